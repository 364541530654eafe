"""MobileNetV1, MobileNetV2 and a small network for trials, in Keras's own layers.

The ImageNet stem is `keras.applications.MobileNet` and `MobileNetV2` layer by
layer: same names, paddings, shapes and order of the weights, so that
`model.set_weights` and `get_weights` interchange with them. The CIFAR stem
keeps more of a small image: only strides (and the paddings that belong to
them) differ, hence the weights interchange as well.

Sources: MobileNetV1, Howard et al., arXiv 1704.04861, table 1; MobileNetV2,
Sandler et al., arXiv 1801.04381, table 2; paddings, batch normalization and
names, keras.applications; CIFAR strides, github.com/kuangliu/pytorch-cifar,
`models/mobilenet.py` and `models/mobilenetv2.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import keras
from keras import layers

STEMS = ("imagenet", "cifar")
MINIMUM_SIZE = 32
ACTIVATIONS = ("softmax", None)

# (filters, stride) of the 13 separable blocks: table 1 of arXiv 1704.04861.
_V1_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
)

# (expansion, filters, repetitions, stride of the first): table 2 of arXiv 1801.04381.
_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v1(
    input_shape: Sequence[int],
    classes: int,
    *,
    width_multiplier: float = 1.0,
    stem: str = "imagenet",
    dropout: float = 1e-3,
    batch_norm_momentum: float = 0.99,
    classifier_activation: str | None = "softmax",
    name: str = "mobilenet_v1",
) -> keras.Model:
    """MobileNetV1 (Howard et al., arXiv 1704.04861).

    Args:
        input_shape: Height, width and channels of one image, in the order of
            `keras.config.image_data_format()`. Height and width at least 32;
            any number of channels.
        classes: Number of classes, at least 1.
        width_multiplier: Factor of every layer's number of filters, the
            paper's alpha; filters are rounded down.
        stem: `"imagenet"`: the first convolution has stride 2, a reduction of
            32 in total. `"cifar"`: it has stride 1, a reduction of 16, as
            pytorch-cifar does for 32x32 images.
        dropout: Rate before the classifier, in [0, 1).
        batch_norm_momentum: Of the moving averages. The default is that of
            keras.applications.
        classifier_activation: `"softmax"`, for probabilities, or `None`, for
            logits, as of keras.applications. The recipes train on logits; see
            `with_probabilities`.
        name: Of the model.

    Returns:
        An uncompiled functional model, (batch, *input_shape) → (batch, classes)
        probabilities or logits: in float32 where the dtype policy computes in
        half precision.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check(input_shape, classes, width_multiplier, stem, dropout, classifier_activation)
    build = _Builder(batch_norm_momentum)
    filters = _v1_filters(32, width_multiplier)

    inputs = layers.Input(shape=tuple(input_shape))
    x = layers.Conv2D(
        filters,
        3,
        strides=2 if stem == "imagenet" else 1,
        padding="same",
        use_bias=False,
        name="conv1",
    )(inputs)
    x = build.batch_norm(x, "conv1_bn")
    x = layers.ReLU(6.0, name="conv1_relu")(x)

    for block, (filters, stride) in enumerate(_V1_BLOCKS, start=1):
        if stride == 2:
            # keras.applications pads below and right whether or not the size is even.
            x = layers.ZeroPadding2D(((0, 1), (0, 1)), name=f"conv_pad_{block}")(x)
        x = build.depthwise(x, stride, f"conv_dw_{block}")
        x = build.batch_norm(x, f"conv_dw_{block}_bn")
        x = layers.ReLU(6.0, name=f"conv_dw_{block}_relu")(x)
        x = build.pointwise(x, _v1_filters(filters, width_multiplier), f"conv_pw_{block}")
        x = build.batch_norm(x, f"conv_pw_{block}_bn")
        x = layers.ReLU(6.0, name=f"conv_pw_{block}_relu")(x)

    x = layers.GlobalAveragePooling2D(keepdims=True, name="global_average_pooling2d")(x)
    x = layers.Dropout(dropout, name="dropout")(x)
    dtype = _at_least_float32(keras.config.dtype_policy().compute_dtype)
    x = layers.Conv2D(classes, 1, padding="same", name="conv_preds", dtype=dtype)(x)
    x = layers.Reshape((classes,), name="reshape_2", dtype=dtype)(x)
    outputs = layers.Activation(classifier_activation, name="predictions", dtype=dtype)(x)
    return keras.Model(inputs, outputs, name=name)


