"""Keras's grouped convolution layers, with a choice of how they compute.

Each class is Keras's own but for the convolution: same arguments, variables,
config and checks, plus `lowering`. A stock layer becomes ours, and ours stock,
by changing its class.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras
from keras import ops

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
from diagconv_tf.spec import ConvSpec

_NATIVE = parse("native")

_ARGUMENT_DOC = """

    Arguments, variables, shapes and errors are those of `keras.layers.{stock}`,
    and one argument more:

    Args:
        lowering: how the convolution is computed; every choice gives the same
            numbers up to rounding.

            - `"diagonal:N"`: standard convolutions of N channels each, with
              the kernel on their diagonal (arXiv 1803.09926); the last one is
              smaller where N does not divide the channels. `"diagonal"` means
              N = 32, `"dense"` one convolution of all channels.
            - `"diagonal_grouped:N"`: the same blocks as one grouped
              convolution; N must divide the channels.
            - `"shifted"`: a sum over kernel taps of shifted, scaled inputs.
            - `"native"`: the framework's own op.
            - a dict with the keys `"forward"`, `"input_gradient"` and
              `"kernel_gradient"`: one of these for each pass.

            Defaults to `"diagonal:32"`, the choice of the paper's authors.

    Raises:
        ValueError: if `lowering` is none of these, or, when the layer is
            built, if it cannot compute the layer; the message says why.
    """


def layer_spec(layer: keras.layers.Layer, input_shape: tuple) -> ConvSpec:
    """The convolution of a layer, stock or ours, as a problem.

    Args:
        layer: a `DepthwiseConv2D`, a `Conv2D`, or a `SeparableConv2D`, of
            which the depthwise half is meant.
        input_shape: four sizes in the layer's `data_format`; batch, height
            and width may be None.

    Raises:
        ValueError: if the input is too small for the kernel, or the groups
            do not fit the channels.
    """
    sizes = [size if isinstance(size, int) else None for size in input_shape]
    if len(sizes) != 4:
        raise ValueError(
            f"Expected inputs of 4 dimensions ({layer.data_format}) for layer "
            f"'{layer.name}'. Received: input_shape={tuple(input_shape)}"
        )
    batch, *image = sizes
    if layer.data_format == "channels_last":
        height, width, channels = image
    else:
        channels, height, width = image
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
        batch=batch,
        height=height,
        width=width,
        groups=groups,
        input_channels_per_group=channels // groups,
        output_channels_per_group=multiplier,
        kernel_size=layer.kernel_size,
        strides=layer.strides,
        dilation_rate=layer.dilation_rate,
        padding=layer.padding,
        data_format=layer.data_format,
        compute_dtype=layer.compute_dtype,
    )


def kernel_channels_axis(layer: keras.layers.Layer, kernel: Any = None) -> MeshAxis | None:
    """The mesh axis that a layer's kernel is divided along, channel by channel; None where not.

    Args:
        layer: as for `layer_spec`; it must be built.
        kernel: what it computes with; None means its variable.
    """
    if kernel is None:
        separable = isinstance(layer, keras.layers.SeparableConv2D)
        kernel = layer.depthwise_kernel if separable else layer.kernel
    return variable_axis(kernel, 3 if isinstance(layer, keras.layers.Conv2D) else 2)


class LoweredLayer:
    """The `lowering` of a layer: argument, attribute, config and check."""

    # Stands here too, so that a stock layer whose class is changed has one.
    _lowering: LoweringChoice = parse(DEFAULT_LOWERING)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = cls.__mro__[2]
        if cls.__doc__ and stock.__module__.startswith("keras."):
            cls.__doc__ += _ARGUMENT_DOC.format(stock=stock.__name__)
            cls.__signature__ = _signature_with_lowering(stock)

    def __init__(
        self, *args: Any, lowering: LoweringLike = DEFAULT_LOWERING, **kwargs: Any
    ) -> None:
        choice = parse(lowering)
        super().__init__(*args, **kwargs)
        self._lowering = choice

    @property
    def lowering(self) -> str | dict[str, str]:
        """How the layer computes: a string, or a dict of one per pass."""
        return self._lowering.to_config()

    @lowering.setter
    def lowering(self, value: LoweringLike) -> None:
        self._lowering = parse(value)

    def spec(self, input_shape: tuple) -> ConvSpec:
        """The layer's convolution as a problem, for inputs of `input_shape`.

        Args:
            input_shape: four sizes in the layer's `data_format`; batch,
                height and width may be None.

        Raises:
            ValueError: if the input is too small for the kernel, or the
                groups do not fit the channels.
        """
        return layer_spec(self, input_shape)

    def build(self, input_shape: tuple) -> None:
        # Keras binds `build` to the object when it makes it. If the class has
        # been changed to stock since, this is stock's to do.
        if not isinstance(self, LoweredLayer):
            type(self).build(self, input_shape)
            return
        # Keras's own checks come first; a refusal must leave no variables.
        self.compute_output_shape(input_shape)
        self._check_lowering(self.spec(tuple(input_shape)))
        super().build(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "lowering": self.lowering}

    def _check_lowering(self, spec: ConvSpec) -> None:
        reasons = why_not(spec, self._lowering)
        if reasons:
            raise ValueError(
                f"Layer '{self.name}' cannot be computed with lowering={self.lowering!r}: "
                f"{'; '.join(reasons)}"
            )

    def _convolve(self, inputs: Any, kernel: Any) -> Any:
        channels = kernel_channels_axis(self, kernel)
        inputs = ops.convert_to_tensor(inputs)
        kernel = ops.convert_to_tensor(kernel)
        spec = self.spec(tuple(inputs.shape))
        self._check_lowering(spec)
        kernel = ops.reshape(kernel, spec.kernel_shape)
        return convolve_sharded(spec, self._lowering, inputs, kernel, channels)

    def _add_bias_and_activate(self, outputs: Any) -> Any:
        if self.use_bias:
            shape = [1, 1, 1, 1]
            shape[-1 if self.data_format == "channels_last" else 1] = -1
            outputs = ops.add(outputs, ops.reshape(self.bias, shape))
        return outputs if self.activation is None else self.activation(outputs)


def _signature_with_lowering(stock: type) -> inspect.Signature:
    """The signature of `stock` with `lowering` among its arguments."""
    signature = inspect.signature(stock.__init__)
    parameters = [p for name, p in signature.parameters.items() if name != "self"]
    lowering = inspect.Parameter(
        "lowering",
        inspect.Parameter.KEYWORD_ONLY,
        default=DEFAULT_LOWERING,
        annotation=LoweringLike,
    )
    position = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*parameters[:position], lowering, *parameters[position:]])


@keras.saving.register_keras_serializable(package="diagconv_tf")
class DiagonalwiseDepthwiseConv2D(LoweredLayer, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` with a choice of how it computes."""

    def call(self, inputs: Any) -> Any:
        return self._add_bias_and_activate(self._convolve(inputs, self.kernel))


@keras.saving.register_keras_serializable(package="diagconv_tf")
class DiagonalwiseSeparableConv2D(LoweredLayer, keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` with a choice of how its depthwise half
    computes.
    """

    def call(self, inputs: Any) -> Any:
        outputs = self._convolve(inputs, self.depthwise_kernel)
        pointwise = self.spec(tuple(inputs.shape)).pointwise(self.filters)
        kernel = ops.convert_to_tensor(self.pointwise_kernel)
        return self._add_bias_and_activate(convolve(pointwise, _NATIVE, outputs, kernel))


@keras.saving.register_keras_serializable(package="diagconv_tf")
class DiagonalwiseConv2D(LoweredLayer, keras.layers.Conv2D):
    """`keras.layers.Conv2D`, meant for `groups` > 1, with a choice of how it
    computes.
    """

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        return self._convolve(inputs, kernel)
