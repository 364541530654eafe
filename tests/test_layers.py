"""The three layers stand in for Keras's own, and Keras's own for them."""

import inspect
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import diagconv_tf
from diagconv_tf import DiagonalwiseConv2D, DiagonalwiseDepthwiseConv2D, DiagonalwiseSeparableConv2D
from tests import cases
from tests.numerics import BACKEND, MODES, vector_jacobian

PER_PASS = cases.LOWERINGS["per pass a"]

#: name: (our class, stock class, arguments, input channels)
LAYERS = {
    "depthwise": (
        DiagonalwiseDepthwiseConv2D,
        keras.layers.DepthwiseConv2D,
        {"kernel_size": 3},
        6,
    ),
    "depthwise with everything": (
        DiagonalwiseDepthwiseConv2D,
        keras.layers.DepthwiseConv2D,
        {
            "kernel_size": (3, 5),
            "strides": 2,
            "padding": "same",
            "depth_multiplier": 2,
            "activation": "relu6",
            "depthwise_initializer": "he_normal",
            "bias_initializer": "ones",
            "depthwise_regularizer": keras.regularizers.L2(1e-3),
            "activity_regularizer": keras.regularizers.L1(1e-3),
            "depthwise_constraint": keras.constraints.MaxNorm(1.0),
            "name": "dw",
        },
        6,
    ),
    "depthwise channels first": (
        DiagonalwiseDepthwiseConv2D,
        keras.layers.DepthwiseConv2D,
        {"kernel_size": 3, "data_format": "channels_first", "strides": 2, "padding": "same"},
        6,
    ),
    "separable": (
        DiagonalwiseSeparableConv2D,
        keras.layers.SeparableConv2D,
        {"filters": 5, "kernel_size": 3, "depth_multiplier": 2, "padding": "same"},
        6,
    ),
    "separable channels first": (
        DiagonalwiseSeparableConv2D,
        keras.layers.SeparableConv2D,
        {
            "filters": 5,
            "kernel_size": 3,
            "data_format": "channels_first",
            "activation": "relu",
        },
        6,
    ),
    "grouped": (
        DiagonalwiseConv2D,
        keras.layers.Conv2D,
        {"filters": 9, "kernel_size": 3, "groups": 3, "padding": "same"},
        6,
    ),
    "grouped by channel": (
        DiagonalwiseConv2D,
        keras.layers.Conv2D,
        {"filters": 6, "kernel_size": 7, "groups": 6, "padding": "same", "use_bias": False},
        6,
    ),
}

layer_cases = pytest.mark.parametrize(
    ("ours", "stock", "arguments", "channels"), LAYERS.values(), ids=LAYERS
)


def images(arguments, channels, seed=0):
    rng = np.random.default_rng(seed)
    first = arguments.get("data_format") == "channels_first"
    shape = (2, channels, 9, 8) if first else (2, 9, 8, channels)
    return rng.normal(size=shape).astype("float32")


def pair(ours, stock, arguments, channels, lowering="diagonal:4"):
    """One of our layers and a stock one, built, with the same random weights."""
    x = images(arguments, channels)
    own, other = ours(lowering=lowering, **arguments), stock(**arguments)
    own.build(x.shape)
    other.build(x.shape)
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=w.shape) for w in other.get_weights()]
    own.set_weights(weights)
    other.set_weights(weights)
    return own, other, x


def predict(layer, x):
    return keras.ops.convert_to_numpy(layer(x))


def by_stock(layer, x):
    """What a stock layer makes of `x`; older Keras cannot do every case."""
    try:
        return layer(x)
    except Exception as error:
        pytest.skip(f"Keras {keras.__version__}'s own layer fails: {error!s:.200}")


