"""Where the images of a data set are, and in what orders they can be read.

Each class here but the last is one kind of place. All give their examples as a tf.data
dataset of cheap records (an index, or encoded bytes), in their own order or in
one that is a function of a seed, and turn a record into a picture when asked:
so a training that goes on in the middle of an epoch passes over what it has
seen without reading or decoding it. Of several processes each gets the examples
of its own share and no others.

A *picture* is a uint8 tensor of shape (height, width, 3), or a string tensor
with the bytes of a JPEG, PNG, BMP or GIF file.
"""

from __future__ import annotations

import abc
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from recipes.data.host import on_host, plain, tf
from recipes.data.seeds import fold_in
from recipes.data.shares import Share, even_parts

# The most parts into which a share of a large set is split, and how many of
# them are read in turns: see `StreamedExamples`.
MAX_PIECES = 32
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

    def in_order(self, share: Share) -> tf.data.Dataset:
        """One process's part of all examples, as (record, int32 label, float32 weight).

        Each example is in the part of one process with weight 1. Those of weight
        0 fill up: all parts are of one length, which the process's replicas divide.

        Args:
            share: Of the process.
        """

    def shuffled(
        self, seed: tf.Tensor, share: Share, first: int | tf.Tensor = 0
    ) -> tf.data.Dataset:
        """One process's part of an epoch, as (record, int32 label).

        No example is in the parts of two processes, or twice in one. There may
        be some more than the whole batches of the epoch take.

        Args:
            seed: It determines the order; int64, (2,); may be symbolic.
            share: Of the process.
            first: The position, of all processes, at which to begin: that of
                the first image of a batch; may be symbolic.
        """

    def read(self, records: tf.Tensor) -> tf.Tensor:
        """The picture of a record. Stateless, for parallel maps."""

    def digest(self) -> str:
        """The same text for the same examples, on every machine, in little time."""


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

    def in_order(self, share: Share) -> tf.data.Dataset:
        """See `Examples`. Batch by batch, the processes' parts are one process's batches."""
        positions = share.positions(share.filled(self.count))
        is_example = positions < self.count
        own = tf.where(is_example, positions, 0)
        return tf.data.Dataset.from_tensor_slices(
            (own, tf.gather(self._labels, own), tf.cast(is_example, tf.float32))
        )

    def shuffled(
        self, seed: tf.Tensor, share: Share, first: int | tf.Tensor = 0
    ) -> tf.data.Dataset:
        """See `Examples`. Every order is equally likely.

        Batch by batch, the processes' parts are one process's batches.
        """
        order = tf.random.experimental.stateless_shuffle(
            tf.range(self.count, dtype=tf.int64), seed=seed
        )
        own = tf.gather(order, share.positions(share.whole(self.count), first))
        return tf.data.Dataset.from_tensor_slices((own, tf.gather(self._labels, own)))

    @abc.abstractmethod
    def read(self, records: tf.Tensor) -> tf.Tensor:
        """See `Examples`."""

    def digest(self) -> str:
        """See `Examples`. Of the labels, in their order."""
        return hashlib.sha256(self.labels.tobytes()).hexdigest()


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

    def digest(self) -> str:
        """See `Examples`. Of labels and paths within the folder that all are in."""
        root = os.path.commonpath(self.paths)
        names = "\0".join(os.path.relpath(path, root) for path in self.paths)
        return hashlib.sha256(f"{super().digest()}{names}".encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class StreamedExamples:
    """Encoded images that are read from front to back, because memory cannot hold them.

    A record is a picture. Of several processes each has a share of its own, one
    of even parts of neighbouring examples, and reads no other. It is the same
    in all epochs: so the system can keep it in its cache of files where the
    memory of all machines together holds the set, though that of one does not.

    A share is read in pieces, `PIECES_AT_A_TIME` of them in turns, in an order
    of their own in each epoch, and the examples pass through a shuffling
    buffer: neighbours in one epoch come apart in the next, but not every order
    is equally likely, as it is for `IndexedExamples`.

    Args:
        stream: Gives the examples from one number up to another, which is not
            among them, as (bytes, label).
        count: Number of examples.
        files: Number of files that they are in. There are no more pieces,
            because one that begins within a file has to pass over the records
            before. Where processes and pieces divide it, these are few.
        shuffle_buffer: Examples in the shuffling buffer of a process.
    """

    stream: Callable[[int, int], tf.data.Dataset] = field(repr=False)
    count: int
    files: int
    shuffle_buffer: int

    @property
    def size(self) -> None:
        """See `Examples`."""
        return None

    def in_order(self, share: Share) -> tf.data.Dataset:
        """See `Examples`. A process's part is its share, and not a part of each batch."""
        start, stop = share.own_part(self.count)
        missing = share.filled(self.count) // share.replicas.num_processes - (stop - start)
        # An example of its own, unless there are more processes than examples.
        start_of_filling = min(start, self.count - 1)
        filling = self.stream(start_of_filling, start_of_filling + 1).repeat(missing)
        filling = filling.map(plain(_with_weight(0.0)))
        if start == stop:
            return filling
        return self.stream(start, stop).map(plain(_with_weight(1.0))).concatenate(filling)

    def shuffled(
        self, seed: tf.Tensor, share: Share, first: int | tf.Tensor = 0
    ) -> tf.data.Dataset:
        """See `Examples`. What is left out is read all the same, but not decoded."""
        if tf.inside_function():
            # Dataset.shuffle mixes the global seed into its own. This one is of
            # the function's graph only; with 0, the shuffle takes no tensor.
            tf.random.set_seed(1)
        processes, process = share.replicas.num_processes, share.replicas.process_index
        if processes > 1:
            # Else shares of one length would have one order, and the images
            # that meet in a batch would meet again in every epoch.
            seed = fold_in(seed, process)
        start, stop = share.own_part(self.count)
        number = max(1, min(MAX_PIECES, self.files // processes))
        with tf.init_scope():  # Once, not in every epoch.
            pieces = [self.stream(*bounds) for bounds in even_parts(start, stop, number)]
        order = tf.random.experimental.stateless_shuffle(
            tf.range(number, dtype=tf.int64), seed=seed
        )
        turns = -(-(stop - start) // number)
        choices = (
            tf.data.Dataset.from_tensor_slices(order)
            .batch(PIECES_AT_A_TIME)
            # A turn of a piece that has ended is passed over.
            .flat_map(plain(lambda group: tf.data.Dataset.from_tensor_slices(group).repeat(turns)))
        )
        examples = tf.data.Dataset.choose_from_datasets(
            pieces, choices, stop_on_empty_dataset=False
        )
        one_seed = fold_in(seed, 0)[0]
        shuffled = examples.shuffle(
            self.shuffle_buffer, seed=one_seed, reshuffle_each_iteration=False
        )
        seen = tf.cast(first // processes, tf.int64)
        return shuffled.skip(seen).map(plain(_with_int32_label))

    def read(self, records: tf.Tensor) -> tf.Tensor:
        """See `Examples`."""
        return records

    def digest(self) -> str:
        """See `Examples`. The number of them alone."""
        return str(self.count)


def _with_int32_label(picture, label):
    return picture, tf.cast(label, tf.int32)


def _with_weight(weight):
    return lambda picture, label: (picture, tf.cast(label, tf.int32), tf.constant(weight))


@dataclass(frozen=True)
class SyntheticExamples:
    """Random patterns, one for each class, in noise.

    Args:
        count: Images in an epoch, nominally: they are one batch, repeated.
        patterns: float32, (classes, size, size, 3), from 0 to 255.
        seed: Of the noise.
    """

    count: int
    patterns: np.ndarray = field(repr=False)
    seed: int = 0

    def digest(self) -> str:
        """See `recipes.data.sources.Examples`."""
        return str(self.count)

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels, uint8 (count, size, size, 3), and labels, int32 (count,)."""
        rng = np.random.default_rng(self.seed)
        labels = (np.arange(count) % len(self.patterns)).astype("int32")
        shape = (count, *self.patterns.shape[1:])
        noise = 32 * rng.standard_normal(shape, dtype="float32")
        return np.clip(self.patterns[labels] + noise, 0, 255).astype("uint8"), labels
