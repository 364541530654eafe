"""Depthwise convolutions as JAX kernels of our own: Pallas, compiled by Triton.

`depthwise_tiling` says what they compute and why so.

Tensors are `(batch, rows, columns, channels)`, kernels `(kh, kw, 1, channels)`; all have
one dtype, float32, bfloat16 or float16. Sums are float32. With `interpret` JAX computes
the kernels operation by operation, on any device.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from diagconv_tf.backends import depthwise_tiling as tiling
from diagconv_tf.backends.depthwise_tiling import Correlation, KernelGradient
from diagconv_tf.spec import ConvSpec


def compute_capability() -> tuple[int, int] | None:
    """That of the NVIDIA GPU on which JAX computes; None on any other device."""
    device = jax.config.jax_default_device or jax.local_devices()[0]
    if isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    # AMD's are words: "gfx90a".
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return (int(found[1]), int(found[2])) if found else None


def forward(spec: ConvSpec, inputs: Any, kernel: Any, interpret: bool) -> Any:
    _check_sizes(inputs.shape)
    return _correlate(tiling.forward(spec, inputs.shape[1:3]), inputs, kernel, interpret)


def input_gradient(
    spec: ConvSpec, output_gradient: Any, kernel: Any, input_shape: tuple, interpret: bool
) -> Any:
    _check_sizes(input_shape)
    problem = tiling.input_gradient(spec, input_shape[1:3])
    return _correlate(problem, output_gradient, kernel, interpret)


def kernel_gradient(spec: ConvSpec, inputs: Any, output_gradient: Any, interpret: bool) -> Any:
    _check_sizes(inputs.shape)
    problem = tiling.kernel_gradient(spec, inputs.shape[1:3])
    batch = inputs.shape[0]
    if 0 in output_gradient.shape:
        return jnp.zeros(spec.kernel_shape, inputs.dtype)
    splits, _ = problem.splits(batch)
    _, columns, depths = problem.blocks
    sums = pl.pallas_call(
        functools.partial(_sum_products, problem, batch, interpret),
        out_shape=jax.ShapeDtypeStruct(
            (splits * columns, problem.sums, problem.channels), jnp.float32
        ),
        grid=(splits * columns * depths,),
        compiler_params=triton.CompilerParams(num_warps=problem.tile.warps, num_stages=1),
        interpret=interpret,
        name="depthwise_kernel_gradient",
    )(inputs, output_gradient)
    return sums.sum(0).reshape(spec.kernel_shape).astype(inputs.dtype)


def _check_sizes(shape: tuple) -> None:
    """Refuses the symbolic sizes with which JAX exports: no kernel is made for them."""
    if not all(isinstance(size, int) for size in shape):
        raise ValueError(
            "Expected inputs of known sizes for lowering='fused' (export with another lowering, "
            f"or with fixed sizes). Received: shape={shape}"
        )


def _correlate(problem: Correlation, source: Any, kernel: Any, interpret: bool) -> Any:
    batch = source.shape[0]
    shape = (batch, problem.vertical.target, problem.horizontal.target, problem.channels)
    if 0 in source.shape:
        return jnp.zeros(shape, source.dtype)
    return pl.pallas_call(
        functools.partial(_correlate_tile, problem, interpret),
        out_shape=jax.ShapeDtypeStruct(shape, source.dtype),
        grid=(batch * math.prod(problem.blocks),),
        compiler_params=triton.CompilerParams(num_warps=problem.tile.warps, num_stages=1),
        interpret=interpret,
        name="depthwise_correlation",
    )(source, kernel)


def _correlate_tile(
    problem: Correlation, interpret: bool, source_ref: Any, kernel_ref: Any, target_ref: Any
) -> None:
    """One program of a correlation: a tile of the target."""
    vertical, horizontal, tile = problem.vertical, problem.horizontal, problem.tile
    image, row_block, column_block, channel_block = _digits(pl.program_id(0), problem.blocks)
    first_row = row_block * tile.rows
    columns = _places(column_block, tile.columns)[:, None]
    channels = _places(channel_block, tile.channels)
    is_channel = channels < problem.channels
    trips, shift = problem.loop

    def add_columns(trip: Any, sums: Sequence) -> list:
        sums = list(sums)
        for offset, taps, rows in problem.columns:
            weights = [
                _load(kernel_ref, (up, across + trip, 0, channels), is_channel)
                for up, across in taps
            ]
            places = columns * horizontal.source_step + (offset + trip * shift)
            is_place = _within(places, horizontal.source) & is_channel
            for row, products in rows:
                row = first_row * vertical.source_step + row
                source = _load(
                    source_ref,
                    (image, row, places, channels[None]),
                    is_place & _within(row, vertical.source),
                )
                for total, weight in products:
                    sums[total] = _multiply_add(source, weights[weight], sums[total], interpret)
        return sums

    sums = [jnp.zeros((tile.columns, tile.channels), jnp.float32)] * problem.sums
    sums = add_columns(0, sums) if trips == 1 else lax.fori_loop(0, trips, add_columns, sums)
    phases = itertools.product(range(vertical.target_step), range(horizontal.target_step))
    for total, (i, (up, across)) in zip(
        sums, itertools.product(range(tile.rows), phases), strict=True
    ):
        row = (first_row + i) * vertical.target_step + up
        places = columns * horizontal.target_step + across
        triton.store(
            target_ref.at[image, row, places, channels[None]],
            total.astype(target_ref.dtype),
            mask=(row < vertical.target) & (places < horizontal.target) & is_channel,
        )


def _sum_products(
    problem: KernelGradient,
    batch: int,
    interpret: bool,
    inputs_ref: Any,
    gradient_ref: Any,
    sums_ref: Any,
) -> None:
    """One program of a kernel gradient: for each tap a sum over the tiles of its split."""
    vertical, horizontal, tile = problem.vertical, problem.horizontal, problem.tile
    row_blocks, *blocks = problem.blocks
    split, column_block, channel_block = _digits(pl.program_id(0), blocks)
    columns = _places(column_block, tile.columns)[:, None]
    channels = _places(channel_block, tile.channels)
    is_channel = channels < problem.channels
    is_column = (columns < horizontal.target) & is_channel
    _, length = problem.splits(batch)

    def add_tile(index: Any, sums: Sequence) -> list:
        sums = list(sums)
        image, row_block = _digits(split * length + index, [row_blocks])
        first_row = row_block * tile.rows
        gradients = [
            _load(
                gradient_ref,
                (image, first_row + i, columns, channels[None]),
                is_column & ((image < batch) & (first_row + i < vertical.target)),
            )
            for i in range(tile.rows)
        ]
        for offset, _, rows in problem.columns:
            places = columns * horizontal.source_step + offset
            is_place = _within(places, horizontal.source) & is_channel
            for row, products in rows:
                row = first_row * vertical.source_step + row
                inputs = _load(
                    inputs_ref,
                    (image, row, places, channels[None]),
                    is_place & ((image < batch) & _within(row, vertical.source)),
                )
                for total, i in products:
                    sums[total] = _multiply_add(inputs, gradients[i], sums[total], interpret)
        return sums

    sums = [jnp.zeros((tile.columns, tile.channels), jnp.float32)] * problem.sums
    for tap, total in enumerate(lax.fori_loop(0, length, add_tile, sums)):
        place = split * blocks[0] + column_block
        triton.store(sums_ref.at[place, tap, channels], total.sum(0), mask=is_channel)


def _load(ref: Any, index: tuple, mask: Any) -> Any:
    """Elements of `ref` as float32, 0 where `mask` is false."""
    return triton.load(ref.at[index], mask=mask, other=0).astype(jnp.float32)


def _digits(number: Any, bases: Sequence[int]) -> Iterator[Any]:
    """The digits of `number` in the given bases, and before them what is left."""
    digits = []
    for base in reversed(bases):
        # Triton lowers no `%` by a Python int.
        digits.append(lax.rem(number, base))
        number = lax.div(number, base)
    return reversed([*digits, number])


def _places(block: Any, size: int) -> Any:
    """The places along an axis that a block of `size` covers."""
    return block * size + jnp.arange(size, dtype=jnp.int32)


def _within(place: Any, size: int) -> Any:
    return (place >= 0) & (place < size)


def _multiply_add(first: Any, second: Any, third: Any, interpret: bool) -> Any:
    """`first * second + third`, rounded once, in one instruction.

    JAX's Triton does not fuse them by itself (0.10.2): kernels had up to 1.6 times as
    many instructions.
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
