"""Which share of a training step waits for its input."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from diagconv_tf import StepTimer

#: Steps on one batch; the median of those that count is kept.
STEPS = 16


def seconds_without_input(model: keras.Model, batch: tuple[Any, Any]) -> float | None:
    """Seconds of a training step on a batch that is there already.

    Frameworks fetch the batch inside the step, so the wait for it cannot be
    timed there. What a step takes on the input pipeline beyond what it takes
    on one batch that is repeated is the wait.

    The model, its optimizer and its metrics are afterwards what they were.
    Nothing is compiled: the shapes are those of the training.

    Args:
        model: a compiled model that has been trained.
        batch: images and labels, as the training has them.

    Returns:
        The median in seconds.
    """
    # TensorFlow is installed whatever the backend: the datasets need it.
    import tensorflow as tf

    variables = _state(model)
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in variables]
    history, stopped = model.history, model.stop_training
    timer = StepTimer()
    try:
        # On JAX, Keras leaves weights and their moving averages as one array at
        # the end of `fit`, and the next `fit` cannot donate that twice.
        _assign(variables, before)
        repeated = tf.data.Dataset.from_tensors(batch).repeat(STEPS)
        model.fit(repeated, steps_per_epoch=STEPS, shuffle=False, callbacks=[timer], verbose=0)
    finally:
        _assign(variables, before)
        model.history, model.stop_training = history, stopped
    return timer.timings.median


def wait_share(step_seconds: float | None, without_input: float | None) -> float | None:
    """The part of a step that waits for input, in [0, 1]; None where a time is missing."""
    if not step_seconds or without_input is None:
        return None
    return max(0.0, 1.0 - without_input / step_seconds)


def _assign(variables: list[Any], values: list[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _state(model: keras.Model) -> list[Any]:
    found = {id(v): v for v in (*model.variables, *model.optimizer.variables)}
    return list(found.values())
