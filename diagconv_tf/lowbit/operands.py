"""What a layer's kernel, inputs and output gradients go through before they are multiplied.

Sources: DoReFa-Net, arXiv 1606.06160, sections 2.3 (weights), 2.4 (activations) and 2.5
(gradients); the authors' reference implementation in tensorpack
(`examples/DoReFa-Net/dorefa.py`) where the paper leaves something open; and Training
Quantized Nets, arXiv 1706.02379 (BinaryConnect).

Each quantizer is a value: frozen, comparable, printable, and serialisable with a model.
Calling it with a tensor gives the quantized tensor, of the same dtype. Whatever the dtype,
it computes in float32 at least. A quantized number is an integer times a float32 scale,
rounded once, so that integer codes and scale give it back exactly.

n stands for 2**bits - 1, and `round` rounds halves to even.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Protocol, runtime_checkable

import keras
import numpy as np
from keras import ops

from diagconv_tf.lowbit import noise

#: What stands for no quantization.
FLOAT_BITS = 32


@dataclasses.dataclass(frozen=True)
class KernelCodes:
    """A quantized kernel as integers.

    Attributes:
        codes: integers, of the kernel's shape: int8 where they fit, else int16.
        scale: float32; the kernel is `codes * scale`.
        bits: bits of a code; the grid has 2**bits levels.
    """

    codes: np.ndarray
    scale: np.float32
    bits: int

    def values(self) -> np.ndarray:
        """The kernel, in float32."""
        return self.codes.astype("float32") * self.scale


class KernelOperand(Protocol):
    """What a kernel goes through."""

    @property
    def bits(self) -> int:
        """Bits of a weight; 32 where it stays float."""

    def __call__(self, kernel: Any) -> Any:
        """A tensor of the kernel's shape and dtype, differentiable."""

    def codes(self, kernel: Any) -> KernelCodes:
        """What calling it gives, as integers and a scale."""


class InputOperand(Protocol):
    """What a layer's inputs go through."""

    @property
    def bits(self) -> int:
        """Bits of an activation; 32 where it stays float."""

    def __call__(self, inputs: Any) -> Any:
        """A tensor of the inputs' shape and dtype, differentiable."""


@runtime_checkable
class GradientOperand(Protocol):
    """What the gradient of a layer's output goes through, in the backward pass.

    It is a value: equal and hashable by what it computes.
    """

    @property
    def uses_seed(self) -> bool:
        """Whether it needs noise, and so a new seed for every step."""

    @property
    def covers_bias(self) -> bool:
        """Whether the bias gets the changed gradient, as kernel and inputs do."""

    def __call__(self, gradient: Any, seed: Any = None) -> Any:
        """A tensor of the gradient's shape and dtype.

        Args:
            gradient: the gradient by the layer's output, before its activation.
            seed: as `noise.uniform` takes it; None where `uses_seed` is false.
        """


@runtime_checkable
class UnitOperand(GradientOperand, Protocol):
    """A gradient operand that keeps some units of a layer's product, and drops the others.

    It is called with a matrix, or (rows, groups, units): each group of units, such as the
    gates of a recurrent layer, chooses for itself. A row is what one product of a vector and
    the kernel gives.
    """

    @property
    def unified(self) -> bool:
        """Whether all rows keep the same units, so that the backward products can be small."""

    def keeps(self, units: int) -> int:
        """How many of so many units it keeps; `units` where it changes nothing."""

    def columns(self, gradient: Any) -> Any:
        """Which units all rows keep, as indices of shape (k,), or (groups, k)."""


