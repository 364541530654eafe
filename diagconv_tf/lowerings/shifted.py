"""`"shifted"`: a sum over kernel taps of shifted, scaled inputs.

A convolution with few channels a group has so little arithmetic that it pays
to write it as elementwise work, which a compiler fuses into one loop over the
image: for every tap, the padded input is shifted and multiplied by the tap's
weight. The input gradient is such a sum over the flipped kernel, of the output
gradient with zeros between its elements where strides left gaps. The kernel
gradient multiplies every shifted input by the output gradient and sums over
batch and space.

Products and sums of half precision are made in float32.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

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
        spread = _spread(spec, _widen(output_gradient), sizes)
        windows = _windows(
            spec, _per_group(spec, spread, spec.output_channels_per_group), sizes, (1, 1)
        )
        # Against the forward pass the kernel is turned by 180 degrees.
        taps = reversed(_taps(spec, _widen(kernel)))
        axis = _inner_axis(spec)
        totals = [None] * spec.input_channels_per_group
        for window, tap in zip(windows, taps, strict=True):
            for channel, total in enumerate(totals):
                product = window * tap[channel]
                if spec.output_channels_per_group > 1:
                    product = ops.sum(product, axis=axis, keepdims=True)
                totals[channel] = product if total is None else total + product
        gradient = totals[0] if len(totals) == 1 else ops.concatenate(totals, axis=axis)
        gradient = _merge_groups(spec, gradient, spec.input_channels)
        return ops.cast(gradient, output_gradient.dtype)

    def kernel_gradient(self, spec: ConvSpec, inputs: Any, output_gradient: Any) -> Any:
        sizes = _sizes(spec, inputs)
        padding = spec.padding_for(sizes)
        output_sizes = [spec.output_length(axis, size) for axis, size in enumerate(sizes)]

        def products(inputs: Any, output_gradient: Any) -> list[Any]:
            windows = _windows(
                spec,
                _per_group(spec, _widen(inputs), spec.input_channels_per_group),
                output_sizes,
                spec.strides,
            )
            gradient = _per_group(spec, _widen(output_gradient), spec.output_channels_per_group)
            return [
                _channel(spec, window, channel) * gradient
                for window in windows
                for channel in range(spec.input_channels_per_group)
            ]

        totals = backends.current().sum_over_images(
            products, _pad(spec, inputs, padding), output_gradient
        )
        axes = (0, *(a + (a > spec.channel_axis) for a in spec.spatial_axes))
        gradient = ops.stack([ops.sum(total, axis=axes) for total in totals])
        return ops.cast(ops.reshape(gradient, spec.kernel_shape), inputs.dtype)


def _widen(tensor: Any) -> Any:
    return ops.cast(tensor, "float32") if _is_half(tensor) else tensor


def _is_half(tensor: Any) -> bool:
    return any(name in str(tensor.dtype) for name in ("float16", "bfloat16"))


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


def _spread(spec: ConvSpec, output_gradient: Any, sizes: list[Any]) -> Any:
    """The output gradient on the grid of the inputs, padded for flipped taps.

    With pad p before the input, element q of the output gradient lies at
    q * stride - p; a tap u of an input at x reads x + p - u * dilation. So the
    grid needs (k - 1) * dilation - p zeros before, and at least as many after
    as the last window reaches.
    """
    padding = spec.padding_for(tuple(sizes))
    spread = output_gradient
    if spec.strides != (1, 1):
        spread = backends.current().interleave_zeros(spread, spec.spatial_axes, spec.strides)
    around = []
    for axis, spread_size in enumerate(_sizes(spec, spread)):
        reach = (spec.kernel_size[axis] - 1) * spec.dilation_rate[axis]
        before = reach - padding[axis][0]
        after = sizes[axis] + reach - before - spread_size
        around.append((before, max(after, 0) if isinstance(after, int) else ops.maximum(after, 0)))
    return _pad(spec, spread, around)


def _windows(spec: ConvSpec, padded: Any, sizes: list[Any], strides: tuple) -> Iterator[Any]:
    """For every tap, row by row, the part of `padded` that it multiplies."""
    vertical, horizontal = (a + (a > spec.channel_axis) for a in spec.spatial_axes)
    for u, v in itertools.product(*map(range, spec.kernel_size)):
        window = [slice(None)] * 5
        for axis, tap, rate, size, stride in (
            (vertical, u, spec.dilation_rate[0], sizes[0], strides[0]),
            (horizontal, v, spec.dilation_rate[1], sizes[1], strides[1]),
        ):
            first = tap * rate
            window[axis] = slice(first, first + stride * (size - 1) + 1, stride)
        yield padded[tuple(window)]


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
    channels = range(spec.input_channels_per_group)
    kernel = ops.reshape(kernel, (*spec.kernel_size, len(channels), *shape))
    return [
        [kernel[u, v, channel] for channel in channels]
        for u, v in itertools.product(*map(range, spec.kernel_size))
    ]
