"""`"shifted"`: a sum over kernel taps of shifted, scaled inputs.

A convolution with few channels a group has so little arithmetic that it pays
to write it as elementwise work, which a compiler fuses into one loop over the
image: for every tap, the padded input is shifted and multiplied by the tap's
weight. The input gradient is such a sum of the output gradient over the flipped
kernel; where strides leave gaps, one for every phase of the inputs. The kernel
gradient multiplies every shifted input by the output gradient and sums over
batch and space; for a CPU under XLA that is a loop over rows, for a GPU under XLA
two sums of few rows and of the rest.

Products and sums of half precision are made in float32.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from keras import ops

from diagconv_tf import backends
from diagconv_tf.lowerings import gathered_sum, row_block_gradient, row_loop_gradient
from diagconv_tf.lowerings import shift_geometry as geometry
from diagconv_tf.lowerings.base import Lowering
from diagconv_tf.spec import ConvSpec


@dataclasses.dataclass(frozen=True)
class Shifted(Lowering):
    @property
    def name(self) -> str:
        return "shifted"

    def why_not(self, spec: ConvSpec) -> list[str]:
        return []

    def has_own_gradients(self, spec: ConvSpec, inputs: Any) -> bool:
        return True

    def forward(self, spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
        sizes = geometry.spatial_sizes(spec, inputs)
        if gathered_sum.fits(inputs, sizes):
            return gathered_sum.forward(spec, inputs, kernel)
        padded = geometry.pad(spec, geometry.widen(inputs), spec.padding_for(sizes))
        windows = geometry.windows(
            spec,
            geometry.per_group(spec, padded, spec.input_channels_per_group),
            [spec.output_length(axis, size) for axis, size in enumerate(sizes)],
            spec.strides,
        )
        total = None
        for window, tap in zip(
            windows, geometry.taps_of(spec, geometry.widen(kernel)), strict=True
        ):
            for channel in range(spec.input_channels_per_group):
                product = geometry.channel_of(spec, window, channel) * tap[channel]
                total = product if total is None else total + product
        outputs = geometry.merge_groups(spec, total, spec.output_channels)
        return ops.cast(outputs, inputs.dtype)

    def input_gradient(
        self, spec: ConvSpec, output_gradient: Any, kernel: Any, input_shape: tuple
    ) -> Any:
        sizes = [input_shape[axis] for axis in spec.spatial_axes]
        if gathered_sum.fits(output_gradient, sizes):
            return gathered_sum.input_gradient(spec, output_gradient, kernel, input_shape)
        padded, axes = geometry.reads_of_gradient(spec, geometry.widen(output_gradient), sizes)
        padded = geometry.per_group(spec, padded, spec.output_channels_per_group)
        weights = geometry.taps_of(spec, geometry.widen(kernel))
        strides = [len(axis.phases) for axis in axes]
        total = None
        for vertical, horizontal in itertools.product(*map(range, strides)):
            terms = [
                (
                    geometry.window(spec, padded, (top, left), (axes[0].count, axes[1].count)),
                    weights[u * spec.kernel_size[1] + v],
                )
                for u, top in axes[0].phases[vertical]
                for v, left in axes[1].phases[horizontal]
            ]
            if terms:
                phase = geometry.merge_groups(
                    spec, _transposed_sum(spec, terms), spec.input_channels
                )
                if strides != [1, 1]:
                    offsets = (vertical, horizontal)
                    phase = backends.current().interior_pad(
                        phase, spec.spatial_axes, strides, offsets
                    )
                total = phase if total is None else total + phase
        if strides != [1, 1]:
            total = geometry.window(spec, total, (0, 0), sizes)
        return ops.cast(total, output_gradient.dtype)

    def kernel_gradient(self, spec: ConvSpec, inputs: Any, output_gradient: Any) -> Any:
        sizes = geometry.spatial_sizes(spec, inputs)
        padded = geometry.pad(spec, inputs, spec.padding_for(sizes))
        if backends.current().compiled_for(inputs) == "cpu":
            gradient = row_loop_gradient.sum_row_by_row(spec, padded, output_gradient)
        elif gathered_sum.fits(inputs, sizes):
            gradient = row_block_gradient.sum_blocks_of_rows(spec, padded, output_gradient)
        else:
            gradient = _sum_tap_by_tap(spec, padded, output_gradient)
        return ops.cast(ops.reshape(gradient, spec.kernel_shape), inputs.dtype)

    def runs_standard_convolutions(self, spec: ConvSpec) -> bool:
        return False


def _sum_tap_by_tap(spec: ConvSpec, padded: Any, output_gradient: Any) -> Any:
    """The kernel gradient, `(taps * input channels of a group, …)`: a sum over all for each."""
    gradient = geometry.per_group(
        spec, geometry.widen(output_gradient), spec.output_channels_per_group
    )
    windows = geometry.windows(
        spec,
        geometry.per_group(spec, geometry.widen(padded), spec.input_channels_per_group),
        geometry.spatial_sizes(spec, output_gradient),
        spec.strides,
    )
    axes = (0, *(geometry.grouped_axis(spec, axis) for axis in spec.spatial_axes))
    return ops.stack(
        [
            # Summed at once, so that only one product is in memory.
            ops.sum(geometry.channel_of(spec, window, channel) * gradient, axis=axes)
            for window in windows
            for channel in range(spec.input_channels_per_group)
        ]
    )


def _transposed_sum(spec: ConvSpec, terms: list[tuple[Any, list[Any]]]) -> Any:
    """Windows times taps, summed, for every input channel of a group."""
    axis = geometry.inner_axis(spec)
    totals: list[Any] = [None] * spec.input_channels_per_group
    for window, tap in terms:
        for channel, total in enumerate(totals):
            product = window * tap[channel]
            if spec.output_channels_per_group > 1:
                product = ops.sum(product, axis=axis, keepdims=True)
            totals[channel] = product if total is None else total + product
    return totals[0] if len(totals) == 1 else ops.concatenate(totals, axis=axis)
