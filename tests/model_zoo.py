"""Small models of every kind that Keras can build, by name."""

import keras
import numpy as np
from keras import layers


class Block(layers.Layer):
    """A composite layer that makes its layers itself, as KerasHub's do."""

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.depthwise = layers.DepthwiseConv2D(3, padding="same", name="depthwise")
        self.stages = [layers.SeparableConv2D(filters, 3, padding="same", name="separable")]

    def build(self, input_shape):
        self.depthwise.build(input_shape)
        self.stages[0].build(self.depthwise.compute_output_shape(input_shape))

    def call(self, inputs):
        return self.stages[0](self.depthwise(inputs))

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}


class OwnStep(keras.Model):
    """A functional model with a training step of its own."""

    def train_step(self, *args, **kwargs):
        return super().train_step(*args, **kwargs)


class Subclassed(keras.Model):
    """A model without a config."""

    def __init__(self, widths):
        super().__init__()
        self.blocks = [Block(width) for width in widths]
        self.head = layers.Dense(3)

    def call(self, inputs):
        for block in self.blocks:
            inputs = block(inputs)
        return self.head(keras.ops.mean(inputs, (1, 2)))


class OwnDepthwise(layers.DepthwiseConv2D):
    """A user's subclass, which no rule names."""

    def call(self, inputs):
        return 2 * super().call(inputs)


def _head(x):
    return layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x))


def sequential():
    return keras.Sequential(
        [
            layers.Input((8, 8, 4)),
            layers.DepthwiseConv2D(3, name="dw1"),
            layers.Conv2D(6, 3, groups=2, name="grouped"),
            layers.BatchNormalization(),
            layers.SeparableConv2D(5, 3, depth_multiplier=2, name="separable"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def sequential_without_input():
    model = keras.Sequential([layers.DepthwiseConv2D(3), layers.Flatten(), layers.Dense(3)])
    model.build((None, 8, 8, 4))
    return model


def skip_connections():
    inputs = keras.Input((8, 8, 4))
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="dw1")(inputs)
    x = layers.Add()([layers.BatchNormalization()(x), inputs])
    x = layers.DepthwiseConv2D(
        3, strides=2, padding="same", name="dw2", depthwise_regularizer="l2", activation="relu6"
    )(x)
    return keras.Model(inputs, _head(x))


def several_inputs_and_outputs():
    inputs = {"left": keras.Input((8, 8, 4), name="left"), "right": keras.Input((4,), name="right")}
    x = layers.DepthwiseConv2D(3, name="dw1")(inputs["left"])
    x = layers.Multiply()([x, layers.Reshape((1, 1, 4))(inputs["right"])])
    y = layers.SeparableConv2D(4, 3, name="separable")(x)
    return keras.Model(inputs, {"a": _head(y), "b": layers.GlobalMaxPooling2D(name="b")(x)})


def called_several_times():
    inputs = keras.Input((8, 8, 4))
    shared = layers.DepthwiseConv2D(3, padding="same", name="shared")
    return keras.Model(inputs, _head(shared(layers.MaxPooling2D()(shared(shared(inputs))))))


def operations():
    inputs = keras.Input((8, 8, 4))
    x = layers.DepthwiseConv2D(3, padding="same", name="dw1")(inputs * 2.0)
    x = keras.ops.concatenate([x[:, 1:], keras.ops.relu(inputs)[:, :3]], axis=1)
    return keras.Model(inputs, _head(keras.ops.transpose(x, (0, 2, 1, 3)) - 0.5))


def nested_and_shared():
    shared = layers.DepthwiseConv2D(3, padding="same", name="shared")
    inner_inputs = keras.Input((8, 8, 4))
    inner = keras.Model(
        inner_inputs,
        layers.DepthwiseConv2D(3, padding="same", name="own")(shared(inner_inputs)),
        name="inner",
    )
    middle = keras.Sequential([layers.Input((8, 8, 4)), inner, layers.ReLU()], name="middle")
    inputs = keras.Input((8, 8, 4))
    return keras.Model(inputs, _head(shared(middle(middle(inputs)))))


def in_a_wrapper():
    inputs = keras.Input((2, 8, 8, 4))
    x = layers.TimeDistributed(layers.DepthwiseConv2D(3, name="dw1"), name="each")(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


def composite():
    inputs = keras.Input((8, 8, 4))
    x = Block(5, name="block1")(inputs)
    return keras.Model(inputs, _head(Block(4, name="block2")(x)))


def own_training_step():
    inputs = keras.Input((8, 8, 4))
    x = layers.DepthwiseConv2D(3, name="dw1")(inputs)
    return OwnStep(inputs, _head(layers.Dropout(0.0)(x)))


def subclassed():
    model = Subclassed([4, 5])
    model(np.zeros((1, 8, 8, 4), "float32"))
    return model


def nasnet():
    """NASNetMobile with one cell where it has four, and narrow: the names of its scopes."""
    from keras.src.applications.nasnet import NASNet

    return NASNet(
        (32, 32, 3),
        penultimate_filters=96,
        num_blocks=1,
        stem_block_filters=8,
        skip_reduction=False,
        include_top=False,
        weights=None,
    )


def convnext():
    """ConvNeXtTiny with one block where it has three or nine, and narrow: layers of its own."""
    from keras.src.applications.convnext import ConvNeXt

    return ConvNeXt(
        depths=[1, 1, 2, 1],
        projection_dims=[8, 12, 16, 20],
        include_top=False,
        weights=None,
        input_shape=(32, 32, 3),
        name="convnext",
    )


def efficientnet():
    """EfficientNetB0 with one block of each kind, and narrow."""
    from keras.src.applications.efficientnet import EfficientNet

    return EfficientNet(
        width_coefficient=0.25,
        depth_coefficient=0.1,
        default_size=32,
        include_top=False,
        weights=None,
        input_shape=(32, 32, 3),
        name="efficientnet",
    )


#: name: (builder, how many layers can be rewritten)
MODELS = {
    "sequential": (sequential, 3),
    "sequential without input": (sequential_without_input, 1),
    "skip connections": (skip_connections, 2),
    "several inputs and outputs": (several_inputs_and_outputs, 2),
    "called several times": (called_several_times, 1),
    "operations": (operations, 1),
    "nested and shared": (nested_and_shared, 2),
    "in a wrapper": (in_a_wrapper, 1),
    "composite": (composite, 4),
    "own training step": (own_training_step, 1),
    "subclassed": (subclassed, 4),
}


def random_inputs(model, count=2, seed=0):
    """A batch for `model`, in the structure of its inputs."""
    rng = np.random.default_rng(seed)
    declared = getattr(model, "_inputs_struct", None)
    if declared is None:
        declared = keras.KerasTensor((None, 8, 8, 4))
    return keras.tree.map_structure(
        lambda tensor: rng.normal(size=(count, *tensor.shape[1:])).astype("float32"), declared
    )


def random_targets(model, inputs, seed=1):
    """Something to fit the outputs to."""
    rng = np.random.default_rng(seed)
    return keras.tree.map_structure(
        lambda y: rng.normal(size=tuple(y.shape)).astype("float32"), model(inputs)
    )