def mobilenet_v2(
    input_shape: Sequence[int],
    classes: int,
    *,
    width_multiplier: float = 1.0,
    stem: str = "imagenet",
    dropout: float = 0.0,
    batch_norm_momentum: float = 0.999,
    classifier_activation: str | None = "softmax",
    name: str = "mobilenet_v2",
) -> keras.Model:
    """MobileNetV2 (Sandler et al., arXiv 1801.04381).

    Args:
        input_shape: Height, width and channels of one image, in the order of
            `keras.config.image_data_format()`. Height and width at least 32;
            any number of channels.
        classes: Number of classes, at least 1.
        width_multiplier: Factor of every layer's number of filters, rounded to
            a multiple of 8. The last convolution keeps 1280 for factors below
            1, as the paper says.
        stem: `"imagenet"`: a reduction of 32 in total. `"cifar"`: the first
            convolution and the first block of 24 filters (`block_1`) have
            stride 1, a reduction of 8, as pytorch-cifar does for 32x32 images.
        dropout: Rate before the classifier, in [0, 1); 0 makes no layer, as in
            keras.applications.
        batch_norm_momentum: Of the moving averages. The default is that of
            keras.applications; it needs some thousand steps to settle.
        classifier_activation: `"softmax"`, for probabilities, or `None`, for
            logits, as of keras.applications. The recipes train on logits; see
            `with_probabilities`.
        name: Of the model.

    Returns:
        An uncompiled functional model, (batch, *input_shape) → (batch, classes)
        probabilities or logits: in float32 where the dtype policy computes in
        half precision.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check(input_shape, classes, width_multiplier, stem, dropout, classifier_activation)
    build = _Builder(batch_norm_momentum)

    inputs = layers.Input(shape=tuple(input_shape))
    x = layers.Conv2D(
        _make_divisible(32 * width_multiplier),
        3,
        strides=2 if stem == "imagenet" else 1,
        padding="same",
        use_bias=False,
        name="Conv1",
    )(inputs)
    x = build.batch_norm(x, "bn_Conv1")
    x = layers.ReLU(6.0, name="Conv1_relu")(x)

    for block, (expansion, filters, stride) in enumerate(_v2_blocks(stem)):
        filters = _make_divisible(int(filters * width_multiplier))
        prefix = f"block_{block}_" if block else "expanded_conv_"
        x = _inverted_residual(build, x, expansion, filters, stride, prefix)

    x = layers.Conv2D(
        _make_divisible(1280 * max(1.0, width_multiplier)), 1, use_bias=False, name="Conv_1"
    )(x)
    x = build.batch_norm(x, "Conv_1_bn")
    x = layers.ReLU(6.0, name="out_relu")(x)
    x = layers.GlobalAveragePooling2D(name="global_average_pooling2d")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    dtype = _at_least_float32(keras.config.dtype_policy().compute_dtype)
    outputs = layers.Dense(
        classes, activation=classifier_activation, name="predictions", dtype=dtype
    )(x)
    return keras.Model(inputs, outputs, name=name)


def small_cnn(
    input_shape: Sequence[int],
    classes: int,
    *,
    width_multiplier: float = 1.0,
    dropout: float = 0.0,
    batch_norm_momentum: float = 0.9,
    classifier_activation: str | None = "softmax",
    name: str = "small_cnn",
) -> keras.Model:
    """Four 3x3 convolutions, of 32, 32, 64 and 64 filters: a network for small trials.

    After the second and the fourth the size is halved. Each has a batch normalization and a
    ReLU, and no bias. The design is the recipes' own.

    Args:
        input_shape: As of `mobilenet_v1`; height and width at least 4.
        classes: Number of classes, at least 1.
        width_multiplier: Factor of the numbers of filters, which are rounded down.
        dropout: Rate before the classifier, in [0, 1); 0 makes no layer.
        batch_norm_momentum: Of the moving averages.
        classifier_activation: As of `mobilenet_v1`.
        name: Of the model.

    Returns:
        An uncompiled functional model, (batch, *input_shape) → (batch, classes)
        probabilities or logits, as `mobilenet_v1`.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check(
        input_shape,
        classes,
        width_multiplier,
        "cifar",
        dropout,
        classifier_activation,
        minimum_size=4,
    )
    build = _Builder(batch_norm_momentum)
    inputs = x = layers.Input(shape=tuple(input_shape))
    for number, filters in enumerate((32, 32, 64, 64), start=1):
        filters = _v1_filters(filters, width_multiplier)
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"conv_{number}")(x)
        x = build.batch_norm(x, f"conv_{number}_bn")
        x = layers.ReLU(name=f"conv_{number}_relu")(x)
        if number % 2 == 0:
            x = layers.MaxPooling2D(name=f"pool_{number}")(x)
    x = layers.GlobalAveragePooling2D(name="global_average_pooling2d")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    dtype = _at_least_float32(keras.config.dtype_policy().compute_dtype)
    outputs = layers.Dense(
        classes, activation=classifier_activation, name="predictions", dtype=dtype
    )(x)
    return keras.Model(inputs, outputs, name=name)


