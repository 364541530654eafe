"""`lowering="auto"`: a choice from what was measured before, without measuring."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from diagconv_tf.environment import Conditions
from diagconv_tf.lowerings import ACCEPTED, LoweringChoice, LoweringLike, parse
from diagconv_tf.spec import STOCK, ConvSpec

#: What `rewrite` takes for "as `choose` says, layer by layer".
AUTO = "auto"

#: The op of `keras.ops` that a stock layer runs: `conv` for `Conv2D(groups=…)`,
#: `depthwise_conv` for `DepthwiseConv2D` and the depthwise half of `SeparableConv2D`.
StockOp = Literal["depthwise_conv", "conv"]

#: What a choice rests on.
Basis = Literal["measured", "predicted", "unknown"]

#: The largest kernel that was measured has 49 taps (ConvNeXt, 7×7), and the cost of
#: `"shifted"` grows with their number.
_MOST_TAPS = 64


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `choose` recommends.

    Attributes:
        lowering: `"stock"` (leave the layer to Keras), or a layer's `lowering`.
        reason: why, in one line.
        basis: `"measured"`; `"predicted"`, from compiled code that was not run; or
            `"unknown"`, and then `lowering` is `"stock"`.
    """

    lowering: str
    reason: str
    basis: Basis

    def __str__(self) -> str:
        return f"{self.lowering} ({self.basis}: {self.reason})"


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row of the decision table; it holds for both stock ops where `stock_op` is None."""

    backend: str
    device_kind: str
    compiled: bool
    stock_op: StockOp | None
    lowering: str
    basis: Basis
    evidence: str
    least_stride: int = 1

    def fits(self, spec: ConvSpec, conditions: Conditions, stock_op: StockOp) -> bool:
        here = (conditions.backend, conditions.device_kind, conditions.compiled)
        there = (self.backend, self.device_kind, self.compiled)
        is_here = here == there and self.stock_op in (None, stock_op)
        return is_here and max(spec.strides) >= self.least_stride


#: What JAX compiles for an H100 (scripts/predict_gpu.py).
_STRIDES_ON_GPU = (
    "nothing was run: in the code that XLA makes for an H100, the input gradient moves 1.00 "
    "times the least bytes, stock's 2.7 to 3.1 times"
)
_ON_GPU = (
    "nothing was run: in the code that XLA makes for an H100, a step takes at least 7.53 ms "
    "stock, 7.08 shifted (MobileNetV1, float32), 4.04 and 4.14 (bfloat16), 16.8 and 18.3 "
    "(ConvNeXtTiny): how fast cuDNN is decides"
)

_TABLE = (
    _Row(
        "tensorflow", "cpu", True, "depthwise_conv", "shifted", "measured",
        "0.15, 0.13, 0.13 of stock's step for MobileNetV1, MobileNetV2, EfficientNetB0 "
        "(training_tensorflow_xla_cpu.json)",
    ),
    _Row(
        "tensorflow", "cpu", True, "conv", "shifted", "measured",
        "0.21 of stock's step for ConvNeXtTiny (training_tensorflow_xla_convnext_cpu.json)",
    ),
    _Row(
        "tensorflow", "cpu", False, "depthwise_conv", STOCK, "measured",
        "1.31 of stock's step with diagonal:32, 1.94 with shifted for MobileNetV1 "
        "(training_tensorflow_graph_cpu.json)",
    ),
    _Row(
        "tensorflow", "cpu", False, "conv", "native", "measured",
        "0.17 of stock's step for ConvNeXtTiny (plan_tensorflow_graph_convnexttiny_cpu.json)",
    ),
    _Row(
        "jax", "cpu", True, "depthwise_conv", "shifted", "measured",
        "0.21, 0.18, 0.19, 0.33 of stock's step for MobileNetV1, MobileNetV2, EfficientNetB0, "
        "Xception (training_jax_cpu.json, training_jax_large_cpu.json)",
    ),
    _Row(
        "jax", "cpu", True, "conv", "shifted", "measured",
        "0.31 of stock's step for ConvNeXtTiny (training_jax_large_cpu.json)",
    ),
    _Row(
        "torch", "cpu", False, None, STOCK, "measured",
        "1.55 of stock's step with diagonal:32, 1.37 with shifted for MobileNetV1 "
        "(training_torch_cpu.json); Keras runs one op for both kinds of layers",
    ),
    _Row("tensorflow", "gpu", True, None, "native", "predicted", _STRIDES_ON_GPU, 2),
    _Row("tensorflow", "gpu", True, None, STOCK, "predicted", _ON_GPU),
    _Row("jax", "gpu", True, None, "native", "predicted", _STRIDES_ON_GPU, 2),
    _Row("jax", "gpu", True, None, STOCK, "predicted", _ON_GPU),
)  # fmt: skip


def choose(spec: ConvSpec, conditions: Conditions, stock_op: StockOp | None = None) -> Choice:
    """The lowering that is known to train a layer fastest; nothing runs.

    The first row that fits decides. Files are those of `scripts/results/`; ratios
    are of whole training steps, and below 1 is faster than stock.

    {table}

    No row fits, and the choice is `"stock"`, where the conditions are others (GPUs
    without a compiler, TPUs, JAX without a compiler, PyTorch with one), and for
    workloads that were never measured: other dtypes than float32; more than one
    input or output channel a group; more than 64 kernel taps; dilation; strides
    that differ; `"channels_first"`. `tune` measures all of these.

    Args:
        spec: the workload.
        conditions: where the layer is trained. Without `compiled`, which is None
            where it is not known, no row fits.
        stock_op: what the stock layer runs: `"conv"` for `Conv2D(groups=…)`,
            `"depthwise_conv"` for `DepthwiseConv2D` and `SeparableConv2D`. The
            default is `"depthwise_conv"` where each group has one input channel,
            else `"conv"`.

    Returns:
        A `Choice`; printed, it says the lowering, its basis and its reason.

    Raises:
        ValueError: if `stock_op` is another.
    """
    if stock_op is None:
        stock_op = "depthwise_conv" if spec.is_depthwise else "conv"
    if stock_op not in get_args(StockOp):
        raise ValueError(
            f"Expected `stock_op` to be one of {get_args(StockOp)} or None. Received: {stock_op!r}"
        )
    row = next((row for row in _TABLE if row.fits(spec, conditions, stock_op)), None)
    if row is None:
        return Choice(STOCK, f"{_where(conditions)} was not measured", "unknown")
    if not_measured := _not_measured(spec):
        return Choice(STOCK, f"{not_measured} was not measured", "unknown")
    return Choice(row.lowering, row.evidence, row.basis)


def parse_or_auto(lowering: LoweringLike | LoweringChoice) -> LoweringChoice | str:
    """`lowerings.parse` that takes `"auto"` too, which it returns as it is.

    Raises:
        ValueError: if `lowering` is not known; the message lists what is accepted.
    """
    if lowering == AUTO:
        return AUTO
    try:
        return parse(lowering)
    except ValueError as error:
        received = dict(lowering) if isinstance(lowering, dict) else lowering
        raise ValueError(
            f'Expected `lowering` to be "{AUTO}", {ACCEPTED}. Received: lowering={received!r}'
        ) from error


def _where(conditions: Conditions) -> str:
    compiled = {True: "compiled", False: "not compiled", None: "compiled or not"}
    return f"{conditions.backend}, {compiled[conditions.compiled]}, on {conditions.device_kind}"


def _not_measured(spec: ConvSpec) -> str | None:
    """What distinguishes a workload from all that were measured; None where nothing does."""
    if spec.compute_dtype != "float32":
        return spec.compute_dtype
    if not spec.is_depthwise or spec.output_channels_per_group > 1:
        return (
            f"a group of {spec.input_channels_per_group} → {spec.output_channels_per_group} "
            "channels"
        )
    if math.prod(spec.kernel_size) > _MOST_TAPS:
        return f"a kernel of {math.prod(spec.kernel_size)} taps"
    if max(spec.dilation_rate) > 1:
        return "dilation"
    if spec.strides[0] != spec.strides[1]:
        return "a pair of different strides"
    if spec.data_format != "channels_last":
        return spec.data_format
    return None


def _table_text() -> str:
    """The decision table in Markdown."""
    cells = [
        (
            row.backend,
            row.device_kind,
            "yes" if row.compiled else "no",
            row.stock_op or "any",
            "any" if row.least_stride == 1 else f">= {row.least_stride}",
            row.lowering,
            row.basis,
            row.evidence,
        )
        for row in _TABLE
    ]
    head = (
        "backend", "device", "compiled", "stock op", "stride", "lowering", "basis", "evidence"
    )  # fmt: skip
    return "\n    ".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *cells))


if choose.__doc__:  # Python -OO has none.
    choose.__doc__ = choose.__doc__.replace("{table}", _table_text())
