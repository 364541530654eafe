"""Depthwise convolutions as PyTorch operators of our own, written in Triton.

`depthwise_tiling` says what the kernels compute and why so. Each is compiled for one
size of image, and serves every batch. With TRITON_INTERPRET=1, set before this module is
imported, Triton computes them operation by operation, on the CPU.

Tensors are `(batch, channels, rows, columns)`, as PyTorch has them. Those that are not in
memory format `torch.channels_last` are copied. Kernels are `(kh, kw, 1, channels)`. All
have one dtype, float32, bfloat16 or float16. Sums are float32.

`torch.compile` calls the operators as they are. `torch.func.vmap` calls them once for
each element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from diagconv_tf.backends import depthwise_tiling as tiling
from diagconv_tf.backends.depthwise_tiling import Problem
from diagconv_tf.spec import ConvSpec


# Compilers that trace a layer take its answer as it is.
@torch.compiler.assume_constant_result
def compute_capability() -> tuple[int, int] | None:
    """That of PyTorch's current NVIDIA GPU; None where there is none."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability()


def forward(spec: ConvSpec, inputs: Any, kernel: Any, interpret: bool) -> Any:
    return _forward(inputs, kernel, spec.strides, spec.dilation_rate, spec.padding)


def input_gradient(
    spec: ConvSpec, output_gradient: Any, kernel: Any, input_shape: tuple, interpret: bool
) -> Any:
    return _input_gradient(
        output_gradient, kernel, input_shape[2:], spec.strides, spec.dilation_rate, spec.padding
    )


def kernel_gradient(spec: ConvSpec, inputs: Any, output_gradient: Any, interpret: bool) -> Any:
    return _kernel_gradient(
        inputs, output_gradient, spec.kernel_size, spec.strides, spec.dilation_rate, spec.padding
    )


@torch.library.custom_op("diagconv_tf::fused_forward", mutates_args=())
def _forward(
    inputs: torch.Tensor,
    kernel: torch.Tensor,
    strides: Sequence[int],
    dilation: Sequence[int],
    padding: str,
) -> torch.Tensor:
    spec = _spec(kernel, strides, dilation, padding)
    return _correlate(tiling.forward(spec, inputs.shape[2:]), inputs, kernel)


@_forward.register_fake
def _(inputs, kernel, strides, dilation, padding):
    spec = _spec(kernel, strides, dilation, padding)
    return _empty_images(inputs, (spec.output_length(i, inputs.shape[2 + i]) for i in (0, 1)))


@torch.library.custom_op("diagconv_tf::fused_input_gradient", mutates_args=())
def _input_gradient(
    output_gradient: torch.Tensor,
    kernel: torch.Tensor,
    sizes: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    padding: str,
) -> torch.Tensor:
    spec = _spec(kernel, strides, dilation, padding)
    return _correlate(tiling.input_gradient(spec, sizes), output_gradient, kernel)


@_input_gradient.register_fake
def _(output_gradient, kernel, sizes, strides, dilation, padding):
    return _empty_images(output_gradient, sizes)


@torch.library.custom_op("diagconv_tf::fused_kernel_gradient", mutates_args=())
def _kernel_gradient(
    inputs: torch.Tensor,
    output_gradient: torch.Tensor,
    kernel_size: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    padding: str,
) -> torch.Tensor:
    kernel = _empty_kernel(inputs, kernel_size)
    spec = _spec(kernel, strides, dilation, padding)
    problem = tiling.kernel_gradient(spec, inputs.shape[2:])
    if 0 in output_gradient.shape:
        return kernel.zero_()
    batch = inputs.shape[0]
    splits, length = problem.splits(batch)
    _, columns, depths = problem.blocks
    sums = inputs.new_empty(
        (splits * columns, problem.taps, problem.channels), dtype=torch.float32
    )
    inputs, output_gradient = _channels_last(inputs), _channels_last(output_gradient)
    with torch.cuda.device_of(inputs):
        _sum_products[(splits * columns * depths,)](
            inputs, output_gradient, sums, batch, length, problem, num_warps=problem.tile.warps
        )
    return sums.sum(0).reshape(kernel.shape).to(inputs.dtype)


@_kernel_gradient.register_fake
def _(inputs, output_gradient, kernel_size, strides, dilation, padding):
    return _empty_kernel(inputs, kernel_size)


def _one_by_one(operator: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, int]]:
    """What `torch.func.vmap` does with an operator of two tensors."""

    def run(info: Any, axes: tuple, first: Any, second: Any, *others: Any) -> tuple:
        pairs = [
            [t if axis is None else t.select(axis, i) for t, axis in zip((first, second), axes)]
            for i in range(info.batch_size)
        ]
        return torch.stack([operator(*pair, *others) for pair in pairs]), 0

    return run


