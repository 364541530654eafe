"""Inference layers that multiply bits: dense layers and convolutions of packed integers.

They take the place of low-bit layers whose kernel and inputs are both quantized, and compute
the same integers; `deploy(model, kernels="bits")` makes them. A kernel is kept as packed
words: of k bits a weight, where a float kernel has 32.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from diagconv_tf.layers import add_bias
from diagconv_tf.lowbit.bit_convolution import CodeGrid, PackedKernel, convolve, dense
from diagconv_tf.lowbit.layers import LowBitConv2D, LowBitDense, kernels_of, operands_of
from diagconv_tf.lowbit.operands import FLOAT_BITS, DoReFaActivations, KernelCodes
from diagconv_tf.spec import ConvSpec


class _BitLayer(keras.layers.Layer):
    """What both have: a packed kernel, a scale, a bias and an activation."""

    def __init__(
        self,
        inputs: DoReFaActivations,
        kernel_bits: int,
        activation: Any = None,
        use_bias: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(trainable=False, **kwargs)
        if isinstance(inputs, dict):
            inputs = keras.saving.deserialize_keras_object(inputs)
        if not isinstance(inputs, DoReFaActivations) or inputs.bits == FLOAT_BITS:
            raise ValueError(
                "Expected `inputs` to be a DoReFaActivations of 1 to 8 bits. "
                f"Received: inputs={inputs!r}"
            )
        self.inputs_quantizer = inputs
        # DoReFa's weights, and signs, are odd integers.
        self.kernel_grid = CodeGrid(kernel_bits, is_odd=True)
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias

    def _add_weights(self, kernel_size: tuple[int, int], channels: int, outputs: int) -> None:
        taps = kernel_size[0] * kernel_size[1]
        # 32 channels a word.
        shape = (-(-channels // 32), self.kernel_grid.bits, taps * outputs)
        self._kernel_shape = (kernel_size, channels, outputs)
        self.words = self._add("words", shape, "int32")
        self.sums = self._add("sums", (taps, outputs), "int32")
        self.kernel_scale = self._add("kernel_scale", (), "float32")
        self.bias = self._add("bias", (outputs,), None) if self.use_bias else None

    def _add(self, name: str, shape: tuple, dtype: str | None) -> keras.Variable:
        return self.add_weight(
            name=name, shape=shape, dtype=dtype, initializer="zeros", trainable=False
        )

    def set_kernel(self, codes: KernelCodes, bias: Any = None) -> None:
        """Sets the weights of the built layer.

        Args:
            codes: the kernel's integers, as the low-bit layer's quantizer gives them.
            bias: the bias, where there is one.

        Raises:
            ValueError: if the integers are not on the layer's grid.
        """
        packed = PackedKernel.of(codes.codes, self.kernel_grid)
        self.words.assign(packed.words)
        self.sums.assign(packed.sums)
        self.kernel_scale.assign(codes.scale)
        if self.bias is not None:
            self.bias.assign(bias)

    @property
    def _packed(self) -> PackedKernel:
        words, sums = (ops.convert_to_tensor(v) for v in (self.words, self.sums))
        return PackedKernel(words, sums, self.kernel_grid, *self._kernel_shape)

    @property
    def _inputs_grid(self) -> CodeGrid:
        return CodeGrid(self.inputs_quantizer.bits, self.inputs_quantizer.signed)

    def _finish(self, sums: Any) -> Any:
        scale = ops.multiply(self.kernel_scale, self.inputs_quantizer.scale)
        outputs = ops.cast(ops.multiply(ops.cast(sums, "float32"), scale), self.compute_dtype)
        outputs = add_bias(self, outputs)
        return outputs if self.activation is None else self.activation(outputs)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["trainable"]
        return {
            **config,
            "inputs": keras.saving.serialize_keras_object(self.inputs_quantizer),
            "kernel_bits": self.kernel_grid.bits,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
        }


@keras.saving.register_keras_serializable(package="diagconv_tf")
class BitDense(_BitLayer):
    """A dense layer of integers, for inference.

    Args:
        units: outputs.
        inputs: quantizer of the inputs.
        kernel_bits: bits of a weight, 1 to 8.
        **kwargs: `activation` and `use_bias` as for `keras.layers.Dense`, and the arguments
            of `keras.Layer`.

    Raises:
        ValueError: if `inputs` is no quantizer of 1 to 8 bits.
    """

    def __init__(
        self, units: int, inputs: DoReFaActivations, kernel_bits: int, **kwargs: Any
    ) -> None:
        super().__init__(inputs, kernel_bits, **kwargs)
        self.units = units

    def build(self, input_shape: tuple) -> None:
        self._add_weights((1, 1), input_shape[-1], self.units)
        self.built = True

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return (*input_shape[:-1], self.units)

    def call(self, inputs: Any) -> Any:
        return self._finish(
            dense(self.inputs_quantizer.codes(inputs), self._inputs_grid, self._packed)
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="diagconv_tf")
class BitConv2D(_BitLayer):
    """A convolution of integers, channels last, for inference. Height and width must be known.

    Args:
        filters: outputs.
        kernel_size: height and width.
        inputs: quantizer of the inputs.
        kernel_bits: bits of a weight, 1 to 8.
        strides: of height and width.
        padding: `"same"` or `"valid"`.
        dilation_rate: of height and width.
        **kwargs: `activation` and `use_bias` as for `keras.layers.Conv2D`, and the arguments
            of `keras.Layer`.

    Raises:
        ValueError: if `inputs` is no quantizer of 1 to 8 bits; on building, if height or
            width is unknown.
    """

    data_format = "channels_last"

    def __init__(
        self,
        filters: int,
        kernel_size: tuple[int, int],
        inputs: DoReFaActivations,
        kernel_bits: int,
        strides: tuple[int, int] = (1, 1),
        padding: str = "valid",
        dilation_rate: tuple[int, int] = (1, 1),
        **kwargs: Any,
    ) -> None:
        super().__init__(inputs, kernel_bits, **kwargs)
        self.filters = filters
        # Lists, in files.
        self.kernel_size = (kernel_size[0], kernel_size[1])
        self.strides = (strides[0], strides[1])
        self.padding = padding
        self.dilation_rate = (dilation_rate[0], dilation_rate[1])

    def build(self, input_shape: tuple) -> None:
        if None in input_shape[1:]:
            raise ValueError(
                f"Expected inputs whose height, width and channels are known. "
                f"Received: {tuple(input_shape)}"
            )
        self._add_weights(self.kernel_size, input_shape[-1], self.filters)
        self.built = True

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return (input_shape[0], *self._spec(input_shape).output_size, self.filters)

    def call(self, inputs: Any) -> Any:
        spec = self._spec(inputs.shape)
        sums = convolve(
            self.inputs_quantizer.codes(inputs),
            self._inputs_grid,
            self._packed,
            spec.strides,
            spec.dilation_rate,
            spec.padding_for((spec.height, spec.width)),
        )
        return self._finish(sums)

    def _spec(self, input_shape: tuple) -> ConvSpec:
        _, height, width, channels = input_shape
        return ConvSpec(
            None,
            height,
            width,
            groups=1,
            input_channels_per_group=channels,
            output_channels_per_group=self.filters,
            kernel_size=self.kernel_size,
            strides=self.strides,
            dilation_rate=self.dilation_rate,
            padding=self.padding,
        )

    def get_config(self) -> dict[str, Any]:
        names = ("filters", "kernel_size", "strides", "padding", "dilation_rate")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def why_not_bits(layer: keras.layers.Layer) -> list[str]:
    """Every reason why a low-bit layer cannot multiply bits; [] where it can."""
    if not isinstance(layer, LowBitDense | LowBitConv2D):
        return [f"{type(layer).__name__}: only dense layers and convolutions multiply bits"]
    operands = operands_of(layer)
    reasons = []
    if operands.kernel is None or operands.kernel.bits == FLOAT_BITS:
        reasons.append("its kernel is not quantized")
    if not isinstance(operands.inputs, DoReFaActivations) or operands.inputs.bits == FLOAT_BITS:
        reasons.append("its inputs are not quantized")
    if isinstance(layer, LowBitConv2D):
        if layer.groups > 1:
            reasons.append(f"groups={layer.groups}: a word holds 32 channels of one group")
        if layer.data_format != "channels_last":
            reasons.append("channels_first")
    return reasons


def bit_layer(layer: LowBitDense | LowBitConv2D) -> BitDense | BitConv2D:
    """The layer that multiplies bits in place of `layer`, not built yet.

    Args:
        layer: a built low-bit layer, which `why_not_bits` does not refuse.
    """
    operands = operands_of(layer)
    common: dict[str, Any] = {
        "inputs": operands.inputs,
        "kernel_bits": operands.kernel_bits,
        "activation": layer.activation,
        "use_bias": layer.use_bias,
        "name": layer.name,
        "dtype": layer.dtype_policy,
    }
    if isinstance(layer, LowBitDense):
        return BitDense(layer.units, **common)
    return BitConv2D(
        layer.filters,
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        **common,
    )


def fill(bit: BitDense | BitConv2D, layer: LowBitDense | LowBitConv2D) -> None:
    """Gives a built layer of bits the weights of the low-bit layer that it replaces."""
    operand = operands_of(layer).kernel
    assert operand is not None, "why_not_bits refuses it"
    (kernel,) = kernels_of(layer)
    # The layer casts a kernel to its compute dtype, and quantizes it then.
    bit.set_kernel(
        operand.codes(ops.cast(ops.convert_to_tensor(kernel), layer.compute_dtype)), layer.bias
    )
