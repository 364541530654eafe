"""`StepTimer`: a Keras callback that times training steps with the clock of timing.py."""

from __future__ import annotations

import array
import dataclasses
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import keras

from diagconv_tf import files, keras_internals
from diagconv_tf.timing import (
    Timings,
    check_whole_number,
    in_milliseconds,
    percentile,
    synchronize,
)


@dataclasses.dataclass(frozen=True)
class StepSummary:
    """What a `StepTimer` has measured; `str()` gives one readable line.

    Times are in seconds, and `None` where unknown. An execution is one call of
    the train function: `steps_per_execution` steps.

    Args:
        backend: Keras backend.
        count: Number of executions behind the times of the step.
        left_out: Number of executions that were timed but not counted.
        step_median_seconds, step_p10_seconds, step_p90_seconds: One step.
        first_step_seconds: First execution, with tracing and compilation.
        images_per_second: Median rate.
        batch_size: Images in a full batch.
        between_steps_median_seconds: Between two executions of an epoch; not
            part of the step.
        step_includes_input: Whether the wait for the input is part of the step
            (TensorFlow, JAX) or of the time between steps (PyTorch).
    """

    backend: str
    count: int
    left_out: int
    step_median_seconds: float | None
    step_p10_seconds: float | None
    step_p90_seconds: float | None
    first_step_seconds: float | None
    images_per_second: float | None
    batch_size: float | None
    between_steps_median_seconds: float | None
    step_includes_input: bool

    def to_json(self) -> str:
        """A JSON object on one line, with the fields of this class."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    def __str__(self) -> str:
        step = (self.step_median_seconds, self.step_p10_seconds, self.step_p90_seconds)
        parts = [f"step {in_milliseconds(*step, self.count)}"]
        if self.images_per_second is not None:
            parts.append(f"{self.images_per_second:.4g} images/s")
        if self.first_step_seconds is not None:
            parts.append(f"first step {self.first_step_seconds:.2f} s")
        if self.between_steps_median_seconds is not None:
            between = 1e3 * self.between_steps_median_seconds
            parts.append(f"between steps {between:.3f} ms")
        return f"{', '.join(parts)}, {self.left_out} left out ({self.backend})"


class StepTimer(keras.callbacks.Callback):
    """Times the training steps of `fit`.

    A step is the time from `on_train_batch_begin` to `on_train_batch_end`, with
    the device idle at both ends, divided by the number of steps that ran. So
    validation, the end of an epoch and other callbacks do not count. Keras
    fetches the batch inside the step on TensorFlow and JAX, and before it on
    PyTorch: there the wait for the input is in `between_steps`, together with
    the other callbacks.

    These executions (calls of the train function) are not counted:

    - the first one, which traces and compiles: see `first_step_seconds`;
    - those that start within the first `warmup` steps;
    - the first one of each epoch: the input pipeline starts, and whatever a
      callback changed is compiled;
    - the first one with a new number of images, which compiles again.

    An execution with a smaller batch counts for `images_per_second`, but not as
    a step. Keras counts the images for its mean loss, and the timer reads that
    number; it also tells how many steps ran at the end of an epoch. Where Keras
    does not count (a model with its own `train_step`), the timer uses
    `batch_size`, and leaves out the last execution of each epoch, because its
    batch may be smaller.

    Put the timer first in `callbacks`: it would time what those before it do in
    `on_train_batch_end`. As every callback with that method, it makes Keras
    wait for each step instead of running ahead of the device.

    A timer describes one `fit`: the next `fit` resets it. What it has measured
    remains when `fit` raises.

    Example:
    ```python
    timer = StepTimer(log_path="steps.jsonl")
    model.fit(dataset, epochs=3, callbacks=[timer])
    print(timer.summary())
    ```

    Args:
        warmup: Integer, at least 0. Steps at the start that are not counted.
        log_path: Path or `None`. A JSON object is added per epoch (`"event":
            "epoch"`) and at the end (`"event": "end"`, all epochs). What is
            there stays. The file is written under another name and renamed:
            a crash never leaves half a line. One timer per file.
        tensorboard_dir: Path or `None`. Scalars `step_timer/...` per epoch, on
            the TensorFlow backend; the others warn.
        batch_size: Integer or `None`: images per step over all devices, where
            Keras does not count them. If neither is known, `images_per_second`
            is `None`.
        clock: Function that returns the time in seconds.

    Raises:
        ValueError: From the constructor, if an argument is out of range or the
            folder of `log_path` or `tensorboard_dir` cannot be created and
            written. A failure to write later warns and lets training go on.
    """

    def __init__(
        self,
        warmup: int = 3,
        log_path: str | os.PathLike | None = None,
        tensorboard_dir: str | os.PathLike | None = None,
        batch_size: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__()
        check_whole_number("warmup", warmup, least=0)
        if batch_size is not None:
            check_whole_number("batch_size", batch_size, least=1)
        if log_path is not None:
            log_path = os.path.realpath(log_path)
            if os.path.isdir(log_path):
                raise ValueError(
                    "Expected `log_path` to be a file, not a folder. "
                    f"Received: log_path={log_path!r}"
                )
            _check_folder("log_path", log_path, os.path.dirname(log_path))
        if tensorboard_dir is not None:
            tensorboard_dir = os.fspath(tensorboard_dir)
            _check_folder("tensorboard_dir", tensorboard_dir, tensorboard_dir)
            if keras.backend.backend() != "tensorflow":
                warnings.warn(
                    "TensorBoard scalars need tensorflow: none will be written "
                    f"with the {keras.backend.backend()} backend. "
                    f"Received: tensorboard_dir={tensorboard_dir!r}",
                    stacklevel=2,
                )
                tensorboard_dir = None
        self.warmup = warmup
        self.log_path = log_path
        self.tensorboard_dir = tensorboard_dir
        self.batch_size = batch_size
        self._clock = clock
        self._first_step_seconds: float | None = None
        self._writer: Any = None
        self._reset()

    @property
    def timings(self) -> Timings:
        """Seconds of one step, over all epochs so far."""
        return Timings(tuple(self._all.steps), self._first_step_seconds)

    @property
    def between_steps(self) -> Timings:
        """Seconds between two executions of an epoch, see the class."""
        return Timings(tuple(self._all.gaps))

    @property
    def first_step_seconds(self) -> float | None:
        """Seconds of the first execution, or `None` before it has ended."""
        return self._first_step_seconds

    @property
    def images_per_second(self) -> float | None:
        """Median over executions of images through seconds, or `None`."""
        return percentile(self._all.rates, 50)

    def summary(self) -> StepSummary:
        """What was found so far, over all epochs."""
        return self._summarize(self._all)

    def on_train_begin(self, logs: Any = None) -> None:
        self._reset()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = _Samples()
        self._waiting: _Sample | None = None
        self._last_end: float | None = None
        self._count_images = _image_counter(keras_internals.callback_model(self))
        counter = self._count_images
        self._images_before = counter.at_epoch_begin() if counter is not None else 0.0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # Work that other callbacks left running is no part of the step.
        synchronize()
        self._first_batch = batch
        self._begin = self._clock()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # Keras has read the logs by now, but the weights may still be updated.
        # `self.model` would make JAX write its state back on every step.
        model = keras_internals.callback_model(self)
        synchronize((keras_internals.training_state(model), logs))
        seconds = self._clock() - self._begin
        if self._first_step_seconds is None:
            self._first_step_seconds = seconds
        sample = self._sample(seconds, announced=batch - self._first_batch + 1)
        self._keep(sample)
        # Read again: the work above is no part of the time between steps.
        self._last_end = self._clock()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        summary = self._summarize(self._epoch)
        self._log({"event": "epoch", "epoch": epoch, **dataclasses.asdict(summary)})
        self._write_scalars(epoch, summary)

    def on_train_end(self, logs: Any = None) -> None:
        self._log({"event": "end", **dataclasses.asdict(self.summary())})
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _reset(self) -> None:
        self._all = _Samples()
        self._first_step_seconds = None
        self._steps_before = 0
        self._shapes_seen: set[tuple[int, float | None]] = set()
        self._full_batch = 0.0

    def _sample(self, seconds: float, announced: int) -> _Sample:
        """What an execution of `announced` steps, or fewer, tells."""
        images = self._images_since()
        shape = (announced, images)
        is_warm = (
            self._last_end is not None
            and self._steps_before >= self.warmup
            and shape in self._shapes_seen
        )
        self._shapes_seen.add(shape)
        self._steps_before += announced
        counted = images is not None
        steps: int | None = announced
        if images is not None:
            self._full_batch = max(self._full_batch, images / announced)
            steps = _full_steps(images, self._full_batch)
        elif self.batch_size is not None:
            images = announced * self.batch_size
        gap = self._begin - self._last_end if self._last_end is not None else None
        return _Sample(
            step=seconds / steps if steps else None,
            rate=images / seconds if images else None,
            gap=gap,
            is_warm=is_warm,
            is_sure=counted,
        )

    def _images_since(self) -> float | None:
        if self._count_images is None:
            return None
        now = self._count_images.now()
        images, self._images_before = now - self._images_before, now
        return images if images > 0 else None  # Another callback reset it.

    def _keep(self, latest: _Sample) -> None:
        sample: _Sample | None = latest
        if not latest.is_sure:
            # Its batch may be the smaller last one of the epoch: it is kept
            # when another one has followed.
            sample, self._waiting = self._waiting, latest
        for samples in (self._all, self._epoch):
            samples.executions += 1
            if sample is not None and sample.is_warm:
                samples.add(sample)

    def _summarize(self, samples: _Samples) -> StepSummary:
        backend = keras.backend.backend()
        return StepSummary(
            backend=backend,
            count=len(samples.steps),
            left_out=samples.executions - len(samples.steps),
            step_median_seconds=percentile(samples.steps, 50),
            step_p10_seconds=percentile(samples.steps, 10),
            step_p90_seconds=percentile(samples.steps, 90),
            first_step_seconds=self._first_step_seconds,
            images_per_second=percentile(samples.rates, 50),
            # Without a counted step, the batches of an execution are unknown.
            batch_size=(samples.steps and self._full_batch) or self.batch_size,
            between_steps_median_seconds=percentile(samples.gaps, 50),
            step_includes_input=backend in ("tensorflow", "jax"),
        )

    def _log(self, entry: dict[str, Any]) -> None:
        if self.log_path is None:
            return
        try:
            files.append_line(self.log_path, json.dumps(entry, allow_nan=False))
        except OSError as error:
            # Hours of training are worth more than a line of its log.
            warnings.warn(f"`StepTimer` could not write {self.log_path}: {error}", stacklevel=2)

    def _write_scalars(self, epoch: int, summary: StepSummary) -> None:
        if self.tensorboard_dir is None:
            return
        import tensorflow as tf

        if self._writer is None:
            self._writer = tf.summary.create_file_writer(self.tensorboard_dir)
        # `tf.summary.scalar` is the same, but needs the tensorboard package.
        metadata = tf.compat.v1.SummaryMetadata(data_class=1)  # DATA_CLASS_SCALAR
        metadata.plugin_data.plugin_name = "scalars"
        with self._writer.as_default(step=epoch):
            for name, value in dataclasses.asdict(summary).items():
                if name.endswith(("_seconds", "_per_second")) and value is not None:
                    value = tf.constant(value, "float32")
                    tf.summary.write(f"step_timer/{name}", value, metadata=metadata)
        self._writer.flush()


class _Sample(NamedTuple):
    """One execution; `None` where it does not tell."""

    step: float | None
    rate: float | None
    gap: float | None
    is_warm: bool
    is_sure: bool


class _Samples:
    """The samples of an epoch or of all; arrays, because trainings are long."""

    def __init__(self) -> None:
        self.executions = 0
        self.steps = array.array("d")
        self.rates = array.array("d")
        self.gaps = array.array("d")

    def add(self, sample: _Sample) -> None:
        for values, value in (
            (self.steps, sample.step),
            (self.rates, sample.rate),
            (self.gaps, sample.gap),
        ):
            if value is not None:
                values.append(value)


@dataclasses.dataclass(frozen=True)
class _ImageCounter:
    """The weight of Keras's mean loss: images of the epoch."""

    model: keras.Model
    count: keras.Variable
    index: int

    def at_epoch_begin(self) -> float:
        """0, unless a training goes on within an epoch."""
        return float(keras.ops.convert_to_numpy(self.count))

    def now(self) -> float:
        """After a step."""
        # Within an epoch JAX keeps the values out of the variables.
        state = keras_internals.training_state(self.model)
        if state is not None:
            return float(state["metrics_variables"][self.index])
        return float(keras.ops.convert_to_numpy(self.count))


