"""A compact model computes what the model with removed units computed, with fewer weights."""

import re

import keras
import numpy as np
import pytest
from keras import layers, ops

from diagconv_tf import LowBit, inspect_model, rewrite
from diagconv_tf.lowbit.layers import OperandLayer
from diagconv_tf.minimal_effort import MinimalEffort
from diagconv_tf.minimal_effort.compacting import compact, plan_compaction
from diagconv_tf.minimal_effort.removal import Remover
from diagconv_tf.minimal_effort.unit_graph import unit_graph
from diagconv_tf.model_tree import walk_layers
from recipes.models import mobilenet_v1
from tests.numerics import BACKEND

RNG = np.random.default_rng(3)


def randomize(model):
    """Weights that hide nothing: no statistics of 0 and 1, no biases of 0."""
    for variable in model.weights:
        values = RNG.normal(scale=0.5, size=variable.shape)
        # Scales and variances stay positive.
        around_one = variable.name in ("gamma", "moving_variance")
        variable.assign(1 + 0.3 * np.tanh(values) if around_one else values)
    return model


def remove(model, share=0.4):
    """Removes a share of the units of each layer, also of those that are left whole."""
    graph = unit_graph(model)
    gone = RNG.random(graph.count) < share
    for layer in graph.hidden:
        gone[layer.first], gone[layer.first + 1] = False, True
    Remover(graph, getattr(model, "optimizer", None)).remove(gone)
    return graph, gone


def data(model, count=4):
    return RNG.normal(size=(count, *model.input_shape[1:])).astype("float32")


# The same function -----------------------------------------------------------------


def perceptron():
    return keras.Sequential(
        [
            keras.Input((7,)),
            layers.Dense(9, activation="sigmoid", name="a"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(8, activation="softplus", use_bias=False, name="b"),
            layers.Dense(3, activation="softmax"),
        ]
    )


def convolutions():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", use_bias=False, name="a")(inputs)
    x = layers.BatchNormalization()(x)
    # Zeros in front of a sigmoid are no zeros behind it, and the padding has some.
    x = layers.Activation("sigmoid")(x)
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="depthwise")(x)
    x = layers.PReLU(shared_axes=[1, 2])(x)
    x = layers.ZeroPadding2D()(layers.MaxPooling2D()(x))
    left = layers.Conv2D(5, 1, activation="gelu", name="b")(x)
    right = layers.SeparableConv2D(4, 3, padding="same", name="c")(x)
    x = layers.Concatenate()([left, inputs[:, 1:7, 1:7], right])
    x = layers.Conv2D(7, 3, strides=2, activation="tanh", name="d")(x)
    x = layers.Flatten()(x)
    x = ops.relu(layers.Dense(6, name="e")(x))
    return keras.Model(inputs, layers.Dense(2)(x))


def nested():
    inner_inputs = keras.Input((6, 4))
    x = layers.Permute((2, 1))(inner_inputs)
    x = layers.Flatten()(x)
    inner = keras.Model(inner_inputs, layers.Dense(6, activation="elu", name="b")(x), name="inner")
    block = keras.Sequential([layers.Dense(5, name="c"), layers.ReLU()], name="block")
    inputs = keras.Input((3, 2, 2))
    x = layers.Conv2D(4, 1, name="a")(inputs)
    x = inner(layers.Reshape((6, 4))(x))
    return keras.Model(inputs, layers.Dense(2)(block(x)))


def one_dimension():
    inputs = keras.Input((9, 3))
    x = layers.Conv1D(5, 3, activation="relu", name="a")(inputs)
    x = layers.SpatialDropout1D(0.2)(layers.AveragePooling1D(2)(x))
    x = layers.Dense(6, activation="sigmoid", name="b")(x)
    x = layers.GlobalMaxPooling1D()(x)
    return keras.Model(inputs, layers.Dense(2)(layers.Reshape((1, 6))(x)))


def channels_first():
    inputs = keras.Input((3, 6, 6))
    x = layers.Conv2D(5, 3, data_format="channels_first", name="a")(inputs)
    x = layers.BatchNormalization(axis=1)(x)
    x = layers.MaxPooling2D(data_format="channels_first")(x)
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten("channels_first")(x)))


def mobilenet():
    return mobilenet_v1((32, 32, 3), 4, width_multiplier=0.125, stem="cifar")


SAME = {
    "perceptron": (perceptron, "ab"),
    "convolutions": (convolutions, "abcde"),
    "nested": (nested, ("a", "inner/b", "block/c")),
    "one dimension": (one_dimension, "ab"),
    "channels first": (channels_first, "a"),
    "MobileNetV1": (mobilenet, [f"conv_pw_{i}" for i in range(1, 14)]),
}


