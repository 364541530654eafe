"""The kernel gradient of `"shifted"` for a GPU under XLA: sums over blocks of rows.

XLA:GPU puts at most two sums over batch and space into one kernel, because it counts
a third of the shared memory for each (`SharedMemoryUsage`,
xla/service/gpu/gpu_fusible.cc). So with a sum for every tap, inputs and output gradient
are read 5 times for 3x3 taps and 25 times for 7x7.

Here each thread sums the products of all taps over a block: some rows of some images,
at one column and channel. A second, small sum adds up the blocks. Inputs and output
gradient are read once; one number for each block, column, channel and tap is written
and read again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from keras import ops

from diagconv_tf import backends
from diagconv_tf.lowerings import shift_geometry as geometry
from diagconv_tf.spec import ConvSpec

#: XLA:GPU gives a sum over 32 neighbouring rows or more a kernel of its own. A sum over
#: fewer is a loop in each thread, in which it takes many sums at once
#: (`IsUnnestedReductionFasterThanElemental`, xla/service/gpu/reduction_utils.cc).
_NEIGHBOURS = 31

#: Rows in a block, of all its images: with more, less is written, and fewer threads run.
_ROWS = 56

#: XLA:GPU allows 96 operands and results in one kernel (`MaxOperandsAndOutputsPerFusion`,
#: xla/service/gpu/gpu_fusible.cc). A sum has one of each; a few are shared by all.
_SUMS = 45


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the rows of all images are cut into blocks.

    Attributes:
        images: images of a block. They lie far apart in the batch: neighbours would be
            one long sum to XLA.
        rows: rows of each of these images.
        per_image: blocks along an image; the last one may reach below it.
    """

    images: int
    rows: int
    per_image: int

    @classmethod
    def of(cls, batch: int | None, height: int) -> Blocks:
        """Blocks for `batch` images with `height` rows of outputs.

        Where the batch is not known, it may be no multiple of a block's images.
        """
        per_image = -(-height // _NEIGHBOURS)
        rows = -(-height // per_image)
        most = min(_NEIGHBOURS, max(1, _ROWS // rows))
        if batch is None:
            return cls(most, rows, per_image)
        images = max(n for n in range(1, most + 1) if batch % n == 0)
        if images == batch and per_image == 1 and images * rows > _NEIGHBOURS:
            # All in one block are neighbours.
            images = max(n for n in range(1, images) if batch % n == 0)
        return cls(images, rows, per_image)


def sum_blocks_of_rows(spec: ConvSpec, padded: Any, output_gradient: Any) -> Any:
    """The kernel gradient of the padded input and the output gradient.

    Args:
        spec: the workload.
        padded: the inputs with their zeros around, of `spec.data_format`.
        output_gradient: of a height and width that are known.

    Returns:
        `(taps * input channels of a group, output channels)`, in the dtype of
        `geometry.widened_dtype`.
    """
    height, width = geometry.spatial_sizes(spec, output_gradient)
    blocks = Blocks.of(output_gradient.shape[0], height)
    rows = blocks.per_image * blocks.rows
    output_gradient = _with_whole_blocks(output_gradient, blocks)
    output_gradient = _with_rows(spec, output_gradient, rows)
    extent = (spec.kernel_size[0] - 1) * spec.dilation_rate[0] + 1
    padded = _with_whole_blocks(padded, blocks)
    padded = _with_rows(spec, padded, (rows - 1) * spec.strides[0] + extent)

    gradient = geometry.per_group(
        spec, geometry.widen(output_gradient), spec.output_channels_per_group
    )
    windows = geometry.windows(
        spec,
        geometry.per_group(spec, geometry.widen(padded), spec.input_channels_per_group),
        [rows, width],
        spec.strides,
    )
    # Axes after the rows are one: XLA finds where an element lies by fewer divisions.
    inner = width * (spec.output_channels if spec.channel_axis == 3 else 1)
    products = [
        ops.reshape(
            geometry.channel_of(spec, window, channel) * gradient,
            (blocks.images, -1, blocks.rows, inner),
        )
        for window in windows
        for channel in range(spec.input_channels_per_group)
    ]
    if len(products) <= _SUMS:
        return _sum_products(spec, blocks, products)
    # Complex numbers hold two sums each, so twice as many fit one kernel.
    parts = [
        _sum_pairs(spec, blocks, products[first : first + 2 * _SUMS])
        for first in range(0, len(products), 2 * _SUMS)
    ]
    return ops.concatenate(parts)


def _with_whole_blocks(tensor: Any, blocks: Blocks) -> Any:
    """`tensor` with images of zeros, where a batch that is not known here needs them."""
    if tensor.shape[0] is not None:
        return tensor
    missing = -ops.shape(tensor)[0] % blocks.images
    return backends.current().pad(tensor, [(0, missing), (0, 0), (0, 0), (0, 0)])


def _with_rows(spec: ConvSpec, tensor: Any, rows: int) -> Any:
    """`tensor` with zeros below, where it has fewer rows."""
    missing = max(0, rows - tensor.shape[spec.spatial_axes[0]])
    return geometry.pad(spec, tensor, ((0, missing), (0, 0)))


def _sum_pairs(spec: ConvSpec, blocks: Blocks, products: list[Any]) -> Any:
    """As `_sum_products`, with two sums in a complex number."""
    count = len(products)
    if count % 2:
        products = [*products, ops.zeros_like(products[0])]
    make_complex = backends.current().make_complex
    pairs = [make_complex(*pair) for pair in zip(products[::2], products[1::2], strict=True)]
    sums = _sum_products(spec, blocks, pairs)
    sums = ops.stack([ops.real(sums), ops.imag(sums)], axis=1)
    return ops.reshape(sums, (-1, spec.output_channels))[:count]


def _sum_products(spec: ConvSpec, blocks: Blocks, products: list[Any]) -> Any:
    """Each product summed over all but channels: `(products, output channels)`.

    Args:
        spec: the workload.
        blocks: how its rows are cut.
        products: `(images of a block, blocks, rows of a block, columns and channels)`;
            the channels are among the blocks where they come first.
    """
    backend = backends.current()
    # Apart, or XLA makes one sum over everything of the two.
    totals = backend.keep_apart(backend.sums_in_one_loop(products, (0, 2)))
    shape: tuple[int, ...] = (-1, spec.output_channels)
    axes: tuple[int, ...] = (1,)
    if spec.channel_axis == 1:
        shape, axes = (*shape, blocks.per_image * products[0].shape[-1]), (1, 3)
    return ops.sum(ops.stack([ops.reshape(total, shape) for total in totals]), axis=axes)
