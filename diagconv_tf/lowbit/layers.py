"""Keras's dense and convolution layers, with a choice of what their operands go through.

Each class is Keras's own, or ours with a lowering, but for its operands: same arguments,
variables and checks, plus `operands`. A layer becomes low-bit, and stock again, by a change
of its class. As in `diagconv_tf.layers`, another thread may be inside `call` when that
happens, so `call` reads each setting once.

The compact kernel is quantized and then lowered: the zeros of a diagonal kernel are no
weights, and stay zeros.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import keras
from absl import logging
from keras import ops

from diagconv_tf import backends as operations
from diagconv_tf import keras_internals
from diagconv_tf.layers import (
    DiagonalwiseConv2D,
    DiagonalwiseDepthwiseConv2D,
    DiagonalwiseSeparableConv2D,
    LoweredLayer,
    add_bias,
    convolve_as,
    convolve_pointwise,
    kernel_channels_axis,
    layer_spec,
    signature_with,
)
from diagconv_tf.lowbit import backends, units
from diagconv_tf.lowbit.noise import NoiseSource
from diagconv_tf.lowbit.operands import GradientOperand, Operands, UnitOperand
from diagconv_tf.lowerings import LoweringChoice, LoweringLike, to_format
from diagconv_tf.spec import STOCK

_FLOAT = Operands()

_OPERANDS_DOC = """

    Arguments, variables, shapes and errors are those of `keras.layers.{stock}`, and more:

    Args:
        operands: what kernel, inputs and output gradient go through; an `Operands`.
            Defaults to none of them.
"""

_LOWERING_DOC = """\
        lowering: as in `{lowered}`, or `"stock"`: Keras's own op. Defaults to `"stock"`.
            The kernel is quantized before it is lowered.
"""

_RAISES_DOC = """
    Raises:
        ValueError: if `operands` is something else, Keras quantizes the layer already
            (`dtype="int8_from_float32"`, `layer.quantize`), or it has LoRA weights.
    """

# For type checkers: a stock layer class follows in the bases of every subclass.
_Mixin: Any = object


class OperandLayer(_Mixin):
    """The `operands` of a layer: argument, attribute and config."""

    settings: ClassVar[frozenset[str]] = frozenset({"operands"})

    #: Those of `Operands` that layers of this class can hold.
    held_operands: ClassVar[frozenset[str]] = frozenset({"kernel", "inputs", "gradients"})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A user's subclass has its own documentation.
        ours = cls.__module__.startswith(f"{__package__.partition('.')[0]}.")
        if not ours or not issubclass(cls, keras.layers.Layer):
            return
        added: dict[str, tuple] = {"operands": (_FLOAT, Operands)}
        doc = (cls.__doc__ or "") + _OPERANDS_DOC.format(stock=_stock(cls).__name__)
        if issubclass(cls, LoweredLayer):
            doc += _LOWERING_DOC.format(lowered=_lowered(cls).__name__)
            added["lowering"] = (STOCK, LoweringLike)
        cls.__doc__ = doc + _RAISES_DOC
        cls.__signature__ = signature_with(_stock(cls), **added)

    def __init__(
        self, *args: Any, operands: Operands | dict[str, Any] = _FLOAT, **kwargs: Any
    ) -> None:
        if isinstance(operands, dict):
            operands = keras.saving.deserialize_keras_object(operands)
        if not isinstance(operands, Operands):
            raise ValueError(f"Expected `operands` to be an `Operands`. Received: {operands!r}")
        for field in dataclasses.fields(operands):
            if field.name not in self.held_operands and getattr(operands, field.name) is not None:
                raise ValueError(
                    f"Expected operands of {' and '.join(sorted(self.held_operands))} for a "
                    f"{type(self).__name__}. Received: {operands}"
                )
        super().__init__(*args, **kwargs)
        _refuse(self)
        self._operands = operands
        set_noise(self, new_noise(operands))

    @property
    def operands(self) -> Operands:
        """What kernel, inputs and output gradient go through.

        `rewrite(model, LowBit(...), in_place=True)` changes it, and recompiles the model.
        """
        return operands_of(self)

    def build(self, input_shape: Any) -> None:
        # Keras binds `build` to the object on creation; the class may have changed since.
        if not isinstance(self, OperandLayer):
            type(self).build(self, input_shape)
            return
        _refuse(self)
        super().build(input_shape)
        say_if_ordinary(self)

    def get_config(self) -> dict[str, Any]:
        operands = keras.saving.serialize_keras_object(self.operands)
        return {**super().get_config(), "operands": operands}


def _stock(layer_class: type) -> type:
    return next(c for c in layer_class.__mro__ if c.__module__.startswith("keras."))


def _lowered(layer_class: type) -> type:
    return next(c for c in layer_class.__mro__[1:] if issubclass(c, LoweredLayer))


def operands_of(layer: keras.layers.Layer) -> Operands:
    """The operands that a layer of any class holds."""
    return vars(layer).get("_operands", _FLOAT)


def why_not_operands(layer: keras.layers.Layer) -> list[str]:
    """Every reason why a layer's operands cannot go through anything."""
    reasons = []
    if (mode := getattr(layer, "quantization_mode", None)) is not None:
        reasons.append(f"Keras quantizes it already ({mode})")
    if getattr(layer, "lora_enabled", False) or getattr(layer, "lora_rank", None):
        reasons.append("its kernel is the sum of two: it has LoRA weights")
    return reasons


