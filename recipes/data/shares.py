"""Which images are whose where several processes share a batch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from diagconv_tf.distribution import Replicas
from recipes.data.host import tf


@dataclass(frozen=True)
class Share:
    """The part that one process has of every batch: as much as any other.

    Positions are counted through all batches, one after another. A process has
    neighbouring ones of each batch.

    Args:
        batch_size: Images in a batch of all processes together.
        replicas: Who shares it; every process has as many of them.

    Raises:
        ValueError: If the replicas do not divide `batch_size`.
    """

    batch_size: int
    replicas: Replicas = Replicas()  # noqa: RUF009 - frozen.

    def __post_init__(self) -> None:
        self.replicas.per_replica_batch(self.batch_size)

    @property
    def own_size(self) -> int:
        """Images in a batch of this process."""
        return self.batch_size // self.replicas.num_processes

    def whole(self, count: int) -> int:
        """Positions of the batches that `count` images fill."""
        return count // self.batch_size * self.batch_size

    def filled(self, count: int) -> int:
        """Positions of batches that have room for `count` images, the last as small as may be."""
        return -(-count // self.replicas.num_replicas) * self.replicas.num_replicas

    def positions(self, stop: int, first: int | tf.Tensor = 0) -> tf.Tensor:
        """The positions of this process.

        Args:
            stop: Number of positions. The last batch may be smaller, but the
                replicas divide it.
            first: Where a batch begins; may be symbolic. Those before it are
                left out.

        Returns:
            int64, increasing.
        """
        processes, process = self.replicas.num_processes, self.replicas.process_index
        own = tf.range(first // processes, stop // processes, dtype=tf.int64)
        batch = own // self.own_size * self.batch_size
        size = tf.minimum(stop - batch, self.batch_size)
        return batch + size // processes * process + own % self.own_size

    def own_part(self, count: int) -> tuple[int, int]:
        """Of `count` examples in a row, the first of this process's part, and the end of it.

        The parts have equal lengths, give or take one.
        """
        return even_parts(0, count, self.replicas.num_processes)[self.replicas.process_index]


def even_parts(start: int, stop: int, number: int) -> list[tuple[int, int]]:
    """The numbers from `start` up to `stop` in parts, the longer ones, by one, first.

    Args:
        start: The first number.
        stop: The end, which is in no part.
        number: Of parts.

    Returns:
        The start and the end of each.
    """
    length, longer = divmod(stop - start, number)
    bounds = [start + part * length + min(part, longer) for part in range(number + 1)]
    return list(itertools.pairwise(bounds))
