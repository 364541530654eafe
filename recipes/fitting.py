"""`model.fit` that survives: it saves, goes on in mid-epoch, and stops cleanly.

`fit` itself can only begin with an epoch. `fit_from` does the rest of a broken
epoch in one `fit` and the remaining epochs in another, and hides the seam: for
callbacks, metrics, moving averages of the weights and the progress bar it is
one training.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from absl import logging

from diagconv_tf import keras_internals
from recipes.averaging import finalize_averages
from recipes.checkpoints import (
    Checkpoint,
    Checkpoints,
    Snapshot,
    generator_states,
    metrics_values,
    set_generator_states,
    set_metrics,
)
from recipes.interruption import Interruption, LossCheck, TrainingInterrupted


def fit_from(
    model: keras.Model,
    start: Checkpoint | None,
    make_dataset: Callable[[int], Any],
    *,
    steps_per_epoch: int,
    epochs: int,
    validation_data: Any = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    checkpoints: Checkpoints | None = None,
    save_every: int = 1,
    record: Callable[[], dict[str, Any]] = dict,
    interruption: Interruption | None = None,
    log_every: int = 1,
    log_first: int = 0,
    tell_after: Callable[[int], bool] | None = None,
    max_steps: int | None = None,
    verbose: int | str = "auto",
) -> keras.callbacks.History:
    """Trains `model` from where it stands to the end.

    On one CPU device the result is bit for bit that of a training that was
    never interrupted.

    Keras reads the loss after every step for the callbacks, and so waits for
    the device. Here steps come in groups of `log_every`: callbacks are told of
    the begin of a group and of its end, as of one call that runs several steps
    (Keras's `steps_per_execution`), and between the two the host runs ahead.

    Args:
        model: compiled, with the state of `start`.
        start: from `Checkpoints.restore`; `None` starts from the beginning.
        make_dataset: of a step: the batches from this step on to the end of
            the last epoch, as a `tf.data.Dataset` or a generator.
        steps_per_epoch: batches; a multiple of the model's
            `steps_per_execution`.
        epochs: in all, those before `start` included.
        validation_data: as in `fit`; it is gone through after each epoch.
        callbacks: as in `fit`, told of groups of steps. Where the training
            goes on within an epoch, the first batch they are told of has its
            number in that epoch, and the means in the logs are over the whole
            epoch.
        checkpoints: where to save; `None` does not.
        save_every: epochs. The last one is saved as well.
        record: gives what shall be in a checkpoint beside the model, such as
            the state of callbacks. It is called when all of them have seen the
            step or the epoch. JSON must be able to hold it.
        interruption: entered; `None` notices no signals.
        log_every: steps in a group, at least 1. At its end the loss is looked
            at. Groups end with multiples of this number and with epochs.
        log_first: so many of the first steps are groups of their own.
        tell_after: of a number of steps of an epoch: whether a group ends with
            them, because a callback has something to do then.
        max_steps: the training ends after so many, those before `start`
            included. With no more than these it only ends the epoch.
        verbose: as in `fit`.

    Returns:
        The history from `start` on.

    Raises:
        ValueError: if `start` does not fit the other arguments, or if the data
            ends too early.
        TrainingInterrupted: after a signal, when the last step is saved.
        NonFiniteLossError: if the loss, or a weight that is to be saved, is NaN
            or infinite. Nothing is saved.
    """
    start = start or Checkpoint()
    done = start.step - start.epochs * steps_per_epoch
    _check_arguments(start, done, steps_per_epoch, model.steps_per_execution)
    watch = _Watch(
        model,
        callbacks,
        start,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        checkpoints=checkpoints,
        save_every=save_every,
        record=record,
        interruption=interruption,
        log_every=log_every,
        log_first=log_first,
        tell_after=tell_after,
        max_steps=max_steps,
        verbose=verbose,
    )
    shared = {
        "validation_data": validation_data,
        "callbacks": watch,
        "shuffle": False,
        "verbose": verbose,
    }
    model.stop_training = False
    epoch = start.epochs
    with _without_final_values(model.optimizer):
        watch.stop_if_asked()
        if epoch < epochs:
            _build(model, make_dataset(start.step))
        if done and epoch < epochs:
            watch.on_train_begin()
            # A callback may want no further step, but the test after the last.
            if done < steps_per_epoch and not model.stop_training:
                model.fit(
                    make_dataset(start.step),
                    steps_per_epoch=steps_per_epoch - done,
                    initial_epoch=epoch,
                    epochs=epoch + 1,
                    **shared,
                )
            else:
                _end_epoch(model, epoch, watch, validation_data, verbose)
            epoch += 1
        if epoch < epochs and not model.stop_training:
            watch.keep_generators()
            model.fit(
                make_dataset(epoch * steps_per_epoch),
                steps_per_epoch=steps_per_epoch,
                initial_epoch=epoch,
                epochs=epochs,
                **shared,
            )
    # `fit` would do that for the weights alone.
    finalize_averages(model)
    watch.end()
    return model.history


class _Watch(keras.callbacks.CallbackList):
    """The callbacks; after them, it checks the loss, saves, and looks for signals.

    Callbacks are told of groups of steps, signals are looked for in each.

    It is the list and not one more callback in it, because all others must have
    seen a step before it is saved, and because they are to be told of one
    training where there are two `fit`s.
    """

    def __init__(
        self,
        model: keras.Model,
        callbacks: Sequence[keras.callbacks.Callback],
        start: Checkpoint,
        *,
        steps_per_epoch: int,
        epochs: int,
        checkpoints: Checkpoints | None,
        save_every: int,
        record: Callable[[], dict[str, Any]],
        interruption: Interruption | None,
        log_every: int,
        log_first: int,
        tell_after: Callable[[int], bool] | None,
        max_steps: int | None,
        verbose: int | str,
    ) -> None:
        super().__init__(
            list(callbacks),
            add_history=True,
            add_progbar=verbose != 0,
            model=model,
            verbose=verbose,
            epochs=epochs,
            steps=steps_per_epoch,
        )
        self._start = start
        self._steps_per_epoch = steps_per_epoch
        self._epochs = epochs
        self._checkpoints = checkpoints
        self._save_every = save_every
        self._record = record
        self._interruption = interruption
        self._log_every = log_every
        self._log_first = log_first
        self._tell_after = tell_after or (lambda steps: False)
        self._max_steps = math.inf if max_steps is None else max_steps
        self._in_group = False
        self._losses = LossCheck()
        self.keep_generators()
        self._before_test: Snapshot | None = None
        self._position = (start.step, start.epochs)
        self._begun = False
        self._end_logs: dict[str, Any] | None = None

    def on_train_begin(self, logs=None):
        if not self._begun:
            self._begun = True
            super().on_train_begin(logs)
            self._stop_at_most(self._start.step)

    def on_train_end(self, logs=None):
        # Of one `fit`, perhaps not the last.
        self._end_logs = logs

    def end(self) -> None:
        """Tells the callbacks that the training has ended."""
        self.on_train_begin()
        super().on_train_end(self._end_logs)

    def on_epoch_begin(self, epoch, logs=None):
        first_step = epoch * self._steps_per_epoch
        self._offset = 0
        self._in_group = False
        if epoch == self._start.epochs and self._start.step > first_step:
            self._offset = self._start.step - first_step
            # Keras has just reset them.
            set_metrics(keras_internals.callback_model(self), self._start.metrics)
        super().on_epoch_begin(epoch, logs)

    def keep_generators(self) -> None:
        """Makes the next step or validation draw what it would draw now.

        PyTorch's data loaders draw from the same generator as its dropout, each
        time they are begun; and here they are begun more often.
        """
        self._generators = generator_states()

    def _put_generators_back(self) -> None:
        set_generator_states(self._generators)
        self._generators = []

    def on_train_batch_begin(self, batch, logs=None):
        self._put_generators_back()
        if not self._in_group:
            self._in_group = True
            super().on_train_batch_begin(self._offset + batch, logs)

    def on_train_batch_end(self, batch, logs=None):
        before, epochs = self._position
        step = epochs * self._steps_per_epoch + self._offset + batch + 1
        ends = self._ends_group(before, step)
        if ends:
            self._in_group = False
            super().on_train_batch_end(self._offset + batch, logs)
            self._stop_at_most(step)
        self._position = (step, epochs)
        asked = self._asked(step)
        if asked or ends:
            self._check_loss(logs)
        if asked:
            self.stop_if_asked(self._snapshot(metrics_values(self.model)))
        elif ends and self._is_stopped():
            # The training ends here; with other settings it may go on some day.
            self._save(self._snapshot(metrics_values(self.model)))

    def _ends_group(self, before: int, step: int) -> bool:
        """Whether callbacks are told of `step`, which came after step `before`."""
        return (
            step <= self._log_first
            or step // self._log_every > before // self._log_every
            or step % self._steps_per_epoch == 0
            or step >= self._max_steps
            or self._tell_after(step % self._steps_per_epoch)
        )

    def _stop_at_most(self, step: int) -> None:
        if step >= self._max_steps:
            keras_internals.callback_model(self).stop_training = True

    def on_test_begin(self, logs=None):
        self._put_generators_back()
        # The validation may be interrupted, when callbacks have put other
        # values into the model (`SwapAverages`) and the metrics are its own.
        self._before_test = None
        if self._interruption is not None:
            self._before_test = self._snapshot(metrics_values(self.model))
        super().on_test_begin(logs)

    def on_test_batch_end(self, batch, logs=None):
        super().on_test_batch_end(batch, logs)
        self.stop_if_asked(self._before_test)

    def on_epoch_end(self, epoch, logs=None):
        self._check_loss(logs)
        super().on_epoch_end(epoch, logs)
        step = self._position[0]
        missing = (epoch + 1) * self._steps_per_epoch - step
        if missing and not self._is_stopped():
            raise ValueError(
                f"Expected data for {self._steps_per_epoch} steps in epoch {epoch + 1}. Received: "
                f"{missing} fewer"
            )
        if missing:
            return  # A callback has stopped the training, whose last step is saved.
        self._position = (step, epoch + 1)
        is_last = epoch + 1 == self._epochs or self._is_stopped()
        if self._asked() or is_last or (epoch + 1) % self._save_every == 0:
            self._save(self._snapshot())
        self.stop_if_asked()

    def _is_stopped(self) -> bool:
        return keras_internals.callback_model(self).stop_training

    def _asked(self, step: int | None = None) -> bool:
        return self._interruption is not None and self._interruption.asked(step)

    def stop_if_asked(self, snapshot: Snapshot | None = None) -> None:
        """After a signal: saves what it is given, and raises `TrainingInterrupted`."""
        if not self._asked():
            return
        self._save(snapshot)
        paths = self._checkpoints.paths() if self._checkpoints else []
        raise TrainingInterrupted(
            self._interruption.signal_name, self._position[0], paths[-1] if paths else None
        )

    def _check_loss(self, logs: dict[str, Any] | None) -> None:
        step, epochs = self._position
        if not self._losses.passes(logs, step):
            raise self._losses.error(self.model, epochs)

    def _snapshot(self, metrics: tuple[Any, ...] = ()) -> Snapshot | None:
        if self._checkpoints is None:
            return None
        keras_internals.flush_callbacks(self)
        step, epochs = self._position
        # On JAX, `self.model` brings the variables up to date.
        weights = self.model.trainable_variables
        if not all(np.isfinite(keras.ops.convert_to_numpy(weight)).all() for weight in weights):
            # The loss tells it one step too late.
            raise self._losses.error_of_weights(self.model, step, epochs)
        return Snapshot.of(self.model, Checkpoint(step, epochs, self._record(), metrics))

    def _save(self, snapshot: Snapshot | None) -> None:
        if self._checkpoints is None or snapshot is None:
            return
        try:
            self._checkpoints.save(snapshot)
        except OSError as error:
            # Hours of training are worth more than one checkpoint.
            logging.warning(
                "No checkpoint of step %d, those before are kept: %s", snapshot.step, error
            )


def _check_arguments(
    start: Checkpoint, done: int, steps_per_epoch: int, steps_per_execution: int
) -> None:
    if not 0 <= done <= steps_per_epoch:
        raise ValueError(
            f"Expected a checkpoint of epochs of {steps_per_epoch} steps. Received: one of step "
            f"{start.step} after {start.epochs} epochs"
        )
    if steps_per_epoch % steps_per_execution:
        raise ValueError(
            "Expected `steps_per_epoch` to be a multiple of the model's steps_per_execution, "
            f"{steps_per_execution}. Received: steps_per_epoch={steps_per_epoch}"
        )


@contextlib.contextmanager
def _without_final_values(optimizer: keras.Optimizer) -> Iterator[None]:
    """`fit` leaves the weights as they are, not as their moving averages, at its end."""
    attributes, name = vars(optimizer), "finalize_variable_values"
    # `MeSimp` has put one there, which leaves its counters out.
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = lambda variables: None
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(before)


def _build(model: keras.Model, dataset: Any) -> None:
    """Makes the variables of optimizer and metrics.

    The metrics' must be there to be given their values. On TensorFlow `fit`
    makes them in its first step, which is then traced twice.
    """
    batch = getattr(dataset, "element_spec", None)
    if batch is None:
        batch = next(iter(dataset))
    keras_internals.build_symbolically(model, batch)


def _end_epoch(
    model: keras.Model, epoch: int, watch: _Watch, validation_data: Any, verbose: int | str
) -> None:
    """What `fit` does after the last step of an epoch: it was interrupted in this."""
    watch.on_train_begin()
    watch.on_epoch_begin(epoch)
    logs = dict(model.get_metrics_result())
    if validation_data is not None:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(validation_data)
        values = model.evaluate(
            x,
            y,
            sample_weight=sample_weight,
            callbacks=watch,
            return_dict=True,
            verbose=verbose,
        )
        logs |= {f"val_{name}": value for name, value in values.items()}
    watch.on_epoch_end(epoch, logs)
