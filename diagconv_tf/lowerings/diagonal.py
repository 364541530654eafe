"""`"diagonal:N"`, `"dense"` and `"diagonal_grouped:N"`.

Diagonalwise refactorization (Qin et al., arXiv 1803.09926, section 3): `b`
neighbouring groups become one group, whose kernel holds the `b` small kernels
on its diagonal and zeros elsewhere. The layer is then `groups / b` standard
convolutions, run apart (`Diagonal`) or as one grouped convolution
(`DiagonalGrouped`).

The zeros are multiplied like any other number, so a non-finite input spreads
to all outputs of its block.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from keras import ops

from diagconv_tf import backends
from diagconv_tf.lowerings.base import Lowering
from diagconv_tf.lowerings.native import Native
from diagconv_tf.spec import ConvSpec

_NATIVE = Native()


def merged(spec: ConvSpec, block: int) -> ConvSpec:
    """`spec` with every `block` neighbouring groups made one group."""
    return spec.replace(
        groups=spec.groups // block,
        input_channels_per_group=spec.input_channels_per_group * block,
        output_channels_per_group=spec.output_channels_per_group * block,
    )


def to_diagonal(spec: ConvSpec, kernel: Any, block: int) -> Any:
    """The kernel of `merged(spec, block)` that computes the same.

    Args:
        spec: a workload whose groups `block` divides.
        kernel: `(kh, kw, i, groups * o)`.
        block: number of groups on each diagonal.

    Returns:
        `(kh, kw, block * i, groups * o)`.
    """
    if block == 1:
        return kernel
    kh, kw, i, outputs = spec.kernel_shape
    blocks, o = spec.groups // block, spec.output_channels_per_group
    kernel = ops.reshape(kernel, (kh, kw, 1, i, blocks, block, o))
    kernel = ops.where(_on_diagonal(block), kernel, ops.zeros_like(kernel))
    return ops.reshape(kernel, (kh, kw, block * i, outputs))


def from_diagonal(spec: ConvSpec, kernel: Any, block: int) -> Any:
    """The transpose of `to_diagonal`: reads the blocks on the diagonal.

    Takes `(kh, kw, block * i, groups * o)`, returns `(kh, kw, i, groups * o)`.
    """
    if block == 1:
        return kernel
    kh, kw, i, outputs = spec.kernel_shape
    blocks, o = spec.groups // block, spec.output_channels_per_group
    kernel = ops.reshape(kernel, (kh, kw, block, i, blocks, block, o))
    kernel = ops.where(_on_diagonal(block), kernel, ops.zeros_like(kernel))
    # At most one term of each sum is not zero, so the sum is exact in any precision.
    return ops.reshape(ops.sum(kernel, axis=2), (kh, kw, i, outputs))


def _on_diagonal(block: int) -> Any:
    """`(block, 1, 1, block, 1)`, bool: where a group meets itself."""
    return ops.reshape(ops.eye(block, dtype="bool"), (block, 1, 1, block, 1))


@dataclasses.dataclass(frozen=True)
class Diagonal(Lowering):
    """Standard convolutions of `channels` input channels each, concatenated.

    A block holds as many whole groups as fit into `channels` (at least one);
    the last one is smaller where they do not divide the groups. None means all
    channels in one block.
    """

    channels: int | None

    @property
    def name(self) -> str:
        return "dense" if self.channels is None else f"diagonal:{self.channels}"

    def why_not(self, spec: ConvSpec) -> list[str]:
        return []

    def blocks(self, spec: ConvSpec) -> list[ConvSpec]:
        """The workloads into which `spec` is split along its channels."""
        size = spec.groups
        if self.channels is not None:
            size = min(size, max(1, self.channels // spec.input_channels_per_group))
        return [
            spec.replace(groups=min(size, spec.groups - first))
            for first in range(0, spec.groups, size)
        ]

    def forward(self, spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
        blocks = self.blocks(spec)
        outputs = [
            _NATIVE.forward(merged(block, block.groups), x, to_diagonal(block, k, block.groups))
            for block, x, k in zip(
                blocks,
                _split_inputs(blocks, inputs),
                _split_outputs(blocks, kernel, axis=3),
                strict=True,
            )
        ]
        return _concatenate(outputs, spec.channel_axis)

    def input_gradient(
        self, spec: ConvSpec, output_gradient: Any, kernel: Any, input_shape: tuple
    ) -> Any:
        blocks = self.blocks(spec)
        gradients = []
        for block, g, k in zip(
            blocks,
            _split_outputs(blocks, output_gradient, spec.channel_axis),
            _split_outputs(blocks, kernel, axis=3),
            strict=True,
        ):
            shape = list(input_shape)
            shape[spec.channel_axis] = block.input_channels
            gradients.append(
                _NATIVE.input_gradient(
                    merged(block, block.groups),
                    g,
                    to_diagonal(block, k, block.groups),
                    tuple(shape),
                )
            )
        return _concatenate(gradients, spec.channel_axis)

    def kernel_gradient(self, spec: ConvSpec, inputs: Any, output_gradient: Any) -> Any:
        blocks = self.blocks(spec)
        gradients = [
            from_diagonal(
                block,
                _NATIVE.kernel_gradient(merged(block, block.groups), x, g),
                block.groups,
            )
            for block, x, g in zip(
                blocks,
                _split_inputs(blocks, inputs),
                _split_outputs(blocks, output_gradient, spec.channel_axis),
                strict=True,
            )
        ]
        return _concatenate(gradients, axis=3)

    def runs_standard_convolutions(self, spec: ConvSpec) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class DiagonalGrouped(Lowering):
    """One grouped convolution with `channels` input channels a group."""

    channels: int

    @property
    def name(self) -> str:
        return f"diagonal_grouped:{self.channels}"

    def why_not(self, spec: ConvSpec) -> list[str]:
        reasons = []
        if spec.input_channels % self.channels:
            reasons.append(
                f"{self.name} needs a number of input channels that {self.channels} divides; "
                f"received {spec.input_channels}"
            )
        if self.channels % spec.input_channels_per_group:
            reasons.append(
                f"{self.name} needs groups whose width divides {self.channels}; received "
                f"{spec.input_channels_per_group} input channels a group"
            )
        return reasons

    def _block(self, spec: ConvSpec) -> int:
        return self.channels // spec.input_channels_per_group

    def forward(self, spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
        block = self._block(spec)
        return _NATIVE.forward(merged(spec, block), inputs, to_diagonal(spec, kernel, block))

    def input_gradient(
        self, spec: ConvSpec, output_gradient: Any, kernel: Any, input_shape: tuple
    ) -> Any:
        block = self._block(spec)
        return _NATIVE.input_gradient(
            merged(spec, block), output_gradient, to_diagonal(spec, kernel, block), input_shape
        )

    def kernel_gradient(self, spec: ConvSpec, inputs: Any, output_gradient: Any) -> Any:
        block = self._block(spec)
        gradient = _NATIVE.kernel_gradient(merged(spec, block), inputs, output_gradient)
        return from_diagonal(spec, gradient, block)

    def runs_standard_convolutions(self, spec: ConvSpec) -> bool:
        return True


def _split_inputs(blocks: list[ConvSpec], tensor: Any) -> list[Any]:
    return _split(tensor, [block.input_channels for block in blocks], blocks[0].channel_axis)


def _split_outputs(blocks: list[ConvSpec], tensor: Any, axis: int) -> list[Any]:
    return _split(tensor, [block.output_channels for block in blocks], axis)


def _split(tensor: Any, sizes: list[int], axis: int) -> list[Any]:
    # Not `keras.ops.split`: it takes positions, which PyTorch cannot trace.
    return [tensor] if len(sizes) == 1 else backends.current().split(tensor, sizes, axis)


def _concatenate(tensors: list[Any], axis: int) -> Any:
    return tensors[0] if len(tensors) == 1 else ops.concatenate(tensors, axis=axis)
