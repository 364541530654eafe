"""The `lowering` argument: what users write, and the value it stands for."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import keras

from diagconv_tf import backends
from diagconv_tf.lowerings.base import Lowering
from diagconv_tf.lowerings.diagonal import Diagonal, DiagonalGrouped
from diagconv_tf.lowerings.fused import Fused
from diagconv_tf.lowerings.native import Native
from diagconv_tf.lowerings.shifted import Shifted
from diagconv_tf.spec import PASSES, ConvSpec

#: What users write for one lowering, or for one per pass.
LoweringLike = str | Mapping[str, str]

#: The authors' choice: their code makes `channels / 32` groups.
DEFAULT_LOWERING = "diagonal:32"

_NUMBERED = re.compile(r"(diagonal|diagonal_grouped):([1-9][0-9]*)")

ACCEPTED = (
    '"native", "diagonal:N", "diagonal" (N = 32), "diagonal_grouped:N", "dense", "shifted" or '
    '"fused", with N an integer >= 1; or a dict with one of these for each of the keys '
    + ", ".join(f'"{name}"' for name in PASSES)
)


@dataclasses.dataclass(frozen=True)
class UniformChoice:
    """One lowering for all passes."""

    lowering: Lowering

    def for_pass(self, pass_name: str) -> Lowering:
        return self.lowering

    def to_config(self) -> str:
        """The string that `parse` turns into this choice."""
        return self.lowering.name

    def __str__(self) -> str:
        return self.lowering.name


@dataclasses.dataclass(frozen=True)
class PerPassChoice:
    """One lowering for each pass."""

    forward: Lowering
    input_gradient: Lowering
    kernel_gradient: Lowering

    def for_pass(self, pass_name: str) -> Lowering:
        return getattr(self, pass_name)

    def to_config(self) -> dict[str, str]:
        """The dict that `parse` turns into this choice."""
        return {name: self.for_pass(name).name for name in PASSES}

    def __str__(self) -> str:
        return "/".join(self.to_config().values())


LoweringChoice = UniformChoice | PerPassChoice


def parse(lowering: LoweringLike | LoweringChoice) -> LoweringChoice:
    """The choice that a `lowering` argument stands for.

    Args:
        lowering: a string, a dict of one string per pass, or a choice.

    Raises:
        ValueError: if it is neither; the message lists what is accepted.
    """
    if isinstance(lowering, UniformChoice | PerPassChoice):
        return lowering
    if isinstance(lowering, Mapping) and set(lowering) == set(PASSES):
        return PerPassChoice(**{name: _parse_name(lowering[name], lowering) for name in PASSES})
    return UniformChoice(_parse_name(lowering, lowering))


def _parse_name(name: Any, received: Any) -> Lowering:
    if isinstance(name, str):
        if name == "diagonal":
            name = DEFAULT_LOWERING
        if name == "native":
            return Native()
        if name == "shifted":
            return Shifted()
        if name == "fused":
            return Fused()
        if name == "dense":
            return Diagonal(None)
        if match := _NUMBERED.fullmatch(name):
            kind = Diagonal if match[1] == "diagonal" else DiagonalGrouped
            return kind(int(match[2]))
    if isinstance(received, Mapping):
        received = dict(received)
    raise ValueError(f"Expected `lowering` to be {ACCEPTED}. Received: lowering={received!r}")


def why_not(spec: ConvSpec, lowering: LoweringLike | LoweringChoice) -> list[str]:
    """Every reason why a lowering cannot compute a workload; [] means it can.

    This alone decides support: whatever it does not refuse runs, on every
    backend, device and pass.

    Args:
        spec: the workload.
        lowering: as a layer's `lowering`.

    Raises:
        ValueError: if `lowering` is not known.
    """
    choice = parse(lowering)
    lowerings = dict.fromkeys(choice.for_pass(name) for name in PASSES)
    reasons = (reason for lowering in lowerings for reason in lowering.why_not(spec))
    return list(dict.fromkeys(reasons))


def convolve(spec: ConvSpec, choice: LoweringChoice, inputs: Any, kernel: Any) -> Any:
    """The convolution of `spec`, computed and differentiated as chosen.

    The framework differentiates one lowering for all passes, unless it has
    gradients of its own. One per pass, `"shifted"`, `"fused"`, and `"native"` with
    strides under XLA on GPUs, go through the backend's custom gradients, which
    have no forward mode.

    Args:
        spec: the workload, which `why_not` does not refuse.
        choice: what `parse` returns for a layer's `lowering`.
        inputs: tensor of `spec.input_shape`.
        kernel: tensor of `spec.kernel_shape`.

    Returns:
        A tensor of `spec.output_shape` and the dtype of the inputs.
    """
    backend = backends.current()
    layout = backend.preferred_data_format(spec.data_format)
    if layout != spec.data_format:
        moved = spec.replace(data_format=layout)
        outputs = convolve(moved, choice, to_format(inputs, spec, layout), kernel)
        return to_format(outputs, moved, spec.data_format)
    if isinstance(choice, PerPassChoice) or choice.lowering.has_own_gradients(spec, inputs):
        return backend.differentiable(_Passes(spec, choice), inputs, kernel)
    return _forward(spec, choice.lowering, inputs, kernel)


def _forward(spec: ConvSpec, lowering: Lowering, inputs: Any, kernel: Any) -> Any:
    forward = functools.partial(lowering.forward, spec)
    if not lowering.runs_framework_convolutions(spec):
        return forward(inputs, kernel)
    shape = functools.partial(_empty_output_shape, spec, inputs)
    return backends.current().with_images(forward, shape, inputs, kernel)


@dataclasses.dataclass(frozen=True)
class _Passes:
    """The three passes of a choice for one workload; a value, as `backends.Passes`."""

    spec: ConvSpec
    choice: LoweringChoice

    def forward(self, inputs: Any, kernel: Any) -> Any:
        return _forward(self.spec, self.choice.for_pass("forward"), inputs, kernel)

    def input_gradient(self, output_gradient: Any, kernel: Any, input_shape: tuple) -> Any:
        lowering = self.choice.for_pass("input_gradient")
        return lowering.input_gradient(self.spec, output_gradient, kernel, input_shape)

    def kernel_gradient(self, inputs: Any, output_gradient: Any) -> Any:
        lowering = self.choice.for_pass("kernel_gradient")
        gradient = functools.partial(lowering.kernel_gradient, self.spec)
        if not lowering.runs_framework_convolutions(self.spec):
            return gradient(inputs, output_gradient)
        return backends.current().with_images(
            gradient, lambda: self.spec.kernel_shape, inputs, output_gradient
        )


def convolution_passes(spec: ConvSpec) -> backends.Passes:
    """The three passes of the framework's own op for a workload, as values.

    Args:
        spec: the workload, in the backend's preferred layout.
    """
    return _Passes(spec, parse("native"))


def _empty_output_shape(spec: ConvSpec, inputs: Any) -> tuple:
    """The shape of the outputs for a batch of 0; sizes as in `keras.ops.shape(inputs)`."""
    shape = list(keras.ops.shape(inputs))
    shape[0], shape[spec.channel_axis] = 0, spec.output_channels
    for index, axis in enumerate(spec.spatial_axes):
        shape[axis] = spec.output_length(index, shape[axis])
    return tuple(shape)


def to_format(images: Any, spec: ConvSpec, data_format: str) -> Any:
    """`images`, which are in the layout of `spec`, in another one."""
    if spec.data_format == data_format:
        return images
    order = (0, 2, 3, 1) if data_format == "channels_last" else (0, 3, 1, 2)
    return keras.ops.transpose(images, order)