def outputs_and_gradients(layer, x, mode):
    """The outputs, and gradients of `sum(cos * outputs)` by inputs and weights."""
    shape = layer.compute_output_shape(x.shape)
    g = np.cos(np.arange(np.prod(shape))).reshape(shape).astype("float32")
    variables = layer.trainable_variables

    def call(x, *values):
        return layer.stateless_call(list(values), [], x)[0]

    return vector_jacobian(call, [x, *(v.value for v in variables)], g, mode)


@pytest.mark.parametrize("lowering", ["diagonal:4", "shifted", PER_PASS], ids=str)
@layer_cases
def test_same_outputs_and_gradients(ours, stock, arguments, channels, lowering):
    own, other, x = pair(ours, stock, arguments, channels, lowering)
    mode = MODES[-1]
    by_stock(other, x)
    for value, wanted in zip(
        outputs_and_gradients(own, x, mode), outputs_and_gradients(other, x, mode), strict=True
    ):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(value, wanted, atol=2e-6 * scale, rtol=2e-5)


@layer_cases
def test_same_variables(ours, stock, arguments, channels):
    own, other, _ = pair(ours, stock, arguments | {"name": "layer"}, channels)
    assert [v.path for v in own.variables] == [v.path for v in other.variables]
    assert [v.shape for v in own.variables] == [v.shape for v in other.variables]
    assert own.count_params() == other.count_params()
    assert len(own.losses) == len(other.losses)


@layer_cases
def test_same_arguments_and_one_more(ours, stock, arguments, channels):
    expected = list(inspect.signature(stock).parameters)
    received = list(inspect.signature(ours).parameters)
    assert [name for name in received if name != "lowering"] == expected
    assert "lowering" in received


def test_arguments_by_position():
    layer = DiagonalwiseDepthwiseConv2D(5, (2, 2), "same", lowering="dense")
    assert (layer.kernel_size, layer.strides, layer.padding) == ((5, 5), (2, 2), "same")


@layer_cases
def test_config_round_trip(ours, stock, arguments, channels):
    for lowering in ("dense", PER_PASS):
        own, other, x = pair(ours, stock, arguments, channels, lowering)
        config = json.loads(json.dumps(own.get_config()))
        again = ours.from_config(config)
        assert again.get_config() == own.get_config()
        assert again.lowering == lowering
        assert {k: v for k, v in config.items() if k not in ("lowering", "name")} == {
            k: v for k, v in json.loads(json.dumps(other.get_config())).items() if k != "name"
        }


