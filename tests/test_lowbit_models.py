"""Models become low-bit, train with noise, and come back."""

import json
import logging
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

from diagconv_tf import (
    DEFAULT_RULES,
    LowBit,
    Rule,
    deploy,
    inspect_model,
    kernel_codes,
    load_weights,
    preview,
    restore,
    rewrite,
    save_weights,
)
from diagconv_tf.class_swap import LayerState
from diagconv_tf.copying import copy_model
from diagconv_tf.exporting.native import native_convolutions
from diagconv_tf.lowbit import (
    BinaryConnect,
    DoReFaActivations,
    DoReFaGradients,
    DoReFaWeights,
    LowBitConv2D,
    LowBitDense,
    LowBitDepthwiseConv2D,
    LowBitSeparableConv2D,
    Operands,
)
from diagconv_tf.lowbit.layers import OperandLayer
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.rules import find_family
from tests import cases, model_zoo
from tests.numerics import BACKEND, MODES, vector_jacobian

ALL = Operands(DoReFaWeights(2), DoReFaActivations(3, True, 2.0), DoReFaGradients(4, seed=3))


def to_numpy(tensor):
    return ops.convert_to_numpy(tensor)


# Layers ----------------------------------------------------------------------


def layer_vjp(layer, inputs, upstream):
    """Outputs and the gradients by inputs and variables, without a model."""
    variables = layer.trainable_variables
    others = [v.value for v in layer.non_trainable_variables]

    def call(inputs, *values):
        return layer.stateless_call(values, others, inputs)[0]

    # JAX compiles operations one by one where it is not asked for the whole.
    mode = MODES[-1] if BACKEND == "jax" else MODES[0]
    return vector_jacobian(call, [inputs, *map(to_numpy, variables)], upstream, mode)


#: name: (make a layer, given arguments; shape of its inputs)
LAYERS = {
    "dense": (lambda **a: LowBitDense(5, **a), (3, 7)),
    "conv": (lambda **a: LowBitConv2D(6, 3, strides=2, padding="same", **a), (2, 6, 5, 3)),
    "grouped": (lambda **a: LowBitConv2D(6, 3, groups=3, **a), (2, 5, 5, 6)),
    "depthwise": (
        lambda **a: LowBitDepthwiseConv2D(3, padding="same", depth_multiplier=2, **a),
        (2, 5, 5, 6),
    ),
    "separable": (lambda **a: LowBitSeparableConv2D(5, 3, **a), (2, 6, 5, 6)),
}

_LOWERED = [("depthwise", lowering) for lowering in cases.LOWERINGS]
_LOWERED += [
    (name, lowering) for name in ("grouped", "separable") for lowering in ("dense", "shifted")
]


def problem(name, **arguments):
    """A built layer with the same weights each time, inputs, and an output gradient."""
    make, shape = LAYERS[name]
    layer = make(operands=ALL, **arguments)
    layer.build(shape)
    rng = np.random.default_rng(0)
    layer.set_weights([rng.normal(size=w.shape) for w in layer.get_weights()])
    upstream = rng.normal(size=layer.compute_output_shape(shape)).astype("float32")
    return layer, rng.normal(size=shape).astype("float32"), upstream


