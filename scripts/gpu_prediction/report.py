"""Tables and pictures of predictions. All say that nothing was run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import bench_common
import bench_device
import bench_roofline
from rich.table import Table

from gpu_prediction.bounds import BANDWIDTH_SHARE
from gpu_prediction.cards import Card
from gpu_prediction.predictor import flops_per_second
from gpu_prediction.rows import PassRow, StepRow

_CAPTION = (
    "Predicted from compiled code; nothing was run. bytes: over the least that the pass must "
    "move. A kernel takes its bytes or its instructions, whichever takes longer; of cuDNN and GEMM "
    "calls only bytes and arithmetic are known."
)


def pass_table(rows: Sequence[PassRow]) -> Table:
    table = Table(title="Least times of single passes", caption=_CAPTION)
    for column in ("card", "precision", "shape", "pass", "lowering"):
        table.add_column(column)
    for column in (
        "kernels",
        "heavy",
        "cuDNN, GEMM",
        "bytes",
        "memory µs",
        "issue µs",
        "least µs",
        "registers",
        "spilled B",
        "loads, B x n",
    ):
        table.add_column(column, justify="right")
    group = None
    for row in rows:
        precision = row.precision + ("" if row.layout == "channels_last" else f" {row.layout}")
        key = (row.card, precision, row.shape, row.pass_name)
        if group not in (None, key):
            table.add_section()
        group = key
        if row.error is not None:
            table.add_row(*key, row.lowering, "failed")
            continue
        table.add_row(
            *key,
            row.lowering,
            str(row.kernels),
            str(row.heavy_kernels),
            str(sum(row.calls.values()) or ""),
            f"{row.bytes_over_least:.2f}",
            _microseconds(row.memory_seconds),
            _microseconds(row.issue_seconds),
            _microseconds(row.least_seconds),
            "" if row.registers is None else str(row.registers),
            "" if row.spilled_bytes is None else str(row.spilled_bytes),
            " ".join(f"{width}x{count}" for width, count in row.loads.items()),
        )
    return table


@dataclasses.dataclass(frozen=True)
class ModelPass:
    """All depthwise layers of a model together, for one lowering and pass."""

    card: str
    precision: str
    layout: str
    model: str
    batch: int
    pass_name: str
    lowering: str
    layers: int
    kernels: int
    bytes_over_least: float
    least_seconds: float


def by_model(rows: Sequence[PassRow], layers: Mapping[str, int]) -> list[ModelPass]:
    """Sums over the depthwise layers of each model whose shapes were all compiled.

    Args:
        rows: with `used_by`.
        layers: model, as in `used_by` → how many depthwise layers it has.
    """
    sums = []
    keys = dict.fromkeys(
        (row.card, row.precision, row.layout, model, row.batch, row.pass_name, row.lowering)
        for row in rows
        for model in row.used_by
    )
    for key in keys:
        card, precision, layout, model, batch, pass_name, lowering = key
        some = [
            row
            for row in rows
            if model in row.used_by
            and (row.card, row.precision, row.layout, row.batch) == (card, precision, layout, batch)
            and (row.pass_name, row.lowering) == (pass_name, lowering)
        ]
        counts = [row.used_by[model] for row in some]
        if sum(counts) != layers[model] or any(row.error is not None for row in some):
            continue
        pairs = list(zip(some, counts, strict=True))
        sums.append(
            ModelPass(
                *key,
                layers=sum(counts),
                kernels=sum(row.kernels * n for row, n in pairs),
                bytes_over_least=sum(row.moved_bytes * n for row, n in pairs)
                / sum(row.least_bytes * n for row, n in pairs),
                least_seconds=sum((row.least_seconds or 0) * n for row, n in pairs),
            )
        )
    return sums


def model_table(sums: Sequence[ModelPass]) -> Table:
    table = Table(
        title="Sums over the depthwise layers of a model, each pass alone", caption=_CAPTION
    )
    for column in ("card", "precision", "model", "lowering", "pass"):
        table.add_column(column)
    for column in ("layers", "kernels", "bytes", "least µs"):
        table.add_column(column, justify="right")
    for one in sums:
        table.add_row(
            one.card,
            one.precision + ("" if one.layout == "channels_last" else f" {one.layout}"),
            f"{one.model}, batch {one.batch}",
            one.lowering,
            one.pass_name,
            str(one.layers),
            str(one.kernels),
            f"{one.bytes_over_least:.2f}",
            _microseconds(one.least_seconds),
        )
    return table


def step_table(rows: Sequence[StepRow]) -> Table:
    table = Table(title="Least times of whole training steps", caption=_CAPTION)
    for column in ("card", "model", "precision", "variant"):
        table.add_column(column)
    for column in (
        "layers",
        "kernels",
        "cuDNN, GEMM",
        "GB",
        "memory ms",
        "least ms",
        "/ stock",
        "in cuDNN, GEMM ms",
        "spilling",
        "memory GB",
    ):
        table.add_column(column, justify="right")
    group = None
    for row in rows:
        key = (row.card, f"{row.model}@{row.size}, batch {row.batch}", row.precision)
        if group not in (None, key):
            table.add_section()
        group = key
        if row.error is not None:
            table.add_row(*key, row.variant, "failed")
            continue
        libraries = [row.shares[name].least_seconds for name in ("cudnn", "gemm")]
        table.add_row(
            *key,
            row.variant,
            f"{row.rewritten}/{row.layers}",
            str(row.kernels),
            str(sum(row.calls.values()) or ""),
            f"{row.moved_bytes / 1e9:.2f}",
            _milliseconds(row.memory_seconds),
            _milliseconds(row.least_seconds),
            "" if row.over_stock is None else f"{row.over_stock:.3f}",
            _milliseconds(sum(libraries)),
            "" if row.spilling_kernels is None else str(row.spilling_kernels),
            f"{row.program_bytes / 1e9:.1f}",
        )
    return table


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.1f}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.2f}"


# Pictures


@dataclasses.dataclass(frozen=True)
class _Point:
    """A `PassRow` as the roofline of the benchmarks wants a measured row."""

    row: PassRow

    @property
    def median(self) -> float | None:
        return self.row.least_seconds

    @property
    def flops_per_second(self) -> float:
        return self.row.flops / (self.row.least_seconds or 1.0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.row, name)


def draw_passes(folder: str, rows: Sequence[PassRow], cards: dict[str, Card]) -> None:
    """A roofline with predictions for each card, precision and layout."""
    for (name, precision, layout), some in bench_common.grouped(
        rows, lambda row: (row.card, row.precision, row.layout)
    ):
        points = [_Point(row) for row in some if row.error is None]
        if not points:
            continue
        card = cards[name]
        ceilings = bench_device.Ceilings(
            BANDWIDTH_SHARE * card.bytes_per_second,
            {precision: flops_per_second(card, precision)},
        )
        title = f"Predicted for {card.name}, nothing was run: {precision}, {layout}"
        figure = bench_roofline.draw_roofline(points, ceilings, title)
        figure.axes[0].set_ylabel("needed GFLOPs per second, at most (predicted)")
        bench_common.save_figure(figure, folder, f"predicted_{name}_{precision}_{layout}")


def draw_steps(folder: str, rows: Sequence[StepRow], cards: dict[str, Card]) -> None:
    """For each card and precision, bars of the least times of all models."""
    from matplotlib.patches import Patch

    for (name, precision), some in bench_common.grouped(
        rows, lambda row: (row.card, row.precision)
    ):
        some = [row for row in some if row.error is None]
        if not some:
            continue
        models = list(dict.fromkeys(row.model for row in some))
        figure = bench_common.new_figure(figsize=(2 + 3 * len(models), 4.5))
        axes = figure.subplots()
        variants = list(dict.fromkeys(row.variant for row in some))
        width = 0.8 / len(variants)
        for row in some:
            place = models.index(row.model) - 0.4 + (variants.index(row.variant) + 0.5) * width
            libraries = 1e3 * sum(row.shares[k].least_seconds for k in ("cudnn", "gemm"))
            color = f"C{variants.index(row.variant)}"
            axes.bar(place, libraries, width, color=color, alpha=0.4)
            own = 1e3 * row.shares["xla"].least_seconds
            axes.bar(place, own, width, bottom=libraries, color=color)
        legend = [Patch(color=f"C{index}", label=name) for index, name in enumerate(variants)]
        legend.append(Patch(color="grey", alpha=0.4, label="of which cuDNN and GEMM, at best"))
        axes.set_xticks(range(len(models)), models)
        axes.set_ylabel("least milliseconds of a training step (predicted)")
        axes.set_title(
            f"Predicted for {cards[name].name}, nothing was run: {precision}, "
            f"batch {some[0].batch}, {some[0].size}x{some[0].size}",
            fontsize="medium",
        )
        axes.legend(handles=legend, fontsize="small")
        bench_common.save_figure(figure, folder, f"predicted_steps_{name}_{precision}")
