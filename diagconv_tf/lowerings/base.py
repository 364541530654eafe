"""What a lowering is."""

from __future__ import annotations

import abc
from typing import Any

from diagconv_tf.spec import ConvSpec


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

    #: Whether a layer that uses this lowering for every pass is differentiated
    #: through the passes below instead of by the framework.
    has_own_gradients = False

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The string that `parse` turns into this lowering."""

    @abc.abstractmethod
    def why_not(self, spec: ConvSpec) -> list[str]:
        """Every reason why it cannot compute `spec`; [] where it can."""

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

    def __str__(self) -> str:
        return self.name
