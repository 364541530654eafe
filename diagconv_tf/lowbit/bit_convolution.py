"""Products of small integers by AND and population count (arXiv 1606.06160, equation 3).

With unsigned codes x and y of M and K bits, and c_m(x) the vector of their m-th bits,

    x · y = Σ_m Σ_k 2^(m+k) · popcount(and(c_m(x), c_k(y))).

A vector's m-th bits are packed into 32-bit words, so that one AND and one population count
serve 32 elements. Everything is integer arithmetic, and exact, on every backend.

Quantized tensors are not always unsigned codes. What DoReFa calls a weight of k bits is an odd
integer between -n and n, with n = 2**k - 1. `CodeGrid` says how integers follow from codes:
`integer = step * code + offset`; then

    Σ x y = s_x s_y Σ u v + s_x o_y Σ u + o_x s_y Σ v + o_x o_y · length,

of which only the first sum takes bits. An image is padded with integers 0. These need not be
on the grid, so there `length` and Σ v count what lies inside the image.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

#: Bits of a word. Signed, because PyTorch has no arithmetic of unsigned ones.
_WORD_BITS = 32

#: Terms of AND and population count in one turn of the loop over words. XLA fuses a turn
#: into one loop over the results; more terms compile for longer and gain nothing.
_TERMS_OF_A_TURN = 64


@dataclasses.dataclass(frozen=True)
class CodeGrid:
    """The integers that codes stand for: `step * code + offset`.

    Attributes:
        bits: bits of a code; it is at least 0 and below `2**bits`.
        is_odd: whether the integers are the odd ones from `-(2**bits - 1)` to
            `2**bits - 1`; else they are the codes.

    Raises:
        ValueError: if `bits` is not from 1 to 8.
    """

    bits: int
    is_odd: bool = False

    def __post_init__(self) -> None:
        if self.bits not in range(1, 9):
            raise ValueError(f"Expected `bits` to be from 1 to 8. Received: {self.bits!r}")

    @property
    def step(self) -> int:
        return 2 if self.is_odd else 1

    @property
    def offset(self) -> int:
        return 1 - 2**self.bits if self.is_odd else 0

    @property
    def largest(self) -> int:
        """The largest integer, which is the largest code as well."""
        return 2**self.bits - 1


@dataclasses.dataclass(frozen=True)
class PackedKernel:
    """The integers of a kernel, as `dense` and `convolve` take them.

    Attributes:
        words: int32, `(words, bits, taps * outputs)`: of each tap and output, the bits of
            its input channels.
        sums: int32, `(taps, outputs)`: codes, summed over the input channels.
        grid: the grid of its integers.
        kernel_size: height and width; `(1, 1)` for a matrix.
        channels: input channels.
        outputs: output channels.
    """

    words: Any
    sums: Any
    grid: CodeGrid
    kernel_size: tuple[int, int]
    channels: int
    outputs: int

    @classmethod
    def of(cls, integers: np.ndarray, grid: CodeGrid) -> PackedKernel:
        """Packs a kernel.

        Args:
            integers: `(height, width, input channels, outputs)`, or
                `(input channels, outputs)` for a matrix.
            grid: the grid that they lie on.

        Raises:
            ValueError: if one does not lie on it.
        """
        integers = np.asarray(integers).astype("int64")
        if integers.ndim == 2:
            integers = integers[None, None]
        codes: np.ndarray = (integers - grid.offset) // grid.step
        off_grid = (codes * grid.step + grid.offset != integers) | (codes < 0)
        if (off_grid | (codes > grid.largest)).any():
            raise ValueError(
                f"Expected integers of {grid}. Received: {integers.min()} to {integers.max()}"
            )
        height, width, channels, outputs = integers.shape
        columns = codes.transpose(2, 0, 1, 3).reshape(channels, -1)
        planes = np.stack([columns >> bit & 1 for bit in range(grid.bits)])
        padded = np.pad(planes, ((0, 0), (0, -channels % _WORD_BITS), (0, 0))).astype("uint32")
        shifts: np.ndarray = np.arange(_WORD_BITS, dtype="uint32")[:, None]
        words = (padded.reshape(grid.bits, -1, _WORD_BITS, columns.shape[1]) << shifts).sum(2)
        return cls(
            words=words.astype("uint32").view("int32").transpose(1, 0, 2),
            sums=codes.sum(2).reshape(height * width, outputs).astype("int32"),
            grid=grid,
            kernel_size=(height, width),
            channels=channels,
            outputs=outputs,
        )

    def check_sums(self, inputs: CodeGrid) -> None:
        """Refuses products whose sums may not fit 32 bits.

        Raises:
            ValueError: if they may not.
        """
        terms = self.kernel_size[0] * self.kernel_size[1] * self.channels
        if inputs.largest * self.grid.largest * terms >= 2**31:
            raise ValueError(
                f"Expected sums below 2**31. Received: {terms} products of {inputs.bits} and "
                f"{self.grid.bits} bits"
            )


def dense(codes: Any, grid: CodeGrid, kernel: PackedKernel) -> Any:
    """The product of integers and a matrix of integers.

    Args:
        codes: int32 codes, `(..., channels)`.
        grid: the grid of their integers.
        kernel: a packed matrix.

    Returns:
        int32, `(..., outputs)`: sums of products of integers.

    Raises:
        ValueError: if sums may not fit 32 bits.
    """
    shape = ops.shape(codes)
    image = ops.reshape(codes, (-1, 1, 1, kernel.channels))
    return ops.reshape(convolve(image, grid, kernel), (*shape[:-1], kernel.outputs))


def convolve(
    codes: Any,
    grid: CodeGrid,
    kernel: PackedKernel,
    strides: Sequence[int] = (1, 1),
    dilation_rate: Sequence[int] = (1, 1),
    padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0)),
) -> Any:
    """The convolution of an image of integers with a kernel of integers.

    Args:
        codes: int32 codes, `(batch, height, width, channels)`; height and width are known.
        grid: the grid of their integers.
        kernel: a packed kernel.
        strides: of height and width.
        dilation_rate: of height and width.
        padding: integers 0 before and after, of height and width.

    Returns:
        int32, `(batch, height, width, outputs)`: sums of products of integers.

    Raises:
        ValueError: if sums may not fit 32 bits.
    """
    kernel.check_sums(grid)
    axes = zip(codes.shape[1:3], kernel.kernel_size, strides, dilation_rate, padding, strict=True)
    windows = _Windows(*(_Axis(*axis) for axis in axes))
    height, width = windows.vertical.outputs, windows.horizontal.outputs
    weights = kernel.grid
    # Of codes that are 0 where the image is padded: nothing is added there.
    total = grid.step * weights.step * _bit_products(windows, codes, grid.bits, kernel)
    if weights.offset:
        inside = sum(windows.of(ops.sum(codes, axis=3, keepdims=True)))
        total += grid.step * weights.offset * ops.reshape(inside, (-1, 1))
    if grid.offset:
        covered = ops.convert_to_tensor(windows.covered())
        per_tap = weights.step * kernel.sums + weights.offset * kernel.channels
        constant = sum(covered[:, tap, None] * per_tap[tap] for tap in range(len(windows.taps)))
        total = ops.reshape(total, (-1, height * width, kernel.outputs)) + grid.offset * constant
    return ops.reshape(total, (-1, height, width, kernel.outputs))


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Height or width of an image, and which part of it each row or column of a kernel meets."""

    size: int
    kernel_size: int
    stride: int
    dilation_rate: int
    padding: tuple[int, int]

    @property
    def outputs(self) -> int:
        extent = (self.kernel_size - 1) * self.dilation_rate + 1
        return (self.size + sum(self.padding) - extent) // self.stride + 1

    def window(self, tap: int) -> slice:
        """Of the padded image."""
        first = tap * self.dilation_rate
        return slice(first, first + (self.outputs - 1) * self.stride + 1, self.stride)

    def is_inside(self, tap: int) -> np.ndarray:
        """For each output, whether the tap meets the image, not the padding."""
        window = self.window(tap)
        positions: np.ndarray = np.arange(window.start, window.stop, window.step) - self.padding[0]
        return (positions >= 0) & (positions < self.size)


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Which pixels each tap of a kernel meets."""

    vertical: _Axis
    horizontal: _Axis

    @property
    def taps(self) -> list[tuple[int, int]]:
        """Row and column of each tap."""
        return list(
            itertools.product(range(self.vertical.kernel_size), range(self.horizontal.kernel_size))
        )

    def of(self, image: Any) -> list[Any]:
        """What each tap meets of an image `(batch, height, width, channels)`, padded with 0."""
        widths = ((0, 0), self.vertical.padding, self.horizontal.padding, (0, 0))
        if any(map(any, widths)):
            image = ops.pad(image, widths)
        return [
            image[:, self.vertical.window(row), self.horizontal.window(column)]
            for row, column in self.taps
        ]

    def covered(self) -> np.ndarray:
        """int32, `(height * width, taps)`: 1 where a tap meets the image, 0 in the padding."""
        inside = [
            self.vertical.is_inside(row)[:, None] & self.horizontal.is_inside(column)
            for row, column in self.taps
        ]
        return np.stack([tap.ravel() for tap in inside], axis=1).astype("int32")


def _bit_products(windows: _Windows, codes: Any, bits: int, kernel: PackedKernel) -> Any:
    """Σ u v for every pixel and output: int32, `(pixels, outputs)`."""
    words = _pack(codes, bits)
    length = words.shape[3]
    image = ops.reshape(words, (*ops.shape(words)[:3], length * bits))
    # The words of a tap lie one after another: (words, bits, pixels), (words, bits, outputs).
    inputs = ops.concatenate(
        [
            ops.reshape(ops.transpose(window, (3, 0, 1, 2)), (length, bits, -1))
            for window in windows.of(image)
        ]
    )
    taps = len(windows.taps)
    weights = ops.reshape(kernel.words, (length, kernel.grid.bits, taps, kernel.outputs))
    weights = ops.reshape(
        ops.transpose(weights, (2, 0, 1, 3)), (taps * length, kernel.grid.bits, kernel.outputs)
    )
    return _sum_of_terms(inputs, weights)


def _pack(codes: Any, bits: int) -> Any:
    """`(batch, height, width, channels)` → `(batch, height, width, words, bits)`, int32."""
    batch, height, width, channels = ops.shape(codes)
    missing = -channels % _WORD_BITS
    codes = ops.pad(ops.cast(codes, "int32"), ((0, 0), (0, 0), (0, 0), (0, missing)))
    words = (channels + missing) // _WORD_BITS
    codes = ops.reshape(codes, (batch, height, width, words, _WORD_BITS))
    places = ops.convert_to_tensor(np.arange(_WORD_BITS, dtype="int32"))
    planes = [
        # No two terms share a bit, so that the sum is their union.
        ops.sum(ops.left_shift(_bit(codes, bit), places), axis=-1)
        for bit in range(bits)
    ]
    return ops.cast(ops.stack(planes, axis=-1), "int32")


def _bit(codes: Any, bit: int) -> Any:
    return ops.bitwise_and(ops.right_shift(codes, _constant(bit)), _constant(1))


def _sum_of_terms(inputs: Any, weights: Any) -> Any:
    """Equation 3 for all pairs of a pixel and an output.

    Args:
        inputs: int32, `(words, bits, pixels)`.
        weights: int32, `(words, bits, outputs)`.
    """
    words, input_bits, _ = inputs.shape
    kernel_bits, outputs = weights.shape[1:]
    turn = max(1, _TERMS_OF_A_TURN // (input_bits * kernel_bits))

    def add_words(total: Any, some_inputs: Any, some_weights: Any, count: int) -> Any:
        for word, m, k in itertools.product(range(count), range(input_bits), range(kernel_bits)):
            both = ops.bitwise_and(some_inputs[word, m][:, None], some_weights[word, k][None])
            total += ops.left_shift(_population_count(both), _constant(m + k))
        return total

    total = ops.zeros((ops.shape(inputs)[2], outputs), "int32")
    turns, rest = divmod(words, turn)
    if turns > 1:

        def turn_of(tensor: Any, index: Any) -> Any:
            return ops.slice(tensor, (index * turn, 0, 0), (turn, *ops.shape(tensor)[1:]))

        def add_turn(index: Any, total: Any) -> Any:
            return add_words(total, turn_of(inputs, index), turn_of(weights, index), turn)

        total = ops.fori_loop(0, turns, add_turn, total)
        return add_words(total, inputs[turns * turn :], weights[turns * turn :], rest)
    return add_words(total, inputs, weights, words)


def _population_count(words: Any) -> Any:
    """The number of 1 bits of each int32 word, as int32."""
    if keras.backend.backend() == "jax":
        from jax import lax

        return lax.population_count(words)
    # Sums of neighbouring bits, then of pairs, nibbles and bytes (H. S. Warren, Hacker's
    # Delight, 2nd edition, section 5-1). The masks take off what signed shifts bring in.
    pairs = words - ops.bitwise_and(ops.right_shift(words, _constant(1)), _constant(0x55555555))
    nibbles = ops.bitwise_and(pairs, _constant(0x33333333)) + ops.bitwise_and(
        ops.right_shift(pairs, _constant(2)), _constant(0x33333333)
    )
    counts = ops.bitwise_and(
        nibbles + ops.right_shift(nibbles, _constant(4)), _constant(0x0F0F0F0F)
    )
    return ops.right_shift(counts * _constant(0x01010101), _constant(24))


def _constant(value: int) -> Any:
    return ops.convert_to_tensor(np.array(value, "int32"))
