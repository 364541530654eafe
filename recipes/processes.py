r"""Several processes that train together, on one machine or on many: JAX only.

Each is started with the same command, and three flags that tell it where the
first process is, how many there are and which one it is:

    python -m recipes.train … --distribution=data_parallel \
        --job_addresses=HOST:PORT --num_processes=2 --process_id=0

Without the flags, Keras's own variables are read: `KERAS_DISTRIBUTION_JOB_ADDRESSES`,
`…_NUM_PROCESSES` and `…_PROCESS_ID`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import keras
import numpy as np
from absl import flags

from diagconv_tf.distribution import from_first_process
from recipes.config import exit_with_line
from recipes.interruption import Interruption, tell_of_saving
from recipes.liveness import Liveness

_VARIABLES = "KERAS_DISTRIBUTION_"

#: JAX's own watch over its processes, seconds. `Liveness` is quicker; this is
#: for a machine that still has its connections, but has stopped.
_HEARTBEAT_SECONDS = 60

#: Of JAX's own goodbye, to which all come together: see `Processes.leave`.
_SHUTDOWN_SECONDS = 3600


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """Where the processes of a run meet.

    Attributes:
        address: `HOST:PORT` of the first process; the port must be free there.
        num_processes: how many there are, at least 2.
        process_index: the number of this one, from 0.
        timeout: seconds in which all of them must have come.

    Raises:
        ValueError: If a number is out of range, or the address is none.
    """

    address: str
    num_processes: int
    process_index: int
    timeout: int = 300

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(
                "Expected --job_addresses to be HOST:PORT of the first process. "
                f"Received: {self.address!r}"
            )
        if self.num_processes < 2:
            raise ValueError(
                f"Expected --num_processes to be at least 2. Received: {self.num_processes}"
            )
        if not 0 <= self.process_index < self.num_processes:
            raise ValueError(
                f"Expected --process_id from 0 to {self.num_processes - 1}. Received: {self.process_index}"
            )

    @property
    def host(self) -> str:
        """Of the first process."""
        return self.address.rpartition(":")[0].strip("[]")


def define_flags() -> None:
    """The flags of a process. They are no settings: each process has other values."""
    flags.DEFINE_string(
        "job_addresses", None, "HOST:PORT of the first of several processes (JAX backend)"
    )
    flags.DEFINE_integer("num_processes", None, "how many processes train together")
    flags.DEFINE_integer("process_id", None, "the number of this one, from 0")
    flags.DEFINE_integer(
        "join_timeout", 300, "seconds to wait for the other processes", lower_bound=1
    )


def group_from_flags(flag_values: flags.FlagValues = flags.FLAGS) -> ProcessGroup | None:
    """What flags or variables say; None where they say nothing.

    Raises:
        ValueError: If they are incomplete or wrong.
    """
    names = ("job_addresses", "num_processes", "process_id")
    values: dict[str, Any] = {}
    for name in names:
        value = flag_values[name].value
        if value is None:
            value = os.environ.get(f"{_VARIABLES}{name.upper()}")
        if value is not None:
            values[name] = value
    if not values:
        return None
    if len(values) < len(names):
        missing = ", ".join(f"--{name}" for name in names if name not in values)
        raise ValueError(
            f"Expected --{', --'.join(names)} together. Received: no {missing}",
        )
    try:
        numbers = [int(values[name]) for name in names[1:]]
    except ValueError as error:
        raise ValueError(f"Expected --num_processes and --process_id as numbers: {error}") from None
    # As Keras takes it: of several addresses, the first one counts.
    address = str(values["job_addresses"]).partition(",")[0]
    return ProcessGroup(address, *numbers, flag_values["join_timeout"].value)


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
        self._liveness: Liveness | None = None
        # JAX compares the numbers of steps it is asked about with one that it has
        # chosen among those to come: they must not begin anew with each variant.
        self._steps = itertools.count(1)

    @classmethod
    def join(cls, group: ProcessGroup | None) -> Processes:
        """Meets the others; before anything is computed.

        Raises:
            ValueError: If the backend cannot do it.
            TimeoutError: If this process comes, but others do not answer.
        """
        if group is None:
            return cls()
        if keras.backend.backend() != "jax":
            raise ValueError(
                "Expected the JAX backend for several processes: KERAS_BACKEND=jax. Received: "
                f"{keras.backend.backend()}"
                + (
                    ", whose MultiWorkerMirroredStrategy is broken with `fit` in Keras 3.15 "
                    "(keras#20585)"
                    if keras.backend.backend() == "tensorflow"
                    else ""
                )
            )
        import jax

        self = cls(group.process_index, group.num_processes)
        # Not `keras.distribution.initialize`: it passes on no time-outs. And JAX
        # would end the process with a stack trace: this is earlier.
        with _Deadline(group):
            jax.distributed.initialize(
                group.address,
                group.num_processes,
                group.process_index,
                initialization_timeout=2 * group.timeout,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            )
            self._liveness = Liveness(group.process_index, group.num_processes)
            port = self._liveness.listen() if self.is_first else 0
            port = int(self.from_first(str(port)))
            self._liveness.connect(group.host, port, group.timeout)
        return self

    @property
    def is_first(self) -> bool:
        """Whether this one writes the files, and prints."""
        return self.process_index == 0

    def leave(self) -> None:
        """At the end: waits for all others, and says goodbye."""
        if self._liveness is None:
            return
        import jax

        # The first one may be exporting a large model, for longer than a collective waits.
        self.from_first("")
        self.agree("end", "")
        self._liveness.close()
        jax.distributed.shutdown()

    def end_with_line(self, message: str, code: int) -> NoReturn:
        """Ends this process with `message` on one line of stderr.

        Where the others do not end by themselves, for the same reason, they
        notice it.
        """
        if self._liveness is None:
            exit_with_line(message, code)
        self._liveness.stop()
        try:
            exit_with_line(message, code)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # At a regular end JAX waits for processes that may have ended, and aborts.
            os._exit(code)

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Whatever ends this process inside, the others notice it.

        Else JAX would wait at the end of this process for the others, and these
        for it.
        """
        try:
            yield
        except SystemExit:
            raise  # After a goodbye.
        except BaseException as error:
            if self._liveness is None:
                raise
            traceback.print_exc()
            self.end_with_line("".join(traceback.format_exception_only(error)), code=1)

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


class _Deadline:
    """Ends the process in one line, if it is not left in time.

    For JAX's own calls, which cannot be interrupted.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._timer = threading.Timer(group.timeout, self._end)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        group = self._group
        who = (
            f"the {group.num_processes - 1} other processes to connect to this one, at {group.address}"
            if group.process_index == 0
            else f"all {group.num_processes} processes to meet at {group.address}"
        )
        line = f"error: Expected {who}. Received: not all of them in {group.timeout} seconds\n"
        os.write(sys.stderr.fileno(), line.encode())
        os._exit(1)
