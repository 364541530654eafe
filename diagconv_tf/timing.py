"""The clock: it waits for the device, and times functions against each other.

`time_interleaved` times candidates in turn. It waits for the device before it
reads the clock (`synchronize`), keeps the first call apart because it compiles,
and reports `Timings`: all samples in seconds, with median, p10 and p90.
`StepTimer` (step_timer.py) times the training steps of `fit` with the same clock.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import keras
import numpy as np


def synchronize(value: Any = None) -> None:
    """Blocks until the device has finished producing `value`.

    JAX waits for the arrays in `value` only. TensorFlow and PyTorch wait for all
    work on the devices: on TensorFlow, reading `value` back would add a copy and
    would not wait for what does not feed it, such as updates of variables. On
    the CPU a call of either returns when its work is done.

    Args:
        value: Tensor, or lists, tuples and dicts of tensors. Other leaves are
            ignored. `None` waits for no array in particular.

    Raises:
        RuntimeError: Inside a `tf.function`, where nothing can be waited for.
            On some devices errors of the computation itself appear here.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        jax.block_until_ready(value)
    elif backend == "tensorflow":
        _synchronize_tensorflow()
    elif backend == "torch":
        _synchronize_torch()


def _synchronize_tensorflow() -> None:
    import tensorflow as tf

    if not tf.executing_eagerly():
        raise RuntimeError(
            "Expected `synchronize` to be called eagerly. "
            "Received: a call inside a `tf.function` or graph"
        )
    # `sync_devices` takes 30 microseconds even on an idle CPU, as long as some
    # of the functions to be timed: only where something can be running.
    kinds = {device.device_type for device in tf.config.list_logical_devices()}
    if kinds != {"CPU"} or not tf.config.experimental.get_synchronous_execution():
        tf.test.experimental.sync_devices()


def _synchronize_torch() -> None:
    import torch

    # Asking an uninitialised CUDA to synchronise would create its context.
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()