@pytest.mark.parametrize(("name", "lowering"), _LOWERED)
def test_every_lowering_computes_what_keras_own_op_does(name, lowering):
    """Kernels are quantized before they are lowered: structural zeros stay zeros."""
    layer, inputs, upstream = problem(name, lowering=cases.LOWERINGS[lowering])
    wanted = layer_vjp(problem(name)[0], inputs, upstream)
    for value, want in zip(layer_vjp(layer, inputs, upstream), wanted, strict=True):
        np.testing.assert_allclose(value, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_stock_layer_of_quantized_operands(name):
    """Its gradients are the stock layer's for the quantized output gradient."""
    layer, inputs, upstream = problem(name)
    family = find_family(type(layer))
    stock = family.stock.from_config(
        {k: v for k, v in layer.get_config().items() if k not in ("operands", "lowering")}
    )
    stock.build(inputs.shape)
    weights = [DoReFaWeights(2)(w) if w.ndim > 1 else w for w in layer.get_weights()]
    stock.set_weights([to_numpy(w) for w in weights])
    gradient = to_numpy(DoReFaGradients(4)(upstream, 3))
    quantized = to_numpy(ALL.inputs(inputs))

    values = layer_vjp(layer, inputs, upstream)
    wanted = layer_vjp(stock, quantized, gradient)
    np.testing.assert_allclose(values[0], wanted[0], rtol=1e-4, atol=1e-5)
    inside = np.abs(inputs) <= 2.0
    np.testing.assert_allclose(values[1], wanted[1] * inside, rtol=1e-4, atol=1e-5)
    # The bias has the quantized gradient, too.
    np.testing.assert_allclose(values[-1], wanted[-1], rtol=1e-4, atol=1e-5)


class Doubled:
    """A gradient operand of somebody else's: it covers no bias, and takes no seed."""

    uses_seed = False
    covers_bias = False

    def __call__(self, gradient, seed=None):
        assert seed is None
        return gradient * 2


@pytest.mark.parametrize("name", ["dense", "depthwise"])
def test_a_gradient_operand_can_leave_the_bias_out(name):
    make, shape = LAYERS[name]
    _, inputs, upstream = problem(name)
    results = []
    for operands in (Operands(gradients=Doubled()), Operands()):
        layer = make(operands=operands)
        layer.build(shape)
        layer.set_weights([np.full(w.shape, 0.5) for w in layer.get_weights()])
        results.append(layer_vjp(layer, inputs, upstream))
    (y, dx, dk, db), (want_y, want_dx, want_dk, want_db) = results
    pairs = [(y, want_y), (dx, 2 * want_dx), (dk, 2 * want_dk), (db, want_db)]
    for value, want in pairs:
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-5)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("name", LAYERS)
def test_configs_hold_operands_and_lowering(name):
    for arguments in ({}, {} if name == "dense" else {"lowering": "dense"}):
        layer = LAYERS[name][0](operands=ALL, name="layer", **arguments)
        again = type(layer).from_config(json.loads(json.dumps(layer.get_config())))
        assert again.get_config() == layer.get_config()
        assert again.operands == ALL
        assert "operands" in type(layer).__signature__.parameters
        assert "operands:" in type(layer).__doc__


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LowBitDense(3, operands=DoReFaWeights(2)), "an `Operands`"),
        (lambda: LowBitDense(3, operands=ALL, dtype="int8_from_float32"), r"already \(int8\)"),
        (lambda: LowBitConv2D(3, 3, operands=ALL, lora_rank=2), "LoRA"),
        (lambda: LowBitDepthwiseConv2D(3, lowering="diagonal:x"), "diagonal:N"),
    ],
)
def test_layers_that_cannot_be(make, words):
    with pytest.raises(ValueError, match=f"Expected.*{words}|Received.*{words}"):
        make()


# Models -----------------------------------------------------------------------


def network():
    """Every kind of layer, ReLUs with and without a bound, and a signed input."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", name="stem")(inputs)
    x = layers.ReLU(6.0, name="relu6")(x)
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="dw")(x)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    x = layers.Conv2D(6, 1, name="pw")(layers.MaxPooling2D()(x))
    x = layers.SeparableConv2D(6, 3, name="sep", activation="relu")(x)
    x = layers.Dense(8, name="fc", activation="tanh")(layers.Flatten()(x))
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    model.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=BACKEND == "tensorflow")
    return model


X = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("float32")
Y = np.random.default_rng(1).normal(size=(4, 3)).astype("float32")
TREATED = ("dw", "pw", "sep", "fc")


def classes(model):
    return {place.path: type(place.layer).__name__ for place in walk_layers(model)}


def train(model, steps=1):
    for _ in range(steps):
        model.train_on_batch(X, Y)
    return model.get_weights()


def assert_equal(values, wanted):
    assert all(map(np.array_equal, values, wanted))
    assert len(values) == len(wanted)


@pytest.fixture(scope="module")
def trained():
    """A float model that has an optimizer's state; nobody changes it."""
    model = network()
    if BACKEND == "jax":
        model.optimizer.build(model.trainable_variables)
    else:
        train(model)
    return model


