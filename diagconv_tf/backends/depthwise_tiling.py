"""Geometry and tiles of the depthwise GPU kernels, without a framework.

Forward pass and input gradient are one problem, a *strided correlation* of a source
with a kernel, channel by channel. Along each axis

    target[target_step * i + phase] += source[source_step * i + offset] * kernel[tap]

for every `Meeting(phase, tap, offset)`. The forward pass has `source_step` = stride and
one phase. The input gradient, whose source is the output gradient, has `target_step` =
stride and as many phases: no products with the zeros that strides leave.

One program of a kernel computes a `Tile`: some positions `i` of rows and columns, for
some channels. It loads a tile of the source once for each row and column offset and
uses it for all rows and phases that meet it. Masks stand for the padding, so nothing is
copied.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from diagconv_tf.spec import ConvSpec

#: Kernels with more taps are refused. The kernel gradient has a sum for each tap in
#: registers: with 49 (7x7) a thread has room for 2 channels of each.
MOST_TAPS = 49

#: Channels that a thread computes: vectors of 16 bytes in float32.
_VECTOR = 4

#: The kernel gradient of kernels with more taps computes 2 channels a thread. Its sums
#: then take 98 of the 255 registers that a thread can have; with 4 channels and 5x5 taps
#: they take 100.
_MOST_TAPS_OF_4_CHANNELS = 25

#: Threads of a program: 4 warps, one for each scheduler of a streaming multiprocessor.
_THREADS = 128

#: Bytes that the memory of NVIDIA GPUs moves at once (a sector; CUDA C++ Best Practices
#: Guide, 'Coalesced Access to Global Memory'). A tile has no narrower row of channels.
_SECTOR = 32

#: Tiles of sums in a program of a correlation: 8 of 4 channels take 32 registers.
_MOST_SUMS = 8

#: Rows of the output gradient that a step of the kernel gradient holds in registers.
_GRADIENT_ROWS = 4

#: Programs of the kernel gradient: 4 for each of the 132 multiprocessors of an H100.
#: Each writes its sums to memory, so more of them would cost bytes.
_GRADIENT_PROGRAMS = 528


@dataclasses.dataclass(frozen=True)
class Meeting:
    """One tap of one axis: which phase of the target meets which source through it."""

    phase: int
    tap: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a strided correlation; see the module's docstring.

    Attributes:
        source: size of the source.
        target: size of the target.
        source_step: source positions from one `i` to the next.
        target_step: target positions from one `i` to the next, that is phases.
        meetings: at most one for each phase and tap.
    """

    source: int
    target: int
    source_step: int
    target_step: int
    meetings: tuple[Meeting, ...]

    @property
    def count(self) -> int:
        """Number of positions `i`."""
        return -(-self.target // self.target_step)

    @property
    def offsets(self) -> dict[int, list[Meeting]]:
        """The meetings by their offset, in ascending order."""
        ordered = sorted(self.meetings, key=lambda meeting: meeting.offset)
        return {
            offset: list(meetings)
            for offset, meetings in itertools.groupby(ordered, lambda meeting: meeting.offset)
        }

    def rows(self, count: int) -> dict[int, list[tuple[int, Meeting]]]:
        """What `count` neighbouring positions read.

        Returns:
            For every source row, relative to the first position's, pairs of a position
            and how it meets the row.
        """
        reads: dict[int, list[tuple[int, Meeting]]] = {}
        for i, meeting in itertools.product(range(count), self.meetings):
            reads.setdefault(i * self.source_step + meeting.offset, []).append((i, meeting))
        return dict(sorted(reads.items()))


def forward_axes(spec: ConvSpec, sizes: Sequence[int]) -> tuple[Axis, Axis]:
    """The axes of the forward pass, from inputs of `sizes` to outputs."""
    padding = spec.padding_for(sizes)
    vertical, horizontal = (
        Axis(
            source=size,
            target=spec.output_length(axis, size),
            source_step=spec.strides[axis],
            target_step=1,
            meetings=tuple(
                Meeting(0, tap, tap * spec.dilation_rate[axis] - padding[axis][0])
                for tap in range(spec.kernel_size[axis])
            ),
        )
        for axis, size in enumerate(sizes)
    )
    return vertical, horizontal


def input_gradient_axes(spec: ConvSpec, sizes: Sequence[int]) -> tuple[Axis, Axis]:
    """The axes of the input gradient, from output gradients to inputs of `sizes`.

    With `before` zeros before the input, input x meets output q through tap u where
    x + before = q * stride + u * dilation.
    """
    padding = spec.padding_for(sizes)
    axes = []
    for axis, size in enumerate(sizes):
        stride, dilation, before = spec.strides[axis], spec.dilation_rate[axis], padding[axis][0]
        distances = {
            (phase, tap): phase + before - tap * dilation
            for phase, tap in itertools.product(range(stride), range(spec.kernel_size[axis]))
        }
        axes.append(
            Axis(
                source=spec.output_length(axis, size),
                target=size,
                source_step=1,
                target_step=stride,
                meetings=tuple(
                    Meeting(phase, tap, distance // stride)
                    for (phase, tap), distance in distances.items()
                    if distance % stride == 0
                ),
            )
        )
    return axes[0], axes[1]


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program computes at once.

    Attributes:
        rows: positions along the vertical axis.
        columns: positions along the horizontal axis; a power of 2.
        channels: a power of 2.
        warps: groups of 32 threads; a power of 2.
    """

    rows: int
    columns: int
    channels: int
    warps: int


def correlation_tile(axes: tuple[Axis, Axis], channels: int, itemsize: int) -> Tile:
    """The tile of a forward pass or input gradient.

    Args:
        axes: the vertical and the horizontal one.
        channels: of source and target.
        itemsize: bytes of an element.
    """
    vertical, horizontal = axes
    phases = vertical.target_step * horizontal.target_step
    rows = _even_share(vertical.count, max(1, _MOST_SUMS // phases))
    return _tile(rows, horizontal, channels, itemsize, _VECTOR)


def kernel_gradient_tile(axes: tuple[Axis, Axis], channels: int, itemsize: int) -> Tile:
    """The tile of a step of a kernel gradient; arguments as for `correlation_tile`.

    Its axes are those of the forward pass, its positions the output gradient's.
    """
    vertical, horizontal = axes
    taps = len(vertical.meetings) * len(horizontal.meetings)
    vector = _VECTOR if taps <= _MOST_TAPS_OF_4_CHANNELS else _VECTOR // 2
    rows = _even_share(vertical.count, _GRADIENT_ROWS)
    return _tile(rows, horizontal, channels, itemsize, vector)


def gradient_splits(steps: int, programs_a_split: int) -> int:
    """Into how many parts, each summed by programs of its own, a kernel gradient is split.

    Args:
        steps: tiles of rows in the whole batch.
        programs_a_split: programs that sum one part: one for each tile of columns and
            channels.
    """
    wanted = max(1, _GRADIENT_PROGRAMS // programs_a_split)
    return -(-steps // -(-steps // min(wanted, steps)))


def _even_share(count: int, most: int) -> int:
    """The size of equal parts of at most `most`, the last one of which is nearly full."""
    return -(-count // -(-count // most))


def _tile(rows: int, horizontal: Axis, channels: int, itemsize: int, vector: int) -> Tile:
    """The shape that wastes least, with `vector` channels a thread.

    Waste is counted in loads of a row: those of masked columns and channels, and those
    of columns that a neighbouring program loads too.
    """
    offsets = list(horizontal.offsets)
    halo = max(offsets) - min(offsets)

    def loads(shape: tuple[int, int]) -> tuple[float, int]:
        width, depth = shape
        columns = -(-horizontal.count // width) * (width * horizontal.source_step + halo)
        # Of equals the deeper one: it has longer rows of channels.
        return columns * -(-channels // depth) * depth, -depth

    shapes = []
    deepest = _power_of_2_from(channels)
    for exponent in range(int(math.log2(_SECTOR // itemsize)), 7):
        depth = 2**exponent
        width = min(_THREADS * vector // depth, _power_of_2_from(horizontal.count))
        if depth <= max(deepest, _SECTOR // itemsize):
            shapes.append((width, depth))
    columns, depth = min(shapes, key=loads)
    return Tile(rows, columns, depth, warps=max(1, columns * depth // (32 * vector)))


def _power_of_2_from(number: int) -> int:
    return 1 << (number - 1).bit_length()