class Serialisable:
    """A dataclass that Keras's files can hold."""

    def get_config(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(**config)


def check_bits(bits: Any, name: str = "bits") -> None:
    """Refuses what is no number of bits.

    Raises:
        ValueError: if `bits` is neither an integer from 1 to 8 nor 32.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in (*range(1, 9), 32):
        raise ValueError(
            f"Expected `{name}` to be an integer from 1 to 8, or 32 for float. "
            f"Received: {name}={bits!r}"
        )


def _wide(tensor: Any) -> Any:
    """`tensor` in the dtype in which quantizers compute."""
    tensor = ops.convert_to_tensor(tensor)
    is_double = keras.backend.standardize_dtype(tensor.dtype) == "float64"
    return tensor if is_double else ops.cast(tensor, "float32")


def _straight_through(differentiable: Any, value: Any, dtype: Any) -> Any:
    """Exactly `value`, with the gradient of `differentiable`, which must be finite."""
    # The difference is zero. It needs no custom gradient, whatever the backend.
    zero = ops.subtract(differentiable, ops.stop_gradient(differentiable))
    return ops.cast(ops.add(ops.stop_gradient(value), zero), dtype)


def _sign(tensor: Any) -> Any:
    """1 where `tensor` is zero or positive, else -1: sign(0) must be no third level."""
    one = ops.ones_like(tensor)
    return ops.where(ops.greater_equal(tensor, 0), one, ops.negative(one))


@keras.saving.register_keras_serializable(package="diagconv_tf")
@dataclasses.dataclass(frozen=True)
class DoReFaWeights(Serialisable):
    """Weights of k bits (arXiv 1606.06160, equations 7 to 9).

    k = 1: sign(w) * E, where E is the mean of |w| over the tensor and sign(0) = 1. The
    gradient passes unchanged, also where |w| > 1, and E counts as a constant.

    k > 1: 2 * round(n * (tanh(w) / (2 * M) + 1/2)) / n - 1, where M is the maximum of
    |tanh(w)| over the tensor. The levels are the odd multiples of 1/n between -1 and 1, so
    that no weight is zero. The gradient is that without `round`.

    k = 32: w.

    A kernel of zeros, for which the formula divides by zero, counts as tanh(w) / M = 0.

    Attributes:
        bits: k, 1 to 8, or 32.
        gradient_of_max: whether the gradient also flows through M, as in the authors'
            implementation. False stops it there.
    """

    bits: int
    gradient_of_max: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def __call__(self, kernel: Any) -> Any:
        kernel = ops.convert_to_tensor(kernel)
        if self.bits == FLOAT_BITS:
            return kernel
        soft, codes, scale = self._parts(_wide(kernel))
        return _straight_through(soft, ops.multiply(codes, scale), kernel.dtype)

    def codes(self, kernel: Any) -> KernelCodes:
        """Integers and scale of the quantized kernel; for k > 1 odd ones.

        Raises:
            ValueError: for 32 bits.
        """
        return _as_codes(self, self._parts, kernel)

    def _parts(self, kernel: Any) -> tuple[Any, Any, Any]:
        """What gives the gradient, and the integers and the scale that give the value."""
        if self.bits == 1:
            return kernel, _sign(kernel), ops.mean(ops.abs(kernel))
        squashed = ops.tanh(kernel)
        largest = ops.max(ops.abs(squashed))
        if not self.gradient_of_max:
            largest = ops.stop_gradient(largest)
        soft = ops.divide(squashed, ops.where(largest > 0, largest, ops.ones_like(largest)))
        n = 2**self.bits - 1
        steps = ops.round(ops.multiply(ops.add(ops.multiply(soft, 0.5), 0.5), float(n)))
        return soft, ops.subtract(ops.multiply(steps, 2.0), float(n)), 1.0 / n


@keras.saving.register_keras_serializable(package="diagconv_tf")
@dataclasses.dataclass(frozen=True)
class BinaryConnect(Serialisable):
    """The sign of each weight, with sign(0) = 1; the gradient passes unchanged.

    It is method BC of arXiv 1706.02379 (section 3; from arXiv 1511.00363): the optimizer
    updates the float weights w, the layer computes with sign(w). For its clipping of w to
    [-1, 1] give the layer a `kernel_constraint`.
    """

    bits: ClassVar[int] = 1

    def __call__(self, kernel: Any) -> Any:
        kernel = ops.convert_to_tensor(kernel)
        return _straight_through(kernel, _sign(kernel), kernel.dtype)

    def codes(self, kernel: Any) -> KernelCodes:
        """The signs, with scale 1."""
        return _as_codes(self, lambda kernel: (kernel, _sign(kernel), 1.0), kernel)


def _as_codes(operand: Any, parts: Any, kernel: Any) -> KernelCodes:
    if operand.bits == FLOAT_BITS:
        raise ValueError(f"Expected a quantizer of at most 8 bits. Received: {operand}")
    _, codes, scale = parts(_wide(kernel))
    dtype = "int8" if operand.bits < 8 else "int16"
    scale = ops.convert_to_numpy(scale) if ops.is_tensor(scale) else scale
    return KernelCodes(ops.convert_to_numpy(codes).astype(dtype), np.float32(scale), operand.bits)


@keras.saving.register_keras_serializable(package="diagconv_tf")
@dataclasses.dataclass(frozen=True)
class DoReFaActivations(Serialisable):
    """Activations of k bits (arXiv 1606.06160, section 2.4), with L = `limit`.

    Unsigned: L * round(n * c / L) / n, where c is x clipped to [0, L]. With L = 1 it is the
    paper's. Signed, for inputs that can be negative: L * (2 * round(n * (c / L + 1) / 2) /
    n - 1), where c is x clipped to [-L, L]; the levels are the odd multiples of L / n.

    The gradient passes unchanged where x is not clipped (the ends included), and is zero
    elsewhere. k = 32: x, not clipped.

    Attributes:
        bits: k, 1 to 8, or 32.
        signed: whether inputs can be negative.
        limit: the largest level: 1 in the paper; 6 behind a ReLU6.
    """

    bits: int
    signed: bool = False
    limit: float = 1.0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_limit(self.limit)

    @property
    def scale(self) -> float:
        """What the integers of the quantized inputs are multiplied by: L / n."""
        return self.limit / (2**self.bits - 1)

    def __call__(self, inputs: Any) -> Any:
        inputs = ops.convert_to_tensor(inputs)
        if self.bits == FLOAT_BITS:
            return inputs
        wide = _wide(inputs)
        clipped = self._clip(wide)
        # Backends differ in the gradient of `clip` at its ends. Zeros are common there.
        soft = ops.where(ops.equal(clipped, wide), wide, ops.stop_gradient(clipped))
        codes = self._codes(clipped)
        if self.signed:
            codes = ops.subtract(ops.multiply(codes, 2.0), 2.0**self.bits - 1)
        return _straight_through(soft, ops.multiply(codes, self.scale), inputs.dtype)

    def codes(self, inputs: Any) -> Any:
        """What calling it gives, as int32 codes from 0 to n.

        The quantized inputs are `scale * code`, and where `signed` `scale * (2 * code - n)`.

        Raises:
            ValueError: for 32 bits.
        """
        if self.bits == FLOAT_BITS:
            raise ValueError(f"Expected a quantizer of at most 8 bits. Received: {self}")
        return ops.cast(self._codes(self._clip(_wide(inputs))), "int32")

    def _clip(self, inputs: Any) -> Any:
        return ops.clip(inputs, -self.limit if self.signed else 0.0, self.limit)

    def _codes(self, clipped: Any) -> Any:
        n = float(2**self.bits - 1)
        if self.signed:
            return ops.round(ops.add(ops.multiply(clipped, 0.5 * n / self.limit), 0.5 * n))
        return ops.round(ops.multiply(clipped, n / self.limit))


def check_limit(limit: Any) -> None:
    """Refuses what can be no limit of activations.

    Raises:
        ValueError: if it is not a positive, finite number.
    """
    number = isinstance(limit, int | float) and not isinstance(limit, bool)
    if not (number and 0 < limit < math.inf):
        raise ValueError(f"Expected `limit` to be a positive number. Received: limit={limit!r}")


@keras.saving.register_keras_serializable(package="diagconv_tf")
@dataclasses.dataclass(frozen=True)
class DoReFaGradients(Serialisable):
    """Gradients of k bits, rounded stochastically (arXiv 1606.06160, equation 12).

    2 * m * (round(n * clip(g / (2 * m) + 1/2 + s / n, 0, 1)) / n - 1/2), where m is the
    maximum of |g| over all axes but the first, and s is uniform between -1/2 and 1/2, drawn
    for each element. It is unbiased: its mean over the noise is g. The levels are the odd
    multiples of m / n, so that gradients of zero become noise; an example whose gradients
    are all zero keeps them (the formula would divide zero by zero).

    k = 32: g.

    Attributes:
        bits: k, 1 to 8, or 32.
        noise: False leaves s out, an ablation: training then fails at few bits.
        seed: of the noise; None draws one for each layer when it gets the quantizer, which
            `keras.utils.set_random_seed` decides.
    """

    bits: int
    noise: bool = True
    seed: int | None = None

    #: The quantizer sits behind the bias (reference implementation).
    covers_bias: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int)
        ):
            raise ValueError(f"Expected `seed` to be an integer or None. Received: {self.seed!r}")

    @property
    def uses_seed(self) -> bool:
        return self.noise and self.bits != FLOAT_BITS

    def __call__(self, gradient: Any, seed: Any = None) -> Any:
        """The quantized gradient.

        Args:
            gradient: tensor, examples first.
            seed: integer tensor of shape (2,), or an integer; None means 0.
        """
        gradient = ops.convert_to_tensor(gradient)
        if self.bits == FLOAT_BITS:
            return gradient
        wide = _wide(gradient)
        axes = tuple(range(1, len(wide.shape)))
        largest = ops.max(ops.abs(wide), axis=axes, keepdims=True) if axes else ops.abs(wide)
        is_zero = ops.equal(largest, 0)
        n = float(2**self.bits - 1)
        share = ops.divide(wide, ops.where(is_zero, ops.ones_like(largest), largest))
        steps = ops.multiply(ops.add(share, 1.0), 0.5 * n)
        if self.noise:
            if seed is None or isinstance(seed, int):
                seed = noise.as_seed(seed or 0)
            drawn = noise.uniform(ops.shape(wide), seed)
            steps = ops.add(steps, ops.cast(drawn, wide.dtype))
        codes = ops.subtract(ops.multiply(ops.round(ops.clip(steps, 0.0, n)), 2.0), n)
        quantized = ops.multiply(codes, ops.multiply(largest, 1.0 / n))
        return ops.cast(quantized, gradient.dtype)


@keras.saving.register_keras_serializable(package="diagconv_tf")
@dataclasses.dataclass(frozen=True)
class Operands(Serialisable):
    """What a layer's operands go through; None leaves one as it is.

    Attributes:
        kernel: for the kernel, or each kernel of a separable layer.
        inputs: for the inputs.
        gradients: for the gradient of the output, in the backward pass.
    """

    kernel: KernelOperand | None = None
    inputs: InputOperand | None = None
    gradients: GradientOperand | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            operand = getattr(self, field.name)
            if operand is not None and (isinstance(operand, type) or not callable(operand)):
                raise ValueError(
                    f"Expected `{field.name}` to be a quantizer or None. Received: {operand!r}"
                )
        if self.gradients is not None and not isinstance(self.gradients, GradientOperand):
            raise ValueError(
                "Expected `gradients` to be a gradient quantizer such as DoReFaGradients(6). "
                f"Received: {self.gradients!r}"
            )

    @property
    def uses_seed(self) -> bool:
        """Whether a layer with these operands needs a source of noise."""
        return self.gradients is not None and self.gradients.uses_seed

    @property
    def kernel_bits(self) -> int:
        """Bits of a weight; 32 where it stays float."""
        return FLOAT_BITS if self.kernel is None else self.kernel.bits

    @property
    def input_bits(self) -> int:
        """Bits of an activation; 32 where it stays float."""
        return FLOAT_BITS if self.inputs is None else self.inputs.bits

    def quantize_kernel(self, kernel: Any) -> Any:
        """`kernel`, or what it is multiplied as."""
        return kernel if self.kernel is None else self.kernel(kernel)

    def quantize_inputs(self, inputs: Any) -> Any:
        """`inputs`, or what they are multiplied as."""
        return inputs if self.inputs is None else self.inputs(inputs)

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {name: serialize(operand) for name, operand in super().get_config().items()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Operands:
        deserialize = keras.saving.deserialize_keras_object
        return cls(**{name: deserialize(operand) for name, operand in config.items()})
