"""`"shifted"`: a sum over kernel taps of shifted, scaled inputs.

A convolution with few channels a group has so little arithmetic that it pays
to write it as elementwise work, which a compiler fuses into one loop over the
image: for every tap, the padded input is shifted and multiplied by the tap's
weight. The input gradient is such a sum of the output gradient over the flipped
kernel; where strides leave gaps, one for every phase of the inputs. The kernel
gradient multiplies every shifted input by the output gradient and sums over
batch and space; for a CPU under XLA that is a loop over rows.

Products and sums of half precision are made in float32.
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
from diagconv_tf.lowerings.base import Lowering
from diagconv_tf.spec import Conditions, ConvSpec


@dataclasses.dataclass(frozen=True)
class Shifted(Lowering):
    has_own_gradients = True

    @property
    def name(self) -> str:
        return "shifted"

    def why_not(self, spec: ConvSpec, pass_name: str, conditions: Conditions) -> list[str]:
        return []

    def forward(self, spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
        sizes = _sizes(spec, inputs)
        padded = _pad(spec, _widen(inputs), spec.padding_for(sizes))
        windows = _windows(
            spec,
            _per_group(spec, padded, spec.input_channels_per_group),
            [spec.output_length(axis, size) for axis, size in enumerate(sizes)],
            spec.strides,
        )
        total = None
        for window, tap in zip(windows, _taps(spec, _widen(kernel)), strict=True):
            for channel in range(spec.input_channels_per_group):
                product = _channel(spec, window, channel) * tap[channel]
                total = product if total is None else total + product
        outputs = _merge_groups(spec, total, spec.output_channels)
        return ops.cast(outputs, inputs.dtype)

    def input_gradient(
        self, spec: ConvSpec, output_gradient: Any, kernel: Any, input_shape: tuple
    ) -> Any:
        sizes = [input_shape[axis] for axis in spec.spatial_axes]
        spread, axes = _phases(spec, _widen(output_gradient), sizes)
        spread = _per_group(spec, spread, spec.output_channels_per_group)
        taps = _taps(spec, _widen(kernel))
        strides = [len(axis.phases) for axis in axes]
        total = None
        for vertical, horizontal in itertools.product(*map(range, strides)):
            terms = [
                (
                    _window(spec, spread, (top, left), (axes[0].count, axes[1].count)),
                    taps[u * spec.kernel_size[1] + v],
                )
                for u, top in axes[0].phases[vertical]
                for v, left in axes[1].phases[horizontal]
            ]
            if terms:
                phase = _merge_groups(spec, _transposed_sum(spec, terms), spec.input_channels)
                if strides != [1, 1]:
                    offsets = (vertical, horizontal)
                    phase = backends.current().spread(phase, spec.spatial_axes, strides, offsets)
                total = phase if total is None else total + phase
        if strides != [1, 1]:
            total = _window(spec, total, (0, 0), sizes)
        return ops.cast(total, output_gradient.dtype)

    def kernel_gradient(self, spec: ConvSpec, inputs: Any, output_gradient: Any) -> Any:
        padded = _pad(spec, inputs, spec.padding_for(_sizes(spec, inputs)))
        # XLA refuses to slice an image out of none, also in a loop that never runs.
        if backends.current().is_compiled_for_cpu() and inputs.shape[0] != 0:
            gradient = _sum_row_by_row(spec, padded, output_gradient)
        else:
            gradient = _sum_tap_by_tap(spec, padded, output_gradient)
        return ops.cast(ops.reshape(gradient, spec.kernel_shape), inputs.dtype)


def _sum_tap_by_tap(spec: ConvSpec, padded: Any, output_gradient: Any) -> Any:
    """The kernel gradient, `(taps * input channels of a group, …)`: a sum over all for each."""
    gradient = _per_group(spec, _widen(output_gradient), spec.output_channels_per_group)
    windows = _windows(
        spec,
        _per_group(spec, _widen(padded), spec.input_channels_per_group),
        _sizes(spec, output_gradient),
        spec.strides,
    )
    axes = (0, *(_grouped_axis(spec, axis) for axis in spec.spatial_axes))
    return ops.stack(
        [
            # At once, so that no two products are in memory.
            ops.sum(_channel(spec, window, channel) * gradient, axis=axes)
            for window in windows
            for channel in range(spec.input_channels_per_group)
        ]
    )


def _sum_row_by_row(spec: ConvSpec, padded: Any, output_gradient: Any) -> Any:
    """The same, `(kernel rows, kernel columns, input channels of a group, …)`.

    XLA:CPU does not vectorise a reduction over batch and space. So a loop over
    the rows of all images adds into one accumulator for each kernel column and
    input channel, of the size of a row times the kernel's rows, which stays in
    a cache; one reduction ends it. (Measured on 2 cores: 1.5 to 3 times faster
    than a loop over images, and a 7x7 kernel compiles 3 times faster.)
    """
    batch = ops.shape(padded)[0]
    rows, width = _sizes(spec, output_gradient)
    vertical, horizontal = (_grouped_axis(spec, axis) for axis in spec.spatial_axes)
    extent = (spec.kernel_size[0] - 1) * spec.dilation_rate[0] + 1
    channels = range(spec.input_channels_per_group)

    def row_of(tensor: Any, image: Any, first: Any, count: int) -> Any:
        starts, shape = [0] * 4, list(ops.shape(tensor))
        starts[0], shape[0] = image, 1
        starts[spec.spatial_axes[0]], shape[spec.spatial_axes[0]] = first, count
        return _widen(ops.slice(tensor, starts, shape))

    def add_row(index: Any, totals: tuple) -> tuple:
        image, row = index // rows, index % rows
        inputs = _per_group(
            spec,
            row_of(padded, image, row * spec.strides[0], extent),
            spec.input_channels_per_group,
        )
        gradient = _per_group(
            spec, row_of(output_gradient, image, row, 1), spec.output_channels_per_group
        )
        columns = [[slice(None)] * 5 for _ in range(spec.kernel_size[1])]
        for column, window in enumerate(columns):
            window[vertical] = slice(None, None, spec.dilation_rate[0])
            first, stride = column * spec.dilation_rate[1], spec.strides[1]
            window[horizontal] = slice(first, first + stride * (width - 1) + 1, stride)
        products = [
            _channel(spec, inputs[tuple(window)], channel) * gradient
            for window in columns
            for channel in channels
        ]
        return tuple(total + product for total, product in zip(totals, products, strict=True))

    shape = [1] * 5
    shape[vertical], shape[horizontal] = spec.kernel_size[0], width
    shape[spec.channel_axis] = spec.groups
    shape[_inner_axis(spec)] = spec.output_channels_per_group
    zeros = ops.zeros(shape, _widened_dtype(padded))
    totals = (zeros,) * (spec.kernel_size[1] * len(channels))
    totals = ops.fori_loop(0, batch * rows, add_row, totals)
    sums = ops.stack([ops.sum(total, axis=(0, horizontal)) for total in totals])
    # (columns * channels, kernel rows, groups, outputs), or rows last.
    rows_axis = 1 if spec.channel_axis == 3 else 3
    sums = ops.moveaxis(sums, rows_axis, 0)
    return sums


def _widen(tensor: Any) -> Any:
    return ops.cast(tensor, _widened_dtype(tensor))


def _widened_dtype(tensor: Any) -> str:
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def _sizes(spec: ConvSpec, tensor: Any) -> list[Any]:
    """Height and width: ints, or scalar tensors where they are unknown."""
    shape = ops.shape(tensor)
    return [shape[axis] for axis in spec.spatial_axes]


def _pad(spec: ConvSpec, tensor: Any, padding: Any) -> Any:
    if all(isinstance(n, int) and n == 0 for pair in padding for n in pair):
        return tensor
    widths: list[Any] = [(0, 0)] * 4
    for axis, pair in zip(spec.spatial_axes, padding, strict=True):
        widths[axis] = tuple(pair)
    return ops.pad(tensor, widths)


@dataclasses.dataclass(frozen=True)
class _Axis:
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


def _axis_of(spec: ConvSpec, axis: int, before: Any, stride: int, size: Any, outputs: Any) -> _Axis:
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
    return _Axis(phases, count, (zeros, after))


def _phases(spec: ConvSpec, output_gradient: Any, sizes: list[Any]) -> tuple[Any, list[_Axis]]:
    """The output gradient with zeros around it, and what is read of it along each axis."""
    padding = spec.padding_for(tuple(sizes))
    strides = spec.strides
    if strides != (1, 1) and not all(isinstance(before, int) for before, _ in padding):
        # Which taps a phase meets depends on the pad, and that on a size that is
        # not known: with zeros between the outputs it is a problem of stride 1.
        output_gradient = backends.current().spread(
            output_gradient, spec.spatial_axes, strides, (0, 0)
        )
        strides = (1, 1)
    axes = [
        _axis_of(spec, axis, padding[axis][0], strides[axis], sizes[axis], outputs)
        for axis, outputs in enumerate(_sizes(spec, output_gradient))
    ]
    return _pad(spec, output_gradient, [axis.padding for axis in axes]), axes


def _transposed_sum(spec: ConvSpec, terms: list[tuple[Any, list[Any]]]) -> Any:
    """Windows times taps, summed, for every input channel of a group."""
    axis = _inner_axis(spec)
    totals: list[Any] = [None] * spec.input_channels_per_group
    for window, tap in terms:
        for channel, total in enumerate(totals):
            product = window * tap[channel]
            if spec.output_channels_per_group > 1:
                product = ops.sum(product, axis=axis, keepdims=True)
            totals[channel] = product if total is None else total + product
    return totals[0] if len(totals) == 1 else ops.concatenate(totals, axis=axis)


def _windows(spec: ConvSpec, padded: Any, sizes: list[Any], strides: tuple) -> Iterator[Any]:
    """For every tap, row by row, the part of `padded` that it multiplies."""
    for u, v in itertools.product(*map(range, spec.kernel_size)):
        first = (u * spec.dilation_rate[0], v * spec.dilation_rate[1])
        yield _window(spec, padded, first, sizes, strides)


def _window(spec: ConvSpec, tensor: Any, first: tuple, sizes: Any, strides: tuple = (1, 1)) -> Any:
    """`sizes` elements along height and width, from `first` on, every so manyth."""
    grouped = len(tensor.shape) == 5
    window = [slice(None)] * len(tensor.shape)
    for axis, start, size, stride in zip(spec.spatial_axes, first, sizes, strides, strict=True):
        axis = _grouped_axis(spec, axis) if grouped else axis
        window[axis] = slice(start, start + stride * (size - 1) + 1, stride)
    return tensor[tuple(window)]


def _grouped_axis(spec: ConvSpec, axis: int) -> int:
    """Where `axis` is once groups have an axis of their own."""
    return axis + (axis > spec.channel_axis)


def _inner_axis(spec: ConvSpec) -> int:
    """The axis of a group's channels once groups have an axis of their own."""
    return spec.channel_axis + 1