def paths(model):
    """Of all layers; those of inputs that nobody named have any name."""
    return [
        place.path
        for place in walk_layers(model)
        if not (isinstance(place.layer, layers.InputLayer) and "/" in place.path)
    ]


@pytest.mark.parametrize("name", SAME)
def test_a_compact_model_computes_the_same(name):
    if name == "channels first" and BACKEND == "tensorflow":
        pytest.skip("TensorFlow computes no convolutions of this format on CPUs")
    make, expected = SAME[name]
    model = randomize(make())
    if name == "MobileNetV1":
        included = ("conv_pw_*",)
        model = rewrite(model, MinimalEffort(ratio=0.5, include=included), in_place=True)
    graph, gone = remove(model)
    x = data(model)
    outputs = model.predict(x, verbose=0)
    plan = plan_compaction(model)
    smaller = compact(model)

    found = {layer.path: layer for layer in plan.layers}
    assert set(expected) <= found.keys()
    for hidden in graph.hidden:
        row = found[hidden.path]
        removed = 0 if row.reasons else int(gone[hidden.numbers].sum())
        assert (row.before, row.after) == (hidden.count, hidden.count - removed)
        assert (removed > 0) == (not row.reasons)
    assert not any(found[path].reasons for path in expected)
    np.testing.assert_allclose(
        smaller.predict(x, verbose=0), outputs, rtol=0, atol=1e-5 * np.abs(outputs).max()
    )
    assert plan.parameters == (model.count_params(), smaller.count_params())
    assert plan.flops == tuple(inspect_model(m).total_flops for m in (model, smaller))
    assert smaller.count_params() < model.count_params()
    assert paths(smaller) == paths(model)
    for place in walk_layers(smaller):
        assert not isinstance(place.layer, OperandLayer)
    # Twice is once: nothing is left to take out.
    with pytest.raises(ValueError, match="Expected a model with removed hidden units"):
        compact(smaller)


def test_the_plan_is_a_table_and_changes_nothing():
    model = randomize(perceptron())
    remove(model)
    before = model.get_weights()
    text = str(plan_compaction(model))
    assert "MFLOPs" in text
    assert "its outputs are the model's" in text
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert compact(model).count_params() < model.count_params()


# What is left whole ------------------------------------------------------------------


class Doubled(layers.Layer):
    def call(self, inputs):
        return inputs * 2


class MyDense(layers.Dense):
    """May do anything."""


def left_whole():
    """Name → what follows the layer `whole`; the units of `other` come out all the same."""

    def chain(*operations):
        def follow(x):
            for operation in operations:
                x = operation(x)
            return x

        return follow

    dense = layers.Dense
    shared = dense(6)
    inner_inputs = keras.Input((6,))
    twice = keras.Model(inner_inputs, layers.ReLU()(inner_inputs), name="twice")
    return {
        "added": (lambda x: dense(4)(layers.Add()([x, dense(6)(x)])), r"\(Add\) reads"),
        "gated": (lambda x: dense(4)(x * ops.sigmoid(dense(6)(x))), r"\(Multiply\) reads"),
        "shared reader": (lambda x: shared(shared(x)), "is called more than once"),
        "shared model": (lambda x: dense(4)(twice(x) + twice(dense(6)(x))), "more than once"),
        "own layer": (chain(Doubled(name="doubled"), dense(4)), r"'doubled' \(Doubled\) reads"),
        "own subclass": (chain(MyDense(5, name="mine"), dense(4)), r"'mine' \(MyDense\) reads"),
        "mixed": (chain(layers.Softmax(), dense(4)), r"\(Softmax\) reads"),
        "own function": (
            chain(layers.Activation(lambda x: x[:, ::-1], name="turn"), dense(4)),
            "the activation of 'turn' mixes units",
        ),
        "normalized": (chain(layers.LayerNormalization(), dense(4)), r"\(LayerNormalization\)"),
        "folded": (chain(layers.Reshape((2, 3)), dense(4), layers.Flatten()), "divides its units"),
        "groups": (
            chain(
                layers.Reshape((1, 6)), layers.Conv1D(6, 1, groups=2, name="g"), layers.Flatten()
            ),
            "'g' has groups",
        ),
        "output": (lambda x: x, "its outputs are the model's"),
    }


LEFT_WHOLE = (
    "added",
    "gated",
    "shared reader",
    "shared model",
    "own layer",
    "own subclass",
    "mixed",
    "own function",
    "normalized",
    "folded",
    "groups",
    "output",
)


@pytest.fixture(scope="module")
def followers():
    return left_whole()


def test_all_that_is_left_whole_is_tried(followers):
    assert set(LEFT_WHOLE) == followers.keys()


