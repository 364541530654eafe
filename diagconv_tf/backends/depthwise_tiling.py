"""What the depthwise GPU kernels compute, and in which tiles; without a framework.

Forward pass and input gradient are one problem, a *strided correlation* of a source
with a kernel, channel by channel. Along each axis

    target[target_step * i + phase] += source[source_step * i + offset] * kernel[tap]

for every `Meeting(phase, tap, offset)`. The forward pass has `source_step` = stride and
one phase. The input gradient, whose source is the output gradient, has `target_step` =
stride and as many phases: it makes no products with the zeros that strides leave.

The kernel gradient meets the forward pass's source, the inputs, with the output
gradient at position `i`, and sums over all positions.

Design
    - A program of a kernel computes a `Tile`: some rows and columns of positions, for
      some channels. Neighbouring threads have neighbouring channels, 4 a thread: loads
      and stores are vectors, and a warp reads whole cache lines.
    - It loads the source once for each row and each column offset, and uses it in
      registers for all rows and taps that meet it. 3x3 kernels take 30 loads for 8
      rows in place of 72. What neighbouring programs load too comes from the caches.
    - Masks stand for the padding. Nothing is padded, copied or dilated.
    - The kernel gradient keeps one sum for each tap in registers while it walks over
      the batch. Each program writes its sums once; a second kernel adds them, always in
      the same order. No atomic operations: the result does not change between runs.

Expected on an H100: memory / instruction issue in microseconds, at batch 64. Predicted
from compiled code (JAX 0.10.2), not measured: least bytes at 0.9 of 3.35 TB/s; warp
instructions over 132 * 4 schedulers at 1.755 GHz. No kernel spills registers.

    ======================= ======== ======== ============== ===============
    inputs, kernel          dtype    forward  input gradient kernel gradient
    ======================= ======== ======== ============== ===============
    112x112x32, 3x3         float32  68 / 14  68 / 14        68 / 17
    112x112x32, 3x3         bfloat16 34 / 20  34 / 20        34 / 23
    113x113x64, 3x3 by 2    float32  86 / 7   86 / 13        86 / 10
    113x113x64, 3x3 by 2    bfloat16 43 / 13  43 / 19        43 / 15
    MobileNetV1, 13 layers  float32  429 / 73 429 / 81       429 / 100
    MobileNetV1, 13 layers  bfloat16 214/109  214 / 120      214 / 135
    56x56x96, 7x7           float32  51 / 54  51 / 54        51 / 63
    56x56x96, 7x7           bfloat16 26 / 72  26 / 73        26 / 81
    ======================= ======== ======== ============== ===============

In bfloat16 about a fifth of the instructions of 7x7 kernels turns numbers into float32.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from diagconv_tf.spec import ConvSpec

#: Kernels with more taps are refused. The kernel gradient has a sum for each tap in
#: registers: with 49 (7x7) a thread has room for 2 channels of each.
MOST_TAPS = 49

#: The kernel gradient of kernels with more taps computes 2 channels a thread. Its sums
#: then take up to 98 of the 255 registers that a thread can have; with 4 channels and
#: 5x5 taps they take 100.
_MOST_TAPS_OF_4_CHANNELS = 25

#: Threads of a program: 4 warps, one for each scheduler of a multiprocessor.
_THREADS = 128

#: Channels of a tile. 32 of float32 are a cache line of 128 bytes.
_DEPTHS = (32, 64, 128)

#: Sums of a correlation in a thread, for each of its channels: 8 of 4 take 32 registers.
_MOST_SUMS = 8

#: Rows of the output gradient that a step of the kernel gradient holds in registers.
_GRADIENT_ROWS = 4

#: Programs of the kernel gradient: 4 for each of the 132 multiprocessors of an H100.
#: More of them would write more sums.
_GRADIENT_PROGRAMS = 528

#: Correlations with more columns of taps loop over them. Written out, 7x7 taps took 19 s
#: to compile on 2 busy cores, a loop 2 s (JAX 0.10.2).
_MOST_COLUMNS_UNROLLED = 3


class Meeting(NamedTuple):
    """Along one axis: which phase of the target meets which source through a tap."""

    phase: int
    tap: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a strided correlation; see the module's docstring.

    Attributes:
        source: size of the source.
        target: size of the target.
        source_step: source places from one position to the next.
        target_step: target places from one position to the next, that is phases.
        taps: size of the kernel.
        meetings: at most one for each phase and tap.
    """

    source: int
    target: int
    source_step: int
    target_step: int
    taps: int
    meetings: tuple[Meeting, ...]

    @property
    def count(self) -> int:
        """Number of positions."""
        return -(-self.target // self.target_step)


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


class Column(NamedTuple):
    """What a program does with the source at one column offset.

    Attributes:
        offset: the offset.
        taps: the taps, `(row, column)`, whose weights it needs.
        rows: for each source row that it loads, counted from that of the tile's first
            row, the products it makes: pairs of the sum and the factor.
    """

    offset: int
    taps: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a kernel is compiled for: all but the batch.

    Attributes:
        vertical: the axis of rows.
        horizontal: the axis of columns.
        channels: number of channels.
        tile: what a program computes at once.
    """

    vertical: Axis
    horizontal: Axis
    channels: int
    tile: Tile

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Tiles that cover the rows, the columns and the channels of an image."""
        return (
            -(-self.vertical.count // self.tile.rows),
            -(-self.horizontal.count // self.tile.columns),
            -(-self.channels // self.tile.channels),
        )

    def _row_reads(self) -> Iterator[tuple[int, list[tuple[int, Meeting]]]]:
        """For each source row that a tile reads, its rows that meet it."""
        reads: dict[int, list[tuple[int, Meeting]]] = {}
        for row, meeting in itertools.product(range(self.tile.rows), self.vertical.meetings):
            source = row * self.vertical.source_step + meeting.offset
            reads.setdefault(source, []).append((row, meeting))
        yield from sorted(reads.items())

    def _column_reads(self) -> Iterator[tuple[int, list[Meeting]]]:
        """For each column offset, what is met there."""
        reads: dict[int, list[Meeting]] = {}
        for meeting in self.horizontal.meetings:
            reads.setdefault(meeting.offset, []).append(meeting)
        yield from sorted(reads.items())


@dataclasses.dataclass(frozen=True)
class Correlation(Problem):
    """A forward pass or an input gradient. Factors are the weights of a column's taps."""

    @property
    def sums(self) -> int:
        """One for each row and phase of the tile: `(row, row phase, column phase)`."""
        return self.tile.rows * self.vertical.target_step * self.horizontal.target_step

    @functools.cached_property
    def loop(self) -> tuple[int, int]:
        """`(trips, shift)` of the loop over columns of taps; `(1, 0)` where there is none.

        Trip t does what `columns` says, with `t` added to columns of taps and
        `t * shift` to offsets.
        """
        first, *others = self.horizontal.meetings
        if self.horizontal.target_step > 1 or len(others) < _MOST_COLUMNS_UNROLLED:
            return 1, 0
        return self.horizontal.taps, others[0].offset - first.offset

    @functools.cached_property
    def columns(self) -> tuple[Column, ...]:
        looped = self.loop != (1, 0)
        first = self.horizontal.meetings[0]
        reads = [(first.offset, [first])] if looped else self._column_reads()
        return tuple(
            Column(
                offset,
                tuple((up, across.tap) for across in meetings for up in range(self.vertical.taps)),
                tuple(
                    (
                        source_row,
                        tuple(
                            (
                                (row * self.vertical.target_step + up.phase)
                                * self.horizontal.target_step
                                + across.phase,
                                index * self.vertical.taps + up.tap,
                            )
                            for row, up in readers
                            for index, across in enumerate(meetings)
                        ),
                    )
                    for source_row, readers in self._row_reads()
                ),
            )
            for offset, meetings in reads
        )


@dataclasses.dataclass(frozen=True)
class KernelGradient(Problem):
    """A kernel gradient. Factors are rows of the output gradient in the tile."""

    @property
    def sums(self) -> int:
        """One for each tap: `(row, column)`."""
        return self.vertical.taps * self.horizontal.taps

    @functools.cached_property
    def columns(self) -> tuple[Column, ...]:
        return tuple(
            Column(
                offset,
                (),
                tuple(
                    (
                        source_row,
                        tuple(
                            (up.tap * self.horizontal.taps + across.tap, row)
                            for row, up in readers
                            for across in meetings
                        ),
                    )
                    for source_row, readers in self._row_reads()
                ),
            )
            for offset, meetings in self._column_reads()
        )

    def splits(self, batch: int) -> tuple[int, int]:
        """How the tiles of a batch are split among programs.

        A program walks over tiles of rows, of all images. There is one for each split,
        tile of columns and tile of channels.

        Returns:
            The number of splits, and of tiles in each but perhaps the last.
        """
        rows, columns, depths = self.blocks
        tiles = batch * rows
        wanted = min(tiles, max(1, _GRADIENT_PROGRAMS // (columns * depths)))
        length = -(-tiles // wanted)
        return -(-tiles // length), length


def forward(spec: ConvSpec, sizes: Sequence[int]) -> Correlation:
    """The forward pass for inputs of `sizes` (height and width)."""
    vertical, horizontal = (_forward_axis(spec, axis, sizes) for axis in (0, 1))
    rows = _equal_parts(vertical.count, _MOST_SUMS)
    tile = _tile(rows, horizontal, spec.groups, channels_a_thread=4)
    return Correlation(vertical, horizontal, spec.groups, tile)


def input_gradient(spec: ConvSpec, sizes: Sequence[int]) -> Correlation:
    """The input gradient for inputs of `sizes` (height and width)."""
    vertical, horizontal = (_gradient_axis(spec, axis, sizes) for axis in (0, 1))
    phases = vertical.target_step * horizontal.target_step
    rows = _equal_parts(vertical.count, max(1, _MOST_SUMS // phases))
    tile = _tile(rows, horizontal, spec.groups, channels_a_thread=4)
    return Correlation(vertical, horizontal, spec.groups, tile)


def kernel_gradient(spec: ConvSpec, sizes: Sequence[int]) -> KernelGradient:
    """The kernel gradient for inputs of `sizes` (height and width)."""
    vertical, horizontal = (_forward_axis(spec, axis, sizes) for axis in (0, 1))
    rows = _equal_parts(vertical.count, _GRADIENT_ROWS)
    few = math.prod(spec.kernel_size) <= _MOST_TAPS_OF_4_CHANNELS
    tile = _tile(rows, horizontal, spec.groups, channels_a_thread=4 if few else 2)
    return KernelGradient(vertical, horizontal, spec.groups, tile)


def _forward_axis(spec: ConvSpec, axis: int, sizes: Sequence[int]) -> Axis:
    before, _ = spec.padding_for(sizes)[axis]
    return Axis(
        source=sizes[axis],
        target=spec.output_length(axis, sizes[axis]),
        source_step=spec.strides[axis],
        target_step=1,
        taps=spec.kernel_size[axis],
        meetings=tuple(
            Meeting(0, tap, tap * spec.dilation_rate[axis] - before)
            for tap in range(spec.kernel_size[axis])
        ),
    )


def _gradient_axis(spec: ConvSpec, axis: int, sizes: Sequence[int]) -> Axis:
    """Input x meets output q through tap u where x + before = q * stride + u * dilation."""
    before, _ = spec.padding_for(sizes)[axis]
    stride, dilation = spec.strides[axis], spec.dilation_rate[axis]
    distances = {
        (phase, tap): phase + before - tap * dilation
        for phase, tap in itertools.product(range(stride), range(spec.kernel_size[axis]))
    }
    return Axis(
        source=spec.output_length(axis, sizes[axis]),
        target=sizes[axis],
        source_step=1,
        target_step=stride,
        taps=spec.kernel_size[axis],
        meetings=tuple(
            Meeting(phase, tap, distance // stride)
            for (phase, tap), distance in distances.items()
            if distance % stride == 0
        ),
    )


def _equal_parts(count: int, most: int) -> int:
    """The size of parts of at most `most` that leave the last one nearly full."""
    return -(-count // -(-count // most)) if count else 1


def _tile(rows: int, horizontal: Axis, channels: int, channels_a_thread: int) -> Tile:
    """The tile that wastes least.

    Waste is counted in loads of a row: those of masked columns and channels, and those
    of columns that a neighbouring program loads too.
    """
    offsets = [meeting.offset for meeting in horizontal.meetings]
    halo = max(offsets) - min(offsets)
    widest, deepest = _power_of_2_from(horizontal.count), _power_of_2_from(channels)
    shapes = [
        (min(_THREADS * channels_a_thread // depth, widest), depth)
        for depth in _DEPTHS
        if depth <= max(_DEPTHS[0], deepest)
    ]

    def loads(shape: tuple[int, int]) -> int:
        columns, depth = shape
        blocks = -(-horizontal.count // columns) * -(-channels // depth)
        return blocks * (columns * horizontal.source_step + halo) * depth

    columns, depth = min(shapes, key=loads)
    return Tile(rows, columns, depth, warps=max(1, columns * depth // (32 * channels_a_thread)))


def _power_of_2_from(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
