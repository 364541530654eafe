"""Training steps one after another, as `fit` runs them.

`train_on_batch` reads the loss back after each step, and on JAX moves all
variables into the step and out of it: on a GPU this can take as long as the step.
"""

from __future__ import annotations

from typing import Any

import keras

from diagconv_tf import keras_internals


class TrainingSteps:
    """Runs the training function of a model on one batch, again and again.

    On JAX the variables of the model are given away with the first step, as in
    `fit`; only the training goes on, with a state of its own.

    Args:
        model: a compiled model; at each step `model.train_function` runs.
        x: inputs, on the device.
        y: targets, or None.
        sample_weight: or None.
    """

    def __init__(self, model: keras.Model, x: Any, y: Any, sample_weight: Any = None) -> None:
        self.model = model
        self.batch = (x, y, sample_weight)
        self._is_built = False
        self._state: Any = None

    def run(self) -> tuple[Any, Any]:
        """One step.

        Returns:
            The logs, and on JAX the state, which is computed apart from them:
            what has to be waited for. The device may still be computing both.
        """
        if not self._is_built:
            self._build()
        backend = keras.backend.backend()
        train = self.model.train_function
        if backend == "jax":
            logs, self._state = train(self._state, iter([self.batch]))
            return logs, self._state
        return train([self.batch] if backend == "torch" else iter([self.batch])), None

    def _build(self) -> None:
        keras_internals.build_for_training(self.model, self.batch)
        if keras.backend.backend() == "jax":
            self._state = keras_internals.take_training_state(self.model)
        self._is_built = True
