"""Keras's einsum layer, with a choice of what its output gradient goes through.

As those of `diagconv_tf.lowbit.layers`, which has dense layers and convolutions: same
arguments, variables and checks, plus `operands`, and a change of class makes one of the other.
Here `operands` can hold `gradients` only.
"""

from __future__ import annotations

from typing import Any, ClassVar

import keras
from keras import ops

from diagconv_tf.lowbit import units
from diagconv_tf.lowbit.layers import (
    OperandLayer,
    active,
    finish,
    multiply,
    noise_of,
    operands_of,
    why_not_operands,
)


class GradientLayer(OperandLayer):
    """A layer whose output gradient alone goes through an operand."""

    held_operands: ClassVar[frozenset[str]] = frozenset({"gradients"})


@keras.saving.register_keras_serializable(package="diagconv_tf")
class MinimalEffortEinsumDense(GradientLayer, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense` with a choice of what its output gradient goes through.

    Units are the axes that kernel and outputs share.
    """

    def call(self, inputs: Any, training: Any = None) -> Any:
        operands, noise = operands_of(self), noise_of(self)
        kernel = self.kernel
        axes = units.einsum_axes(self, len(inputs.shape))
        layout = gradients = None
        if axes is not None:
            layout = axes.units_of(tuple(kernel.shape))
            gradients = active(operands.gradients, layout.count)
        unified = units.unified_operand(gradients)
        if unified is not None and axes is not None and layout is not None:
            product = units.EinsumProduct(unified, layout, self.equation, axes)
            outputs, gradients = multiply(product, inputs, kernel), None
        else:
            outputs = ops.einsum(self.equation, inputs, kernel)
        return finish(self, gradients, noise, outputs, layout, _add_bias)


def _add_bias(layer: keras.layers.EinsumDense, outputs: Any) -> Any:
    return outputs if layer.bias is None else ops.add(outputs, layer.bias)


def why_not_einsum(layer: keras.layers.EinsumDense) -> list[str]:
    """Every reason why the output gradient of a layer cannot go through an operand."""
    reasons = why_not_operands(layer)
    if units.einsum_axes(layer) is None:
        reasons.append(f"'{layer.equation}' is no product of two matrices")
    return reasons
