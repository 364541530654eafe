"""Geometry of `"shifted"`: which part of a tensor meets which tap of a kernel.

Tensors of four axes are as `ConvSpec` has them. `per_group` gives groups an
axis of their own, so that a group's channels stay apart: five axes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from diagconv_tf import backends
from diagconv_tf.spec import ConvSpec


def spatial_sizes(spec: ConvSpec, tensor: Any) -> list[Any]:
    """Height and width: ints, or scalar tensors where they are unknown."""
    shape = ops.shape(tensor)
    return [shape[axis] for axis in spec.spatial_axes]


def pad(spec: ConvSpec, tensor: Any, padding: Any) -> Any:
    """Zeros `((top, bottom), (left, right))` around height and width."""
    if all(isinstance(n, int) and n == 0 for pair in padding for n in pair):
        return tensor
    widths: list[Any] = [(0, 0)] * 4
    for axis, pair in zip(spec.spatial_axes, padding, strict=True):
        widths[axis] = tuple(pair)
    return backends.current().pad(tensor, widths)


@dataclasses.dataclass(frozen=True)
class AxisReads:
    """What the inputs read of the output gradient, along one axis.

    With pad p before the input, stride s and dilation d, input x meets output q
    through tap u where x + p = q * s + u * d. So inputs x = s * i + r of one
    phase r meet the taps u for which s divides r + p - u * d, and of these
    always the same ones: no products with the zeros that strides leave.

    Attributes:
        phases: for each r, pairs of a tap u and where its window of the padded
            output gradient begins.
        count: windows' size, that is inputs of a phase: ceil(size / s).
        padding: zeros before and after the output gradient.
    """

    phases: list[list[tuple[int, int]]]
    count: Any
    padding: tuple[Any, Any]


def _axis_of(
    spec: ConvSpec, axis: int, before: Any, stride: int, size: Any, outputs: Any
) -> AxisReads:
    kernel, dilation = spec.kernel_size[axis], spec.dilation_rate[axis]
    reach = (kernel - 1) * dilation
    count = -(-size // stride)
    if stride == 1:
        # Windows begin at the same place whatever the pad, which may be unknown.
        phases = [[(u, reach - u * dilation) for u in range(kernel)]]
        zeros = reach - before
    else:
        reads = [
            [
                (u, (r + before - u * dilation) // stride)
                for u in range(kernel)
                if (r + before - u * dilation) % stride == 0
            ]
            for r in range(stride)
        ]
        zeros = max(0, -min(first for phase in reads for _, first in phase))
        phases = [[(u, zeros + first) for u, first in phase] for phase in reads]
    last = max(first for phase in phases for _, first in phase)
    after = count + last - zeros - outputs
    after = max(after, 0) if isinstance(after, int) else ops.maximum(after, 0)
    return AxisReads(phases, count, (zeros, after))


def reads_of_gradient(
    spec: ConvSpec, output_gradient: Any, sizes: list[Any]
) -> tuple[Any, list[AxisReads]]:
    """The output gradient with zeros around it, and what is read of it along each axis."""
    padding = spec.padding_for(tuple(sizes))
    strides = spec.strides
    if strides != (1, 1) and not all(isinstance(before, int) for before, _ in padding):
        # Which taps a phase meets depends on the pad, and that on a size that is
        # not known. With zeros between the outputs the stride is 1.
        output_gradient = backends.current().interior_pad(
            output_gradient, spec.spatial_axes, strides, (0, 0)
        )
        strides = (1, 1)
    axes = [
        _axis_of(spec, axis, padding[axis][0], strides[axis], sizes[axis], outputs)
        for axis, outputs in enumerate(spatial_sizes(spec, output_gradient))
    ]
    return pad(spec, output_gradient, [axis.padding for axis in axes]), axes


def windows(spec: ConvSpec, padded: Any, sizes: list[Any], strides: tuple) -> Iterator[Any]:
    """For every tap, row by row, the part of `padded` that it multiplies."""
    for u, v in itertools.product(*map(range, spec.kernel_size)):
        first = (u * spec.dilation_rate[0], v * spec.dilation_rate[1])
        yield window(spec, padded, first, sizes, strides)


def window(spec: ConvSpec, tensor: Any, first: tuple, sizes: Any, strides: tuple = (1, 1)) -> Any:
    """`sizes` elements along height and width, from `first` on, in steps of `strides`."""
    grouped = len(tensor.shape) == 5
    index = [slice(None)] * len(tensor.shape)
    for axis, start, size, stride in zip(spec.spatial_axes, first, sizes, strides, strict=True):
        axis = grouped_axis(spec, axis) if grouped else axis
        index[axis] = slice(start, start + stride * (size - 1) + 1, stride)
    return tensor[tuple(index)]


def grouped_axis(spec: ConvSpec, axis: int) -> int:
    """Where `axis` is once groups have an axis of their own."""
    return axis + (axis > spec.channel_axis)


def inner_axis(spec: ConvSpec) -> int:
    """The axis of a group's channels once groups have an axis of their own."""
    return spec.channel_axis + 1


def per_group(spec: ConvSpec, tensor: Any, channels: int) -> Any:
    """Splits the channel axis into `(groups, channels of a group)`."""
    shape = list(ops.shape(tensor))
    axis = spec.channel_axis
    return ops.reshape(tensor, (*shape[:axis], spec.groups, channels, *shape[axis + 1 :]))


def merge_groups(spec: ConvSpec, tensor: Any, channels: int) -> Any:
    """Undoes `per_group`."""
    shape = list(ops.shape(tensor))
    axis = spec.channel_axis
    return ops.reshape(tensor, (*shape[:axis], channels, *shape[axis + 2 :]))


def channel_of(spec: ConvSpec, tensor: Any, channel: int) -> Any:
    """Input channel `channel` of every group, its axis kept."""
    if spec.input_channels_per_group == 1:
        return tensor
    index = [slice(None)] * 5
    index[inner_axis(spec)] = slice(channel, channel + 1)
    return tensor[tuple(index)]


def taps_of(spec: ConvSpec, kernel: Any) -> list[list[Any]]:
    """For every tap, row by row, its weights for each input channel of a group.

    They are shaped to meet a tensor that `per_group` made.
    """
    shape = [1] * 5
    shape[spec.channel_axis] = spec.groups
    shape[inner_axis(spec)] = spec.output_channels_per_group
    channels = spec.input_channels_per_group
    # Unstacked at once: TensorFlow takes a millisecond to trace a slice.
    count = math.prod(spec.kernel_size) * channels
    weights = ops.unstack(ops.reshape(kernel, (count, *shape)), count)
    return [weights[first : first + channels] for first in range(0, count, channels)]


def widen(tensor: Any) -> Any:
    """`tensor` in the dtype in which its products are summed."""
    return ops.cast(tensor, widened_dtype(tensor))


def widened_dtype(tensor: Any) -> str:
    """float32 for half precision, else the tensor's own dtype."""
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return "float32" if dtype in ("float16", "bfloat16") else dtype
