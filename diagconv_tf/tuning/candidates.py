"""Which lowerings are worth the time to measure, and in which order."""

from __future__ import annotations

import math
from collections.abc import Mapping

import keras

from diagconv_tf.environment import Conditions
from diagconv_tf.inspection import ConvolutionRow, Inspection
from diagconv_tf.lowerings import LoweringLike, parse, why_not
from diagconv_tf.measurements import Workload
from diagconv_tf.spec import PASSES, STOCK, ConvSpec

#: Layer path → lowering; a layer that is not named is stock.
Variant = Mapping[str, LoweringLike]

#: Kernel taps times input channels of a group. `"shifted"` computes a product
#: for each: a compiler fuses them into one loop, and takes time for each of them.
MOST_SHIFTS_COMPILED = 64
#: Without a compiler each product is a pass through memory. (Measured on a CPU: with
#: 3x3 kernels a whole training step takes 1.4 times as long as with the framework's op.)
MOST_SHIFTS_UNCOMPILED = 25

#: `"dense"` multiplies as many times more often as there are channels. It is measured
#: up to this number of channels.
MOST_DENSE_CHANNELS = 128

#: On GPUs the kernel gradient is where the frameworks' own op loses most
#: (tensorflow#41715); a prediction, no GPU has been measured yet.
_OWN_KERNEL_GRADIENTS: tuple[dict[str, str], ...] = tuple(
    {**dict.fromkeys(PASSES, "native"), "kernel_gradient": lowering}
    for lowering in ("shifted", "fused", "diagonal:32")
)


def distinct_workloads(inspection: Inspection) -> list[Workload]:
    """The workloads of the layers that can be rewritten, the most FLOPs first."""
    rows_of: dict[tuple[ConvSpec, str], list[ConvolutionRow]] = {}
    for row, spec, stock_op in _eligible(inspection):
        rows_of.setdefault((spec, stock_op), []).append(row)
    flops = {key: sum(row.flops or 0 for row in rows) for key, rows in rows_of.items()}
    return [
        Workload(*key, layers=tuple(row.path for row in rows_of[key]))
        for key in sorted(rows_of, key=lambda key: -flops[key])
    ]


def contest_variants(inspection: Inspection, conditions: Conditions) -> dict[str, Variant]:
    """The variants of a whole model that are timed against stock.

    Each gives all layers one choice; layers that it does not suit stay stock.
    What compiles slowly comes last.

    Args:
        inspection: of the model.
        conditions: where the model will train.

    Returns:
        Name → variant, without empty ones and repetitions.
    """
    layers = _eligible(inspection)

    def variant(lowering: LoweringLike) -> dict[str, LoweringLike]:
        return {
            row.path: found
            for row, spec, stock_op in layers
            if (found := _plainest(spec, stock_op, lowering, conditions)) is not None
            and not any(why_not(spec, found) for spec in row.specs)
        }

    lowerings: list[LoweringLike] = ["native", "shifted"]
    if conditions.device_kind != "cpu":
        lowerings += ["fused", "diagonal_grouped:32", *_OWN_KERNEL_GRADIENTS, "diagonal:32"]
    elif len(variant("shifted")) < len(layers):
        # Where "shifted" suits all layers, "diagonal:32" has nothing to win on a CPU, and
        # compiles longest. (MobileNetV1: 1.37 and 1.48 times shifted's step under XLA, with
        # 3.0 and 4.5 times stock's compilation; uncompiled 1.31 and 1.55 of stock's step:
        # training_{tensorflow_xla_diagonal,jax_diagonal,tensorflow_graph,torch}_cpu.json.)
        lowerings.append("diagonal:32")
    variants: dict[str, Variant] = {}
    for lowering in lowerings:
        found = variant(lowering)
        if found and found not in variants.values():
            variants[str(parse(lowering))] = found
    return variants


def layer_candidates(workload: Workload, conditions: Conditions) -> list[str]:
    """What is measured of one workload alone: stock first, then lowerings."""
    names = ["native", "shifted", "fused", "diagonal:32", "dense", "diagonal_grouped:32"]
    if conditions.device_kind == "cpu" and conditions.compiled:
        # XLA:CPU takes seconds for the kernel gradient of grouped convolutions.
        names.remove("diagonal_grouped:32")
    found = (_plainest(workload.spec, workload.stock_op, name, conditions) for name in names)
    return [STOCK, *dict.fromkeys(name for name in found if isinstance(name, str))]


def _eligible(inspection: Inspection) -> list[tuple[ConvolutionRow, ConvSpec, str]]:
    """The layers that can be rewritten, with their workloads: spec and stock op."""
    return [
        (row, spec, "conv" if isinstance(row.layer, keras.layers.Conv2D) else "depthwise_conv")
        for row in inspection.rows
        if row.eligible and (spec := row.main_spec) is not None
    ]


def _native_is_stock(spec: ConvSpec, stock_op: str, conditions: Conditions) -> bool:
    """Whether the lowering `"native"` runs what stock runs."""
    # It has an input gradient of its own for strides there.
    if conditions.compiled and conditions.device_kind == "gpu" and max(spec.strides) > 1:
        return False
    return (
        stock_op == "depthwise_conv"
        and spec.is_depthwise
        # Elsewhere frameworks and Keras differ in what their op takes, or in layouts.
        and spec.strides[0] == spec.strides[1]
        and (max(spec.strides) == 1 or max(spec.dilation_rate) == 1)
        and keras.backend.backend() != "torch"
    )


def _plainest(
    spec: ConvSpec, stock_op: str, lowering: LoweringLike, conditions: Conditions
) -> LoweringLike | None:
    """`lowering` in its plainest form; None where it is not possible, sensible or new."""
    if isinstance(lowering, str):
        _, _, width = lowering.partition(":")
        if width and int(width) < 2 * spec.input_channels_per_group:
            return None  # Blocks of one group, as native has.
        if width and int(width) >= spec.input_channels:
            lowering = "dense"
    shifts = math.prod(spec.kernel_size) * spec.input_channels_per_group
    most_shifts = MOST_SHIFTS_COMPILED if conditions.compiled else MOST_SHIFTS_UNCOMPILED
    names = {lowering} if isinstance(lowering, str) else set(lowering.values())
    senseless = (
        (names == {"native"} and _native_is_stock(spec, stock_op, conditions))
        or ("dense" in names and spec.input_channels > MOST_DENSE_CHANNELS)
        or ("shifted" in names and shifts > most_shifts)
    )
    return None if senseless or why_not(spec, lowering) else lowering
