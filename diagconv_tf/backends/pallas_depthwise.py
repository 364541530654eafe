"""Depthwise convolutions as JAX kernels of our own: Pallas, compiled by Triton."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from diagconv_tf.backends import depthwise_tiling as tiling
from diagconv_tf.backends.depthwise_tiling import Axis, Meeting, Tile

#: Kernels with more columns are computed in a loop over them: with all of 7x7 taps
#: written out, a kernel took 19 s to compile, with those of one column 3 s.
_MOST_COLUMNS_UNROLLED = 3


def correlate(axes: tuple[Axis, Axis], source: Any, kernel: Any, interpret: bool) -> Any:
    """The strided correlation of `axes`.

    Args:
        axes: the vertical and the horizontal one.
        source: `(batch, rows, columns, channels)`; float32, bfloat16 or float16.
        kernel: `(kh, kw, 1, channels)`, of the source's dtype.
        interpret: whether JAX computes the kernel operation by operation, on any
            device.

    Returns:
        `(batch, rows, columns, channels)`, of the source's dtype; sums are float32.
    """
    vertical, horizontal = axes
    batch, *_, channels = source.shape
    shape = (batch, vertical.target, horizontal.target, channels)
    if 0 in source.shape:
        return jnp.zeros(shape, source.dtype)
    tile = tiling.correlation_tile(axes, channels, source.dtype.itemsize)
    blocks = (
        pl.cdiv(vertical.count, tile.rows),
        pl.cdiv(horizontal.count, tile.columns),
        pl.cdiv(channels, tile.channels),
    )
    return pl.pallas_call(
        functools.partial(_correlate_tile, axes, tile, blocks, interpret),
        out_shape=jax.ShapeDtypeStruct(shape, source.dtype),
        grid=(batch * math.prod(blocks),),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
        name="depthwise_correlation",
    )(source, kernel)


def kernel_gradient(
    axes: tuple[Axis, Axis], inputs: Any, output_gradient: Any, interpret: bool
) -> Any:
    """The kernel gradient of the forward pass of `axes`.

    One kernel reads inputs and output gradient once. Each of its programs sums its own
    part of them, and a second kernel sums these sums, always in the same order.

    Args:
        axes: the vertical and the horizontal one.
        inputs: `(batch, rows, columns, channels)`; float32, bfloat16 or float16.
        output_gradient: `(batch, rows, columns, channels)`, of the inputs' dtype.
        interpret: as for `correlate`.

    Returns:
        `(kh, kw, 1, channels)`, of the inputs' dtype; sums are float32.
    """
    vertical, horizontal = axes
    batch, *_, channels = inputs.shape
    shape = (len(vertical.meetings), len(horizontal.meetings), 1, channels)
    if 0 in output_gradient.shape:
        return jnp.zeros(shape, inputs.dtype)
    tile = tiling.kernel_gradient_tile(axes, channels, inputs.dtype.itemsize)
    steps = batch * pl.cdiv(vertical.count, tile.rows)
    columns, depths = pl.cdiv(horizontal.count, tile.columns), pl.cdiv(channels, tile.channels)
    splits = tiling.gradient_splits(steps, columns * depths)
    blocks = (splits, columns, depths)
    sums = pl.pallas_call(
        functools.partial(_sum_products, axes, tile, blocks, steps, interpret),
        out_shape=jax.ShapeDtypeStruct(
            (splits * columns, math.prod(shape[:2]), channels), jnp.float32
        ),
        grid=(math.prod(blocks),),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
        name="depthwise_kernel_gradient",
    )(inputs, output_gradient)
    return sums.sum(0).reshape(shape).astype(inputs.dtype)


def _correlate_tile(
    axes: tuple[Axis, Axis],
    tile: Tile,
    blocks: tuple[int, int, int],
    interpret: bool,
    source_ref: Any,
    kernel_ref: Any,
    target_ref: Any,
) -> None:
    """One program: a tile of the target."""
    vertical, horizontal = axes
    image, row, column, depth = _digits(pl.program_id(0), blocks)
    first_row = row * tile.rows
    column = _places(column, tile.columns)[:, None]
    channel = _places(depth, tile.channels)
    is_channel = channel < source_ref.shape[3]
    sums = {
        (i, phases): jnp.zeros((tile.columns, tile.channels), jnp.float32)
        for i in range(tile.rows)
        for phases in itertools.product(
            range(vertical.target_step), range(horizontal.target_step)
        )
    }

    def add_column(offset: Any, meetings: Sequence[Meeting], sums: dict) -> dict:
        """Adds what meets the source columns at one offset."""
        weights = {
            (up, meeting.phase): triton.load(
                kernel_ref.at[up, meeting.tap, 0, channel], mask=is_channel, other=0
            ).astype(jnp.float32)
            for up in range(kernel_ref.shape[0])
            for meeting in meetings
        }
        source_column = column * horizontal.source_step + offset
        is_column = _within(source_column, horizontal.source) & is_channel
        for source_row, readers in vertical.rows(tile.rows).items():
            source_row = first_row * vertical.source_step + source_row
            source = triton.load(
                source_ref.at[image, source_row, source_column, channel[None]],
                mask=is_column & _within(source_row, vertical.source),
                other=0,
            ).astype(jnp.float32)
            for (i, up), across in itertools.product(readers, meetings):
                key = i, (up.phase, across.phase)
                weight = weights[up.tap, across.phase]
                sums[key] = _multiply_add(source, weight, sums[key], interpret)
        return sums

    offsets = horizontal.offsets
    if horizontal.target_step > 1 or len(offsets) <= _MOST_COLUMNS_UNROLLED:
        for offset, meetings in offsets.items():
            sums = add_column(offset, meetings, sums)
    else:
        first, second, *_ = horizontal.meetings

        def add_tap(tap: Any, values: tuple) -> tuple:
            offset = first.offset + tap * (second.offset - first.offset)
            meeting = Meeting(0, tap, offset)
            return tuple(add_column(offset, [meeting], dict(zip(sums, values))).values())

        values = lax.fori_loop(0, len(offsets), add_tap, tuple(sums.values()))
        sums = dict(zip(sums, values))
    for (i, (up, across)), value in sums.items():
        target_row = (first_row + i) * vertical.target_step + up
        target_column = column * horizontal.target_step + across
        is_target = (target_row < vertical.target) & (target_column < horizontal.target)
        triton.store(
            target_ref.at[image, target_row, target_column, channel[None]],
            value.astype(target_ref.dtype),
            mask=is_target & is_channel,
        )


def _sum_products(
    axes: tuple[Axis, Axis],
    tile: Tile,
    blocks: tuple[int, int, int],
    steps: int,
    interpret: bool,
    inputs_ref: Any,
    gradient_ref: Any,
    sums_ref: Any,
) -> None:
    """One program: for each tap, the products of some tiles summed over all but channels."""
    vertical, horizontal = axes
    _, split, block, depth = _digits(pl.program_id(0), blocks)
    column = _places(block, tile.columns)[:, None]
    channel = _places(depth, tile.channels)
    is_channel = channel < inputs_ref.shape[3]
    is_column = (column < horizontal.count) & is_channel
    a_image, a_split = pl.cdiv(vertical.count, tile.rows), pl.cdiv(steps, blocks[0])

    def add_step(step: Any, sums: tuple) -> tuple:
        added = list(sums)
        step = split * a_split + step
        image, first_row = lax.div(step, a_image), lax.rem(step, a_image) * tile.rows
        gradients = [
            triton.load(
                gradient_ref.at[image, first_row + i, column, channel[None]],
                mask=is_column & (first_row + i < vertical.count) & (step < steps),
                other=0,
            ).astype(jnp.float32)
            for i in range(tile.rows)
        ]
        for (offset, meetings), (source_row, readers) in itertools.product(
            horizontal.offsets.items(), vertical.rows(tile.rows).items()
        ):
            source_column = column * horizontal.source_step + offset
            source_row = first_row * vertical.source_step + source_row
            is_source = _within(source_column, horizontal.source) & is_channel
            inputs = triton.load(
                inputs_ref.at[image, source_row, source_column, channel[None]],
                mask=is_source & (_within(source_row, vertical.source) & (step < steps)),
                other=0,
            ).astype(jnp.float32)
            for (i, up), across in itertools.product(readers, meetings):
                tap = up.tap * len(horizontal.meetings) + across.tap
                added[tap] = _multiply_add(inputs, gradients[i], added[tap], interpret)
        return tuple(added)

    taps = len(vertical.meetings) * len(horizontal.meetings)
    zeros = jnp.zeros((tile.columns, tile.channels), jnp.float32)
    sums = lax.fori_loop(0, a_split, add_step, (zeros,) * taps)
    for tap, value in enumerate(sums):
        triton.store(
            sums_ref.at[split * blocks[1] + block, tap, channel], value.sum(0), mask=is_channel
        )


def _digits(index: Any, bases: Sequence[int]) -> list[Any]:
    """`index` as a number with the digits of `bases`, the last one fastest; the rest first."""
    digits: list[Any] = []
    for base in reversed(bases):
        digits.insert(0, lax.rem(index, base))
        index = lax.div(index, base)
    return [index, *digits]


def _places(block: Any, size: int) -> Any:
    """The places along an axis that a block of `size` covers."""
    return block * size + jnp.arange(size, dtype=jnp.int32)


def _within(place: Any, size: int) -> Any:
    return (place >= 0) & (place < size)


def _multiply_add(first: Any, second: Any, third: Any, interpret: bool) -> Any:
    """`first * second + third` in one instruction.

    JAX's Triton does not fuse them: written so, kernels have up to twice as many
    instructions (JAX 0.10.2).
    """
    if interpret:
        return first * second + third
    (result,) = triton.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[first, jnp.broadcast_to(second, third.shape), third],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(third.shape, third.dtype)],
    )
    return result
