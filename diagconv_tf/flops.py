"""Floating-point operations of Keras's own convolutions and dense layers."""

from __future__ import annotations

import math

import keras

_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
)
_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
_TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
#: Classes of layers whose FLOPs are counted.
COUNTED = (
    *_CONVOLUTIONS,
    *_SEPARABLE,
    *_TRANSPOSED,
    keras.layers.Dense,
    keras.layers.EinsumDense,
)


def layer_flops(layer: keras.layers.Layer, input_shape: tuple[int, ...]) -> int:
    """Returns the floating-point operations of one forward call; 0 for classes not in `COUNTED`.

    Counts a multiplication and an addition per kernel element and position, as
    `ConvSpec.flops` does. Leaves out biases and activations.

    Args:
        layer: a built layer.
        input_shape: sizes of its inputs, batch first; all known.
    """
    if not isinstance(layer, COUNTED):
        return 0
    if isinstance(layer, keras.layers.Dense):
        return 2 * math.prod(layer.kernel.shape) * math.prod(input_shape[:-1])
    if isinstance(layer, keras.layers.EinsumDense):
        return _einsum_flops(layer, input_shape)
    if isinstance(layer, _TRANSPOSED):
        # Each input position is multiplied by each kernel element once.
        return 2 * math.prod(layer.kernel.shape) * _positions(layer, input_shape)
    positions = _positions(layer, layer.compute_output_shape(input_shape))
    if isinstance(layer, _SEPARABLE):
        kernels = (layer.depthwise_kernel, layer.pointwise_kernel)
        return 2 * sum(math.prod(kernel.shape) for kernel in kernels) * positions
    return 2 * math.prod(layer.kernel.shape) * positions


def _positions(layer: keras.layers.Layer, shape: tuple[int, ...]) -> int:
    batch, *rest = shape
    image = rest[:-1] if layer.data_format == "channels_last" else rest[1:]
    return batch * math.prod(image)


def _einsum_flops(layer: keras.layers.EinsumDense, input_shape: tuple[int, ...]) -> int:
    # One multiplication and addition per combination of all indices; `...` stands
    # for further axes of the input.
    letters, kernel_letters = layer.equation.split("->")[0].split(",")
    sizes = dict(zip(kernel_letters, layer.kernel.shape, strict=True))
    before, dots, after = letters.partition("...")
    sizes.update(zip(before, input_shape, strict=False))
    sizes.update(zip(reversed(after), reversed(input_shape), strict=False))
    further = input_shape[len(before) : len(input_shape) - len(after)] if dots else ()
    return 2 * math.prod(sizes.values()) * math.prod(further)