@pytest.mark.parametrize("name", LEFT_WHOLE)
def test_what_cannot_be_told_apart_is_left_whole(name, followers):
    follow, reason = followers[name]
    inputs = keras.Input((5,))
    x = layers.Dense(6, activation="relu", name="other")(inputs)
    model = randomize(keras.Model(inputs, follow(layers.Dense(6, name="whole")(x))))
    remove(model)
    row = next(row for row in plan_compaction(model).layers if row.path == "whole")
    assert row.before == row.after == 6
    assert any(re.search(reason, text) for text in row.reasons)
    x = data(model)
    if name == "own function":
        # Keras does not make a layer anew from a function that has no name.
        with pytest.raises(ValueError, match="Expected layers that can be made anew"):
            compact(model)
    else:
        smaller = compact(model)
        assert smaller.get_layer("other").units < 6
        np.testing.assert_allclose(
            smaller.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5
        )


def test_the_readers_kernel_must_be_a_variable():
    model = randomize(perceptron())
    model.layers[3].enable_lora(2)
    row = plan_compaction(model).layers[0]
    assert row.reasons == (
        "'b' reads its outputs: its kernel is the sum of two: it has LoRA weights",
    )


def test_zeros_of_an_initializer_remove_nothing():
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(6), layers.Dense(3, kernel_initializer="zeros")]
    )
    assert plan_compaction(model).removed == 0


def test_one_unit_stays():
    model = randomize(perceptron())
    graph = unit_graph(model)
    Remover(graph, None).remove(np.arange(graph.count) < 9)
    assert compact(model).get_layer("a").units == 1


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(6)

    def call(self, inputs):
        return self.hidden(inputs)


def mistakes(name):
    if name == "no graph":
        model = Subclassed()
        model(np.ones((2, 5), "float32"))
        return model, "Expected a functional or sequential model"
    if name == "not built":
        return keras.Sequential([layers.Dense(2)]), "Expected a built model"
    if name == "no removed units":
        return perceptron(), "Expected a model with removed hidden units"
    model = randomize(perceptron())
    remove(model)
    return rewrite(model, LowBit(2, 2, skip=())), "Expected a model whose kernels and inputs"


@pytest.mark.parametrize("name", ["no graph", "not built", "no removed units", "low-bit"])
def test_mistakes_are_refused_in_one_line(name):
    model, message = mistakes(name)
    with pytest.raises(ValueError, match=message) as error:
        compact(model)
    assert "Received: " in str(error.value)
    assert "\n" not in str(error.value)


# Training goes on ---------------------------------------------------------------------


def loss(y_true, y_pred):
    """A function that no file can hold."""
    return ops.mean(ops.square(y_true - y_pred), axis=-1)


OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=1e-2),
    "Adam": lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.1, amsgrad=True),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "averages": lambda: keras.optimizers.Lion(0.001, use_ema=True),
    "scaled loss": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
    "schedule": lambda: keras.optimizers.RMSprop(
        keras.optimizers.schedules.ExponentialDecay(0.01, 1, 0.9)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on(name):
    keras.utils.set_random_seed(5)
    model = keras.Sequential(
        [
            keras.Input((7,)),
            layers.Dense(9, activation="relu", name="a"),
            layers.BatchNormalization(),
            layers.Dense(8, activation="tanh", kernel_regularizer="l2", name="b"),
            layers.Dense(5, name="frozen", trainable=False),
            layers.Dense(3),
        ]
    )
    model.compile(OPTIMIZERS[name](), loss, metrics=["mae"])
    x, y = data(model, 8), RNG.normal(size=(8, 3)).astype("float32")
    for _ in range(3):
        model.train_on_batch(x, y)
    remove(model)
    smaller = compact(model)
    assert smaller.optimizer is not model.optimizer
    assert int(smaller.optimizer.iterations) == int(model.optimizer.iterations) > 0
    assert not smaller.get_layer("frozen").trainable
    for _ in range(3):
        expected, found = (m.train_on_batch(x, y, return_dict=True) for m in (model, smaller))
        assert found.keys() == expected.keys() == {"loss", "mae"}
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-4)
    outputs = [m.predict(x, verbose=0) for m in (model, smaller)]
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-3, atol=1e-5)


def test_state_that_cannot_be_cut_starts_anew(caplog):
    model = randomize(perceptron())
    model.compile(keras.optimizers.Adafactor(0.01), "mse")
    x, y = data(model, 8), np.ones((8, 3), "float32")
    model.train_on_batch(x, y)
    remove(model)
    with caplog.at_level("WARNING"):
        smaller = compact(model)
    assert "new, because it cannot be cut" in caplog.text
    smaller.train_on_batch(x, y)


def test_dropout_goes_on_with_its_noise():
    model = randomize(perceptron())
    remove(model)
    model.compile("sgd", "mse")
    model.train_on_batch(data(model), np.ones((4, 3), "float32"))
    smaller = compact(model)
    states = [[v for v in m.variables if "seed" in v.path] for m in (model, smaller)]
    assert states[0]
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)
