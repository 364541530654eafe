"""Which lowerings are worth the time to measure, and in which order."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import keras

from diagconv_tf.inspection import STOCK
from diagconv_tf.lowerings import why_not
from diagconv_tf.spec import Conditions, ConvSpec

#: Kernel taps times input channels of a group. `"shifted"` makes a product for
#: each: a compiler fuses them into one loop, and takes time for each of them.
MOST_SHIFTS_COMPILED = 64
#: Without one each is a pass through memory (measured on a CPU: 3x3 kernels
#: take 1.4 times as long as the framework's own op in a whole training step).
MOST_SHIFTS_UNCOMPILED = 25

#: Up to so many channels one dense convolution is tried: it does as many times
#: the multiplications.
MOST_DENSE_CHANNELS = 128


@dataclasses.dataclass(frozen=True)
class Problem:
    """A convolution, and the Keras op with which the stock layer solves it.

    `Conv2D(groups=channels)` and `DepthwiseConv2D` pose the same problem, and
    Keras runs different ops for them.
    """

    spec: ConvSpec
    stock_op: Literal["depthwise_conv", "conv"]

    @property
    def native_is_stock(self) -> bool:
        """Whether the lowering `"native"` runs what stock runs."""
        spec = self.spec
        return (
            self.stock_op == "depthwise_conv"
            and spec.is_depthwise
            # Where frameworks differ in what their op takes, or in layouts.
            and spec.strides[0] == spec.strides[1]
            and (max(spec.strides) == 1 or max(spec.dilation_rate) == 1)
            and keras.backend.backend() != "torch"
        )


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
        if name is not None
        and _is_sensible(spec, name, conditions)
        and not why_not(spec, name, conditions=conditions)
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


def similarity(spec: ConvSpec, other: ConvSpec) -> float:
    """How far two problems are apart: 0 where equal, infinite where a choice
    for one says nothing of the other.

    The distance is in doublings of height, width, channels and batch.
    """
    same = ("kernel_size", "strides", "dilation_rate", "compute_dtype", "data_format")
    same = (*same, "input_channels_per_group", "output_channels_per_group")
    if any(getattr(spec, name) != getattr(other, name) for name in same):
        return math.inf
    return sum(
        abs(math.log2((getattr(spec, name) or 1) / (getattr(other, name) or 1)))
        for name in ("height", "width", "groups", "batch")
    )
