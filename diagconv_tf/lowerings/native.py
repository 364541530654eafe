"""`"native"`: the framework's own op."""

from __future__ import annotations

import dataclasses
from typing import Any

from diagconv_tf import backends
from diagconv_tf.lowerings import gathered_sum
from diagconv_tf.lowerings.base import Lowering
from diagconv_tf.spec import ConvSpec


@dataclasses.dataclass(frozen=True)
class Native(Lowering):
    """The depthwise op where a group has one channel, else the grouped one.

    For `Conv2D(groups=channels)` stock Keras does not run the depthwise op.
    """

    @property
    def name(self) -> str:
        return "native"

    def why_not(self, spec: ConvSpec) -> list[str]:
        return []

    def forward(self, spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
        return backends.current().forward(spec, inputs, kernel)

    def input_gradient(
        self, spec: ConvSpec, output_gradient: Any, kernel: Any, input_shape: tuple
    ) -> Any:
        sizes = [input_shape[axis] for axis in spec.spatial_axes]
        is_strided = max(spec.strides) > 1
        if spec.is_depthwise and is_strided and gathered_sum.fits(output_gradient, sizes):
            # XLA:GPU writes the output gradient to memory with zeros between, and runs a
            # convolution over that: 3 times the least bytes.
            return gathered_sum.input_gradient(spec, output_gradient, kernel, input_shape)
        return backends.current().input_gradient(spec, output_gradient, kernel, input_shape)

    def kernel_gradient(self, spec: ConvSpec, inputs: Any, output_gradient: Any) -> Any:
        return backends.current().kernel_gradient(spec, inputs, output_gradient)

    def runs_standard_convolutions(self, spec: ConvSpec) -> bool:
        return not spec.is_depthwise
