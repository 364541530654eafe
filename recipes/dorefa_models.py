"""The networks that DoReFa-Net (arXiv 1606.06160) was tried on, in floating point.

Layers, sizes and order are those of the authors' implementation (tensorpack,
`examples/DoReFa-Net/svhn-digit-dorefa.py` and `alexnet-dorefa.py`): a convolution, a batch
normalization of momentum 0.9 and epsilon 1e-4, perhaps a pooling, an activation. Quantizers come
with a treatment (`recipes.treatments`): `diagconv_tf.LowBit` quantizes activations where a
layer takes its inputs, which after a ReLU is what the authors' clip does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers

EPSILON = 1e-4


def svhn_cnn(
    input_shape: Sequence[int],
    classes: int,
    *,
    width_multiplier: float = 1.0,
    dropout: float = 0.5,
    batch_norm_momentum: float = 0.9,
    classifier_activation: str | None = "softmax",
    name: str = "svhn_cnn",
) -> keras.Model:
    """Seven convolutions for house numbers of 40x40 pixels.

    The authors' activation is min(|x|, 1); here it is a ReLU, which the quantizer of
    activations clips at 1.

    Args:
        input_shape: Of one image, in the order of `keras.config.image_data_format()`; height
            and width at least 37.
        classes: Number of classes.
        width_multiplier: Factor of the numbers of filters, which are rounded down.
        dropout: Rate before the last convolution.
        batch_norm_momentum: Of the moving averages.
        classifier_activation: As of `recipes.models.mobilenet_v1`.
        name: Of the model.

    Returns:
        An uncompiled functional model, (batch, *input_shape) → (batch, classes)
        probabilities or logits.

    Raises:
        ValueError: If the image is too small.
    """
    _check_size(input_shape, 37)
    block = _Block(width_multiplier, batch_norm_momentum)
    inputs = layers.Input(shape=tuple(input_shape))
    x = block.convolution(inputs, 48, 5, "valid", "conv_0", use_bias=True)
    x = layers.MaxPooling2D(padding="same", name="pool_0")(x)
    x = layers.ReLU(name="conv_0_relu")(x)
    x = block(x, 64, 3, "same", "conv_1")
    x = block(x, 64, 3, "same", "conv_2", pool=(2, "same"))
    x = block(x, 128, 3, "valid", "conv_3")
    x = block(x, 128, 3, "same", "conv_4")
    x = block(x, 128, 3, "valid", "conv_5")
    x = layers.Dropout(dropout, name="dropout")(x)
    x = block(x, 512, 5, "valid", "conv_6")
    x = layers.Flatten(name="flatten")(x)
    # The sum of squares times half of this is a part of the loss.
    regularizer = keras.regularizers.L2(0.5e-7)
    outputs = _classifier(x, classes, classifier_activation, regularizer)
    return keras.Model(inputs, outputs, name=name)


def alexnet(
    input_shape: Sequence[int],
    classes: int,
    *,
    width_multiplier: float = 1.0,
    dropout: float = 0.0,
    batch_norm_momentum: float = 0.9,
    classifier_activation: str | None = "softmax",
    name: str = "alexnet",
) -> keras.Model:
    """AlexNet as DoReFa-Net has it: batch normalizations, no dropout, two groups.

    Args:
        input_shape: Of one image, in the order of `keras.config.image_data_format()`; 224x224
            as published, height and width at least 44.
        classes: Number of classes.
        width_multiplier: Factor of the numbers of filters and units, which are rounded down.
        dropout: Rate before each of the last two dense layers; the authors have none.
        batch_norm_momentum: Of the moving averages.
        classifier_activation: As of `recipes.models.mobilenet_v1`.
        name: Of the model.

    Returns:
        An uncompiled functional model, (batch, *input_shape) → (batch, classes)
        probabilities or logits.

    Raises:
        ValueError: If the image is too small.
    """
    _check_size(input_shape, 44)
    block = _Block(width_multiplier, batch_norm_momentum)
    # The sum of squares times half of this is a part of the loss.
    regularizer = keras.regularizers.L2(2.5e-6)
    inputs = layers.Input(shape=tuple(input_shape))
    x = block.convolution(inputs, 96, 12, "valid", "conv_0", strides=4)
    x = layers.ReLU(name="conv_0_relu")(x)
    x = block(x, 256, 5, "same", "conv_1", groups=2, pool=(3, "same"))
    x = block(x, 384, 3, "same", "conv_2", pool=(3, "same"))
    x = block(x, 384, 3, "same", "conv_3", groups=2)
    x = block(x, 256, 3, "same", "conv_4", groups=2, pool=(3, "valid"))
    x = layers.Flatten(name="flatten")(x)
    for number, use_bias in enumerate((True, False)):
        if dropout and number:
            x = layers.Dropout(dropout, name="dropout_0")(x)
        x = layers.Dense(
            block.width(4096),
            use_bias=use_bias,
            kernel_regularizer=regularizer,
            name=f"dense_{number}",
        )(x)
        x = block.batch_norm(x, f"dense_{number}_bn")
        x = layers.ReLU(name=f"dense_{number}_relu")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout_1")(x)
    outputs = _classifier(x, classes, classifier_activation, regularizer)
    return keras.Model(inputs, outputs, name=name)


class _Block:
    """A convolution without bias, a batch normalization, perhaps a pooling, and a ReLU."""

    def __init__(self, width_multiplier: float, batch_norm_momentum: float) -> None:
        self._width_multiplier = width_multiplier
        self._momentum = batch_norm_momentum

    def width(self, filters: int) -> int:
        # Even, for two groups.
        return max(2, int(filters * self._width_multiplier) // 2 * 2)

    def convolution(
        self, x: Any, filters: int, size: int, padding: str, name: str, **more: Any
    ) -> Any:
        more = {"use_bias": False, **more}
        return layers.Conv2D(self.width(filters), size, padding=padding, name=name, **more)(x)

    def batch_norm(self, x: Any, name: str) -> Any:
        first = keras.config.image_data_format() == "channels_first" and len(x.shape) == 4
        return layers.BatchNormalization(
            axis=1 if first else -1, momentum=self._momentum, epsilon=EPSILON, name=name
        )(x)

    def __call__(
        self,
        x: Any,
        filters: int,
        size: int,
        padding: str,
        name: str,
        *,
        groups: int = 1,
        pool: tuple[int, str] | None = None,
    ) -> Any:
        x = self.convolution(x, filters, size, padding, name, groups=groups)
        x = self.batch_norm(x, f"{name}_bn")
        if pool is not None:
            x = layers.MaxPooling2D(pool[0], 2, padding=pool[1], name=f"{name}_pool")(x)
        return layers.ReLU(name=f"{name}_relu")(x)


def _classifier(
    x: Any, classes: int, activation: str | None, regularizer: keras.regularizers.Regularizer
) -> Any:
    compute_dtype = keras.config.dtype_policy().compute_dtype
    return layers.Dense(
        classes,
        activation=activation,
        kernel_regularizer=regularizer,
        name="predictions",
        # Half precision has too few digits for what the loss is made of.
        dtype=keras.backend.result_type(compute_dtype, "float32"),
    )(x)


def _check_size(input_shape: Sequence[int], least: int) -> None:
    first = keras.config.image_data_format() == "channels_first"
    size = tuple(input_shape)[1:] if first else tuple(input_shape)[:2]
    if len(input_shape) != 3 or min(size) < least:
        raise ValueError(
            f"Expected images of at least {least} pixels in height and width. "
            f"Received: input_shape={tuple(input_shape)}"
        )
