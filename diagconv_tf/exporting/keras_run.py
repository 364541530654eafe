"""A Keras model as a function of its weights and inputs, for inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from diagconv_tf.exporting.tensors import Leaf, leaves
from diagconv_tf.tf32 import tf32_allowed


class KerasRun:
    """Runs a model for inference with full float32.

    Runs it as a graph, because some ops run only there. A stateless one, so that
    weights can be replaced without touching the model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        backend = keras.backend.backend()
        if backend == "tensorflow":
            import tensorflow as tf

            self._call = tf.function(self._stateless_call, autograph=False)
        elif backend == "jax":
            import jax

            self._call = jax.jit(self._stateless_call)
        else:
            import torch

            self._call = torch.no_grad()(self._stateless_call)

    def __call__(self, inputs: Any, perturbation: float = 0.0, seed: int = 0) -> list[Leaf]:
        """The outputs.

        Args:
            inputs: a structure of NumPy arrays.
            perturbation: relative; each float among weights and inputs is larger or
                smaller by so much.
            seed: of the signs.
        """
        weights = [keras.ops.convert_to_tensor(variable) for variable in self._model.variables]
        if perturbation:
            rng = np.random.default_rng(seed)
            weights, inputs = keras.tree.map_structure(
                lambda tensor: _perturbed(tensor, perturbation, rng), (weights, inputs)
            )
        with tf32_allowed(False):
            outputs = self._call(weights, inputs)
            return [
                dataclasses.replace(leaf, value=keras.ops.convert_to_numpy(leaf.value))
                for leaf in leaves(outputs)
            ]

    def _stateless_call(self, weights: Sequence[Any], inputs: Any) -> Any:
        state = list(zip(self._model.variables, weights, strict=True))
        with keras.StatelessScope(state_mapping=state):
            return self._model(inputs, training=False)


def _perturbed(tensor: Any, perturbation: float, rng: np.random.Generator) -> Any:
    if "float" not in str(tensor.dtype):
        return tensor
    factors = 1.0 + perturbation * rng.choice((-1.0, 1.0), tuple(tensor.shape))
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return keras.ops.multiply(tensor, keras.ops.convert_to_tensor(factors, dtype))