def with_probabilities(model: keras.Model) -> keras.Model:
    """`model`, which gives logits, with a softmax after them.

    The recipes train on logits, because cross-entropy of logits has a gradient
    where that of rounded probabilities is 0; what they save gives
    probabilities, as the models of keras.applications do.

    Args:
        model: Functional, (batch, …) → logits, (batch, classes).

    Returns:
        An uncompiled functional model of the same layers, which shares all
        weights with `model`: (batch, …) → probabilities, (batch, classes), in
        float32 where the logits are of half precision.
    """
    name = "probabilities"
    while any(layer.name == name for layer in model.layers):
        name += "_1"
    logits = model.outputs[0]
    softmax = layers.Softmax(name=name, dtype=_at_least_float32(logits.dtype))
    # Not `inputs`, a list: exported, the model is called as it was built.
    return keras.Model(model.input, softmax(logits), name=model.name)


@dataclass(frozen=True)
class _Builder:
    """The layers in which the networks agree."""

    batch_norm_momentum: float

    def depthwise(self, x, stride: int, name: str):
        return layers.DepthwiseConv2D(
            3,
            strides=stride,
            padding="same" if stride == 1 else "valid",
            use_bias=False,
            # He's, for an output that sums over 9 inputs (arXiv 1502.01852, eq. 10).
            # Keras's own initializers count the inputs of all channels: their
            # values are too small by the root of the number of channels, and a
            # kernel's gradient, with a batch norm after it, too large by as much.
            depthwise_initializer=keras.initializers.RandomNormal(stddev=(2 / 9) ** 0.5),
            name=name,
        )(x)

    def pointwise(self, x, filters: int, name: str):
        return layers.Conv2D(filters, 1, padding="same", use_bias=False, name=name)(x)

    def batch_norm(self, x, name: str):
        return layers.BatchNormalization(
            axis=_channel_axis(), epsilon=1e-3, momentum=self.batch_norm_momentum, name=name
        )(x)


