"""A few samples of everything, to tell what is too far from the best to time longer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from diagconv_tf.timing import Timings, time_interleaved

#: A call of less than so many seconds is repeated: one may be interrupted by
#: anything. Of a long one such an interruption is a small part.
SHORT_SECONDS = 0.2
_REPEATS = 4


def first_samples(
    functions: Mapping[str, Callable[[], Any]], clock: Callable[[], float], calls: int = 1
) -> dict[str, Timings]:
    """The first call, which compiles, and one sample of each function; five of a short one.

    Args:
        functions: name → function without arguments.
        clock: returns the time in seconds.
        calls: of a sample; see `time_interleaved`.
    """
    timings = time_interleaved(functions, rounds=1, warmup=0, calls=calls, clock=clock)
    short = {
        name: function
        for name, function in functions.items()
        if timings[name].error is None and timings[name].median < SHORT_SECONDS
    }
    more = time_interleaved(short, rounds=_REPEATS, warmup=0, calls=calls, clock=clock)
    for name, again in more.items():
        timings[name] = dataclasses.replace(
            timings[name], samples=timings[name].samples + again.samples, error=again.error
        )
    return timings
