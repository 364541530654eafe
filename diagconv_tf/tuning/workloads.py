"""The distinct workloads of a model's layers."""

from __future__ import annotations

import dataclasses
from typing import Literal

import keras

from diagconv_tf.inspection import ConvolutionRow, Inspection
from diagconv_tf.measurements import WorkloadMeasurements
from diagconv_tf.spec import ConvSpec


@dataclasses.dataclass(frozen=True)
class Workload:
    """A convolution, and the Keras op with which the stock layer runs it.

    `Conv2D(groups=channels)` and `DepthwiseConv2D` may have equal specs, but
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
            # Elsewhere frameworks and Keras differ in what their op takes, or in layouts.
            and spec.strides[0] == spec.strides[1]
            and (max(spec.strides) == 1 or max(spec.dilation_rate) == 1)
            and keras.backend.backend() != "torch"
        )


@dataclasses.dataclass(frozen=True)
class LayersOfWorkload:
    """The layers that have one workload.

    Attributes:
        workload: what they have in common.
        rows: the layers, in the order of the inspection.
    """

    workload: Workload
    rows: tuple[ConvolutionRow, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(row.path for row in self.rows)

    @property
    def unmeasured(self) -> WorkloadMeasurements:
        """What a plan says of it before any measurement."""
        return WorkloadMeasurements(self.workload.spec, self.workload.stock_op, self.paths)

    @property
    def flops(self) -> int:
        """FLOPs of one pass of all these layers."""
        return sum(row.flops or 0 for row in self.rows)


def distinct_workloads(inspection: Inspection) -> list[LayersOfWorkload]:
    """The workloads of the layers that can be rewritten, the most FLOPs first."""
    rows_of: dict[Workload, list[ConvolutionRow]] = {}
    for row in inspection.rows:
        if row.eligible and row.main_spec is not None:
            is_conv = isinstance(row.layer, keras.layers.Conv2D)
            workload = Workload(row.main_spec, "conv" if is_conv else "depthwise_conv")
            rows_of.setdefault(workload, []).append(row)
    groups = [LayersOfWorkload(workload, tuple(rows)) for workload, rows in rows_of.items()]
    return sorted(groups, key=lambda group: -group.flops)
