"""The picture of a run: losses, their differences, step times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from recipes.results import VariantResult


def draw_curves(title: str, variants: Sequence[VariantResult], path: str) -> None:
    """Draws loss curves, their differences and the step times as a PNG file.

    Args:
        title: Of the picture.
        variants: The first is what the others are compared with.
        path: Of the file.
    """
    # No pyplot: it needs no display, and keeps no figure alive.
    figure = Figure(figsize=(11, 5.5), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.5, 1), height_ratios=(1.7, 1))
    losses = figure.add_subplot(grid[0, 0])
    differences = figure.add_subplot(grid[1, 0], sharex=losses)
    times = figure.add_subplot(grid[:, 1])
    _draw_losses(variants, losses)
    _draw_differences(variants, differences)
    _draw_times(variants, times)
    for axes in (losses, differences, times):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path)


def _draw_losses(variants: Sequence[VariantResult], axes: Axes) -> None:
    for number, variant in enumerate(variants):
        if not variant.losses:
            continue
        steps = np.array(variant.loss_steps)
        color = _color(number)
        axes.plot(steps, variant.losses, color=color, alpha=0.25, linewidth=0.7)
        window = max(1, len(steps) // 40)
        # Where two variants agree the second hides the first: that is wider.
        is_below = number == 0 and len(variants) > 1
        axes.plot(
            _moving_mean(steps, window),
            _moving_mean(variant.losses, window),
            color=color,
            alpha=0.5 if is_below else 1.0,
            linewidth=5 if is_below else 1.8,
            marker="o" if len(steps) < 3 else None,
            label=f"{variant.name}, test accuracy {100 * variant.test_accuracy:.2f} %",
        )
    axes.set_yscale("log")
    axes.set_ylabel("training loss\n(thick: moving mean)")
    axes.legend(frameon=False)
    axes.tick_params(labelbottom=False)


def _draw_differences(variants: Sequence[VariantResult], axes: Axes) -> None:
    first = variants[0]
    for number, variant in enumerate(variants[1:], start=1):
        differences = variant.loss_differences(first)
        steps = np.intersect1d(variant.loss_steps, first.loss_steps)
        marker = "o" if len(steps) == 1 else None
        # An exact zero has no place on a logarithmic axis.
        visible = np.where(differences > 0, differences, np.nan)
        axes.plot(steps, visible, color=_color(number), linewidth=1, marker=marker)
        if (differences > 0).any():
            axes.set_yscale("log")
    axes.set_ylabel(f"|difference|\nto {first.name}")
    axes.set_xlabel("step")


def _draw_times(variants: Sequence[VariantResult], axes: Axes) -> None:
    jitter = np.random.default_rng(0)
    for number, variant in enumerate(variants):
        milliseconds = 1e3 * np.array(variant.step_seconds)
        if not len(milliseconds):
            continue
        heights = number + jitter.uniform(-0.16, 0.16, len(milliseconds))
        axes.scatter(milliseconds, heights, s=9, color=_color(number), alpha=0.3, linewidths=0)
        p10, median, p90 = np.percentile(milliseconds, (10, 50, 90))
        axes.plot((p10, p90), (number, number), color="0.15", linewidth=2)
        axes.plot(median, number, "o", color="white", markeredgecolor="0.15", markersize=8)
        axes.text(
            median,
            number - 0.19,  # Above the points; the axis points down.
            f"{median:.1f} ms",
            ha="center",
            va="bottom",
            fontweight="bold",
        )
    axes.set_yticks(range(len(variants)), [variant.name for variant in variants])
    axes.set_ylim(len(variants) - 0.5, -0.5)
    axes.set_xlim(left=0, right=_longest_time(variants))
    axes.set_xlabel("step time in ms (median, p10 to p90)")


def _longest_time(variants: Sequence[VariantResult]) -> float | None:
    """Right end of the axis in ms: a few outliers must not squeeze all else."""
    ends = [1e3 * np.percentile(v.step_seconds, 98) for v in variants if v.step_seconds]
    return 1.15 * max(ends) if ends else None


def _moving_mean(values: ArrayLike, window: int) -> np.ndarray:
    """Means of `window` neighbours."""
    return np.convolve(values, np.ones(window) / window, mode="valid")


def _color(number: int) -> str:
    # Okabe and Ito: told apart by those who see fewer colours.
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    return palette[number % len(palette)]
