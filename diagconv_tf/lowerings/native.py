"""`"native"`: the framework's own op."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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

    def has_own_gradients(self, spec: ConvSpec, inputs: Any) -> bool:
        return _gathers_gradient(spec, inputs, [inputs.shape[axis] for axis in spec.spatial_axes])

    def forward(self, spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
        return backends.current().forward(spec, inputs, kernel)

    def input_gradient(
        self, spec: ConvSpec, output_gradient: Any, kernel: Any, input_shape: tuple
    ) -> Any:
        sizes = [input_shape[axis] for axis in spec.spatial_axes]
        if _gathers_gradient(spec, output_gradient, sizes):
            return gathered_sum.input_gradient(spec, output_gradient, kernel, input_shape)
        return backends.current().input_gradient(spec, output_gradient, kernel, input_shape)

    def kernel_gradient(self, spec: ConvSpec, inputs: Any, output_gradient: Any) -> Any:
        return backends.current().kernel_gradient(spec, inputs, output_gradient)

    def runs_standard_convolutions(self, spec: ConvSpec) -> bool:
        return not spec.is_depthwise

    def runs_framework_convolutions(self, spec: ConvSpec) -> bool:
        return True


def _gathers_gradient(spec: ConvSpec, tensor: Any, sizes: Sequence[Any]) -> bool:
    """Whether the input gradient is a sum of gathered outputs, not XLA's.

    XLA:GPU writes the output gradient of a strided depthwise convolution to memory with
    zeros between, and runs a convolution over that: 3 times the least bytes
    (scripts/results/predicted_passes.json).

    Args:
        spec: the workload.
        tensor: any tensor of the computation.
        sizes: height and width of the inputs.
    """
    return spec.is_depthwise and max(spec.strides) > 1 and gathered_sum.fits(tensor, sizes)
