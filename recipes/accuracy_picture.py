"""Pictures of accuracy against bits, or kept elements, of a run with treatments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from recipes.results import VariantResult


def bits_text(bits: Sequence[int | None]) -> str:
    """`"1, 2, 6"`: of weights, activations and gradients."""
    return ", ".join("–" if number is None else str(number) for number in bits)


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a picture shows accuracy against.

    Attributes:
        amount: Of a variant: orders the groups; infinity comes last.
        rank: Of a variant: its order within its group. Equal ones keep theirs.
        text: Of an amount: what stands above the group.
        explanation: What the texts say.
    """

    amount: Callable[[VariantResult], float]
    rank: Callable[[VariantResult], float]
    text: Callable[[float], str]
    explanation: str


def _product(variant: VariantResult) -> float:
    weights, activations = variant.bits[:2]
    return math.inf if weights is None or activations is None else weights * activations


def _kept(variant: VariantResult) -> float:
    return math.inf if variant.kept is None else variant.kept


#: A product of an M-bit weight and a K-bit activation takes M · K products of bits (arXiv
#: 1606.06160, equation 3): these order the variants, and then the bits of gradients, which count
#: in training only. A grid without end comes last.
BITS = Scale(
    _product,
    lambda variant: variant.bits[2] or 0,
    lambda product: "–" if product == math.inf else f"{product:g}",
    "bits of a weight × bits of an activation",
)

KEPT = Scale(
    _kept,
    lambda _: 0,
    lambda kept: "all" if kept == math.inf else f"{kept:g}" if kept >= 1 else f"{100 * kept:g} %",
    "elements of an output gradient that are kept",
)


def draw_accuracies(title: str, variants: Sequence[VariantResult], scale: Scale, path: str) -> None:
    """Draws test accuracies in groups, that of the smallest amount first, as a PNG file.

    Args:
        title: Of the picture.
        variants: A line shows the accuracy of the first.
        scale: What makes the groups.
        path: Of the file.
    """
    known = [variant for variant in variants if not math.isnan(variant.test_accuracy)]
    ordered = sorted(known, key=lambda variant: (scale.amount(variant), scale.rank(variant)))
    # No pyplot: it needs no display, and keeps no figure alive.
    figure = Figure(figsize=(2.5 + 0.75 * len(ordered), 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if known:
        first = 100 * known[0].test_accuracy
        axes.axhline(first, color="0.6", linewidth=1, linestyle="--", label=known[0].name)
        axes.legend(frameon=False)
    amounts = [scale.amount(variant) for variant in ordered]
    for amount in dict.fromkeys(amounts):
        places = [place for place, other in enumerate(amounts) if other == amount]
        if places[0]:
            axes.axvline(places[0] - 0.5, color="0.85", linewidth=0.8)
        axes.text(
            (places[0] + places[-1]) / 2,
            1.01,
            scale.text(amount),
            transform=axes.get_xaxis_transform(),
            ha="center",
        )
    accuracies = [100 * variant.test_accuracy for variant in ordered]
    axes.plot(accuracies, "o", color="#0072B2", markersize=8)
    for place, accuracy in enumerate(accuracies):
        axes.annotate(
            f"{accuracy:.2f}",
            (place, accuracy),
            xytext=(0, -8),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
        )
    axes.set_xticks(
        range(len(ordered)),
        [variant.name for variant in ordered],
        rotation=40,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_xlim(-0.5, len(ordered) - 0.5)
    axes.set_ylabel("test accuracy in %")
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.suptitle(f"{title}\nabove: {scale.explanation}", fontsize=10)
    figure.savefig(path)