def test_there_and_back_is_float_stock_to_the_bit(trained):
    paths = [variable.path for variable in trained.variables]
    low_bit = rewrite(trained, LowBit(1, 2, 6))
    assert {path for path, name in classes(low_bit).items() if name.startswith("LowBit")} == {
        *TREATED
    }
    assert_equal(low_bit.get_weights(), trained.get_weights())
    assert [v.path for v in low_bit.weights] == [v.path for v in trained.weights]
    back = restore(low_bit)
    assert classes(back) == classes(trained)
    assert [variable.path for variable in back.variables] == paths
    assert not any({"_operands", "_noise", "_lowering"} & set(vars(layer)) for layer in back.layers)
    assert_equal(back.get_weights(), trained.get_weights())
    # Compiling a step takes long, and only shows that the optimizer's state is there.
    if BACKEND != "jax":
        assert np.array_equal(back.predict(X, verbose=0), trained.predict(X, verbose=0))
        assert_equal(train(back), train(copy_model(trained)))


@pytest.mark.backends("tensorflow", "torch")  # JAX compiles each of them.
def test_settings_meet_in_either_order_and_leave_in_either(trained):
    first = rewrite(rewrite(trained, "shifted"), LowBit(1, 2, 6, seed=1))
    second = rewrite(rewrite(trained, LowBit(1, 2, 6, seed=1)), "shifted")
    assert classes(first) == classes(second)
    assert first.get_layer("dw").lowering == "shifted"
    assert first.get_layer("pw").lowering == "stock"
    for a, b in zip(train(first), train(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    layer = first.get_layer("dw")
    family = find_family(type(layer))
    state = LayerState.of(layer)
    assert state.with_operands(family, None).layer_class.__name__ == "DiagonalwiseDepthwiseConv2D"
    assert state.with_lowering(family, "stock").layer_class is LowBitDepthwiseConv2D
    assert state.with_lowering(family, "stock").with_operands(family, None).layer_class is (
        layers.DepthwiseConv2D
    )


@pytest.mark.backends("tensorflow")
def test_a_native_copy_for_a_while_keeps_its_operands(trained):
    model = rewrite(rewrite(trained, LowBit(1, 2, 6)), "shifted")
    wanted = to_numpy(model(X))
    with native_convolutions(model):
        assert model.get_layer("dw").lowering == "stock"
        np.testing.assert_allclose(to_numpy(model(X)), wanted, rtol=1e-4, atol=1e-5)
    assert model.get_layer("dw").lowering == "shifted"


@pytest.mark.backends("tensorflow")
def test_an_interrupted_treatment_changes_nothing(monkeypatch, trained):
    model = copy_model(trained)
    before = [(LayerState.of(p.layer), set(vars(p.layer))) for p in walk_layers(model)]
    set_state, calls = LayerState.set, []

    def set_or_stop(state):
        set_state(state)
        calls.append(state)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(LayerState, "set", set_or_stop)
    with pytest.raises(KeyboardInterrupt):
        rewrite(model, LowBit(1, 2, 6), in_place=True)
    assert [(LayerState.of(p.layer), set(vars(p.layer))) for p in walk_layers(model)] == before
    assert [v.path for v in model.variables] == [v.path for v in trained.variables]


# Noise ------------------------------------------------------------------------


def noisy(seed=7):
    """A compiled low-bit model whose steps differ by nothing but noise."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = layers.Dense(8, activation="relu", name="a")(inputs)
    x = layers.Dense(8, activation="relu", name="b")(x)
    x = layers.Dense(8, activation="relu", name="c")(x)
    model = keras.Model(inputs, layers.Dense(2, name="d")(x))
    model.compile(keras.optimizers.SGD(1.0), "mse")
    return rewrite(model, LowBit(gradients=2, seed=seed), in_place=True)


NOISY_X = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
NOISY_Y = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")


def change(model):
    """What a step adds to the kernels, from the same weights each time."""
    before = model.get_weights()
    model.train_on_batch(NOISY_X, NOISY_Y)
    steps = [after - value for after, value in zip(model.get_weights(), before, strict=True)]
    model.set_weights(before)
    return steps[2]


def test_noise_is_new_in_each_step_and_goes_on_after_saving_loading_and_copying(tmp_path):
    model = noisy()
    steps = [change(model) for _ in range(3)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(steps) for b in steps[:i])
    again = noisy()
    assert_equal([change(again) for _ in range(3)], steps)
    assert not np.array_equal(change(noisy(seed=8)), steps[0])
    # Of layers with one seed, each has its own noise.
    seeds = {name: vars(model.get_layer(name))["_noise"].state for name in ("b", "c")}
    assert int(to_numpy(seeds["b"])[0]) != int(to_numpy(seeds["c"])[0])

    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "own.weights.h5")
    resumed = noisy(seed=9)
    resumed.load_weights(tmp_path / "own.weights.h5")
    loaded, copied = keras.models.load_model(tmp_path / "model.keras"), copy_model(model)
    step = change(model)
    assert_equal([change(other) for other in (loaded, copied, resumed)], [step] * 3)


def test_inference_leaves_the_noise_as_it_is():
    model = noisy()
    state = vars(model.get_layer("b"))["_noise"].state
    for training, count in ((False, 0), (True, 1), (False, 1), (True, 2)):
        model(NOISY_X, training=training)
        assert int(to_numpy(state)[1]) == count


@pytest.mark.backends("tensorflow", "torch")
def test_weight_files_are_those_of_the_stock_model(tmp_path, trained):
    low_bit = rewrite(trained, LowBit(1, 2, 6))
    save_weights(low_bit, tmp_path / "low.weights.h5")
    stock = network()
    stock.load_weights(tmp_path / "low.weights.h5")
    assert_equal(stock.get_weights(), low_bit.get_weights())
    fresh = network()
    fresh.save_weights(tmp_path / "stock.weights.h5")
    load_weights(low_bit, tmp_path / "stock.weights.h5")
    assert_equal(low_bit.get_weights(), fresh.get_weights())


@pytest.mark.backends("torch")
def test_pytorch_knows_the_sources_of_noise():
    model = noisy()
    names = {name for name, _ in model.named_parameters()}
    assert any("seed_generator_state" in name for name in names)
    restore(model, in_place=True)
    assert not any("seed_generator_state" in name for name, _ in model.named_parameters())


@pytest.mark.backends("tensorflow")
def test_layers_keep_their_noise_when_they_are_treated_again():
    model = noisy()
    state = vars(model.get_layer("b"))["_noise"]
    rewrite(model, LowBit(weights=2, gradients=4), in_place=True)
    assert vars(model.get_layer("b"))["_noise"] is state
    rewrite(model, LowBit(weights=2), in_place=True)
    assert "_noise" not in vars(model.get_layer("b"))
    assert all("seed_generator" not in variable.path for variable in model.variables)


# What the graph tells ----------------------------------------------------------


def chain(*steps, shape=(8, 8, 3)):
    inputs = x = keras.Input(shape)
    for step in steps:
        x = step(x)
    return keras.Model(inputs, x)


def residual():
    inputs = keras.Input((8, 8, 4))
    x = layers.ReLU(name="relu")(layers.Conv2D(4, 3, padding="same", name="first")(inputs))
    y = layers.Conv2D(4, 3, padding="same", name="plus")(x)
    linear = layers.Add(name="linear_sum")([x, y])
    positive = layers.Add()([x, layers.ReLU()(y)])
    a = layers.Conv2D(2, 1, name="after_linear")(linear)
    b = layers.Conv2D(2, 1, name="after_positive")(positive)
    x = layers.Concatenate()([layers.Activation("sigmoid")(a), layers.ReLU(6.0)(b)])
    x = layers.Conv2D(2, 1, name="after_both")(x)
    out = [layers.Dense(2, name=f"head{i}")(layers.Flatten()(x)) for i in (1, 2)]
    return keras.Model(inputs, out)


def nested_models():
    inner_inputs = keras.Input((8, 8, 3))
    inside = layers.Conv2D(3, 3, padding="same", name="inside")(inner_inputs)
    inner = keras.Model(inner_inputs, layers.Activation("relu6")(inside), name="inner")
    body = keras.Sequential([layers.Input((8, 8, 3)), layers.Conv2D(3, 1, name="own")], name="body")
    return chain(inner, inner, body, layers.Flatten(), layers.Dense(2, name="head"))


def operations():
    inputs = keras.Input((8, 8, 3))
    x = ops.relu6(layers.Conv2D(3, 3, name="first")(inputs))
    x = layers.Conv2D(3, 1, name="second")(ops.transpose(x, (0, 2, 1, 3))[:, 1:])
    x = layers.Conv2D(3, 1, name="third")(x * 2.0)
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))


def wrapped():
    x = [layers.TimeDistributed(layers.Conv2D(2, 3, name=n), name=f"t{n}") for n in "abc"]
    return chain(x[0], layers.ReLU(), x[1], x[2], shape=(2, 8, 8, 3))


#: name: (build, paths that stay float, path → (signed, limit), words of a reason)
GRAPHS = {
    "zoo of ranges": (
        network,
        ["stem", "head"],
        {"dw": (False, 6.0), "pw": (False, 6.0), "sep": (True, 1.0), "fc": (False, 1.0)},
        ("sep", "`pw` (Conv2D)"),
    ),
    "residual": (
        residual,
        ["first", "head1", "head2"],
        {
            "plus": (False, 1.0),
            "after_linear": (True, 1.0),
            "after_positive": (False, 1.0),
            "after_both": (False, 6.0),
        },
        ("after_linear", "`plus` (Conv2D)"),
    ),
    "nested and shared": (
        nested_models,
        # `inside` is called first, and after itself.
        ["inner/inside", "head"],
        {"body/own": (False, 6.0)},
        ("body/own", "behind `activation"),
    ),
    "operations": (
        operations,
        ["first", "head"],
        {"second": (False, 6.0), "third": (True, 1.0)},
        ("third", "multiply"),
    ),
    "wrappers": (wrapped, ["ta/a", "tc/c"], {"tb/b": (False, 1.0)}, ("tb/b", "re_lu")),
    "sequential": (
        lambda: keras.Sequential(
            [
                layers.Input((8, 8, 3)),
                layers.Conv2D(3, 3, activation="tanh", name="a"),
                layers.Dropout(0.5),
                layers.Conv2D(3, 3, name="b"),
                layers.Conv2D(3, 3, name="c"),
            ]
        ),
        ["a", "c"],
        {"b": (True, 1.0)},
        ("b", "`a` (Conv2D)"),
    ),
    "scales after the ends": (
        lambda: chain(
            layers.Conv2D(3, 3, name="a"),
            layers.PReLU(),
            layers.Conv2D(3, 3, name="b"),
            layers.Conv2D(3, 3, name="c"),
            layers.PReLU(),
            layers.LayerNormalization(),
        ),
        ["a", "c"],
        {"b": (True, 1.0)},
        ("b", "(PReLU)"),
    ),
    "inside a composite layer": (
        lambda: chain(
            layers.Conv2D(3, 3, activation="relu", name="a"),
            model_zoo.Block(3, name="block"),
            layers.Flatten(),
            layers.Dense(2, name="head"),
        ),
        ["a", "head"],
        {"block/depthwise": (True, 1.0), "block/separable": (True, 1.0)},
        ("block/separable", "composite layer `block`"),
    ),
}


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("other", ["shifted", "auto", None])
def test_only_treatments_have_a_preview(other):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="Expected a treatment"):
        preview(model, other)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("name", GRAPHS)
def test_the_graph_tells_ends_signs_and_limits(name):
    build, ends, inputs, (path, words) = GRAPHS[name]
    treated = preview(build(), LowBit(1, 2, 6))
    found = {layer.path: layer for layer in treated.layers}
    assert [p for p, layer in found.items() if layer.operands is None] == ends
    assert {
        p: (layer.operands.inputs.signed, layer.operands.inputs.limit)
        for p, layer in found.items()
        if layer.operands is not None
    } == inputs
    assert words.lower() in " ".join(found[path].reasons).lower()
    assert all(p in str(treated) for p in found)


@pytest.mark.backends("tensorflow")
def test_what_the_clip_changes_is_said_loudly(caplog):
    with caplog.at_level(logging.WARNING):
        rewrite(network(), LowBit(1, 2, 6), in_place=True)
    (record,) = caplog.records
    words = (
        "This changes what the model computes",
        "Left as they are (the graph's first layer): stem",
        "Left as they are (the graph's last layer): head",
        "Take signed inputs: sep",
        "Clips its inputs, which reach [-inf, inf], to [-1, 1]: sep",
        "Clips its inputs, which reach [0, inf], to [0, 1]: fc",
    )
    assert all(word in record.getMessage() for word in words)
    # Behind a ReLU6 a clip at 6 changes nothing, and is not named.
    assert ": dw" not in record.getMessage()


SELECTIONS = {
    "all": ({"skip": ()}, ("stem", "dw", "pw", "sep", "fc", "head")),
    "first only": ({"skip": "first"}, ("dw", "pw", "sep", "fc", "head")),
    "by name": ({"skip": ("first", "last", "s*")}, ("dw", "pw", "fc")),
    "include": ({"include": ["dw", "p*"]}, ("dw", "pw")),
    "include does not bring back the first": ({"include": ("stem", "dw")}, ("dw",)),
    "exclude": ({"exclude": "sep"}, ("dw", "pw", "fc")),
}


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("name", SELECTIONS)
def test_selection(name, trained):
    arguments, expected = SELECTIONS[name]
    layers = preview(trained, LowBit(1, **arguments)).layers
    assert tuple(layer.path for layer in layers if layer.operands is not None) == expected


@pytest.mark.backends("tensorflow")
def test_signs_and_limits_that_the_user_gives(trained):
    layers = preview(trained, LowBit(1, 2, signed=False, limit=3)).layers
    for layer in layers:
        if layer.operands is not None:
            assert layer.operands.inputs == DoReFaActivations(2, False, 3.0)


def composite_first():
    return chain(
        model_zoo.Block(3, name="block"), layers.Flatten(), layers.Dense(4), layers.Dense(2)
    )


#: name: (model, treatment, words of the error)
REFUSED = {
    "subclassed": (
        model_zoo.subclassed,
        LowBit(1),
        r"class Subclassed, which has none; name.*skip=",
    ),
    "a composite layer first": (composite_first, LowBit(1), r"the layer 'block', whose inside"),
    "no layer": (lambda: chain(layers.ReLU()), LowBit(1), "fits none of its 0"),
    "ends only": (lambda: chain(layers.Dense(2)), LowBit(1), "fits none of its 1"),
    "a pattern": (network, LowBit(1, include="wd"), r"'wd'.*none of 6; near: .*dw"),
    "a skipped pattern": (network, LowBit(1, skip="haed"), r"`skip`.*'haed'.*near: head"),
}


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("name", REFUSED)
def test_treatments_that_do_not_fit(name):
    build, treatment, words = REFUSED[name]
    model = build()
    before = classes(model)
    with pytest.raises(ValueError, match=f"Expected.*Received: .*{words}|Expected.*{words}"):
        rewrite(model, treatment, in_place=True)
    assert classes(model) == before


@pytest.mark.backends("tensorflow")
def test_a_subclassed_model_works_once_its_ends_are_named(caplog):
    model = model_zoo.subclassed()
    ends = (f"{model.blocks[0].name}/depthwise", model.head.name)
    rewrite(model, LowBit(1, 2, skip=ends), in_place=True)
    treated = [p for p in walk_layers(model) if isinstance(p.layer, OperandLayer)]
    assert len(treated) == 3
    assert all(place.layer.operands.inputs.signed for place in treated)
    assert "save `restore(model)`" in caplog.text


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0,), "weights"),
        ((1, 9), "activations"),
        ((1, 2, 64), "gradients"),
        ((), "fewer than 32"),
        ((32, 32, 32), "fewer than 32"),
    ],
)
def test_treatments_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=f"Expected.*{words}.*Received"):
        LowBit(*arguments)
    for wrong in ({"skip": 3}, {"include": [1]}, {"limit": -1.0}):
        with pytest.raises(ValueError, match=f"Expected `{next(iter(wrong))}`.*Received"):
            LowBit(1, **wrong)


@pytest.mark.backends("tensorflow")
def test_a_layer_that_keras_quantizes_is_left_with_the_reason(trained):
    model = copy_model(trained)
    model.get_layer("fc").quantize("int8")
    layer = next(x for x in preview(model, LowBit(1)).layers if x.path == "fc")
    assert layer.operands is None
    assert layer.reasons == ("Keras quantizes it already (int8)",)
    with pytest.raises(ValueError, match="include"):
        rewrite(trained, LowBit(1), include="dw")


# Rules -------------------------------------------------------------------------


class OwnLowBit(model_zoo.OwnDepthwise, LowBitDepthwiseConv2D):
    pass


@pytest.mark.backends("tensorflow")
def test_a_users_class_becomes_low_bit_by_a_users_rule():
    inputs = keras.Input((8, 8, 3))
    x = layers.Dense(3, name="a")(inputs)
    x = model_zoo.OwnDepthwise(3, name="own")(x)
    model = keras.Model(inputs, layers.Dense(2, name="b")(x))
    with pytest.raises(ValueError, match="fits none of its 2"):
        rewrite(model, LowBit(2))
    rules = (*DEFAULT_RULES, Rule(model_zoo.OwnDepthwise, OwnLowBit))
    low_bit = rewrite(model, LowBit(2), rules=rules)
    own = low_bit.get_layer("own")
    assert type(own) is OwnLowBit
    # Its rule says that it holds a lowering as well.
    assert type(rewrite(low_bit, "shifted", rules=rules).get_layer("own")) is OwnLowBit
    assert type(restore(low_bit, rules=rules).get_layer("own")) is model_zoo.OwnDepthwise
    with pytest.raises(ValueError, match="OwnLowBit of layer 'own'"):
        restore(low_bit)


@pytest.mark.backends("tensorflow")
def test_a_rule_says_which_settings_its_class_can_hold():
    only = Rule(layers.DepthwiseConv2D, LowBitDepthwiseConv2D, settings={"operands"})
    assert only.held == {"operands"}
    assert Rule(layers.Dense, LowBitDense).held == {"operands"}
    family = find_family(layers.DepthwiseConv2D, (only,))
    assert family.why_not(layers.DepthwiseConv2D(3), "lowering") == [
        "no rule gives a DepthwiseConv2D lowering"
    ]
    with pytest.raises(ValueError, match=r"Expected a rule.*lowering and operands"):
        family.class_for({"lowering", "operands"}, layers.DepthwiseConv2D)
    for settings in ((), ("colour",)):
        with pytest.raises(ValueError, match=r"Expected `settings`.*Received"):
            Rule(layers.Dense, LowBitDense, settings=settings)


# Looking, and deploying ----------------------------------------------------------


@pytest.mark.backends("tensorflow")
def test_the_inspection_shows_bits_multiplications_and_size(trained):
    assert inspect_model(trained).low_bit == ()
    model = rewrite(trained, LowBit(2, 4, 6, exclude="fc"))
    found = inspect_model(model, 1)
    rows = {row.path: row for row in found.low_bit}
    assert list(rows) == ["dw", "pw", "sep"]
    assert (rows["dw"].kernel_bits, rows["dw"].input_bits) == (2, 4)
    # 8 x 8 positions of a 3 x 3 kernel; half the size behind the pooling.
    assert rows["dw"].macs == rows["dw"].integer_macs == 64 * 9 * 6
    assert rows["pw"].integer_macs == 16 * 6 * 6
    # The pointwise half of a separable layer multiplies floats.
    assert rows["sep"].macs == 4 * (9 * 6 + 6 * 6)
    assert rows["sep"].integer_macs == 4 * 9 * 6
    assert found.integer_macs == sum(row.integer_macs for row in rows.values())
    assert found.float_bytes == 4 * sum(w.size for w in model.get_weights())
    kernels = {"dw": [54], "pw": [36], "sep": [54, 36]}
    saved = sum(4 * n - -(-2 * n // 8) - 4 for sizes in kernels.values() for n in sizes)
    assert found.low_bit_bytes == found.float_bytes - saved
    content = json.loads(found.to_json())
    assert [row["path"] for row in content["low_bit"]] == list(rows)
    assert content["low_bit"][0]["operands"]["kernel"] == str(DoReFaWeights(2))
    text = str(found)
    assert all(word in text for word in ("3 low-bit layers", "0 … 6", "±1", "2 bit", "kB packed"))
    weights_only = rewrite(trained, LowBit(1))
    assert inspect_model(weights_only).integer_macs == 0
    assert [row.path for row in found.rows] == [row.path for row in inspect_model(trained).rows]


@pytest.mark.backends("tensorflow", "torch")
@pytest.mark.parametrize("bits", [(1, 32, 6), (3, 2, 32)])
def test_a_deployed_model_computes_the_same_with_quantized_kernels(trained, bits):
    model = rewrite(trained, LowBit(*bits))
    deployed = deploy(model)
    wanted = to_numpy(model(X))
    np.testing.assert_allclose(to_numpy(deployed(X)), wanted, rtol=1e-5, atol=1e-6)
    codes = kernel_codes(model)
    assert list(codes) == list(TREATED)
    assert [len(codes[name]) for name in TREATED] == [1, 1, 2, 1]
    for path in TREATED:
        layer = deployed.get_layer(path)
        # Stock but where inputs are quantized.
        assert isinstance(layer, OperandLayer) == (bits[1] != 32)
        assert vars(layer).get("_operands", Operands()).kernel is None
        kernels = [w for w in layer.get_weights() if w.ndim > 1]
        for kernel, quantized in zip(kernels, kernel_codes(deployed)[path], strict=True):
            assert np.array_equal(kernel, quantized.values())
            assert len(np.unique(kernel)) <= 2 ** bits[0]
        for mine, theirs in zip(codes[path], kernel_codes(deployed)[path], strict=True):
            assert np.array_equal(mine.codes, theirs.codes)
            assert mine.scale == theirs.scale
    assert_equal(model.get_weights(), trained.get_weights())
    assert classes(restore(deployed)) == classes(trained)


@pytest.mark.backends("tensorflow")
def test_what_is_no_low_bit_model_cannot_be_deployed(trained):
    with pytest.raises(ValueError, match=r"Expected a low-bit model.*Received"):
        deploy(trained)
    deployed = deploy(rewrite(trained, LowBit(1)))
    deployed.set_weights([w + 1 for w in deployed.get_weights()])
    with pytest.raises(ValueError, match=r"Expected the kernel of 'dw'.*Received"):
        kernel_codes(deployed)


@pytest.mark.backends("tensorflow", "torch")
def test_saved_files_hold_operands_and_lowerings(tmp_path, trained):
    model = rewrite(rewrite(trained, LowBit(1, 2, 6)), "shifted")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for layer, saved in zip(loaded.layers, model.layers, strict=True):
        assert layer.get_config() == saved.get_config()
    np.testing.assert_allclose(to_numpy(loaded(X)), to_numpy(model(X)), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_trains_and_deploys(dtype):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = layers.Dense(8, activation="relu", name="a", dtype=dtype)(inputs)
    x = layers.Dense(8, activation="relu", name="b", dtype=dtype)(x)
    model = keras.Model(inputs, layers.Dense(2, name="d", dtype="float32")(x))
    model.compile("adam", "mse", run_eagerly=BACKEND == "tensorflow")
    rewrite(model, LowBit(2, 2, 4), in_place=True)
    before = model.get_weights()
    model.train_on_batch(NOISY_X, NOISY_Y)
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())
    assert not np.array_equal(model.get_layer("b").get_weights()[0], before[2])
    wanted = to_numpy(model(NOISY_X))
    assert np.array_equal(to_numpy(deploy(model)(NOISY_X)), wanted)


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_a_low_bit_model_is_exported_without_its_noise(tmp_path):
    import tensorflow as tf

    model = noisy()
    model.export(tmp_path / "model", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "model")
    np.testing.assert_allclose(loaded.serve(NOISY_X), model.predict(NOISY_X, verbose=0), rtol=1e-6)


@pytest.mark.backends("tensorflow")
def test_bc_is_a_quantizer_of_the_kernel():
    layer = LowBitDense(3, operands=Operands(kernel=BinaryConnect()), use_bias=False)
    inputs = np.eye(4, dtype="float32")
    assert set(np.unique(to_numpy(layer(inputs)))) == {-1.0, 1.0}


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_replicas_have_noise_of_their_own_and_the_same_weights():
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-m", "tests.lowbit_on_replicas"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == dict.fromkeys(found, True)
    assert len(found) == 4