@layer_cases
def test_class_change_there_and_back(ours, stock, arguments, channels):
    own, other, x = pair(ours, stock, arguments, channels)
    wanted = keras.ops.convert_to_numpy(by_stock(other, x))
    weights, config = other.get_weights(), other.get_config()
    other.__class__ = ours
    assert other.lowering == "diagonal:32"
    other.lowering = "shifted"
    np.testing.assert_allclose(predict(other, x), wanted, atol=1e-4)
    assert other.get_config() == {**config, "lowering": "shifted"}
    other.__class__ = stock
    assert other.get_config() == config
    for before, after in zip(weights, other.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(predict(other, x), wanted)


@layer_cases
def test_class_change_before_the_layer_is_built(ours, stock, arguments, channels):
    x = images(arguments, channels)
    to_stock = ours(lowering="dense", **arguments)
    to_stock.__class__ = stock
    by_stock(to_stock, x)
    assert type(to_stock) is stock
    to_ours = stock(**arguments)
    to_ours.__class__ = ours
    to_ours(x)
    assert to_ours.lowering == "diagonal:32"


@layer_cases
def test_compute_output_shape_and_symbolic_calls(ours, stock, arguments, channels):
    for lowering in ("diagonal:4", "shifted", PER_PASS):
        own, other, x = pair(ours, stock, arguments, channels, lowering)
        first = arguments.get("data_format") == "channels_first"
        for sizes in ((9, 8), (None, None), (9, None)):
            shape = (channels, *sizes) if first else (*sizes, channels)
            batched = (None, *shape)
            assert own.compute_output_shape(batched) == other.compute_output_shape(batched)
            symbolic = own(keras.Input(shape))
            assert symbolic.shape == other(keras.Input(shape)).shape
        assert own.compute_output_shape(x.shape) == tuple(own(x).shape)


@layer_cases
def test_composite_layer_without_an_output_shape(ours, stock, arguments, channels):
    """Keras then traces `call`, on some backends with synthetic sizes."""

    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.convolution = ours(lowering=PER_PASS, **arguments)

        def call(self, x):
            return self.convolution(x) * 2.0

    shape = images(arguments, channels).shape[1:]
    symbolic = Block()(keras.Input(shape))
    assert symbolic.shape == stock(**arguments).compute_output_shape((None, *shape))


@pytest.mark.parametrize("lowering", ["diagonal:4", PER_PASS], ids=str)
@layer_cases
def test_keras_file(ours, stock, arguments, channels, lowering, tmp_path):
    x = images(arguments, channels)
    inputs = keras.Input(x.shape[1:])
    model = keras.Model(inputs, ours(lowering=lowering, **arguments)(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[1]) is ours
    assert loaded.layers[1].lowering == lowering
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_registered_under_the_package_name():
    for ours in (DiagonalwiseDepthwiseConv2D, DiagonalwiseSeparableConv2D, DiagonalwiseConv2D):
        name = f"diagconv_tf>{ours.__name__}"
        assert keras.saving.get_registered_name(ours) == name
        assert keras.saving.get_registered_object(name) is ours


@pytest.mark.backends("tensorflow")
@layer_cases
def test_tensorflow_checkpoints_interchange(ours, stock, arguments, channels, tmp_path):
    import tensorflow as tf

    own, other, x = pair(ours, stock, arguments, channels)
    for source, target in ((own, other), (other, own)):
        target.set_weights([np.zeros(w.shape) for w in target.get_weights()])
        path = tf.train.Checkpoint(layer=source).save(str(tmp_path / "checkpoint"))
        status = tf.train.Checkpoint(layer=target).restore(path)
        status.assert_existing_objects_matched()
        for left, right in zip(source.get_weights(), target.get_weights(), strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64", "bfloat16"])
@layer_cases
def test_dtype_policies(ours, stock, arguments, channels, policy):
    if BACKEND == "jax" and policy == "float64":
        pytest.skip("JAX computes in float64 only where jax_enable_x64 is set")
    x = images(arguments, channels)
    stock_layer = stock(dtype=policy, **arguments)
    wanted = by_stock(stock_layer, x)
    for lowering in ("diagonal:4", "shifted", PER_PASS):
        layer = ours(dtype=policy, lowering=lowering, **arguments)
        layer.build(x.shape)
        layer.set_weights(stock_layer.get_weights())
        outputs = layer(x)
        assert str(outputs.dtype) == str(wanted.dtype)
        to_numpy = [
            keras.ops.convert_to_numpy(keras.ops.cast(t, "float32")) for t in (outputs, wanted)
        ]
        tolerance = {"mixed_float16": 4e-3, "float64": 1e-6}.get(policy, 4e-2)
        np.testing.assert_allclose(*to_numpy, atol=tolerance * np.abs(to_numpy[1]).max())


@pytest.mark.parametrize("lowering", ["diagonal:4", "shifted", PER_PASS], ids=str)
def test_a_model_trains_as_with_stock_layers(lowering):
    """Same losses step by step, and as many bytes of optimizer state."""

    def build(depthwise):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((12, 12, 3)),
                keras.layers.Conv2D(6, 3, strides=2),
                depthwise(3, padding="same"),
                keras.layers.BatchNormalization(),
                keras.layers.ReLU(),
                depthwise(3, strides=2, depth_multiplier=2),
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dense(4),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.01), loss)
        return model

    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 12, 12, 3)).astype("float32")
    y = rng.integers(0, 4, 32)
    losses, sizes = [], []
    for depthwise in (
        keras.layers.DepthwiseConv2D,
        lambda *args, **kw: DiagonalwiseDepthwiseConv2D(*args, lowering=lowering, **kw),
    ):
        model = build(depthwise)
        history = model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
        sizes.append((model.count_params(), [tuple(v.shape) for v in model.optimizer.variables]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)
    assert losses[0][-1] < losses[0][0]
    assert sizes[0] == sizes[1]


class TestBadInput:
    @pytest.mark.parametrize("lowering", ["diagonal:0", "winograd", 32, {"forward": "native"}])
    @layer_cases
    def test_unknown_lowering(self, ours, stock, arguments, channels, lowering):
        with pytest.raises(ValueError, match="Expected `lowering` to be .* Received: lowering="):
            ours(lowering=lowering, **arguments)

    def test_unknown_lowering_set_later(self):
        layer = DiagonalwiseDepthwiseConv2D(3)
        with pytest.raises(ValueError, match="Expected `lowering`"):
            layer.lowering = "diagonal:0"
        assert layer.lowering == "diagonal:32"

    @pytest.mark.parametrize("how", ["build", "symbolic", "eager"])
    def test_impossible_lowering_is_refused_when_the_layer_is_built(self, how):
        layer = DiagonalwiseDepthwiseConv2D(3, name="dw", lowering="diagonal_grouped:32")
        with pytest.raises(
            ValueError, match=r"'dw' cannot be computed with lowering='diagonal_grouped:32'.*40"
        ):
            if how == "build":
                layer.build((None, 8, 8, 40))
            else:
                layer(keras.Input((8, 8, 40)) if how == "symbolic" else np.ones((1, 8, 8, 40)))
        assert not layer.variables

    def test_groups_that_do_not_fit_the_channels(self):
        with pytest.raises(ValueError, match=r"groups=3.*8 channels|groups=3.*8 input channels"):
            DiagonalwiseConv2D(6, 3, groups=3)(np.ones((1, 8, 8, 8), "float32"))

    @pytest.mark.parametrize("lowering", ["diagonal:4", "shifted", "native"])
    @pytest.mark.parametrize("built", [False, True])
    def test_input_too_small_for_the_kernel(self, built, lowering):
        layer = DiagonalwiseDepthwiseConv2D(5, lowering=lowering)
        if built:
            layer.build((None, None, None, 4))
        with pytest.raises(ValueError, match="too small|zero or negative|negative dimension|<= 0"):
            layer(np.ones((1, 4, 9, 4), "float32"))

    @pytest.mark.parametrize(
        "arguments",
        [{"kernel_size": 0}, {"kernel_size": 3, "strides": 0}, {"kernel_size": 3, "padding": "x"}],
        ids=str,
    )
    def test_what_keras_refuses_is_refused_alike(self, arguments):
        messages = []
        for layer in (keras.layers.DepthwiseConv2D, DiagonalwiseDepthwiseConv2D):
            with pytest.raises(ValueError) as error:  # noqa: PT011
                layer(**arguments)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@pytest.mark.backends("jax", "torch")
def test_the_package_works_without_importing_tensorflow():
    code = (
        "import sys, numpy, diagconv_tf\n"
        "diagconv_tf.DiagonalwiseDepthwiseConv2D(3)(numpy.ones((1, 5, 5, 2)))\n"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"KERAS_BACKEND": BACKEND}, check=True
    )


