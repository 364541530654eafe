"""`"shifted"` for a GPU under XLA: sums over taps of gathered, scaled inputs.

With zeros around a tensor, a GPU's thread must ask before each load whether it falls on
them, and cannot load several channels at once. Here it asks nothing: indices are moved
to the nearest element inside, and what they find there is replaced by zero, for a whole
column or row of taps at a time.

The input gradient of a strided convolution is such a sum too. Which taps an input meets
depends on where it lies between the strides, so that weights are gathered as well: an
input costs as many products as it meets taps, and there are no zeros between outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from diagconv_tf import backends
from diagconv_tf.lowerings import shift_geometry as geometry
from diagconv_tf.spec import ConvSpec


def fits(tensor: Any, sizes: Sequence[Any]) -> bool:
    """Whether to compute in the forms for GPUs.

    Args:
        tensor: any tensor of the computation.
        sizes: height and width of the images; ints, or tensors where they are unknown.
    """
    known = all(isinstance(size, int) for size in sizes)
    return known and backends.current().compiled_for(tensor) == "gpu"


@dataclasses.dataclass(frozen=True)
class Reads:
    """What the elements of a result read of a tensor, along one axis, by one tap each.

    Attributes:
        indices: for each element of the result, what it reads.
        inside: whether that is what it should read; else it is the nearest there is.
        taps: the taps by which the element multiplies it.
    """

    indices: np.ndarray
    inside: np.ndarray
    taps: np.ndarray

    @classmethod
    def of(cls, positions: np.ndarray, taps: np.ndarray, size: int) -> Reads:
        """Reads at `positions` of a tensor of `size`; a tap below 0 stands for none."""
        inside = (positions >= 0) & (positions < size) & (taps >= 0)
        indices = np.clip(positions, 0, size - 1)
        return cls(indices.astype("int32"), inside, np.maximum(taps, 0).astype("int32"))


def reads_of_inputs(spec: ConvSpec, axis: int, size: int) -> list[Reads]:
    """What the outputs read of the inputs along spatial `axis` (0 or 1): a `Reads` for each tap."""
    before = spec.padding_for((size, size))[axis][0]
    outputs = np.arange(spec.output_length(axis, size))
    return [
        Reads.of(
            outputs * spec.strides[axis] + tap * spec.dilation_rate[axis] - before,
            np.full_like(outputs, tap),
            size,
        )
        for tap in range(spec.kernel_size[axis])
    ]


def reads_of_gradient(spec: ConvSpec, axis: int, size: int) -> list[Reads]:
    """What inputs of `size` read of the output gradient along spatial `axis` (0 or 1).

    With p zeros before the inputs, stride s and dilation d, input x meets output q
    through tap u where x + p = q * s + u * d. So the inputs of one remainder of x + p by
    s meet the taps for which s divides x + p - u * d, and of these always the same ones.
    """
    kernel, stride, dilation = (
        values[axis] for values in (spec.kernel_size, spec.strides, spec.dilation_rate)
    )
    places = np.arange(size) + spec.padding_for((size, size))[axis][0]
    met = [
        [tap for tap in range(kernel) if (phase - tap * dilation) % stride == 0]
        for phase in range(stride)
    ]
    most = max(map(len, met))
    table = np.array([taps + [-1] * (most - len(taps)) for taps in met])
    outputs = spec.output_length(axis, size)
    return [
        Reads.of((places - taps * dilation) // stride, taps, outputs)
        for taps in table[places % stride].T
    ]


def forward(spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
    """The outputs; the height and width of `inputs` are known."""

    def multiply(window: Any, tap: list[Any]) -> Any:
        products = [
            geometry.channel_of(spec, window, channel) * weights
            for channel, weights in enumerate(tap)
        ]
        return sum(products[1:], products[0])

    sizes = geometry.spatial_sizes(spec, inputs)
    rows, columns = (reads_of_inputs(spec, axis, size) for axis, size in enumerate(sizes))
    grouped = geometry.per_group(spec, inputs, spec.input_channels_per_group)
    total = _sum_over_taps(spec, grouped, kernel, rows, columns, multiply)
    outputs = ops.cast(geometry.merge_groups(spec, total, spec.output_channels), inputs.dtype)
    if geometry.widened_dtype(outputs) != keras.backend.standardize_dtype(outputs.dtype):
        # XLA would keep them in float32, twice the bytes, where a batch norm asks for that.
        (outputs,) = backends.current().keep_apart([outputs])
    return outputs


def input_gradient(spec: ConvSpec, output_gradient: Any, kernel: Any, input_shape: tuple) -> Any:
    """The derivative by inputs of `input_shape`, whose height and width are known."""
    axis = geometry.inner_axis(spec)

    def multiply(window: Any, tap: list[Any]) -> Any:
        # One output channel after the other: XLA:GPU writes what it sums to memory.
        outputs = ops.split(window, spec.output_channels_per_group, axis)
        products = []
        for weights in tap:
            parts = ops.split(weights, spec.output_channels_per_group, axis)
            terms = [output * part for output, part in zip(outputs, parts, strict=True)]
            products.append(sum(terms[1:], terms[0]))
        return products[0] if len(products) == 1 else ops.concatenate(products, axis=axis)

    sizes = [input_shape[axis] for axis in spec.spatial_axes]
    rows, columns = (reads_of_gradient(spec, axis, size) for axis, size in enumerate(sizes))
    grouped = geometry.per_group(spec, output_gradient, spec.output_channels_per_group)
    total = _sum_over_taps(spec, grouped, kernel, rows, columns, multiply)
    return ops.cast(geometry.merge_groups(spec, total, spec.input_channels), output_gradient.dtype)


def _sum_over_taps(
    spec: ConvSpec,
    tensor: Any,
    kernel: Any,
    rows: list[Reads],
    columns: list[Reads],
    multiply: Callable[[Any, list[Any]], Any],
) -> Any:
    """The sum over `rows` and `columns` of what they read of `tensor`, times their taps.

    Args:
        spec: the workload.
        tensor: as `geometry.per_group` makes it.
        kernel: the kernel.
        rows: reads along the height.
        columns: reads along the width.
        multiply: of what was read and its weights for each input channel of a group,
            both in the widened dtype.
    """
    vertical, horizontal = (geometry.grouped_axis(spec, axis) for axis in spec.spatial_axes)
    kernel = _arrange(spec, kernel)
    gather = backends.current().gather
    total = None
    for row in rows:
        row_tensor = gather(tensor, row.indices, vertical)
        row_kernel = _taps(kernel, row, vertical + 1)
        row_total = None
        for column in columns:
            window = geometry.widen(gather(row_tensor, column.indices, horizontal))
            weights = geometry.widen(_taps(row_kernel, column, horizontal + 1))
            window = _inside(window, column, horizontal)
            product = multiply(window, [weights[i] for i in range(weights.shape[0])])
            row_total = product if row_total is None else row_total + product
        row_total = _inside(row_total, row, vertical)
        total = row_total if total is None else total + row_total
    return total


def _arrange(spec: ConvSpec, kernel: Any) -> Any:
    """The kernel, `(input channels of a group, 1, …)` with the axes of `geometry.per_group`."""
    groups, outputs = spec.groups, spec.output_channels_per_group
    kernel = ops.reshape(
        kernel, (*spec.kernel_size, spec.input_channels_per_group, groups, outputs)
    )
    order = (2, 0, 1, 3, 4) if spec.channel_axis == 3 else (2, 3, 4, 0, 1)
    return ops.expand_dims(ops.transpose(kernel, order), 1)


def _taps(kernel: Any, reads: Reads, axis: int) -> Any:
    """The weights of `reads` along `axis`: for each element, or one for all."""
    first = int(reads.taps[0])
    if (reads.taps != first).any():
        return backends.current().gather(kernel, reads.taps, axis)
    index = [slice(None)] * len(kernel.shape)
    index[axis] = slice(first, first + 1)
    return kernel[tuple(index)]


def _inside(tensor: Any, reads: Reads, axis: int) -> Any:
    """`tensor`, with zeros along `axis` where nothing should have been read."""
    if reads.inside.all():
        return tensor
    shape = [1] * len(tensor.shape)
    shape[axis] = -1
    return ops.where(reads.inside.reshape(shape), tensor, 0)
