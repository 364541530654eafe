"""Which lowerings are worth the time to measure, and in which order."""

from __future__ import annotations

import math

from diagconv_tf.environment import Conditions
from diagconv_tf.lowerings import why_not
from diagconv_tf.spec import STOCK, ConvSpec
from diagconv_tf.tuning.problems import Problem

#: Kernel taps times input channels of a group. `"shifted"` makes a product for
#: each: a compiler fuses them into one loop, and takes time for each of them.
MOST_SHIFTS_COMPILED = 64
#: Without one each is a pass through memory (measured on a CPU: 3x3 kernels
#: take 1.4 times as long as the framework's own op in a whole training step).
MOST_SHIFTS_UNCOMPILED = 25

#: Up to so many channels one dense convolution is tried: it does as many times
#: the multiplications.
MOST_DENSE_CHANNELS = 128


def first_candidates(problem: Problem, conditions: Conditions) -> list[str]:
    """Stock, and the best known of each kind of lowering; stock comes first."""
    native = [] if problem.native_is_stock else ["native"]
    grouped = [] if conditions.device_kind == "cpu" else ["diagonal_grouped:32"]
    names = [*native, "shifted", "diagonal:32", *grouped]
    return [STOCK, *_possible(problem.spec, names, conditions)]


def further_candidates(problem: Problem, conditions: Conditions) -> list[str]:
    """Other sizes of blocks: worth it where blocks are near the best."""
    names = ["diagonal:16", "diagonal:64", "dense"]
    compiled_for_cpu = conditions.device_kind == "cpu" and conditions.compiled
    if not compiled_for_cpu:
        # XLA:CPU takes seconds for the kernel gradient of grouped convolutions.
        names.append("diagonal_grouped:32")
    known = first_candidates(problem, conditions)
    return [n for n in _possible(problem.spec, names, conditions) if n not in known]


def _possible(spec: ConvSpec, names: list[str], conditions: Conditions) -> list[str]:
    possible = dict.fromkeys(_simplest(spec, name) for name in names)
    return [
        name
        for name in possible
        if name is not None and _is_sensible(spec, name, conditions) and not why_not(spec, name)
    ]


def _simplest(spec: ConvSpec, name: str) -> str | None:
    """The plainest name for what `name` does; None where it is native's work."""
    number = name.partition(":")[2]
    if not number:
        return name
    if int(number) < 2 * spec.input_channels_per_group:
        return None  # Blocks of one group.
    if int(number) >= spec.input_channels:
        return "dense"
    return name


def _is_sensible(spec: ConvSpec, name: str, conditions: Conditions) -> bool:
    if name == "dense":
        return spec.input_channels <= MOST_DENSE_CHANNELS
    if name == "shifted":
        shifts = math.prod(spec.kernel_size) * spec.input_channels_per_group
        compiled = conditions.compiled
        return shifts <= (MOST_SHIFTS_COMPILED if compiled else MOST_SHIFTS_UNCOMPILED)
    return True