INPUT_DTYPES = ("uint8", "int32", "bool", "float16", "bfloat16", "float32", "float64")


@pytest.mark.parametrize("lowering", ["native", "diagonal:4", "shifted", PER_PASS], ids=str)
@pytest.mark.parametrize("name", ["depthwise", "separable", "grouped"])
def test_inputs_of_every_dtype_give_what_stock_gives(name, lowering):
    """Stock's dtype and numbers, or a refusal where stock refuses."""
    ours, stock, arguments, channels = LAYERS[name]
    for autocast, dtype in ((True, "mixed_float16"), (False, "float32"), (False, "bfloat16")):
        settings = {"autocast": autocast, "dtype": dtype, "activation": None}
        arguments = {**arguments, **settings}
        other = stock(**arguments)
        own = ours(lowering=lowering, **arguments)
        for layer in (own, other):
            layer.build((2, 9, 8, channels))
        own.set_weights(other.get_weights())
        for input_dtype in INPUT_DTYPES:
            x = keras.ops.cast(10 * np.abs(images(arguments, channels)), input_dtype)
            case = f"{input_dtype} inputs, dtype={dtype}, autocast={autocast}"
            try:
                wanted = other(x)
            except Exception:
                with pytest.raises(TypeError, match="Expected inputs of the kernel's dtype"):
                    own(x)
                continue
            outputs = own(x)
            assert outputs.dtype == wanted.dtype, case
            value, want = (
                np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(t, "float32")), "float64")
                for t in (outputs, wanted)
            )
            error = np.linalg.norm(value - want) / np.linalg.norm(want)
            assert error <= (1e-5 if dtype == "float32" else 3e-2), case


