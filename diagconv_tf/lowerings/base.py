"""What a lowering is."""

from __future__ import annotations

import abc
import math
from typing import Any

from diagconv_tf.spec import ConvSpec, Pass

#: Unit roundoff: half the distance from 1 to the next larger number.
_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}

#: TensorFloat-32 keeps 11 significant bits of each factor (NVIDIA A100 Tensor Core GPU
#: Architecture, 'TF32'), and sums in float32.
_TF32_ROUNDOFF = 2.0**-11


class Lowering(abc.ABC):
    """One exact way to compute the three passes of a `ConvSpec`.

    Laws, tested for every lowering:

    - where `why_not` has no reason, the result equals the framework's own
      convolution within the rounding of `spec.compute_dtype`;
    - the passes are linear in each argument and each other's derivatives;
    - tensors come in the layout of `spec.data_format`, batch and size may be
      unknown where the backend traces with unknown sizes;
    - lowerings are values: equal where `name` is equal, hashable, printable.

    Shapes are those of `ConvSpec`.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The string that `parse` turns into this lowering."""

    @abc.abstractmethod
    def why_not(self, spec: ConvSpec) -> list[str]:
        """Every reason why it cannot compute `spec`; [] where it can."""

    def has_own_gradients(self, spec: ConvSpec, inputs: Any) -> bool:
        """Whether a layer with this lowering for every pass is differentiated by the passes below.

        Else the framework differentiates `forward`.

        Args:
            spec: the workload.
            inputs: tensor of `spec.input_shape`, which may be traced.
        """
        return False

    @abc.abstractmethod
    def forward(self, spec: ConvSpec, inputs: Any, kernel: Any) -> Any:
        """The outputs."""

    @abc.abstractmethod
    def input_gradient(
        self, spec: ConvSpec, output_gradient: Any, kernel: Any, input_shape: tuple
    ) -> Any:
        """The derivative by the inputs, which have `input_shape`."""

    @abc.abstractmethod
    def kernel_gradient(self, spec: ConvSpec, inputs: Any, output_gradient: Any) -> Any:
        """The derivative by the kernel."""

    @abc.abstractmethod
    def runs_standard_convolutions(self, spec: ConvSpec) -> bool:
        """Whether it computes `spec` by standard or grouped convolutions.

        Frameworks compute these in TensorFloat-32 where the device has it and
        the user has not switched it off. They do not do so in elementwise work
        and in depthwise kernels of their own.
        """

    def runs_framework_convolutions(self, spec: ConvSpec) -> bool:
        """Whether it computes `spec` by any convolution of the framework.

        Some of these fail, or return other shapes, where a batch has no images.
        """
        return self.runs_standard_convolutions(spec)

    def tolerance(self, spec: ConvSpec, pass_name: Pass, allows_tf32: bool) -> float:
        """The largest relative error of one pass that rounding explains.

        The error is that of the whole tensor, by norm, from the same pass of
        the same inputs in float64.

        Rounding errors of a sum of n terms grow like the root of n times the
        unit roundoff (Higham, Accuracy and Stability of Numerical Algorithms,
        2nd edition, section 2.8: the rule of thumb for statistically
        independent errors). The result is rounded once more to its dtype. The
        factors 4 and 16 leave room. Sums of half precision are made in float32.
        The zeros in a diagonal kernel add exactly, so all lowerings sum as many
        terms.

        Args:
            spec: the workload; unknown sizes count as 1.
            pass_name: the pass.
            allows_tf32: whether the device has TensorFloat-32, switched on.
                It matters in float32, for standard and grouped convolutions.
        """
        terms = {
            "forward": math.prod(spec.kernel_size) * spec.input_channels_per_group,
            "input_gradient": math.prod(spec.kernel_size) * spec.output_channels_per_group,
            "kernel_gradient": math.prod(n or 1 for n in (spec.batch, *spec.output_size)),
        }[pass_name]
        rounded = _ROUNDOFF[spec.compute_dtype]
        summed = min(rounded, _ROUNDOFF["float32"])
        uses_tf32 = allows_tf32 and self.runs_standard_convolutions(spec)
        if spec.compute_dtype == "float32" and uses_tf32:
            rounded = _TF32_ROUNDOFF
        return 16 * rounded + 4 * math.sqrt(terms) * summed

    def __str__(self) -> str:
        return self.name
