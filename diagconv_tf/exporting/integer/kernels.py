"""Grids of activations, and kernels as integers with a scale for each channel."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np

from diagconv_tf.lowbit.layers import kernels_of, operands_of
from diagconv_tf.lowbit.operands import FLOAT_BITS, DoReFaActivations, KernelCodes

# x86 processors without VNNI add two products in 16 bits, which hold 2 * 255 * 64
# (onnxruntime's documentation of quantization, "reduce_range"). Inputs of 7 bits leave room
# for 127.
_LARGEST_WEIGHT, _LARGEST_WEIGHT_OF_8_BITS = 127, 64

#: The largest step of a sum's int32 bias, so that other terms have room.
_LARGEST_BIAS = 2**30


@dataclasses.dataclass(frozen=True)
class Grid:
    """The numbers `scale * code - offset`, for codes from 0 to `levels`.

    Attributes:
        scale: the distance between two of them.
        offset: how far below zero the first one is; 0 where none is negative.
        levels: the largest code, at most 255.
    """

    scale: float
    offset: float
    levels: int

    @classmethod
    def of(cls, quantizer: DoReFaActivations) -> Grid:
        """The grid that a quantizer rounds to.

        Of the signed one, L * (2 * code / n - 1), zero is no member. So its numbers are
        written as those of an unsigned grid, moved by L.
        """
        levels = 2**quantizer.bits - 1
        if quantizer.signed:
            return cls(2 * quantizer.limit / levels, quantizer.limit, levels)
        return cls(quantizer.scale, 0.0, levels)

    @property
    def high(self) -> float:
        """The largest number."""
        return self.scale * self.levels - self.offset

    @property
    def holds_zero(self) -> bool:
        return self.offset == 0


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerKernel:
    """What a layer multiplies and adds: `(codes * scales) · x + bias`, by output channel.

    Attributes:
        codes: int8. Of a convolution, (height, width, input channels per group, outputs);
            of a dense layer, (inputs, outputs).
        scales: float64, one for each output.
        bias: float64, one for each output.
        groups: of a convolution.
    """

    codes: np.ndarray
    scales: np.ndarray
    bias: np.ndarray
    groups: int = 1

    def scaled(self, factor: np.ndarray, added: np.ndarray) -> IntegerKernel:
        """The kernel whose outputs are those of this one, times `factor`, plus `added`."""
        signs = np.where(factor < 0, -1, 1).astype("int8")
        return dataclasses.replace(
            self,
            codes=self.codes * signs,
            scales=self.scales * np.abs(factor),
            bias=self.bias * factor + added,
        )

    def on(self, grid: Grid) -> IntegerKernel:
        """The kernel for the codes of inputs on `grid`, in place of the inputs.

        Weights are multiplied as far as 8 bits allow: the bias is rounded to a multiple of
        the product of the scales of inputs and kernel, which so becomes smaller. The factor
        is odd, as DoReFa's weights are: so no sum is midway between two outputs on a grid
        like that of the inputs, where float roundings would decide.
        """
        largest = _LARGEST_WEIGHT if grid.levels <= 127 else _LARGEST_WEIGHT_OF_8_BITS
        factor = largest // max(1, int(np.abs(self.codes).max(initial=0)))
        factor = max(1, factor - (factor + 1) % 2)
        codes: np.ndarray = self.codes.astype("float64") * factor
        scales = self.scales * (grid.scale / factor)
        moved = codes.reshape(-1, codes.shape[-1]).sum(0) * scales * (grid.offset / grid.scale)
        bias = self.bias - moved
        return dataclasses.replace(self, codes=codes, scales=scales, bias=bias).with_room(0.0)

    def with_room(self, offset: float) -> IntegerKernel:
        """The kernel, with scales in which the bias, plus `offset`, is no large integer.

        A channel that a batch norm has (almost) switched off has a scale of (almost) zero.
        """
        bias = np.maximum(np.abs(self.bias), np.abs(self.bias + offset))
        least = np.maximum(bias / _LARGEST_BIAS, np.finfo("float32").tiny)
        raised = np.maximum(self.scales, least)
        codes = np.round(self.codes * (self.scales / raised)).astype("int8")
        return dataclasses.replace(self, codes=codes, scales=raised)

    def integer_bias(self, offset: float) -> np.ndarray:
        """The bias, plus `offset`, in int32: multiples of `scales`."""
        return np.rint((self.bias + offset) / self.scales).astype("int32")

    def largest_sum(self, grid: Grid) -> int:
        """A bound of the absolute value of a sum of products, without the bias."""
        sums = np.abs(self.codes.astype("int64")).reshape(-1, self.codes.shape[-1]).sum(0)
        return int(sums.max(initial=0)) * grid.levels


def grid_of(layer: keras.layers.Layer) -> Grid | None:
    """The grid of the inputs of a layer; None where they are not on one that is known."""
    quantizer = operands_of(layer).inputs
    if type(quantizer) is not DoReFaActivations or quantizer.bits == FLOAT_BITS:
        return None
    return Grid.of(quantizer)


def integer_kernel(layer: keras.layers.Layer, codes: KernelCodes) -> IntegerKernel:
    """The kernel of a dense layer or a convolution, with one scale so far."""
    array, groups = codes.codes, 1
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        # As a convolution of as many groups as channels.
        groups = array.shape[2]
        array = array.reshape(*array.shape[:2], 1, -1)
    elif isinstance(layer, keras.layers.Conv2D):
        groups = layer.groups
    outputs = array.shape[-1]
    bias = np.zeros(outputs)
    if layer.bias is not None:
        bias = keras.ops.convert_to_numpy(layer.bias).astype("float64")
    scales = np.full(outputs, codes.scale, "float64")
    return IntegerKernel(array.astype("int8"), scales, bias, groups)


def deployed_codes(layer: keras.layers.Layer) -> KernelCodes | None:
    """The integers of the kernel of a deployed layer, found from its values.

    So a model that was saved and loaded has them, too.

    Args:
        layer: a built layer with one kernel, which no operand quantizes.

    Returns:
        Integers and scale of which the kernel is exactly the product, with the fewest bits;
        None where it is on no grid of 1 to 8 bits.
    """
    operand = operands_of(layer).kernel
    if operand is not None and operand.bits != FLOAT_BITS:
        return None
    (variable,) = kernels_of(layer)
    kernel = keras.ops.convert_to_numpy(variable).astype("float32")
    magnitude = np.abs(kernel).max(initial=0)
    if magnitude > 0 and (np.abs(kernel) == magnitude).all():
        return KernelCodes(np.sign(kernel).astype("int8"), np.float32(magnitude), bits=1)
    for bits in range(2, 9):
        levels = 2**bits - 1
        codes = np.round(kernel * levels)
        found = KernelCodes(codes.astype("int16"), np.float32(1.0 / levels), bits)
        if np.all(codes % 2 == 1) and np.array_equal(found.values(), kernel):
            return found
    return None
