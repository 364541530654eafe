"""Which lowerings are worth the time to measure, and in which order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from diagconv_tf.environment import Conditions
from diagconv_tf.lowerings import LoweringLike, parse, why_not
from diagconv_tf.spec import PASSES, STOCK, ConvSpec
from diagconv_tf.tuning.workloads import LayersOfWorkload, Workload

#: Layer path → lowering; a layer that is not named is stock.
Variant = Mapping[str, LoweringLike]

#: Kernel taps times input channels of a group. `"shifted"` makes a product for
#: each: a compiler fuses them into one loop, and takes time for each of them.
MOST_SHIFTS_COMPILED = 64
#: Without a compiler each product is a pass through memory. (Measured on a CPU: with
#: 3x3 kernels a whole training step takes 1.4 times as long as with the framework's op.)
MOST_SHIFTS_UNCOMPILED = 25

#: `"dense"` does as many times the multiplications as there are channels. It is
#: measured up to so many.
MOST_DENSE_CHANNELS = 128

#: On GPUs the kernel gradient is where the frameworks' own op loses most
#: (tensorflow#41715); a prediction, no GPU has been measured yet.
_OWN_KERNEL_GRADIENT = {**dict.fromkeys(PASSES, "native"), "kernel_gradient": "diagonal:32"}


def contest_variants(
    groups: Sequence[LayersOfWorkload], conditions: Conditions
) -> dict[str, Variant]:
    """The variants of a whole model that are timed against stock.

    Each gives all layers one choice; layers that it does not suit stay stock.
    What compiles slowly comes last. (Measured for MobileNetV1 with XLA on a CPU: first
    steps of 5 s with `"shifted"`, 11 to 14 s with `"diagonal:32"`.)

    Args:
        groups: the layers of the model by workload.
        conditions: where the model will train.

    Returns:
        Name → variant, without empty ones and repetitions.
    """
    lowerings: list[LoweringLike] = ["native", "shifted", "diagonal:32"]
    if conditions.device_kind != "cpu":
        lowerings = ["native", "shifted", "diagonal_grouped:32", _OWN_KERNEL_GRADIENT, lowerings[2]]
    variants: dict[str, Variant] = {}
    for lowering in lowerings:
        variant = {
            row.path: found
            for group in groups
            if (found := _for_workload(group.workload, lowering, conditions)) is not None
            for row in group.rows
            if not any(why_not(spec, found) for spec in row.specs)
        }
        if variant and variant not in variants.values():
            variants[str(parse(lowering))] = variant
    return variants


def layer_candidates(workload: Workload, conditions: Conditions) -> list[str]:
    """What is measured of one workload alone: stock first, then lowerings."""
    names = ["native", "shifted", "diagonal:32", "dense", "diagonal_grouped:32"]
    if conditions.device_kind == "cpu" and conditions.compiled:
        # XLA:CPU takes seconds for the kernel gradient of grouped convolutions.
        names.remove("diagonal_grouped:32")
    found = (_for_workload(workload, name, conditions) for name in names)
    return [STOCK, *dict.fromkeys(name for name in found if isinstance(name, str))]


def _for_workload(
    workload: Workload, lowering: LoweringLike, conditions: Conditions
) -> LoweringLike | None:
    """`lowering` in its plainest form; None where it is not possible, sensible or new."""
    if not isinstance(lowering, str):
        return None if why_not(workload.spec, lowering) else lowering
    name = _plainest(workload.spec, lowering)
    if name is None or (name == "native" and workload.native_is_stock):
        return None
    return name if _is_sensible(workload.spec, name, conditions) else None


def _plainest(spec: ConvSpec, name: str) -> str | None:
    """The plainest name for what `name` does; None where it does what native does."""
    number = name.partition(":")[2]
    if not number:
        return name
    if int(number) < 2 * spec.input_channels_per_group:
        return None  # Blocks of one group.
    return "dense" if int(number) >= spec.input_channels else name


def _is_sensible(spec: ConvSpec, name: str, conditions: Conditions) -> bool:
    if why_not(spec, name):
        return False
    if name == "dense":
        return spec.input_channels <= MOST_DENSE_CHANNELS
    if name == "shifted":
        shifts = math.prod(spec.kernel_size) * spec.input_channels_per_group
        return shifts <= (MOST_SHIFTS_COMPILED if conditions.compiled else MOST_SHIFTS_UNCOMPILED)
    return True
