"""What a run leaves behind: callbacks that record, and the files of the results.

    runs/NAME/
      config.json      the settings
      metrics.jsonl    one JSON object a line, as the training goes: "event" is
                       "step" (loss of the batch), "epoch" or "end"
      report.json      the numbers of the table
      curves.png       loss curves and step times
      model.keras      the last variant, trained
      saved_model/     the same weights in stock layers (TensorFlow only)
      tensorboard/     events, a folder for each variant (TensorFlow only)

`metrics.jsonl` and the events grow where they are, so that a run can be
watched. All else is written under another name and renamed when complete.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import platform
import shutil
from typing import Any, TextIO

import keras
import numpy as np
import rich.box
import rich.console
import rich.table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diagconv_tf import files
from diagconv_tf.step_timer import StepSummary
from recipes.config import Config

# In the first steps only rounding tells two exact variants apart; later every
# training, also one repeated in another order of summation, goes its own way.
EARLY_STEPS = 20


@dataclasses.dataclass(frozen=True)
class VariantResult:
    """How one variant was trained.

    Args:
        name: Its lowering, or `"stock"`.
        losses: Training loss of every step (mean over the batch).
        test_accuracies: After each epoch, in [0, 1].
        steps: Times of the steps; see `StepTimer`.
        step_seconds: Every time that counts, for the picture.
    """

    name: str
    losses: tuple[float, ...] = dataclasses.field(repr=False)
    test_accuracies: tuple[float, ...]
    steps: StepSummary
    step_seconds: tuple[float, ...] = dataclasses.field(repr=False)

    @property
    def test_accuracy(self) -> float:
        """After the last epoch, in [0, 1]; no epoch is picked."""
        return self.test_accuracies[-1]

    def loss_differences(self, other: VariantResult) -> np.ndarray:
        """Absolute difference of the two losses at each step."""
        return np.abs(np.subtract(self.losses, other.losses))


@dataclasses.dataclass(frozen=True)
class RunReport:
    """The results of a run; `variants[0]` is what the others are compared with.

    Args:
        config: The experiment.
        folder: Where the files are.
        environment: Backend, versions and machine.
        variants: In the order of training.
    """

    config: Config
    folder: pathlib.Path
    environment: dict[str, str]
    variants: tuple[VariantResult, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One per variant: the numbers of the table, times in seconds."""
        first = self.variants[0]
        rows = []
        for variant in self.variants:
            differences = variant.loss_differences(first)
            rows.append(
                {
                    "variant": variant.name,
                    **dataclasses.asdict(variant.steps),
                    "test_accuracy": variant.test_accuracy,
                    "loss_difference": float(differences.max()),
                    "early_loss_difference": float(differences[:EARLY_STEPS].max()),
                }
            )
        return rows

    def write(self) -> None:
        """Writes `report.json` and `curves.png`."""
        content = {"environment": self.environment, "variants": self.rows()}
        files.write_text(self.folder / "report.json", json.dumps(content, indent=2))
        files.write_aside(self.folder / "curves.png", self.draw)

    def print(self, console: rich.console.Console | None = None) -> None:
        """Prints the table. Where the output is no terminal it is not cut off."""
        if console is None:
            console = rich.console.Console()
            if not console.is_terminal:
                console = rich.console.Console(width=140)
        table = rich.table.Table(
            title=f"{self.config.name}: {self.config.model} on {self.config.dataset}",
            caption=", ".join(self.environment.values()),
            box=rich.box.SIMPLE_HEAD,
        )
        table.add_column("variant")
        for heading in (
            "median step",
            "images/s",
            "first step",
            "test accuracy",
            f"loss difference,\nfirst {EARLY_STEPS} steps",
            "loss difference,\nall steps",
        ):
            table.add_column(heading, justify="right")
        for number, row in enumerate(self.rows()):
            table.add_row(
                row["variant"],
                _text(row["step_median_seconds"], "{:.1f} ms", factor=1e3),
                _text(row["images_per_second"], "{:.0f}"),
                _text(row["first_step_seconds"], "{:.1f} s"),
                _text(row["test_accuracy"], "{:.2f} %", factor=1e2),
                *(
                    _text(row[key] if number else None, "{:.2g}")
                    for key in ("early_loss_difference", "loss_difference")
                ),
            )
        console.print(table)

    def draw(self, path: str) -> None:
        """Draws loss curves, their differences and the step times as a PNG file."""
        # No pyplot: it needs no display, and keeps no figure alive.
        figure = Figure(figsize=(11, 5.5), dpi=150, layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(1.5, 1), height_ratios=(1.7, 1))
        losses = figure.add_subplot(grid[0, 0])
        differences = figure.add_subplot(grid[1, 0], sharex=losses)
        times = figure.add_subplot(grid[:, 1])
        self._draw_losses(losses)
        self._draw_differences(differences)
        self._draw_times(times)
        for axes in (losses, differences, times):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="0.92", linewidth=0.8)
            axes.set_axisbelow(True)
        figure.suptitle(
            f"{self.config.name}: {self.config.model} (width {self.config.width_multiplier:g}) "
            f"on {self.config.dataset}, batch {self.config.batch_size}, "
            f"{self.environment['backend']}",
            fontsize=12,
        )
        figure.savefig(path)

    def _draw_losses(self, axes: Axes) -> None:
        for number, variant in enumerate(self.variants):
            steps = np.arange(1, len(variant.losses) + 1)
            color = _color(number)
            axes.plot(steps, variant.losses, color=color, alpha=0.25, linewidth=0.7)
            window = max(1, len(steps) // 40)
            # Where two variants agree the second hides the first: that is wider.
            is_below = number == 0 and len(self.variants) > 1
            axes.plot(
                *_moving_mean(steps, variant.losses, window),
                color=color,
                alpha=0.5 if is_below else 1.0,
                linewidth=5 if is_below else 1.8,
                marker="o" if len(steps) < 3 else None,
                label=f"{variant.name}, test accuracy {100 * variant.test_accuracy:.2f} %",
            )
        axes.set_yscale("log")
        axes.set_ylabel(f"training loss\n(thick: mean of {window} steps)")
        axes.legend(frameon=False)
        axes.tick_params(labelbottom=False)

    def _draw_differences(self, axes: Axes) -> None:
        first = self.variants[0]
        for number, variant in enumerate(self.variants[1:], start=1):
            differences = variant.loss_differences(first)
            steps = np.arange(1, len(differences) + 1)
            marker = "o" if len(steps) == 1 else None
            # An exact zero has no place on a logarithmic axis.
            visible = np.where(differences > 0, differences, np.nan)
            axes.plot(steps, visible, color=_color(number), linewidth=1, marker=marker)
            if (differences > 0).any():
                axes.set_yscale("log")
        axes.set_ylabel(f"|difference|\nto {first.name}")
        axes.set_xlabel("step")

    def _draw_times(self, axes: Axes) -> None:
        jitter = np.random.default_rng(0)
        for number, variant in enumerate(self.variants):
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
        axes.set_yticks(range(len(self.variants)), [variant.name for variant in self.variants])
        axes.set_ylim(len(self.variants) - 0.5, -0.5)
        axes.set_xlim(left=0, right=self._longest_time())
        axes.set_xlabel("step time in ms (median, p10 to p90)")

    def _longest_time(self) -> float | None:
        """Right end of the axis in ms: a few outliers must not squeeze all else."""
        ends = [1e3 * np.percentile(v.step_seconds, 98) for v in self.variants if v.step_seconds]
        return 1.15 * max(ends) if ends else None


class MetricsLog(keras.callbacks.Callback):
    """Writes a JSON line for each step and epoch, and keeps the losses.

    Args:
        variant: Named in every line.
        file: Lines are added here.
    """

    def __init__(self, variant: str, file: TextIO):
        super().__init__()
        self.variant = variant
        self.file = file
        self.losses: list[float] = []
        self.test_accuracies: list[float] = []

    def write(self, event: str, **values: Any) -> None:
        """Adds one line."""
        line = {"event": event, "variant": self.variant, **values}
        self.file.write(json.dumps(line) + "\n")

    def write_end(self, result: VariantResult) -> None:
        """Adds the line about the whole training."""
        times = dataclasses.asdict(result.steps)
        self.write("end", test_accuracy=result.test_accuracy, **times)
        self.file.flush()

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._sum = 0.0
        self._count = 0

    def on_train_batch_end(self, batch, logs=None):
        # Keras reports the mean over the epoch so far, of equal batches here. Its
        # float32 leaves each loss an error of 1e-7 times the epoch's sum.
        self._count += 1
        total = float(logs["loss"]) * self._count
        self.losses.append(total - self._sum)
        self._sum = total
        self.write("step", epoch=self._epoch, step=len(self.losses), loss=self.losses[-1])

    def on_epoch_end(self, epoch, logs=None):
        values = {name: float(value) for name, value in logs.items()}
        self.test_accuracies.append(values["val_accuracy"])
        learning_rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        self.write("epoch", epoch=epoch, learning_rate=learning_rate, **values)
        self.file.flush()


class StopAfter(keras.callbacks.Callback):
    """Ends a training after so many steps.

    Args:
        steps: At least 1.
    """

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps

    def on_train_begin(self, logs=None):
        self._left = self.steps

    def on_train_batch_end(self, batch, logs=None):
        self._left -= 1
        if not self._left:
            self.model.stop_training = True


class TensorBoardLog(keras.callbacks.Callback):
    """Writes the metrics of each epoch as TensorBoard scalars.

    Keras's own callback calls `tf.summary.scalar`, which fails where the
    package `tensorboard` is not installed, and TensorFlow does not require it
    since 2.21. The events themselves need only TensorFlow.

    Args:
        folder: For the event file of one variant.
    """

    def __init__(self, folder: pathlib.Path):
        super().__init__()
        import tensorflow as tf

        self._tf = tf
        self._writer = tf.summary.create_file_writer(str(folder))
        self._metadata = tf.compat.v1.SummaryMetadata(data_class="DATA_CLASS_SCALAR")
        self._metadata.plugin_data.plugin_name = "scalars"

    def on_epoch_end(self, epoch, logs=None):
        with self._writer.as_default(step=epoch):
            for name, value in logs.items():
                value = self._tf.constant(value, "float32")
                self._tf.summary.write(name, value, metadata=self._metadata)
        self._writer.flush()

    def on_train_end(self, logs=None):
        self._writer.close()


def environment() -> dict[str, str]:
    """Backend, versions and machine, for a person to read."""
    return {
        "backend": f"{keras.backend.backend()} backend",
        "keras": f"Keras {keras.__version__}",
        "machine": f"{platform.machine()} with {os.cpu_count()} cores",
        "python": f"Python {platform.python_version()}",
    }


def new_run_folder(config: Config) -> pathlib.Path:
    """Makes the folder of a run's results, with `config.json` in it.

    It is `output_dir/name`; if that exists `name-2` and so on, or with
    `overwrite` the old one is removed.

    Raises:
        ValueError: If it cannot be made or written, or if what is to be
            overwritten is no folder of results.
    """
    root = pathlib.Path(config.output_dir).expanduser()
    folder = root / config.name
    if config.overwrite and folder.exists():
        # So that a slip in `output_dir` does not remove anything else.
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"Expected --overwrite to replace the results of a run. Received: {folder}, "
                "which has no config.json"
            )
        shutil.rmtree(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(2):
            try:
                folder.mkdir()  # Only one of two runs at the same time succeeds.
                break
            except FileExistsError:
                folder = root / f"{config.name}-{number}"
        files.write_text(folder / "config.json", config.to_json())
    except OSError as error:
        raise ValueError(
            "Expected `output_dir` to be a folder that can be made and written. "
            f"Received: output_dir={config.output_dir} ({error})"
        ) from error
    return folder


def _moving_mean(steps: np.ndarray, values, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of `window` neighbours, and the steps in their middle."""
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    return steps[window - 1 :] - (window - 1) / 2, means


def _color(number: int) -> str:
    # Okabe and Ito: told apart by those who see fewer colours.
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    return palette[number % len(palette)]


def _text(value: float | None, pattern: str, factor: float = 1.0) -> str:
    return "–" if value is None else pattern.format(value * factor)
