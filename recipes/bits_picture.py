"""The picture of accuracy against bits, of a run whose variants are treatments."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from recipes.results import VariantResult
from recipes.treatments import FLOAT


def bits_text(bits: Sequence[int | None]) -> str:
    """`"1, 2, 6"`: of weights, activations and gradients."""
    return ", ".join("–" if number is None else str(number) for number in bits)


def draw_bits(title: str, variants: Sequence[VariantResult], path: str) -> None:
    """Draws test accuracy against the bits of a product as a PNG file.

    A product of an M-bit weight and a K-bit activation takes M · K products of bits (arXiv
    1606.06160, equation 3). Colours tell the bits of gradients, which count in training only.

    Args:
        title: Of the picture.
        variants: With their bits. Those of a grid without end are left out.
        path: Of the file.
    """
    known = [v for v in variants if None not in v.bits and not math.isnan(v.test_accuracy)]
    # No pyplot: it needs no display, and keeps no figure alive.
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    gradients = sorted({variant.bits[2] for variant in known})
    # Okabe and Ito: told apart by those who see fewer colours.
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    colors = {bits: palette[n % len(palette)] for n, bits in enumerate(reversed(gradients))}
    for bits in gradients:
        own = [variant for variant in known if variant.bits[2] == bits]
        axes.scatter(
            [_product(variant) for variant in own],
            [100 * variant.test_accuracy for variant in own],
            s=55,
            color=colors[bits],
            label="float" if bits == FLOAT[2] else f"{bits} bits",
            zorder=3,
        )
    products = sorted({_product(variant) for variant in known})
    for product in products:
        own = sorted(
            (variant for variant in known if _product(variant) == product),
            key=lambda variant: -variant.test_accuracy,
        )
        # Names of one column stand below one another, so that none hides another.
        text = "\n".join(
            f"{v.name} ({100 * v.test_accuracy:.2f})" if len(own) > 1 else v.name for v in own
        )
        axes.annotate(
            text,
            (product, 100 * own[0].test_accuracy),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(products, [str(product) for product in products])
    axes.set_xlabel("bits of a weight × bits of an activation")
    axes.set_ylabel("test accuracy in %")
    axes.margins(x=0.12, y=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(title="gradients", frameon=False)
    axes.set_title(title, fontsize=10)
    figure.savefig(path)


def _product(variant: VariantResult) -> int:
    weights, activations, _ = variant.bits
    assert weights is not None, "left out"
    assert activations is not None, "treatments round weights, or quantize activations"
    return weights * activations