def _refuse(layer: keras.layers.Layer) -> None:
    if reasons := why_not_operands(layer):
        raise ValueError(
            f"Expected a float layer to quantize. Received: layer '{layer.name}': "
            f"{'; '.join(reasons)}"
        )


def say_if_ordinary(layer: keras.layers.Layer) -> None:
    """Logs that a layer which was just built drops none of its units."""
    gradients, count = operands_of(layer).gradients, units.unit_count(layer)
    if isinstance(gradients, UnitOperand) and count is not None and gradients.keeps(count) == count:
        logging.warning(
            "Layer '%s' has ordinary back-propagation: `%s` keeps all of its %d units.",
            layer.name,
            gradients,
            count,
        )


def kernels_of(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The variables of a layer that its kernel operand is for; none of an unbuilt layer's."""
    names = ("depthwise_kernel", "pointwise_kernel", "kernel")
    found = [getattr(layer, name, None) for name in names] if layer.built else []
    return [kernel for kernel in found if isinstance(kernel, keras.Variable)]


def new_noise(operands: Operands | None) -> NoiseSource | None:
    """A source of noise for a layer that gets `operands`; None where they need none."""
    if operands is None or not operands.uses_seed:
        return None
    return NoiseSource(getattr(operands.gradients, "seed", None))


def noise_of(layer: keras.layers.Layer) -> NoiseSource | None:
    """The source of noise that a layer of any class holds."""
    return vars(layer).get("_noise")


def set_noise(layer: keras.layers.Layer, noise: NoiseSource | None) -> None:
    """Gives a layer, built or not, a source of noise, or takes it away.

    PyTorch's lists of parameters are not told: `keras_internals.track_torch_variables`.
    """
    before = noise_of(layer)
    if noise is before:
        return
    # A built layer takes no more state, unless it is told to.
    tracker = keras_internals.tracker(layer)
    locked = tracker.locked
    tracker.unlock()
    try:
        if before is not None:
            tracker.untrack(before)
            delattr(layer, "_noise")
        if noise is not None:
            layer._noise = noise
    finally:
        if locked:
            tracker.lock()


def active(gradients: GradientOperand | None, count: int) -> GradientOperand | None:
    """`gradients` where it changes the present call's gradient, else None.

    Args:
        gradients: the layer's operand.
        count: its units.
    """
    # Inference has no gradients. It leaves the noise as it is, and files of it need none.
    if gradients is None or keras_internals.is_inference():
        return None
    if isinstance(gradients, UnitOperand):
        return units.unit_operand(gradients, count)
    return gradients


def seed_for(gradients: GradientOperand, noise: NoiseSource | None) -> Any:
    """The seed of a call: a layer that is called twice in a step has two."""
    return noise.draw() if gradients.uses_seed and noise is not None else None


def finish(
    layer: keras.layers.Layer,
    gradients: GradientOperand | None,
    noise: NoiseSource | None,
    outputs: Any,
    layout: units.Units | None = None,
    biased: Callable[[keras.layers.Layer, Any], Any] = add_bias,
) -> Any:
    """Adds the bias, applies the activation; the gradient goes through its operand.

    Args:
        layer: the layer.
        gradients: the operand, as `active` has it.
        noise: where the operand's seed comes from.
        outputs: those of the layer's product.
        layout: where the units of the outputs are, for an operand that drops some.
        biased: of the layer and outputs, returns these with the bias.
    """
    if gradients is None:
        outputs = biased(layer, outputs)
    elif isinstance(gradients, UnitOperand):
        assert layout is not None
        seed = seed_for(gradients, noise)
        outputs = biased(layer, units.through(gradients, layout, outputs, seed))
    else:
        through = functools.partial(backends.through, gradients, seed=seed_for(gradients, noise))
        if gradients.covers_bias:
            outputs = through(biased(layer, outputs))
        else:
            outputs = biased(layer, through(outputs))
    return outputs if layer.activation is None else layer.activation(outputs)


def multiply(product: operations.Passes, inputs: Any, kernel: Any) -> Any:
    """A product whose backward pass takes the units that all rows keep."""
    # A tensor, not a variable, which `tf.custom_gradient` refuses.
    kernel = ops.reshape(kernel, tuple(kernel.shape))
    return operations.current().differentiable(product, ops.convert_to_tensor(inputs), kernel)


def _convolve(layer: keras.layers.Layer, inputs: Any, kernel: Any, stock_op: str) -> Any:
    choice = vars(layer).get("_lowering")
    if choice is not None:
        channels = kernel_channels_axis(layer)
        return convolve_as(choice, layer, inputs, kernel, stock_op, channels)
    return getattr(ops, stock_op)(inputs, kernel, **_window(layer))


def _convolve_few(layer: keras.layers.Layer, operand: UnitOperand, inputs: Any, kernel: Any) -> Any:
    """A convolution whose backward pass takes the channels that all rows keep."""
    backend = operations.current()
    inputs, kernel = ops.convert_to_tensor(inputs), ops.convert_to_tensor(kernel)
    inputs, kernel = backend.stock_operands(inputs, kernel, "conv")
    dtype = keras.backend.standardize_dtype(kernel.dtype)
    spec = layer_spec(layer, tuple(inputs.shape), dtype)
    layout = backend.preferred_data_format(spec.data_format)
    moved = spec.replace(data_format=layout)
    channels = units.Units(layer.filters, (moved.channel_axis,))
    outputs = multiply(
        units.ConvolutionProduct(operand, channels, moved), to_format(inputs, spec, layout), kernel
    )
    return to_format(outputs, moved, spec.data_format)


def _channel_axis(layer: keras.layers.Layer) -> int:
    return -1 if layer.data_format == "channels_last" else 1


def _finish_channels(
    layer: keras.layers.Layer,
    gradients: GradientOperand | None,
    noise: NoiseSource | None,
    outputs: Any,
) -> Any:
    axis = _channel_axis(layer)
    channels = outputs.shape[axis]
    layout = units.Units(channels, (axis,))
    return finish(layer, active(gradients, channels), noise, outputs, layout)


def _window(layer: keras.layers.Layer) -> dict[str, Any]:
    return {
        "strides": layer.strides,
        "padding": layer.padding,
        "dilation_rate": layer.dilation_rate,
        "data_format": layer.data_format,
    }


@keras.saving.register_keras_serializable(package="diagconv_tf")
class LowBitDense(OperandLayer, keras.layers.Dense):
    """`keras.layers.Dense` with quantized operands."""

    def call(self, inputs: Any, training: Any = None) -> Any:
        operands, noise = operands_of(self), noise_of(self)
        kernel = operands.quantize_kernel(self.kernel)
        inputs = operands.quantize_inputs(inputs)
        layout = units.Units(self.units)
        gradients = active(operands.gradients, layout.count)
        if (unified := units.unified_operand(gradients)) is not None:
            outputs = multiply(units.MatrixProduct(unified, layout), inputs, kernel)
            gradients = None
        else:
            outputs = ops.matmul(inputs, kernel)
        return finish(self, gradients, noise, outputs, layout)


class _LowBitConvolution(OperandLayer):
    """A convolution with operands, and a lowering or Keras's own op."""

    settings: ClassVar[frozenset[str]] = frozenset({"lowering", "operands"})

    _lowering: LoweringChoice | None = None

    def __init__(self, *args: Any, lowering: LoweringLike = STOCK, **kwargs: Any) -> None:
        super().__init__(*args, lowering=lowering, **kwargs)


@keras.saving.register_keras_serializable(package="diagconv_tf")
class LowBitConv2D(_LowBitConvolution, DiagonalwiseConv2D):
    """`keras.layers.Conv2D` with quantized operands."""

    def call(self, inputs: Any) -> Any:
        operands, noise = operands_of(self), noise_of(self)
        kernel = operands.quantize_kernel(self.kernel)
        inputs = operands.quantize_inputs(inputs)
        layout = units.Units(self.filters, (_channel_axis(self),))
        gradients = active(operands.gradients, layout.count)
        unified = units.unified_operand(gradients)
        # Of several groups, each has channels of its own; and a lowering has its own passes.
        if unified is not None and self.groups == 1 and vars(self).get("_lowering") is None:
            outputs = _convolve_few(self, unified, inputs, kernel)
            gradients = None
        else:
            outputs = _convolve(self, inputs, kernel, "conv")
        return finish(self, gradients, noise, outputs, layout)


@keras.saving.register_keras_serializable(package="diagconv_tf")
class LowBitDepthwiseConv2D(_LowBitConvolution, DiagonalwiseDepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` with quantized operands."""

    def call(self, inputs: Any) -> Any:
        operands, noise = operands_of(self), noise_of(self)
        kernel = operands.quantize_kernel(self.kernel)
        outputs = _convolve(self, operands.quantize_inputs(inputs), kernel, "depthwise_conv")
        return _finish_channels(self, operands.gradients, noise, outputs)


@keras.saving.register_keras_serializable(package="diagconv_tf")
class LowBitSeparableConv2D(_LowBitConvolution, DiagonalwiseSeparableConv2D):
    """`keras.layers.SeparableConv2D` with quantized operands.

    Each of the two kernels is quantized, with a scale of its own. What passes from the
    depthwise half to the pointwise one stays float: no activation bounds it. Use two
    layers where both halves shall multiply integers.
    """

    def call(self, inputs: Any) -> Any:
        operands, noise = operands_of(self), noise_of(self)
        quantized = operands.quantize_inputs(inputs)
        depthwise = operands.quantize_kernel(self.depthwise_kernel)
        pointwise = operands.quantize_kernel(self.pointwise_kernel)
        choice = vars(self).get("_lowering")
        if choice is not None:
            channels = kernel_channels_axis(self)
            outputs = convolve_as(choice, self, quantized, depthwise, "depthwise_conv", channels)
            outputs = convolve_pointwise(self, inputs, outputs, pointwise)
        else:
            outputs = ops.separable_conv(quantized, depthwise, pointwise, **_window(self))
        return _finish_channels(self, operands.gradients, noise, outputs)
