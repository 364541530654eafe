"""Pictures of single convolutions: bars, and a roofline plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import bench_common
import bench_device
import keras
from bench_rows import Row

from diagconv_tf.spec import PASSES


def draw_pictures(folder: str, rows: Sequence[Row], ceilings: bench_device.Ceilings) -> None:
    """For each precision, layout and way of compiling: bars, and a roofline plot."""
    for key, some in bench_common.grouped(
        rows, lambda row: (row.precision, row.layout, row.compiled)
    ):
        precision, layout, compiled = key
        if any(row.median for row in some):
            name = f"{precision}_{layout}" + ("_compiled" if compiled else "")
            batches = " and ".join(str(batch) for batch in dict.fromkeys(r.batch for r in some))
            title = name.replace("_", " ") + f", {keras.backend.backend()}, batch {batches}"
            bench_common.save_figure(draw_bars(some, title), folder, f"bars_{name}")
            picture = draw_roofline(some, ceilings, title)
            bench_common.save_figure(picture, folder, f"roofline_{name}")


def draw_bars(rows: Sequence[Row], title: str) -> Any:
    """One plot a shape: bars for passes and lowerings, and the limit of each pass."""
    shapes = list(bench_common.grouped(rows, lambda row: row.shape))
    columns = min(3, len(shapes))
    lines = math.ceil(len(shapes) / columns)
    figure = bench_common.new_figure(figsize=(5 * columns, 0.7 + 3 * lines))
    plots = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in plots[len(shapes) :]:
        axes.remove()
    for axes, (shape, some) in zip(plots, shapes, strict=False):
        passes = list(dict.fromkeys(row.pass_name for row in some))
        series = {
            lowering: {r.pass_name: (r.median, r.p10, r.p90) for r in mine if r.median}
            for lowering, mine in bench_common.grouped(some, lambda row: row.lowering)
        }
        bench_common.draw_bars(axes, passes, series)
        for place, pass_name in enumerate(passes):
            limit = next(row.limit for row in some if row.pass_name == pass_name)
            axes.plot([place - 0.45, place + 0.45], [1e3 * limit] * 2, "k--", linewidth=1)
        axes.set_title(shape, fontsize="medium")
        axes.set_xticks(range(len(passes)), [name.replace("_", "\n") for name in passes])
    axes = figure.axes[0]
    axes.plot([], [], "k--", linewidth=1, label="limit")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(title)
    return figure


def draw_roofline(rows: Sequence[Row], ceilings: bench_device.Ceilings, title: str) -> Any:
    """FLOPs per byte against FLOPs per second; only the FLOPs that are needed count."""
    figure = bench_common.new_figure(figsize=(8, 5.5))
    axes = figure.subplots()
    rate = ceilings.flops_per_second[rows[0].precision]
    ridge = rate / ceilings.bytes_per_second
    intensities = [row.flops / row.least_bytes for row in rows]
    ends = [min(intensities) / 2, max(2 * max(intensities), 4 * ridge)]
    roof = [ends[0], ridge, ends[1]]
    axes.plot(
        roof,
        [min(rate, x * ceilings.bytes_per_second) / 1e9 for x in roof],
        "k-",
        label=f"roof: {ceilings.bytes_per_second / 1e9:,.1f} GB/s, {rate / 1e9:,.0f} GFLOP/s",
    )
    markers = dict(zip(PASSES, "o^s", strict=True))
    for index, (lowering, some) in enumerate(bench_common.grouped(rows, lambda row: row.lowering)):
        axes.plot([], [], "o", color=f"C{index}", label=lowering)
        for row in some:
            if row.median:
                axes.plot(
                    row.flops / row.least_bytes,
                    row.flops_per_second / 1e9,
                    markers[row.pass_name],
                    color=f"C{index}",
                    markersize=5,
                    alpha=0.7,
                )
    for pass_name in dict.fromkeys(row.pass_name for row in rows):
        axes.plot([], [], markers[pass_name], color="grey", label=pass_name.replace("_", " "))
    axes.set(xscale="log", yscale="log", title=title)
    axes.set_xlabel("needed FLOPs per byte that must be moved")
    axes.set_ylabel("needed GFLOPs per second")
    axes.legend(fontsize="small")
    return figure
