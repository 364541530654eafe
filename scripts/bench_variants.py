"""Ways to compute the convolutions of a model that the benchmarks compare, by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from keras import ops

from diagconv_tf import ConvSpec
from diagconv_tf.lowerings import Lowering, LoweringChoice, UniformChoice, parse
from diagconv_tf.spec import PASSES


@dataclasses.dataclass(frozen=True)
class CentreTap(Lowering):
    """The floor: the centre tap of each depthwise kernel. Not the same function."""

    @property
    def name(self) -> str:
        return "floor"

    def why_not(self, spec: ConvSpec) -> list[str]:
        if spec.input_channels_per_group == 1:
            return []
        return ["the floor is defined for one input channel a group"]

    def runs_standard_convolutions(self, spec: ConvSpec) -> bool:
        return False

    def forward(self, spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
        multiplier = spec.output_channels_per_group
        if multiplier > 1:
            inputs = ops.repeat(inputs, multiplier, axis=spec.channel_axis)
        centre = [(k - 1) // 2 for k in spec.kernel_size]
        padding = spec.padding_for((spec.height, spec.width))
        window = [slice(None)] * 4
        for axis in (0, 1):
            first = centre[axis] * spec.dilation_rate[axis] - padding[axis][0]
            last = first + (spec.output_size[axis] - 1) * spec.strides[axis]
            window[spec.spatial_axes[axis]] = slice(first, last + 1, spec.strides[axis])
        shape = [1, 1, 1, 1]
        shape[spec.channel_axis] = spec.output_channels
        return inputs[tuple(window)] * ops.reshape(kernel[centre[0], centre[1], 0], shape)

    def input_gradient(
        self, spec: ConvSpec, output_gradient: Any, kernel: Any, input_shape: tuple
    ) -> Any:
        raise NotImplementedError("The framework differentiates the floor.")

    def kernel_gradient(self, spec: ConvSpec, inputs: Any, output_gradient: Any) -> Any:
        raise NotImplementedError("The framework differentiates the floor.")


def read_variant(variant: str) -> LoweringChoice:
    """The lowering that a variant's name means."""
    if variant == "floor":
        return UniformChoice(CentreTap())
    passes = variant.split("/")
    return parse(variant if len(passes) == 1 else dict(zip(PASSES, passes, strict=True)))