for _operator in (_forward, _input_gradient, _kernel_gradient):
    _operator.register_vmap(_one_by_one(_operator))


def _spec(kernel: torch.Tensor, strides: Sequence, dilation: Sequence, padding: str) -> ConvSpec:
    """The workload for images of any size."""
    return ConvSpec(
        batch=None,
        height=None,
        width=None,
        groups=kernel.shape[3],
        kernel_size=tuple(kernel.shape[:2]),
        strides=tuple(strides),
        dilation_rate=tuple(dilation),
        padding=padding,
    )


def _empty_images(like: torch.Tensor, sizes: Any) -> torch.Tensor:
    shape = (*like.shape[:2], *sizes)
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _empty_kernel(like: torch.Tensor, kernel_size: Sequence[int]) -> torch.Tensor:
    return like.new_empty((*kernel_size, 1, like.shape[1]))


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _correlate(problem: Problem, source: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    target = _empty_images(source, (problem.vertical.target, problem.horizontal.target))
    if 0 in source.shape:
        return target.zero_()
    programs = source.shape[0] * math.prod(problem.blocks)
    with torch.cuda.device_of(source):
        _correlate_tile[(programs,)](
            _channels_last(source),
            kernel.contiguous(),
            target,
            problem,
            num_warps=problem.tile.warps,
        )
    return target


# In the kernels, `problem` and what it holds are known to the compiler. Only loops over
# `tl.static_range` are written out, and it takes only a `tl.constexpr`.


@triton.jit
def _correlate_tile(source, kernel, target, problem: tl.constexpr):
    """One program of a correlation: a tile of the target."""
    channel_block = tl.program_id(0) % problem.blocks[2]
    rest = tl.program_id(0) // problem.blocks[2]
    column_block = rest % problem.blocks[1]
    rest = rest // problem.blocks[1]
    first_row = rest % problem.blocks[0] * problem.tile.rows
    # An image has fewer elements than 32 bits can count; a batch need not.
    image = (rest // problem.blocks[0]).to(tl.int64)
    columns = _places(column_block, problem.tile.columns)[:, None]
    channels = _places(channel_block, problem.tile.channels)[None, :]
    is_channel = channels < problem.channels
    source += image * (problem.vertical.source * problem.horizontal.source * problem.channels)
    target += image * (problem.vertical.target * problem.horizontal.target * problem.channels)
    source_row = first_row * problem.vertical.source_step
    target_row = first_row * problem.vertical.target_step

    sums = ()
    for _ in tl.static_range(tl.constexpr(problem.sums)):
        sums = sums + (_zeros(problem),)
    for trip in range(tl.constexpr(problem.column_loop[0])):
        for c in tl.static_range(tl.constexpr(len(problem.loop_reads))):
            places = columns * problem.horizontal.source_step + (
                problem.loop_reads[c][0] + trip * problem.column_loop[1]
            )
            is_place = _within(places, problem.horizontal.source) & is_channel
            pointers = source + (
                (source_row * problem.horizontal.source + places) * problem.channels + channels
            )
            for reader in tl.static_range(tl.constexpr(len(problem.loop_reads[c][1]))):
                weights = ()
                for tap in tl.static_range(tl.constexpr(problem.vertical.taps)):
                    place = tap * problem.horizontal.taps + problem.loop_reads[c][1][reader][1]
                    weights = weights + (
                        _load(kernel + (place + trip) * problem.channels + channels, is_channel),
                    )
                sums = _add_rows(
                    sums, pointers, is_place, source_row, weights,
                    problem.loop_reads[c][1][reader][0], problem,
                )  # fmt: skip
    for i in tl.static_range(tl.constexpr(problem.sums)):
        row = target_row + i // problem.horizontal.target_step
        places = columns * problem.horizontal.target_step + i % problem.horizontal.target_step
        tl.store(
            target + (row * problem.horizontal.target + places) * problem.channels + channels,
            sums[i].to(target.dtype.element_ty),
            mask=(row < problem.vertical.target)
            & (places < problem.horizontal.target)
            & is_channel,
        )


@triton.jit
def _add_rows(
    sums, pointers, is_place, first_row, weights, across: tl.constexpr, problem: tl.constexpr
):
    """Adds what one column phase reads of all rows through one column tap."""
    for r in tl.static_range(tl.constexpr(len(problem.row_reads))):
        row = problem.row_reads[r][0]
        values = _load(
            pointers + row * (problem.horizontal.source * problem.channels),
            is_place & _within(first_row + row, problem.vertical.source),
        )
        for reader in tl.static_range(tl.constexpr(len(problem.row_reads[r][1]))):
            sums = _add(
                sums,
                problem.sum_index(*problem.row_reads[r][1][reader], across),
                values,
                weights[problem.row_reads[r][1][reader][2]],
            )
    return sums