class TestSettingTheLowering:
    def test_what_the_built_layer_cannot_do_is_refused_and_not_taken(self):
        layer = DiagonalwiseDepthwiseConv2D(3, name="dw", lowering="diagonal:4")
        layer.build((None, 8, 8, 40))
        with pytest.raises(ValueError, match=r"'dw' cannot be computed with .*grouped:32.*40"):
            layer.lowering = "diagonal_grouped:32"
        assert layer.lowering == "diagonal:4"
        again = DiagonalwiseDepthwiseConv2D.from_config(layer.get_config())
        again.build((None, 8, 8, 40))

    @layer_cases
    def test_says_once_what_must_be_compiled_again(
        self, ours, stock, arguments, channels, monkeypatch
    ):
        lines = []
        monkeypatch.setattr(
            "absl.logging.warning", lambda text, *values: lines.append(text % values)
        )
        layer = ours(lowering="diagonal:4", **arguments)
        layer.lowering = "dense"
        assert lines == []
        layer.build(images(arguments, channels).shape)
        layer.lowering = "dense"
        assert lines == []
        layer.lowering = "shifted"
        assert len(lines) == 1
        for words in (layer.name, "'shifted'", "'dense'", "`model.compile`"):
            assert words in lines[0]

    def test_compile_again_takes_it_in(self):
        seen = []
        model = keras.Sequential(
            [keras.Input((6, 6, 4)), DiagonalwiseDepthwiseConv2D(3, lowering="dense")]
        )
        model.compile("sgd", "mse")
        x, y = np.ones((2, 6, 6, 4)), np.ones((2, 4, 4, 4))
        from diagconv_tf.lowerings.shifted import Shifted

        forward = Shifted.forward

        def spy(self, *args):
            seen.append(args)
            return forward(self, *args)

        model.fit(x, y, verbose=0)
        model.layers[0].lowering = "shifted"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Shifted, "forward", spy)
            model.compile("sgd", "mse")
            model.fit(x, y, verbose=0)
        assert seen


@layer_cases
def test_a_call_is_right_with_whichever_class_it_meets(ours, stock, arguments, channels):
    """The class changes while the layer is inside its call, as by another thread."""
    own, other, x = pair(ours, stock, arguments, channels, "shifted")
    wanted = keras.ops.convert_to_numpy(by_stock(other, x))
    own_call = type(own).call
    vars(own).pop("_lowering")
    own.__class__ = stock
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(own_call(own, keras.ops.convert_to_tensor(x))),
        wanted,
        atol=1e-4,
    )


def test_public_names():
    for name in diagconv_tf.__all__:
        assert getattr(diagconv_tf, name).__doc__
