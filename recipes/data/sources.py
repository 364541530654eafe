"""Where the images of a data set are, and in what orders they can be read.

Each class here is one kind of place. All give their examples as a tf.data
dataset of cheap records (an index, or encoded bytes), in their own order or in
one that is a function of a seed, and turn a record into a picture when asked:
so a training that goes on in the middle of an epoch passes over what it has
seen without reading or decoding it.

A *picture* is a uint8 tensor of shape (height, width, 3), or a string tensor
with the bytes of a JPEG, PNG, BMP or GIF file.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from recipes.data.host import on_host, plain, tf
from recipes.data.seeds import fold_in

# Parts of a large set that are read in turns, see `StreamedExamples`.
PIECES_AT_A_TIME = 8


class Examples(Protocol):
    """Pictures with labels."""

    @property
    def count(self) -> int:
        """Number of examples."""

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width where all pictures are pixels of one size, else `None`.

        Where it is not `None`, `read` takes many records at once.
        """

    def in_order(self) -> tf.data.Dataset:
        """All examples as (record, int32 label)."""

    def shuffled(self, seed: tf.Tensor, start: int | tf.Tensor = 0) -> tf.data.Dataset:
        """All examples as (record, int32 label), in an order that `seed` determines.

        Args:
            seed: int64, (2,); may be symbolic.
            start: The number of examples to leave out at the beginning; may be
                symbolic.
        """

    def read(self, records: tf.Tensor) -> tf.Tensor:
        """The picture of a record. Stateless, for parallel maps."""


class IndexedExamples(abc.ABC):
    """Examples that can be read in any order: a record is an index.

    Args:
        labels: int32, (count,).
    """

    def __init__(self, labels: np.ndarray):
        self.labels = np.asarray(labels, "int32")
        with on_host():
            self._labels = tf.constant(self.labels)

    @property
    def count(self) -> int:
        """See `Examples`."""
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int] | None:
        """See `Examples`."""
        return None

    def in_order(self) -> tf.data.Dataset:
        """See `Examples`."""
        return tf.data.Dataset.from_tensor_slices(
            (tf.range(self.count, dtype=tf.int64), self._labels)
        )

    def shuffled(self, seed: tf.Tensor, start: int | tf.Tensor = 0) -> tf.data.Dataset:
        """See `Examples`. Every order is equally likely."""
        order = tf.random.experimental.stateless_shuffle(
            tf.range(self.count, dtype=tf.int64), seed=seed
        )[start:]
        return tf.data.Dataset.from_tensor_slices((order, tf.gather(self._labels, order)))

    @abc.abstractmethod
    def read(self, records: tf.Tensor) -> tf.Tensor:
        """See `Examples`."""


class PixelExamples(IndexedExamples):
    """Pixels in memory.

    Args:
        pixels: uint8, (count, height, width, 3).
        labels: int32, (count,).
    """

    def __init__(self, pixels: np.ndarray | tf.Tensor, labels: np.ndarray):
        super().__init__(labels)
        with on_host():
            # Captured by the datasets' functions, not written into their graphs.
            self._pixels = tf.convert_to_tensor(pixels, tf.uint8)

    @property
    def size(self) -> tuple[int, int]:
        """See `Examples`."""
        _, height, width, _ = self._pixels.shape
        return height, width

    def read(self, records: tf.Tensor) -> tf.Tensor:
        """See `Examples`."""
        return tf.gather(self._pixels, records)


class EncodedExamples(IndexedExamples):
    """Encoded images in memory.

    Args:
        encoded: Strings, (count,).
        labels: int32, (count,).
    """

    def __init__(self, encoded: tf.Tensor, labels: np.ndarray):
        super().__init__(labels)
        self._encoded = encoded

    def read(self, records: tf.Tensor) -> tf.Tensor:
        """See `Examples`."""
        return tf.gather(self._encoded, records)


class FileExamples(IndexedExamples):
    """Image files, read when they are asked for.

    Args:
        paths: One per example.
        labels: int32, (count,).
    """

    def __init__(self, paths: Sequence[str], labels: np.ndarray):
        super().__init__(labels)
        self.paths = tuple(paths)
        with on_host():
            self._paths = tf.constant(self.paths, tf.string)

    def read(self, records: tf.Tensor) -> tf.Tensor:
        """See `Examples`."""
        return tf.io.read_file(tf.gather(self._paths, records))


@dataclass(frozen=True, eq=False)
class StreamedExamples:
    """Encoded images that are read from front to back, because memory cannot hold them.

    A record is a picture. The pieces are read `PIECES_AT_A_TIME` in turns, in
    an order of their own in each epoch, and the examples pass through a
    shuffling buffer: neighbours in one epoch come apart in the next, but not
    every order is equally likely, as it is for `IndexedExamples`.

    Args:
        whole: All examples, as (bytes, label).
        pieces: The same examples in parts of equal length, give or take one.
        count: Number of examples.
        shuffle_buffer: Examples in the shuffling buffer.
    """

    whole: tf.data.Dataset = field(repr=False)
    pieces: Sequence[tf.data.Dataset] = field(repr=False)
    count: int
    shuffle_buffer: int

    @property
    def size(self) -> None:
        """See `Examples`."""
        return None

    def in_order(self) -> tf.data.Dataset:
        """See `Examples`."""
        return self.whole.map(plain(_with_int32_label))

    def shuffled(self, seed: tf.Tensor, start: int | tf.Tensor = 0) -> tf.data.Dataset:
        """See `Examples`. What is left out is read all the same, but not decoded."""
        if tf.inside_function():
            # Dataset.shuffle mixes the global seed into its own. This one is of
            # the function's graph only; with 0, the shuffle takes no tensor.
            tf.random.set_seed(1)
        order = tf.random.experimental.stateless_shuffle(
            tf.range(len(self.pieces), dtype=tf.int64), seed=seed
        )
        turns = -(-self.count // len(self.pieces))
        choices = (
            tf.data.Dataset.from_tensor_slices(order)
            .batch(PIECES_AT_A_TIME)
            # A turn of a piece that has ended is passed over.
            .flat_map(plain(lambda group: tf.data.Dataset.from_tensor_slices(group).repeat(turns)))
        )
        examples = tf.data.Dataset.choose_from_datasets(
            list(self.pieces), choices, stop_on_empty_dataset=False
        )
        one_seed = fold_in(seed, 0)[0]
        shuffled = examples.shuffle(
            self.shuffle_buffer, seed=one_seed, reshuffle_each_iteration=False
        )
        return shuffled.skip(tf.cast(start, tf.int64)).map(plain(_with_int32_label))

    def read(self, records: tf.Tensor) -> tf.Tensor:
        """See `Examples`."""
        return records


def _with_int32_label(picture, label):
    return picture, tf.cast(label, tf.int32)
