"""A Keras model as a function of its weights and inputs, for inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from diagconv_tf.exporting.tensors import Leaf, leaves
from diagconv_tf.tf32 import tf32_allowed


class KerasRun:
    """Runs a model for inference with full float32.

    Runs it as a graph, because some ops run only there; on TensorFlow as one graph for
    all batch sizes, as Keras exports it. The function is stateless: weights can be
    replaced without touching the model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._call: Callable[..., Any]
        self.weights = [keras.ops.convert_to_tensor(variable) for variable in model.variables]
        backend = keras.backend.backend()
        if backend == "tensorflow":
            import tensorflow as tf

            self._function = tf.function(self._stateless_call, autograph=False)
            self._call = self._call_tensorflow
        elif backend == "jax":
            import jax

            self._call = jax.jit(self._stateless_call)
        else:
            import torch

            self._call = torch.no_grad()(self._stateless_call)

    def __call__(self, inputs: Any, weights: Sequence[Any] | None = None) -> list[Leaf]:
        """The outputs, as NumPy arrays.

        Args:
            inputs: a structure of NumPy arrays.
            weights: in place of `self.weights`.
        """
        with tf32_allowed(False):
            outputs = self._call(self.weights if weights is None else weights, inputs)
            return [
                dataclasses.replace(leaf, value=keras.ops.convert_to_numpy(leaf.value))
                for leaf in leaves(outputs)
            ]

    def _stateless_call(self, weights: Sequence[Any], inputs: Any) -> Any:
        state = list(zip(self._model.variables, weights, strict=True))
        with keras.StatelessScope(state_mapping=state):
            return self._model(inputs, training=False)

    def _call_tensorflow(self, weights: Sequence[Any], inputs: Any) -> Any:
        import tensorflow as tf

        inputs = tf.nest.map_structure(tf.convert_to_tensor, inputs)
        specs = tf.nest.map_structure(
            lambda tensor: tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype), inputs
        )
        return self._function.get_concrete_function(weights, specs)(weights, inputs)


def perturbed(structure: Any, size: float, rng: np.random.Generator) -> Any:
    """Multiplies each float of each tensor by its own random factor in `1 ± size`."""

    def perturb(tensor: Any) -> Any:
        if "float" not in str(tensor.dtype):
            return tensor
        factors = 1.0 + size * rng.uniform(-1.0, 1.0, tuple(tensor.shape))
        if isinstance(tensor, np.ndarray):  # Layers take no mixture of arrays and tensors.
            return (tensor * factors).astype(tensor.dtype)
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        return keras.ops.multiply(tensor, keras.ops.convert_to_tensor(factors, dtype))

    return keras.tree.map_structure(perturb, structure)
