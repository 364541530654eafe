"""Callbacks that write down how a training goes."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import keras
from absl import logging

from diagconv_tf import StepTimer
from recipes.optimizers import TOP5_ACCURACY
from recipes.run_folder import Progress

#: Points of a loss curve, and step times, that are kept for report and picture.
MOST_POINTS = 10_000


class MetricsLog(keras.callbacks.Callback):
    """Writes a JSON line for each group of steps and each epoch, and keeps the losses.

    The loss of a group, of which `fit_from` tells, is the mean over its steps.

    Args:
        variant: Named in every line.
        file: Lines are added here. Where it cannot be written, as on a full
            disk, the training goes on.
        progress: What came before, where the training goes on.
        state: What `state` returned then.

    Attributes:
        losses: Step → mean loss of this step and those since the one before.
        test_accuracies: After each epoch.
    """

    def __init__(
        self, variant: str, file: TextIO, progress: Progress, state: Mapping[str, float] = {}
    ):
        super().__init__()
        self.variant = variant
        self.file = file
        self.losses = dict(progress.losses)
        self.test_accuracies = list(progress.test_accuracies)
        self.test_top5_accuracy = progress.test_top5_accuracy
        self._resumed = state
        self._sum = self._count = 0.0

    def state(self) -> dict[str, float]:
        """Of the epoch, up to the last line: where a training goes on, so does the next group."""
        return {"sum": self._sum, "count": self._count}

    def write(self, event: str, **values: Any) -> None:
        """Adds one line."""
        line = {"event": event, "variant": self.variant, **values}
        try:
            self.file.write(json.dumps(line) + "\n")
            if event != "step":
                self.file.flush()
        except OSError as error:
            logging.log_first_n(logging.WARNING, "Metrics are not written: %s", 1, error)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._sum = self._resumed.get("sum", 0.0)
        self._count = self._resumed.get("count", 0)
        self._resumed = {}

    def on_train_batch_end(self, batch, logs=None):
        # Keras reports the mean over the epoch so far, of equal batches here. Its
        # float32 leaves each loss an error of 1e-7 times the epoch's sum.
        count = batch + 1
        total = float(logs["loss"]) * count
        loss = (total - self._sum) / (count - self._count)
        self._sum, self._count = total, count
        step = self._step(count)
        self.losses[step] = loss
        self.write("step", epoch=self._epoch, step=step, loss=loss)

    def on_epoch_end(self, epoch, logs=None):
        values = {name: float(value) for name, value in logs.items()}
        self.test_accuracies.append(values["val_accuracy"])
        self.test_top5_accuracy = values.get(f"val_{TOP5_ACCURACY}")
        rate = current_learning_rate(self.model)
        step = self._step(self._count)
        self.write("epoch", epoch=epoch, step=step, learning_rate=rate, **values)
        # A checkpoint of the end of an epoch is that of the beginning of the next.
        self._sum = self._count = 0.0

    def _step(self, count: float) -> int:
        return self._epoch * self.params["steps"] + int(count)


def thinned_losses(losses: Mapping[int, float], keep: int) -> dict[int, float]:
    """Loss curves of no more than `MOST_POINTS`, so that report and picture stay small.

    Args:
        losses: Step → mean loss of the steps since the one before.
        keep: So many of the first points stay as they are.

    Returns:
        The same, or neighbours joined to their mean.
    """
    points = list(losses.items())
    first, rest = points[:keep], points[keep:]
    size = -(-len(rest) // MOST_POINTS)
    groups = (rest[start : start + size] for start in range(0, len(rest), size or 1))
    joined = {group[-1][0]: sum(loss for _, loss in group) / len(group) for group in groups}
    return dict(first) | joined


def thinned(values: Sequence[float]) -> tuple[float, ...]:
    """No more than `MOST_POINTS` of them, evenly spaced."""
    return tuple(values[:: -(-len(values) // MOST_POINTS) or 1])


def current_learning_rate(model: keras.Model) -> float:
    """That of the next update."""
    return float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))


class TensorBoardLog(keras.callbacks.Callback):
    """Writes metrics, learning rate and step time of each epoch as TensorBoard scalars.

    Keras's own callback calls `tf.summary.scalar`, which fails where the
    package `tensorboard` is not installed, and TensorFlow does not require it
    since 2.21. The events themselves need only TensorFlow.

    Args:
        folder: For the event files of one variant.
        timer: Of the same training, before this one among the callbacks.
    """

    def __init__(self, folder: pathlib.Path, timer: StepTimer):
        super().__init__()
        import tensorflow as tf

        self.folder = folder
        self.timer = timer
        self._tf = tf
        self._metadata = tf.compat.v1.SummaryMetadata(data_class="DATA_CLASS_SCALAR")
        self._metadata.plugin_data.plugin_name = "scalars"

    def on_train_begin(self, logs=None):
        self._writer = self._tf.summary.create_file_writer(str(self.folder))

    def on_epoch_end(self, epoch, logs=None):
        values = {**logs, "learning_rate": current_learning_rate(self.model)}
        steps = self.timer.summary()
        values |= {
            name: value
            for name, value in (
                ("step_seconds", steps.step_median_seconds),
                ("images_per_second", steps.images_per_second),
            )
            if value is not None
        }
        try:
            with self._writer.as_default(step=epoch):
                for name, value in values.items():
                    value = self._tf.constant(value, "float32")
                    self._tf.summary.write(name, value, metadata=self._metadata)
            self._writer.flush()
        except (OSError, self._tf.errors.OpError) as error:
            logging.log_first_n(logging.WARNING, "Events are not written: %s", 1, error)

    def on_train_end(self, logs=None):
        self._writer.close()