def _image_counter(model: Any) -> _ImageCounter | None:
    """A counter of the images that this epoch has had so far.

    It reads the weight of Keras's mean loss: Keras's own `train_step` weighs the
    loss of a batch with its number of images, on every backend and over all
    replicas. None for a model with its own `train_step`, which may do anything.
    """
    if (
        not isinstance(model, keras.Model)
        or type(model).train_step is not keras.Model.train_step
        or "train_step" in vars(model)
    ):
        return None
    means = [m for m in model.metrics if isinstance(m, keras.metrics.Mean)]
    count = next((m.count for m in means if m.name == "loss"), None)
    # Half precision cannot count beyond 2048.
    if count is None or count.dtype not in ("float32", "float64"):
        return None
    index = [variable is count for variable in model.metrics_variables].index(True)
    return _ImageCounter(model, count, index)


def _full_steps(images: float, full_batch: float) -> int | None:
    """Steps that make `images` out of full batches, `None` if none do."""
    steps = round(images / full_batch)
    return steps if steps and steps * full_batch == images else None


def _check_folder(name: str, path: str, folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        # Permission bits do not tell of quotas, and root ignores them: so a file is written.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\n")
    except OSError as error:
        raise ValueError(
            f"Expected `{name}` to lie in a folder that can be written. "
            f"Received: {name}={path!r} ({error})"
        ) from error
