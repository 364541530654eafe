r"""Several processes that train together, on one machine or on many: JAX only.

Each is started with the same command, and three flags that tell it where the
first process is, how many there are and which one it is:

    python -m recipes.train … --distribution=data_parallel \
        --job_addresses=HOST:PORT --num_processes=2 --process_id=0

Their defaults are Keras's own variables: `KERAS_DISTRIBUTION_JOB_ADDRESSES`,
`…_NUM_PROCESSES` and `…_PROCESS_ID`.

JAX watches over the processes: where one has ended without its goodbye, it
aborts the others (`jax.distributed.initialize`, `heartbeat_timeout_seconds`).
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from absl import flags, logging

from diagconv_tf.distribution import from_first_process
from recipes.interruption import Interruption, tell_of_saving

_GROUP = ("job_addresses", "num_processes", "process_id")


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """The flags of a process. They are no settings: each process has other values."""

    def default(name: str) -> str | None:
        return os.environ.get(f"KERAS_DISTRIBUTION_{name.upper()}")

    address, number, process = _GROUP
    flags.DEFINE_string(
        address,
        default(address),
        "HOST:PORT of the first of several processes (JAX backend)",
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        number, default(number), "how many processes train together", flag_values=flag_values
    )
    flags.DEFINE_integer(
        process, default(process), "the number of this one, from 0", flag_values=flag_values
    )
    flags.DEFINE_integer(
        "join_timeout",
        300,
        "seconds to wait for the other processes",
        lower_bound=1,
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        "heartbeat_timeout",
        100,
        "seconds after which a process that gives no sign of life, or has failed, ends the others",
        lower_bound=1,
        flag_values=flag_values,
    )
    flags.register_multi_flags_validator(_GROUP, _check_group, flag_values=flag_values)


def _check_group(values: dict[str, Any]) -> bool:
    missing = [f"--{name}" for name in _GROUP if values[name] is None]
    if len(missing) == len(_GROUP):
        return True
    if missing:
        raise flags.ValidationError(
            f"Expected --{', --'.join(_GROUP)} together. Received: no {', '.join(missing)}"
        )
    address, number, process = (values[name] for name in _GROUP)
    host, _, port = _first(address).rpartition(":")
    if not host or not port.isdecimal():
        raise flags.ValidationError(f"Expected HOST:PORT of the first process. Received: {address}")
    if not 0 <= process < number:
        raise flags.ValidationError(
            f"Expected a process from 0 to {number - 1}. Received: {process}"
        )
    return True


def _first(addresses: str) -> str:
    # As Keras takes them: of several, the first one counts.
    return addresses.partition(",")[0]


class Processes:
    """This process among those that train together.

    Where there is only one, everything here does nothing.

    Attributes:
        process_index: the number of this one, from 0.
        num_processes: all of them.
    """

    def __init__(self, process_index: int = 0, num_processes: int = 1) -> None:
        self.process_index = process_index
        self.num_processes = num_processes
        # JAX compares the numbers of steps it is asked about with one that it has
        # chosen among those to come: their numbers must not restart with each variant.
        self._steps = itertools.count(1)

    @classmethod
    def join(cls, flag_values: flags.FlagValues = flags.FLAGS) -> Processes:
        """Meets the others, where flags say that there are any; before anything is computed.

        JAX aborts this process if they do not come within `--join_timeout`.

        Raises:
            ValueError: If the backend cannot do it.
        """
        if flag_values.job_addresses is None:
            return cls()
        backend = keras.backend.backend()
        if backend != "jax":
            raise ValueError(
                f"Expected the JAX backend for several processes: KERAS_BACKEND=jax. Received: "
                f"{backend}"
                + (
                    ", whose MultiWorkerMirroredStrategy is broken with `fit` in Keras 3.15 "
                    "(keras#20585)"
                    if backend == "tensorflow"
                    else ""
                )
            )
        import jax

        address = _first(flag_values.job_addresses)
        self = cls(flag_values.process_id, flag_values.num_processes)
        # JAX's own message, when it aborts, does not say for whom it has waited.
        logging.info(
            "Process %d waits up to %d seconds for all %d to meet at %s",
            self.process_index,
            flag_values.join_timeout,
            self.num_processes,
            address,
        )
        # Not `keras.distribution.initialize`: it passes on no time-outs.
        jax.distributed.initialize(
            address,
            self.num_processes,
            self.process_index,
            initialization_timeout=flag_values.join_timeout,
            heartbeat_timeout_seconds=flag_values.heartbeat_timeout,
            # One that has failed waits so long for the others, which wait for it.
            shutdown_timeout_seconds=flag_values.heartbeat_timeout,
        )
        return self

    @property
    def is_first(self) -> bool:
        """Whether this one writes the files, and prints."""
        return self.process_index == 0

    def wait_for_first(self) -> None:
        """At the end: the first process may be writing for longer than JAX waits at an exit."""
        self.from_first("")

    def from_first(self, text: str) -> str:
        """What the first process gave as `text`, in all of them.

        Args:
            text: of the first process; of the others it does not matter.
        """
        if self.num_processes == 1:
            return text
        return from_first_process(lambda: text, self.process_index)

    def agree(self, what: str, value: str) -> None:
        """Makes sure that all processes have the same; waits for all of them.

        Not `multihost_utils.assert_equal`, which says neither what nor whose it is.

        Args:
            what: names it.
            value: what this process has.

        Raises:
            ValueError: In all processes, if two have different values.
        """
        if self.num_processes == 1:
            return
        from jax.experimental import multihost_utils

        digest = np.frombuffer(hashlib.sha256(f"{what}\0{value}".encode()).digest(), "uint8")
        all_digests = np.asarray(multihost_utils.process_allgather(digest))
        others = [n for n, other in enumerate(all_digests) if (other != all_digests[0]).any()]
        if others:
            raise ValueError(
                f"Expected the same {what} in all processes. Received: another one than process "
                f"0's in process {', '.join(map(str, others))}"
            )

    def interruption(self) -> Interruption:
        """Notices signals: in all processes in the same step, whichever got one."""
        return Interruption() if self.num_processes == 1 else _SharedInterruption(self._steps)


class _SharedInterruption(Interruption):
    """A SIGTERM of any process is one of all, in the same step.

    JAX itself notices SIGTERM, and finds a step that no process has begun.

    Args:
        steps: numbers of this process's steps, of all variants. All processes
            ask equally often.
    """

    def __init__(self, steps: Iterator[int]) -> None:
        super().__init__()
        self._steps = steps

    def __enter__(self) -> Interruption:
        return self

    def asked(self, step: int | None = None) -> bool:
        from jax.experimental import multihost_utils

        # During a validation the processes do not ask: they need not be in step.
        if step is not None and multihost_utils.reached_preemption_sync_point(next(self._steps)):
            self.signal_name = "SIGTERM"
            tell_of_saving(self.signal_name)
        return self.signal_name is not None
