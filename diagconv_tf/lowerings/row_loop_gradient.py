"""The kernel gradient of `"shifted"` for a CPU under XLA: a loop over rows.

XLA:CPU does not vectorise a reduction over batch and space. So a loop over the
rows of all images adds into one accumulator for each kernel column and input
channel, of the size of a row times the kernel's rows, which stays in a cache;
one reduction ends it. (Measured on 2 cores: 1.5 to 3 times faster than a loop
over images, and a 7x7 kernel compiles 3 times faster.)
"""

from __future__ import annotations

from typing import Any

from keras import ops

from diagconv_tf import backends
from diagconv_tf.lowerings import shift_geometry as geometry
from diagconv_tf.spec import ConvSpec


def sum_row_by_row(spec: ConvSpec, padded: Any, output_gradient: Any) -> Any:
    """The kernel gradient of the padded input and the output gradient.

    Returns:
        `(kernel rows, kernel columns * input channels of a group, groups, outputs of a
        group)`, with axes of size 1 between them.
    """
    padded, output_gradient = _with_an_image(padded), _with_an_image(output_gradient)
    _, width = geometry.spatial_sizes(spec, output_gradient)
    # With 16 to 32 channels 3 times faster, else no faster (JAX, 2 cores, 3x3 and 5x5).
    one_to_one = spec.input_channels_per_group == spec.output_channels_per_group == 1
    thin = one_to_one and spec.groups <= 32
    if thin and spec.channel_axis == 3 and spec.strides[1] == 1:
        totals = _totals_of_flat_rows(spec, padded, output_gradient)
    else:
        totals = _totals_of_rows(spec, padded, output_gradient)
    vertical, horizontal = (geometry.grouped_axis(spec, axis) for axis in spec.spatial_axes)
    shape = [1] * 5
    shape[vertical], shape[horizontal] = spec.kernel_size[0], width
    shape[spec.channel_axis] = spec.groups
    shape[geometry.inner_axis(spec)] = spec.output_channels_per_group
    sums = ops.stack([ops.sum(ops.reshape(t, shape), axis=(0, horizontal)) for t in totals])
    # (columns * channels, kernel rows, groups, outputs), or rows last.
    return ops.moveaxis(sums, 1 if spec.channel_axis == 3 else 3, 0)


def _with_an_image(tensor: Any) -> Any:
    """`tensor`, with an image of zeros where it has none.

    XLA refuses to slice an image out of none, also in a loop that never runs.
    """
    if tensor.shape[0]:
        return tensor
    images = tensor.shape[0]
    missing = 1 if images == 0 else ops.maximum(1 - ops.shape(tensor)[0], 0)
    return backends.current().pad(tensor, [(0, missing), (0, 0), (0, 0), (0, 0)])


def _totals_of_flat_rows(spec: ConvSpec, padded: Any, output_gradient: Any) -> tuple:
    """As `_totals_of_rows`, with the columns and channels of a row as one axis.

    XLA:CPU vectorises the last axis, which channels alone may leave too short.
    Each total is `(1, kernel rows, width * channels)`.
    """
    batch, rows, width, channels = ops.shape(output_gradient)
    extent = (spec.kernel_size[0] - 1) * spec.dilation_rate[0] + 1
    apart = spec.dilation_rate[1] * channels

    def flatten(tensor: Any) -> Any:
        _, height, columns, _ = ops.shape(tensor)
        return ops.reshape(tensor, (batch, height, columns * channels))

    def row_of(tensor: Any, image: Any, first: Any, count: int) -> Any:
        shape = (1, count, ops.shape(tensor)[2])
        return geometry.widen(ops.slice(tensor, (image, first, 0), shape))

    def add_row(index: Any, totals: tuple) -> tuple:
        image, row = index // rows, index % rows
        inputs = row_of(padded, image, row * spec.strides[0], extent)
        inputs = inputs[:, :: spec.dilation_rate[0]]
        gradient = row_of(output_gradient, image, row, 1)
        return tuple(
            total + inputs[:, :, column * apart : column * apart + width * channels] * gradient
            for column, total in enumerate(totals)
        )

    padded, output_gradient = flatten(padded), flatten(output_gradient)
    zeros = ops.zeros((1, spec.kernel_size[0], width * channels), geometry.widened_dtype(padded))
    return ops.fori_loop(0, batch * rows, add_row, (zeros,) * spec.kernel_size[1])


def _totals_of_rows(spec: ConvSpec, padded: Any, output_gradient: Any) -> tuple:
    """For each kernel column and input channel of a group, products summed over all rows.

    Each is `(1, kernel rows, width, groups, outputs of a group)`, or channels first.
    """
    batch = ops.shape(padded)[0]
    rows, width = geometry.spatial_sizes(spec, output_gradient)
    vertical, horizontal = (geometry.grouped_axis(spec, axis) for axis in spec.spatial_axes)
    extent = (spec.kernel_size[0] - 1) * spec.dilation_rate[0] + 1
    channels = range(spec.input_channels_per_group)

    def row_of(tensor: Any, image: Any, first: Any, count: int) -> Any:
        starts, shape = [0] * 4, list(ops.shape(tensor))
        starts[0], shape[0] = image, 1
        starts[spec.spatial_axes[0]], shape[spec.spatial_axes[0]] = first, count
        return geometry.widen(ops.slice(tensor, starts, shape))

    def add_row(index: Any, totals: tuple) -> tuple:
        image, row = index // rows, index % rows
        inputs = geometry.per_group(
            spec,
            row_of(padded, image, row * spec.strides[0], extent),
            spec.input_channels_per_group,
        )
        gradient = geometry.per_group(
            spec, row_of(output_gradient, image, row, 1), spec.output_channels_per_group
        )
        columns = [[slice(None)] * 5 for _ in range(spec.kernel_size[1])]
        for column, window in enumerate(columns):
            window[vertical] = slice(None, None, spec.dilation_rate[0])
            first, stride = column * spec.dilation_rate[1], spec.strides[1]
            window[horizontal] = slice(first, first + stride * (width - 1) + 1, stride)
        products = [
            geometry.channel_of(spec, inputs[tuple(window)], channel) * gradient
            for window in columns
            for channel in channels
        ]
        return tuple(total + product for total, product in zip(totals, products, strict=True))

    shape = [1] * 5
    shape[vertical], shape[horizontal] = spec.kernel_size[0], width
    shape[spec.channel_axis] = spec.groups
    shape[geometry.inner_axis(spec)] = spec.output_channels_per_group
    zeros = ops.zeros(shape, geometry.widened_dtype(padded))
    totals = (zeros,) * (spec.kernel_size[1] * len(channels))
    return ops.fori_loop(0, batch * rows, add_row, totals)
