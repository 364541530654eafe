"""Keras's grouped convolution layers, with a choice of how they compute.

Each class is Keras's own but for the convolution: same arguments, variables,
config and checks, plus `lowering`. A stock layer becomes ours, and ours stock,
by changing its class. Another thread may be inside `call` when that happens. So
`call` reads the layer's lowering once, and then nothing that only one of the
two classes has; whichever class it meets, it computes the same function.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import keras
import numpy as np
from absl import logging
from keras import ops

from diagconv_tf import backends
from diagconv_tf.distribution import MeshAxis, variable_axis
from diagconv_tf.lowerings import (
    DEFAULT_LOWERING,
    LoweringChoice,
    LoweringLike,
    convolve,
    convolve_sharded,
    parse,
    why_not,
)
from diagconv_tf.spec import STOCK, ConvSpec

_NATIVE = parse("native")
_DEFAULT = parse(DEFAULT_LOWERING)

_ARGUMENT_DOC = """

    Arguments, variables, shapes and errors are those of `keras.layers.{stock}`,
    and one argument more:

    Args:
        lowering: how to compute the convolution. Every choice gives the same
            numbers up to rounding.

            - `"diagonal:N"`: standard convolutions of N channels each, with
              the kernel on their diagonal (arXiv 1803.09926). The last one is
              smaller where N does not divide the channels. `"diagonal"` means
              N = 32, `"dense"` one convolution of all channels.
            - `"diagonal_grouped:N"`: the same blocks as one grouped
              convolution; N must divide the channels.
            - `"shifted"`: a sum over kernel taps of shifted, scaled inputs.
            - `"fused"`: GPU kernels of this package; NVIDIA GPUs, JAX and PyTorch.
            - `"native"`: the framework's own op.
            - a dict with the keys `"forward"`, `"input_gradient"` and
              `"kernel_gradient"`: one of these for each pass.

            Defaults to `"diagonal:32"`, the choice of the paper's authors.

    Inputs have the dtypes that the stock layer takes on the same backend, and
    outputs have the stock layer's dtype.

    Raises:
        ValueError: if `lowering` is none of these, or cannot compute the layer
            once it is built; the message says why.
        TypeError: when called, if the stock layer refuses the inputs' dtype.
    """


def layer_spec(
    layer: keras.layers.Layer, input_shape: tuple, compute_dtype: str | None = None
) -> ConvSpec:
    """The workload of a layer, stock or ours.

    Args:
        layer: a `DepthwiseConv2D`, a `Conv2D`, or a `SeparableConv2D`, of
            which the depthwise half is meant.
        input_shape: four sizes in the layer's `data_format`. Batch, height and
            width may be None or symbolic, which counts as unknown.
        compute_dtype: a floating dtype name; None means the layer's own.

    Raises:
        ValueError: if the shape has no four sizes or no number of channels, the
            input is too small for the kernel, or the groups do not fit the
            channels.
    """
    shape = tuple(input_shape)
    channels_last = layer.data_format == "channels_last"
    if len(shape) != 4 or shape[-1 if channels_last else 1] is None:
        raise ValueError(
            f"Expected inputs of 4 dimensions ({layer.data_format}) with a known number of "
            f"channels for layer '{layer.name}'. Received: input_shape={shape}"
        )
    batch, *image = shape
    height, width, channels = image if channels_last else (*image[1:], image[0])
    # Under `torch.jit.trace` it is a tensor.
    channels = int(channels)
    if isinstance(layer, keras.layers.Conv2D):
        groups, multiplier = layer.groups, layer.filters // layer.groups
        if channels % groups:
            raise ValueError(
                f"Expected a number of input channels that groups={groups} divides, for "
                f"layer '{layer.name}'. Received: {channels} input channels"
            )
    else:
        groups, multiplier = channels, layer.depth_multiplier
    return ConvSpec(
        batch=_known(batch),
        height=_known(height),
        width=_known(width),
        groups=groups,
        input_channels_per_group=channels // groups,
        output_channels_per_group=multiplier,
        kernel_size=layer.kernel_size,
        strides=layer.strides,
        dilation_rate=layer.dilation_rate,
        padding=layer.padding,
        data_format=layer.data_format,
        compute_dtype=layer.compute_dtype if compute_dtype is None else compute_dtype,
    )


def _known(size: Any) -> int | None:
    """A size as an int; None where it is None, a tensor or a symbol."""
    if isinstance(size, int):
        return size
    return int(size) if isinstance(size, np.integer) else None


def kernel_channels_axis(layer: keras.layers.Layer, kernel: Any = None) -> MeshAxis | None:
    """The mesh axis that shards a layer's kernel by channels; None where none does.

    Args:
        layer: as for `layer_spec`; it must be built.
        kernel: the kernel that it computes with; None means its variable.
    """
    if kernel is None:
        kernel = _kernel_variable(layer)
    return variable_axis(kernel, 3 if isinstance(layer, keras.layers.Conv2D) else 2)


def _kernel_variable(layer: keras.layers.Layer) -> Any:
    separable = isinstance(layer, keras.layers.SeparableConv2D)
    return layer.depthwise_kernel if separable else layer.kernel


# For type checkers: a stock layer class follows in the bases of every subclass.
_Mixin: Any = object


class LoweredLayer(_Mixin):
    """The `lowering` of a layer: argument, attribute, config and check.

    Where the class's own `_lowering` is None, `"stock"` is one more lowering and the
    default: Keras's own op.
    """

    #: The settings that layers of this class can hold, by name.
    settings: ClassVar[frozenset[str]] = frozenset({"lowering"})

    # A class attribute, so that a stock layer has one when its class is changed.
    _lowering: LoweringChoice | None = _DEFAULT

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = cls.__mro__[2]
        if cls.__doc__ and stock.__module__.startswith("keras."):
            cls.__doc__ += _ARGUMENT_DOC.format(stock=stock.__name__)
            cls.__signature__ = signature_with(stock, lowering=(DEFAULT_LOWERING, LoweringLike))

    def __init__(
        self, *args: Any, lowering: LoweringLike = DEFAULT_LOWERING, **kwargs: Any
    ) -> None:
        choice = self._parse(lowering)
        super().__init__(*args, **kwargs)
        self._lowering = choice

    @classmethod
    def _parse(cls, lowering: LoweringLike) -> LoweringChoice | None:
        return None if lowering == STOCK and cls._lowering is None else parse(lowering)

    @property
    def lowering(self) -> str | dict[str, str]:
        """How the layer computes: a string, or a dict of one per pass.

        Setting it does not change functions that are compiled already;
        `rewrite(model, lowering, in_place=True)` recompiles them.

        Raises:
            ValueError: on setting, if the value is not known or cannot compute
                the layer. The layer then keeps the value that it has.
        """
        return STOCK if self._lowering is None else self._lowering.to_config()

    @lowering.setter
    def lowering(self, value: LoweringLike) -> None:
        choice, before, name_before = self._parse(value), self._lowering, self.lowering
        if self.built and choice is not None:
            _check_lowering(self, _built_spec(self), choice)
        self._lowering = choice
        if self.built and choice != before:
            logging.warning(
                "Layer '%s' computes with lowering=%r instead of %r from its next call on. "
                "Functions of its model that are compiled already do not: call "
                "`model.compile` again, or use `rewrite(model, ..., in_place=True)`",
                self.name,
                self.lowering,
                name_before,
            )

    def spec(self, input_shape: tuple) -> ConvSpec:
        """The layer's workload for inputs of `input_shape`.

        Args:
            input_shape: four sizes in the layer's `data_format`; batch, height
                and width may be None.

        Raises:
            ValueError: if the shape has no four sizes or no number of channels,
                the input is too small for the kernel, or the groups do not fit
                the channels.
        """
        return layer_spec(self, input_shape)

    def build(self, input_shape: tuple) -> None:
        # Keras binds `build` to the object on creation. If the class has become
        # stock since, stock's own is meant.
        if not isinstance(self, LoweredLayer):
            type(self).build(self, input_shape)
            return
        # Keras's own checks come first; a refusal must leave no variables.
        self.compute_output_shape(input_shape)
        if self._lowering is not None:
            _check_lowering(self, layer_spec(self, input_shape), self._lowering)
        super().build(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "lowering": self.lowering}


def _built_spec(layer: keras.layers.Layer) -> ConvSpec:
    """The workload of a built layer for inputs of unknown size."""
    kernel = _kernel_variable(layer)
    channels = kernel.shape[2]
    if isinstance(layer, keras.layers.Conv2D):
        channels *= layer.groups
    last = layer.data_format == "channels_last"
    return layer_spec(layer, (None, None, None, channels) if last else (None, channels, None, None))


def _check_lowering(layer: keras.layers.Layer, spec: ConvSpec, choice: LoweringChoice) -> None:
    reasons = why_not(spec, choice)
    if reasons:
        raise ValueError(
            f"Layer '{layer.name}' cannot be computed with lowering={choice.to_config()!r}: "
            f"{'; '.join(reasons)}"
        )


def _convolve(layer: keras.layers.Layer, inputs: Any, kernel: Any, stock_op: str) -> Any:
    choice = vars(layer).get("_lowering", _DEFAULT)
    return convolve_as(choice, layer, inputs, kernel, stock_op, kernel_channels_axis(layer, kernel))


def convolve_as(
    choice: LoweringChoice,
    layer: keras.layers.Layer,
    inputs: Any,
    kernel: Any,
    stock_op: str,
    channels: MeshAxis | None,
) -> Any:
    """What `keras.ops.<stock_op>` computes for a layer, computed with a lowering.

    Args:
        choice: the lowering.
        layer: as for `layer_spec`.
        inputs: tensor.
        kernel: the kernel to compute with.
        stock_op: `"conv"` or `"depthwise_conv"`.
        channels: the mesh axis along which the kernel's channels are sharded, or None.

    Raises:
        TypeError: if stock Keras refuses the inputs' dtype.
        ValueError: if the lowering cannot compute the layer.
    """
    inputs, kernel = _operands(layer, inputs, kernel, stock_op)
    spec = layer_spec(layer, tuple(inputs.shape), _dtype_name(kernel))
    _check_lowering(layer, spec, choice)
    kernel = ops.reshape(kernel, spec.kernel_shape)
    return convolve_sharded(spec, choice, inputs, kernel, channels)


def _operands(layer: keras.layers.Layer, inputs: Any, kernel: Any, stock_op: str) -> tuple:
    """Inputs and kernel in the one dtype with which stock Keras computes.

    Raises:
        TypeError: if stock Keras refuses them.
    """
    inputs, kernel = ops.convert_to_tensor(inputs), ops.convert_to_tensor(kernel)
    inputs, kernel = backends.current().stock_operands(inputs, kernel, stock_op)
    if inputs.dtype != kernel.dtype:
        raise TypeError(
            f"Expected inputs of the kernel's dtype {_dtype_name(kernel)} for layer "
            f"'{layer.name}', like the stock layer. Received: inputs of dtype "
            f"{_dtype_name(inputs)}"
        )
    return inputs, kernel


def _dtype_name(tensor: Any) -> str:
    return keras.backend.standardize_dtype(tensor.dtype)


def _add_bias_and_activate(layer: keras.layers.Layer, outputs: Any) -> Any:
    outputs = add_bias(layer, outputs)
    return outputs if layer.activation is None else layer.activation(outputs)


def add_bias(layer: keras.layers.Layer, outputs: Any) -> Any:
    """`outputs` of a convolution or dense layer and its bias, if it has one."""
    if not layer.use_bias:
        return outputs
    shape = [1] * len(outputs.shape)
    first = getattr(layer, "data_format", None) == "channels_first"
    shape[1 if first else -1] = -1
    return ops.add(outputs, ops.reshape(layer.bias, shape))


def signature_with(stock: Any, **added: tuple[Any, Any]) -> inspect.Signature:
    """The signature of a stock layer with more arguments.

    Args:
        stock: the class.
        **added: default and type of each further argument, by name.
    """
    signature = inspect.signature(stock.__init__)
    parameters = [p for name, p in signature.parameters.items() if name != "self"]
    position = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters[position:position] = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )
        for name, (default, annotation) in added.items()
    ]
    return signature.replace(parameters=parameters)


def convolve_pointwise(
    layer: keras.layers.SeparableConv2D, inputs: Any, outputs: Any, kernel: Any
) -> Any:
    """The second half of a separable layer whose first half has a lowering.

    Args:
        layer: the layer.
        inputs: the layer's.
        outputs: those of its depthwise half.
        kernel: the pointwise kernel to compute with.
    """
    outputs, kernel = _operands(layer, outputs, kernel, "conv")
    spec = layer_spec(layer, tuple(inputs.shape), _dtype_name(kernel))
    return convolve(spec.pointwise(layer.filters), _NATIVE, outputs, kernel)


@keras.saving.register_keras_serializable(package="diagconv_tf")
class DiagonalwiseDepthwiseConv2D(LoweredLayer, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` with a choice of how it computes."""

    def call(self, inputs: Any) -> Any:
        outputs = _convolve(self, inputs, self.kernel, "depthwise_conv")
        return _add_bias_and_activate(self, outputs)


@keras.saving.register_keras_serializable(package="diagconv_tf")
class DiagonalwiseSeparableConv2D(LoweredLayer, keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` with a choice of how its depthwise half
    computes.
    """

    def call(self, inputs: Any) -> Any:
        outputs = _convolve(self, inputs, self.depthwise_kernel, "depthwise_conv")
        outputs = convolve_pointwise(self, inputs, outputs, self.pointwise_kernel)
        return _add_bias_and_activate(self, outputs)


@keras.saving.register_keras_serializable(package="diagconv_tf")
class DiagonalwiseConv2D(LoweredLayer, keras.layers.Conv2D):
    """`keras.layers.Conv2D`, meant for `groups` > 1, with a choice of how it
    computes.
    """

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        return _convolve(self, inputs, kernel, "conv")
