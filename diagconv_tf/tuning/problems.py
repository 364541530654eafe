"""The distinct problems that a model's layers pose."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import keras

from diagconv_tf.inspection import ConvolutionRow, Inspection
from diagconv_tf.spec import ConvSpec


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


@dataclasses.dataclass(frozen=True)
class LayersOfProblem:
    """The layers that pose one problem.

    Attributes:
        problem: what they have in common.
        rows: the layers, in the order of the inspection.
    """

    problem: Problem
    rows: tuple[ConvolutionRow, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(row.path for row in self.rows)

    @property
    def flops(self) -> int:
        """Of one pass of all these layers."""
        return sum(row.flops or 0 for row in self.rows)


def distinct_problems(inspection: Inspection) -> list[LayersOfProblem]:
    """The problems of the layers that can be rewritten, the most FLOPs first."""
    rows_of: dict[Problem, list[ConvolutionRow]] = {}
    for row in inspection.rows:
        if row.eligible and row.main_spec is not None:
            is_conv = isinstance(row.layer, keras.layers.Conv2D)
            problem = Problem(row.main_spec, "conv" if is_conv else "depthwise_conv")
            rows_of.setdefault(problem, []).append(row)
    layers = [LayersOfProblem(problem, tuple(rows)) for problem, rows in rows_of.items()]
    return sorted(layers, key=lambda each: -each.flops)


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