def _inverted_residual(
    build: _Builder, inputs, expansion: int, filters: int, stride: int, prefix: str
):
    in_channels = inputs.shape[_channel_axis()]
    x = inputs
    if expansion > 1:
        x = build.pointwise(x, expansion * in_channels, f"{prefix}expand")
        x = build.batch_norm(x, f"{prefix}expand_BN")
        x = layers.ReLU(6.0, name=f"{prefix}expand_relu")(x)
    if stride == 2:
        x = layers.ZeroPadding2D(_padding_for_stride_2(x), name=f"{prefix}pad")(x)
    x = build.depthwise(x, stride, f"{prefix}depthwise")
    x = build.batch_norm(x, f"{prefix}depthwise_BN")
    x = layers.ReLU(6.0, name=f"{prefix}depthwise_relu")(x)
    x = build.pointwise(x, filters, f"{prefix}project")
    x = build.batch_norm(x, f"{prefix}project_BN")
    if stride == 1 and in_channels == filters:
        return layers.Add(name=f"{prefix}add")([inputs, x])
    return x


def _v1_filters(filters: int, width_multiplier: float) -> int:
    """Rounded down, as in keras.applications; a width that leaves none is refused."""
    rounded = int(filters * width_multiplier)
    if rounded < 1:
        raise ValueError(
            "Expected a `width_multiplier` that leaves at least one of the "
            f"{filters} filters. Received: width_multiplier={width_multiplier}"
        )
    return rounded


def _v2_blocks(stem: str) -> list[tuple[int, int, int]]:
    """(expansion, filters, stride) of the 17 blocks."""
    blocks = []
    for expansion, filters, repetitions, stride in _V2_STAGES:
        if stem == "cifar" and filters == 24:
            stride = 1
        blocks += [(expansion, filters, stride)]
        blocks += [(expansion, filters, 1)] * (repetitions - 1)
    return blocks


def _make_divisible(value: float, divisor: int = 8) -> int:
    """`value` to the nearest multiple of `divisor`, but not more than 10 % below.

    Source: the authors' repository, github.com/tensorflow/models,
    `research/slim/nets/mobilenet/mobilenet.py`.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor


def _padding_for_stride_2(x) -> tuple[tuple[int, int], tuple[int, int]]:
    """(before, after) of height and width, so that a 3x3 'valid' convolution
    with stride 2 halves the size, rounded up.
    """
    height, width = x.shape[2:] if _channel_axis() == 1 else x.shape[1:3]
    return (height % 2, 1), (width % 2, 1)


def _at_least_float32(dtype: str) -> str:
    """Half precision has too few digits for logits: a softmax of them that is wrong by 20
    has no gradient left.
    """
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def _channel_axis() -> int:
    return 1 if keras.config.image_data_format() == "channels_first" else -1


def _check(
    input_shape: Sequence[int],
    classes: int,
    width_multiplier: float,
    stem: str,
    dropout: float,
    classifier_activation: str | None,
    minimum_size: int = MINIMUM_SIZE,
) -> None:
    data_format = keras.config.image_data_format()
    order = "(channels, height, width)" if _channel_axis() == 1 else "(height, width, channels)"
    shape = tuple(input_shape)
    size = shape[1:] if _channel_axis() == 1 else shape[:2]
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(
            f"Expected `input_shape` to be three positive integers {order}. "
            f"Received: input_shape={shape}"
        )
    if min(size) < minimum_size:
        raise ValueError(
            f"Expected height and width of at least {minimum_size} in `input_shape` "
            f"{order} ({data_format}). Received: input_shape={shape}"
        )
    if not isinstance(classes, int) or classes < 1:
        raise ValueError(
            f"Expected `classes` to be a positive integer. Received: classes={classes!r}"
        )
    if not width_multiplier > 0:
        raise ValueError(
            "Expected `width_multiplier` to be positive. "
            f"Received: width_multiplier={width_multiplier!r}"
        )
    if stem not in STEMS:
        raise ValueError(f"Expected `stem` to be one of {STEMS}. Received: stem={stem!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"Expected `dropout` in [0, 1). Received: dropout={dropout!r}")
    if classifier_activation not in ACTIVATIONS:
        raise ValueError(
            f"Expected `classifier_activation` to be one of {ACTIVATIONS}. "
            f"Received: classifier_activation={classifier_activation!r}"
        )