def _per_group(spec: ConvSpec, tensor: Any, channels: int) -> Any:
    """Splits the channel axis into `(groups, channels of a group)`."""
    shape = list(ops.shape(tensor))
    axis = spec.channel_axis
    return ops.reshape(tensor, (*shape[:axis], spec.groups, channels, *shape[axis + 1 :]))


def _merge_groups(spec: ConvSpec, tensor: Any, channels: int) -> Any:
    """Undoes `_per_group`."""
    shape = list(ops.shape(tensor))
    axis = spec.channel_axis
    return ops.reshape(tensor, (*shape[:axis], channels, *shape[axis + 2 :]))


def _channel(spec: ConvSpec, tensor: Any, channel: int) -> Any:
    """Input channel `channel` of every group, its axis kept."""
    if spec.input_channels_per_group == 1:
        return tensor
    index = [slice(None)] * 5
    index[_inner_axis(spec)] = slice(channel, channel + 1)
    return tensor[tuple(index)]


def _taps(spec: ConvSpec, kernel: Any) -> list[list[Any]]:
    """For every tap, row by row, its weights for each input channel of a group.

    They are shaped to meet a tensor that `_per_group` made.
    """
    shape = [1] * 5
    shape[spec.channel_axis] = spec.groups
    shape[_inner_axis(spec)] = spec.output_channels_per_group
    channels = spec.input_channels_per_group
    # Unstacked at once: TensorFlow takes a millisecond to trace a slice.
    count = math.prod(spec.kernel_size) * channels
    weights = ops.unstack(ops.reshape(kernel, (count, *shape)), count)
    return [weights[first : first + channels] for first in range(0, count, channels)]