@dataclasses.dataclass(frozen=True)
class Timings:
    """Times of one function or of one training step, in seconds.

    All statistics are `None` where there are no samples.

    Args:
        samples: Tuple of floats, every time that counts, in order.
        first_seconds: Float or `None`: the first call, which traces and
            compiles. It is not among the samples.
        error: The exception that ended the measuring, or `None`.
    """

    samples: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    first_seconds: float | None = None
    error: Exception | None = None

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @property
    def median(self) -> float | None:
        """Median in seconds."""
        return percentile(self.samples, 50)

    @property
    def p10(self) -> float | None:
        """10th percentile in seconds, linearly interpolated."""
        return percentile(self.samples, 10)

    @property
    def p90(self) -> float | None:
        """90th percentile in seconds, linearly interpolated."""
        return percentile(self.samples, 90)

    @property
    def relative_interquartile_range(self) -> float | None:
        """`(p75 - p25) / median`, without unit: the noise of the measurement."""
        if not self.median:
            return None
        return float(np.subtract(*np.percentile(self.samples, (75, 25)))) / self.median

    def __str__(self) -> str:
        if self.error is not None:
            return f"failed: {type(self.error).__name__}: {self.error}"
        return in_milliseconds(self.median, self.p10, self.p90, self.count)


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 20,
    warmup: int = 1,
    calls: int = 1,
    budget_seconds: float | None = None,
    first_calls: bool = True,
    select: Callable[[Mapping[str, Sequence[float]]], Collection[str]] | None = None,
    on_error: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timings]:
    """Times functions in turn: A B C, B C A, C A B, ...

    Each function is called once for its `first_seconds` (tracing, compilation),
    then in `warmup` rounds that are not kept and `rounds` that are. Turns spread
    a slow drift of the machine over all of them; rotation changes who follows
    whom. The wait for the device is part of each time.

    A function that raises an `Exception` is not called again, and the others go
    on. Its `Timings` has the exception in `error` and no samples, so that it
    cannot win by accident. The traceback is dropped: it would keep the arrays
    of the failed call alive.

    Args:
        functions: Mapping from name to a function without arguments. On JAX
            only what a function returns is waited for.
        rounds: Integer, at least 1: samples per function.
        warmup: Integer, at least 0.
        calls: Integer, at least 1: calls one after another that a sample is the
            mean of. The device is waited for after the last: so a GPU need not
            wait for the host between them, as it does not in training. It must
            run them in their order.
        budget_seconds: Float or `None`. Once it is used up, first calls
            included, the measuring ends with the round.
        first_calls: Whether to make the first calls; False means that the
            caller has made them.
        select: Function of all samples so far, or `None`. After each round it
            returns the names that go on; none ends the measuring. Without it
            all functions keep the same number of samples.
        on_error: Function without arguments, or `None`. It is called after a
            function has failed and before the next one runs, to rebuild what
            they share.
        clock: Function that returns the time in seconds.

    Returns:
        A dict from name to `Timings`, in the order of `functions`.

    Raises:
        ValueError: If an argument is out of range, before any function runs.
    """
    functions = dict(functions)
    for name, function in functions.items():
        if not callable(function):
            raise ValueError(
                "Expected `functions` to map names to functions without arguments. "
                f"Received: functions[{name!r}]={function!r}"
            )
    check_whole_number("rounds", rounds, least=1)
    check_whole_number("warmup", warmup, least=0)
    check_whole_number("calls", calls, least=1)
    if budget_seconds is not None and not budget_seconds > 0:
        raise ValueError(
            "Expected `budget_seconds` to be above 0 or None. "
            f"Received: budget_seconds={budget_seconds!r}"
        )

    synchronize()
    start = clock()
    first: dict[str, float] = {}
    errors: dict[str, Exception] = {}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    selected: Collection[str] = functions

    def run_round(number: int, calls: int, keep: Callable[[str, float], Any]) -> None:
        for name in _rotated(list(functions), number):
            if name in errors or name not in selected:
                continue
            try:
                keep(name, _time(functions[name], calls, clock))
            except Exception as error:
                errors[name] = error.with_traceback(None)
                if on_error is not None:
                    on_error()

    def budget_left() -> bool:
        return budget_seconds is None or clock() - start < budget_seconds

    if first_calls:
        run_round(0, 1, first.__setitem__)
    for number in range(warmup):
        if budget_left():
            run_round(number, calls, lambda name, seconds: None)
    for number in range(rounds):
        if selected and (number == 0 or budget_left()):
            run_round(number, calls, lambda name, seconds: samples[name].append(seconds))
            if select is not None:
                selected = select({n: s for n, s in samples.items() if n not in errors})

    return {
        name: Timings(
            samples=() if name in errors else tuple(samples[name]),
            first_seconds=first.get(name),
            error=errors.get(name),
        )
        for name in functions
    }


def _rotated(names: list[str], number: int) -> list[str]:
    shift = number % len(names) if names else 0
    return names[shift:] + names[:shift]


def _time(function: Callable[[], Any], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        # The name keeps the last value alive past the second reading, so that
        # freeing its memory is not timed.
        value = function()
    synchronize(value)
    return (clock() - start) / calls


def percentile(samples: Sequence[float], percent: float) -> float | None:
    """A percentile, linearly interpolated; `None` where there are no samples."""
    if not len(samples):
        return None
    return float(np.percentile(samples, percent))


def in_milliseconds(median: float | None, p10: float | None, p90: float | None, count: int) -> str:
    """Times in seconds as text for people, in milliseconds."""
    if median is None or p10 is None or p90 is None:
        return "not measured"
    times = f"p10 {1e3 * p10:.3f}, p90 {1e3 * p90:.3f}"
    return f"{1e3 * median:.3f} ms (median of {count}, {times})"


def check_whole_number(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless the argument `name` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"Expected `{name}` to be an integer of at least {least}. Received: {name}={value!r}"
        )
