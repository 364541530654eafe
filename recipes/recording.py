"""Callbacks that write down how a training goes."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, TextIO

import keras
from absl import logging

from diagconv_tf import StepTimer
from recipes.optimizers import TOP5_ACCURACY
from recipes.run_folder import Progress


class MetricsLog(keras.callbacks.Callback):
    """Writes a JSON line for each step and epoch, and keeps the losses.

    Args:
        variant: Named in every line.
        file: Lines are added here. Where it cannot be written, as on a full
            disk, the training goes on.
        progress: What came before, where the training goes on.
        state: What `state` returned then.
    """

    def __init__(
        self, variant: str, file: TextIO, progress: Progress, state: Mapping[str, float] = {}
    ):
        super().__init__()
        self.variant = variant
        self.file = file
        self.losses = list(progress.losses)
        self.test_accuracies = list(progress.test_accuracies)
        self.test_top5_accuracy = progress.test_top5_accuracy
        self._resumed = state
        self._sum = self._count = 0.0

    def state(self) -> dict[str, float]:
        """Of the epoch so far: where a training goes on within an epoch, so do its means."""
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
        self._count += 1
        total = float(logs["loss"]) * self._count
        self.losses.append(total - self._sum)
        self._sum = total
        self.write("step", epoch=self._epoch, step=len(self.losses), loss=self.losses[-1])

    def on_epoch_end(self, epoch, logs=None):
        values = {name: float(value) for name, value in logs.items()}
        self.test_accuracies.append(values["val_accuracy"])
        self.test_top5_accuracy = values.get(f"val_{TOP5_ACCURACY}")
        rate = current_learning_rate(self.model)
        self.write("epoch", epoch=epoch, step=len(self.losses), learning_rate=rate, **values)
        # A checkpoint of the end of an epoch is that of the beginning of the next.
        self._sum = self._count = 0.0


def current_learning_rate(model: keras.Model) -> float:
    """That of the next update."""
    return float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))


class StopAfter(keras.callbacks.Callback):
    """Ends a training after so many steps.

    Args:
        steps: With 0, and `fit_from`, an epoch that has begun is only ended.
    """

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps

    def on_train_begin(self, logs=None):
        self._left = self.steps
        if not self._left:
            self.model.stop_training = True

    def on_train_batch_end(self, batch, logs=None):
        self._left -= 1
        if not self._left:
            self.model.stop_training = True


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
