# Triton knows neither starred expressions nor tuples of a declared length.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
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
from diagconv_tf.backends.depthwise_tiling import Correlation
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
    sums = inputs.new_empty((splits * columns, problem.sums, problem.channels), dtype=torch.float32)
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
            [
                tensor if axis is None else tensor.select(axis, i)
                for tensor, axis in zip((first, second), axes[:2], strict=True)
            ]
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


def _correlate(problem: Correlation, source: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    target = _empty_images(source, (problem.vertical.target, problem.horizontal.target))
    if 0 in source.shape:
        return target.zero_()
    source, kernel = _channels_last(source), kernel.contiguous()
    programs = source.shape[0] * math.prod(problem.blocks)
    with torch.cuda.device_of(source):
        _correlate_tile[(programs,)](source, kernel, target, problem, num_warps=problem.tile.warps)
    return target


# In the kernels `problem` is a constant, and so is what it holds. Triton writes out loops
# over `tl.static_range`, whose bound must be a `tl.constexpr`.


@triton.jit
def _correlate_tile(source, kernel, target, problem: tl.constexpr):
    """One program of a correlation: a tile of the target."""
    block = tl.program_id(0)
    channels = _places(block % problem.blocks[2], problem.tile.channels)[None, :]
    is_channel = channels < problem.channels
    block //= problem.blocks[2]
    columns = _places(block % problem.blocks[1], problem.tile.columns)[:, None]
    block //= problem.blocks[1]
    first_row = block % problem.blocks[0] * problem.tile.rows
    source_row = first_row * problem.vertical.source_step
    target_row = first_row * problem.vertical.target_step
    # 32 bits count the elements of an image, but not always those of a batch.
    image = (block // problem.blocks[0]).to(tl.int64)
    source += image * (problem.vertical.source * problem.horizontal.source * problem.channels)
    target += image * (problem.vertical.target * problem.horizontal.target * problem.channels)

    sums = _zeros(problem)
    for trip in range(tl.constexpr(problem.loop[0])):
        for c in tl.static_range(tl.constexpr(len(problem.columns))):
            weights = ()
            for tap in tl.static_range(tl.constexpr(len(problem.columns[c].taps))):
                place = (
                    problem.columns[c].taps[tap][0] * problem.horizontal.taps
                    + problem.columns[c].taps[tap][1]
                    + trip
                )
                weight = _load(kernel + place * problem.channels + channels, is_channel)
                weights = weights + (weight,)
            offset = problem.columns[c].offset + trip * problem.loop[1]
            sums = _add_column(
                sums, source, source_row, columns, channels, offset, is_channel, weights, c, problem
            )
    for i in tl.static_range(tl.constexpr(problem.sums)):
        row = target_row + i // problem.horizontal.target_step
        places = columns * problem.horizontal.target_step + i % problem.horizontal.target_step
        tl.store(
            target + (row * problem.horizontal.target + places) * problem.channels + channels,
            sums[i].to(target.dtype.element_ty),
            mask=_as_mask(
                is_channel & (places < problem.horizontal.target) & (row < problem.vertical.target)
            ),
        )


@triton.jit
def _sum_products(inputs, gradient, sums_of_splits, batch, length, problem: tl.constexpr):
    """One program of a kernel gradient: for each tap a sum over the tiles of its split."""
    block = tl.program_id(0)
    channels = _places(block % problem.blocks[2], problem.tile.channels)[None, :]
    is_channel = channels < problem.channels
    block //= problem.blocks[2]
    columns = _places(block % problem.blocks[1], problem.tile.columns)[:, None]
    is_column = (columns < problem.horizontal.target) & is_channel
    split = block // problem.blocks[1]

    sums = _zeros(problem)
    for index in range(length):
        row_block = split * length + index
        image = row_block // problem.blocks[0]
        first_row = row_block % problem.blocks[0] * problem.tile.rows
        is_image = image < batch
        image = image.to(tl.int64)
        pointers = (
            gradient
            + image * (problem.vertical.target * problem.horizontal.target * problem.channels)
            + ((first_row * problem.horizontal.target + columns) * problem.channels + channels)
        )
        gradients = ()
        for i in tl.static_range(tl.constexpr(problem.tile.rows)):
            is_row = is_image & (first_row + i < problem.vertical.target)
            values = _load(
                pointers + i * (problem.horizontal.target * problem.channels), is_column & is_row
            )
            gradients = gradients + (values,)
        source = inputs + image * (
            problem.vertical.source * problem.horizontal.source * problem.channels
        )
        for c in tl.static_range(tl.constexpr(len(problem.columns))):
            sums = _add_column(
                sums,
                source,
                first_row * problem.vertical.source_step,
                columns,
                channels,
                problem.columns[c].offset,
                is_channel & is_image,
                gradients,
                c,
                problem,
            )
    for tap in tl.static_range(tl.constexpr(problem.sums)):
        place = (block * problem.sums + tap) * problem.channels
        total = tl.sum(sums[tap], axis=0)[None, :]
        tl.store(sums_of_splits + place + channels, total, mask=is_channel)


@triton.jit
def _add_column(
    sums,
    source,
    first_row,
    columns,
    channels,
    offset,
    mask,
    factors,
    index: tl.constexpr,
    problem: tl.constexpr,
):
    """Adds the products that `problem.columns[index]` lists."""
    places = columns * problem.horizontal.source_step + offset
    is_place = _within(places, problem.horizontal.source) & mask
    pointers = source + (
        (first_row * problem.horizontal.source + places) * problem.channels + channels
    )
    for r in tl.static_range(tl.constexpr(len(problem.columns[index].rows))):
        row = problem.columns[index].rows[r][0]
        values = _load(
            pointers + row * (problem.horizontal.source * problem.channels),
            is_place & _within(first_row + row, problem.vertical.source),
        )
        for p in tl.static_range(tl.constexpr(len(problem.columns[index].rows[r][1]))):
            sums = _add(
                sums,
                problem.columns[index].rows[r][1][p][0],
                values,
                factors[problem.columns[index].rows[r][1][p][1]],
            )
    return sums


@triton.jit
def _add(sums, index: tl.constexpr, values, factor):
    """`sums` with `values * factor` added to one of them, in one instruction."""
    total = tl.fma(values, tl.broadcast_to(factor, values.shape), sums[index])
    return sums[:index] + (total,) + sums[index + 1 :]


@triton.jit
def _zeros(problem: tl.constexpr):
    sums = ()
    for _ in tl.static_range(tl.constexpr(problem.sums)):
        zeros = tl.zeros(
            (tl.constexpr(problem.tile.columns), tl.constexpr(problem.tile.channels)), tl.float32
        )
        sums = sums + (zeros,)
    return sums


@triton.jit
def _load(pointers, mask):
    """Elements as float32, 0 where `mask` is false."""
    return tl.load(pointers, mask=_as_mask(mask), other=0).to(tl.float32)


@triton.jit
def _as_mask(condition):
    # Triton's interpreter makes integers of a vector and a scalar condition (3.9).
    return condition != 0


@triton.jit
def _places(block, size: tl.constexpr):
    """The places along an axis that a block of `size` covers."""
    return block * size + tl.arange(0, size)


@triton.jit
def _within(place, size):
    return (place >= 0) & (place < size)
