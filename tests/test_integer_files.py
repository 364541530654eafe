"""Files of integers multiply integers, and compute what the deployed model does."""

import functools

import keras
import numpy as np
import pytest
from keras import layers

from diagconv_tf import LowBit, deploy, restore, rewrite
from diagconv_tf.exporting import ExportError, export, exporter
from diagconv_tf.exporting.integer import kernels, plan_integers
from diagconv_tf.exporting.integer.kernels import Grid, IntegerKernel, deployed_codes
from diagconv_tf.lowbit import (
    BinaryConnect,
    DoReFaActivations,
    DoReFaWeights,
    LowBitConv2D,
    LowBitDense,
    LowBitDepthwiseConv2D,
    LowBitSeparableConv2D,
    Operands,
)

BACKEND = keras.backend.backend()
SUFFIXES = {"onnx": ".onnx", "litert": ".tflite"}


def works(format):
    """Whether integer files of this format can be written and checked here."""
    if format == "litert" and BACKEND != "tensorflow":
        return False
    try:
        requirements = exporter._find_format(format).requirements()
    except ValueError:
        return False
    return all(requirement.is_installed for requirement in requirements)


FORMATS = [
    pytest.param(
        format,
        marks=pytest.mark.skipif(not works(format), reason=f"{BACKEND} cannot write {format} here"),
    )
    for format in SUFFIXES
]
needs_onnx = pytest.mark.skipif(not works("onnx"), reason=f"{BACKEND} cannot write onnx here")


def block(x, filters, stride, name):
    if stride == 2:
        x = layers.ZeroPadding2D(((0, 1), (0, 1)))(x)
    padding = "same" if stride == 1 else "valid"
    x = layers.DepthwiseConv2D(
        3, strides=stride, padding=padding, use_bias=False, name=f"{name}_dw"
    )(x)
    x = layers.BatchNormalization(scale=False)(x)
    x = layers.ReLU(6.0)(x)
    x = layers.Conv2D(filters, 1, use_bias=False, name=f"{name}_pw")(x)
    return layers.BatchNormalization()(x)


def mobile():
    """Float ends, folded batch norms, padding, a skip connection, a linear bottleneck."""
    inputs = x = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(32, 3, padding="same", name="stem")(x)
    x = layers.ReLU(6.0)(x)
    x = layers.ReLU(6.0)(block(x, 64, 2, "a"))
    y = block(x, 64, 1, "b")
    x = layers.Add()([x, y])
    x = layers.Conv2D(64, 1, use_bias=False, name="expand")(x)
    x = layers.BatchNormalization(center=False)(x)
    x = layers.ReLU(6.0)(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(0.5)(x)
    outputs = layers.Dense(4, activation="softmax", name="head")(x)
    return keras.Model(inputs, outputs, name="mobile")


def sequential():
    """Activations inside layers, pooling of integers, dense layers, biases."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 3), name="image"),
            layers.Conv2D(8, 3, activation="relu6", name="stem"),
            layers.Conv2D(16, 3, activation="relu6", padding="same", name="conv"),
            layers.MaxPooling2D(),
            layers.DepthwiseConv2D(2, depth_multiplier=2, activation="relu6", name="dw"),
            layers.Flatten(),
            layers.Dense(8, activation="tanh", name="hidden"),
            layers.Dense(6, name="signed"),
            layers.Dense(3, name="head"),
        ],
        name="sequential",
    )


def nested():
    """A model within a model, called twice, whose layers have two lots of readers."""
    inside = keras.Input((8, 8, 4))
    x = layers.Conv2D(4, 3, padding="same", activation="relu6", name="conv")(inside)
    inner = keras.Model(inside, layers.ZeroPadding2D(1)(x), name="inner")
    inputs = keras.Input((8, 8, 4), name="image")
    x = layers.ReLU(6.0)(inputs)
    x = inner(layers.Cropping2D(1)(inner(x)))
    outputs = [layers.Conv2D(3, 3, name="head")(x), x]
    return keras.Model(inputs, outputs, name="nested")


# Model, treatment, the layers that multiply integers in each format, and how often.
MOBILE = {"a_dw", "a_pw", "b_dw", "b_pw", "expand"}
MODELS = {
    "mobile": (mobile, LowBit(7, 8, limit=6), MOBILE, MOBILE - {"b_pw"}),
    "sequential": (
        sequential,
        LowBit(3, 4),
        {"conv", "dw", "hidden", "signed"},
        {"conv", "dw"},
    ),
    "nested": (nested, LowBit(1, 8, skip=("head",)), {"inner/conv"}, {"inner/conv"}),
}


def randomized(model):
    """Weights and statistics of batch norms that hide no mistake; sizes stay moderate."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if len(variable.shape) > 1:
            fan_in = np.prod(variable.shape[:-1])
            variable.assign(rng.normal(0, fan_in**-0.5, variable.shape))
        elif variable.name in ("gamma", "moving_variance"):
            variable.assign(rng.uniform(0.5, 2, variable.shape))
        else:
            variable.assign(rng.normal(0.5, 0.5, variable.shape))
    return model


@functools.cache
def deployed(name, **options):
    """The same model each time: the tests do not change it."""
    build, treatment, *_ = MODELS[name]
    return deploy(rewrite(randomized(build()), treatment), **options)


def sample(channels=3):
    return np.random.default_rng(1).normal(1, 1, (16, 8, 8, channels)).astype("float32")


# What becomes of a layer -------------------------------------------------------


def quantized(bits=7, signed=False):
    return Operands(DoReFaWeights(bits), DoReFaActivations(8, signed, 6.0))


def one_layer(layer, shape=(8, 8, 4), after=None):
    """A deployed model of a low-bit layer behind a ReLU6, and of one that can do integers."""
    inputs = keras.Input(shape)
    x = rectified = layers.ReLU(6.0)(inputs)
    for each in [layer, layers.ReLU(6.0)] if after is None else [layer, *after]:
        x = each(x)
    other = LowBitDense(2, activation="relu6", operands=quantized(), name="other")(rectified)
    return deploy(randomized(keras.Model(inputs, [x, other])))


class OwnLayer(LowBitConv2D):
    """A user's class, whose code is not known."""


class OwnRounding:
    bits = 4

    def __call__(self, inputs):
        return keras.ops.round(inputs)


def wrapped():
    return layers.TimeDistributed(LowBitConv2D(2, 3, operands=quantized(), name="layer"))


LEFT_FLOAT = {
    "separable": (
        "onnx",
        lambda: one_layer(LowBitSeparableConv2D(4, 3, operands=quantized())),
        "between its two halves",
    ),
    "float kernel": (
        "onnx",
        lambda: one_layer(LowBitConv2D(4, 3, operands=Operands(inputs=quantized().inputs))),
        "its kernel is float",
    ),
    "own rounding": (
        "onnx",
        lambda: one_layer(LowBitConv2D(4, 3, operands=Operands(DoReFaWeights(2), OwnRounding()))),
        "its inputs are rounded by OwnRounding",
    ),
    "half precision": (
        "onnx",
        lambda: one_layer(LowBitConv2D(4, 3, dtype="mixed_float16", operands=quantized())),
        "it computes in float16",
    ),
    "zeros off the grid": (
        "onnx",
        lambda: one_layer(LowBitConv2D(4, 3, padding="same", operands=quantized(signed=True))),
        "pads with zeros, which are not on the signed grid",
    ),
    "long sums": (
        "onnx",
        lambda: one_layer(LowBitDense(1, operands=quantized(1)), (70_000,)),
        "its sums may exceed 32 bits",
    ),
    "in a wrapper": ("onnx", lambda: one_layer(wrapped(), (2, 8, 8, 4)), "in no graph"),
    "unbounded outputs": (
        "litert",
        lambda: one_layer(LowBitConv2D(4, 3, operands=quantized()), after=[layers.ReLU()]),
        "no activation bounds them",
    ),
    "last": (
        "litert",
        lambda: one_layer(LowBitConv2D(4, 3, operands=quantized()), after=[]),
        "no activation bounds them",
    ),
    "groups": (
        "litert",
        lambda: one_layer(LowBitConv2D(4, 3, groups=2, operands=quantized())),
        "groups=2",
    ),
    "channels first": (
        "litert",
        lambda: one_layer(LowBitConv2D(4, 3, data_format="channels_first", operands=quantized())),
        "channels_first",
    ),
    "two strides": (
        "litert",
        lambda: one_layer(LowBitDepthwiseConv2D(3, strides=(1, 2), operands=quantized())),
        "one stride",
    ),
}


@pytest.mark.parametrize("name", LEFT_FLOAT)
def test_left_float(name):
    format, build, reason = LEFT_FLOAT[name]
    plan = plan_integers(build(), format).plan
    ((path, reasons),) = plan.left_float.items()
    assert path != "other"
    assert any(reason in each for each in reasons), reasons
    assert reason in str(plan)


@pytest.mark.parametrize("format", SUFFIXES)
@pytest.mark.parametrize("name", MODELS)
def test_plan(name, format):
    expected = MODELS[name][2 + list(SUFFIXES).index(format)]
    plan = plan_integers(deployed(name), format).plan
    assert {layer.path for layer in plan.layers if not layer.reasons} == expected
    assert plan.integer_calls == len(expected) + (name == "nested")


def test_own_class_stays_float():
    model = one_layer(LowBitConv2D(4, 3, operands=quantized(), name="layer"))
    model.get_layer("layer").__class__ = OwnLayer
    plan = plan_integers(model, "onnx").plan
    assert plan.left_float == {"layer": ("OwnLayer has no integer form",)}


@pytest.mark.parametrize(
    ("integers", "format", "build", "message"),
    [
        (None, "onnx", lambda: deployed_eight_bits(), "at most 7 bits"),
        (True, "onnx", lambda: Subclassed().made(), "functional or sequential"),
        (True, "onnx", mobile, "Expected a model from `deploy`"),
        (True, "tf_saved_model", mobile, "Expected format='litert' or format='onnx'"),
    ],
)
def test_refused(integers, format, build, message):
    file_format = exporter._find_format(format)
    with pytest.raises(ValueError, match=message):
        exporter._plan(build(), file_format, integers)
    assert exporter._plan(build(), file_format, False) is None


def deployed_eight_bits():
    return deploy(rewrite(mobile(), LowBit(8, 8, limit=6)))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.layer = LowBitDense(4, operands=quantized())

    def call(self, inputs):
        return self.layer(inputs)

    def made(self):
        self(np.ones((1, 3), "float32"))
        return deploy(self)


@pytest.mark.parametrize(
    "build",
    [
        mobile,
        lambda: rewrite(mobile(), LowBit(7, 8, limit=6)),
        lambda: deploy(rewrite(mobile(), LowBit(7, 32))),
        lambda: deploy(
            rewrite(sequential(), LowBit(2, 2, include=("conv", "hidden"))), kernels="bits"
        ),
        lambda: restore(deployed("mobile")),
    ],
    ids=["stock", "not deployed", "float inputs", "bits", "restored"],
)
def test_others_are_exported_as_floats(build):
    assert exporter._plan(build(), exporter._find_format("onnx"), None) is None


# Numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grid_is_the_quantizers(bits, signed):
    quantizer = DoReFaActivations(bits, signed, limit=3.0)
    grid = Grid.of(quantizer)
    inputs = np.random.default_rng(0).normal(0, 3, 1000).astype("float32")
    codes = np.clip(np.rint((inputs + grid.offset) / grid.scale), 0, grid.levels)
    expected = keras.ops.convert_to_numpy(quantizer(inputs))
    np.testing.assert_allclose(codes * grid.scale - grid.offset, expected, atol=1e-6)
    assert grid.high == pytest.approx(3.0)


@pytest.mark.parametrize("quantizer", [*(DoReFaWeights(b) for b in range(1, 9)), BinaryConnect()])
def test_codes_of_a_deployed_kernel(quantizer):
    layer = LowBitDense(5, operands=Operands(quantizer, DoReFaActivations(8)))
    model = deploy(randomized(keras.Sequential([keras.Input((7,)), layer])))
    found, kernel = deployed_codes(model.layers[0]), model.layers[0].kernel
    np.testing.assert_array_equal(found.values(), keras.ops.convert_to_numpy(kernel))
    assert found.bits == quantizer.bits
    kernel.assign(kernel * 1.01)
    assert found.bits == 1 or deployed_codes(model.layers[0]) is None


@pytest.mark.parametrize("grid", [Grid(0.1, 0.0, 255), Grid(0.5, 2.0, 15)], ids=str)
def test_kernel_on_a_grid(grid):
    """The sum of products of integers, scaled, is that of the numbers they stand for."""
    rng = np.random.default_rng(0)
    made = IntegerKernel(
        (2 * rng.integers(-4, 4, (20, 6)) + 1).astype("int8"),
        np.full(6, 1 / 7),
        rng.normal(size=6),
    )
    factor, added = rng.normal(size=6), rng.normal(size=6)
    factor[2:4] = 0.0, 1e-20  # Channels that a batch norm switches off.
    codes = rng.integers(0, grid.levels + 1, (10, 20))
    inputs = codes * grid.scale - grid.offset
    expected = (inputs @ (made.codes / 7) + made.bias) * factor + added
    kernel = made.scaled(factor, added).on(grid)
    sums = codes @ kernel.codes.astype("int64")
    np.testing.assert_allclose(sums * kernel.scales + kernel.bias, expected, atol=1e-6)
    rounded = kernel.integer_bias(0.0) * kernel.scales
    assert np.all(np.abs(rounded - kernel.bias) <= 0.5001 * kernel.scales)
    assert np.abs(kernel.codes).max() == (7 * 17 if grid.levels == 15 else 7 * 9)


@pytest.mark.parametrize("gamma", [0.0, 1e-20])
def test_a_channel_switched_off_before_a_signed_grid(gamma):
    """Its bias holds the offset of the outputs' grid, and does not overflow."""
    inputs = x = keras.Input((8, 8, 4))
    x = LowBitConv2D(3, 3, operands=quantized(), name="one")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = LowBitConv2D(3, 3, operands=quantized(signed=True), name="other")(x)
    model = randomized(keras.Model(inputs, x))
    norm = model.get_layer("norm")
    norm.gamma.assign([1.0, gamma, 1.0])
    norm.beta.assign([0.5, 0.0, 0.5])
    program = plan_integers(deploy(model), "onnx")
    step = program.calls.steps[0]
    grid = program.grids[step.outputs[0]]
    assert grid.offset == 6.0
    bias = step.kernel.integer_bias(grid.offset) * step.kernel.scales
    np.testing.assert_allclose(bias, step.kernel.bias + grid.offset, atol=1e-2)
    np.testing.assert_allclose(bias[1], grid.offset, rtol=1e-6)


@pytest.mark.parametrize("name", ["norm", "dropout"])
def test_calls_that_always_train_are_kept(name):
    """Statistics of the batch are not folded, and noise is not left out."""
    between = {"norm": layers.BatchNormalization(), "dropout": layers.Dropout(0.5)}[name]
    inputs = x = keras.Input((8, 8, 4))
    x = LowBitConv2D(3, 3, operands=quantized(), name="one")(x)
    x = between(x, training=True)
    x = LowBitConv2D(3, 3, operands=quantized(), name="other")(x)
    program = plan_integers(deploy(randomized(keras.Model(inputs, x))), "onnx")
    steps = program.calls.steps
    assert [type(step.operation) for step in steps][1:-1] == [type(between)]
    assert not program.is_moved(steps[1])


# Files -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format", FORMATS)
def test_file(name, format, tmp_path):
    model, path = deployed(name), tmp_path / f"model{SUFFIXES[format]}"
    inputs = sample(channels=model.inputs[0].shape[-1])
    before = [keras.ops.convert_to_numpy(v) for v in model.variables]
    report = export(model, path, format, sample=inputs)
    integers = report.integers
    assert integers.operations == integers.plan.integer_calls > 0
    assert integers.share_within >= 0.99
    assert integers.share_of_given > 0.9
    assert report.file_bytes < integers.float_file_bytes or name != "mobile"
    assert report.tolerance is None
    assert "integer operations" in str(report)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)


@needs_onnx
def test_an_input_named_like_an_inner_value(tmp_path):
    import onnx

    def written(name):
        inputs = keras.Input((4,), name=name)
        outputs = LowBitDense(2, operands=quantized(), name="layer")(inputs)
        model, path = deploy(randomized(keras.Model(inputs, outputs))), tmp_path / f"{name}.onnx"
        given = np.random.default_rng(1).normal(1, 1, (16, 4)).astype("float32")
        assert export(model, path, "onnx", sample=given).integers.operations == 1
        return onnx.load(path).graph

    graph = written("inputs")
    constants = [each.name for each in graph.initializer if each.name.startswith("c")]
    values = [name for node in graph.node for name in node.output if name.startswith("t")]
    for name in (constants[0], values[0]):
        assert [value.name for value in written(name).input] == [name]


@needs_onnx
def test_rounded_biases_are_those_of_the_file(tmp_path):
    """What `deploy(kernels="int8")` computes is what the file does, in a model from a file."""
    deployed("mobile", kernels="int8").save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    report = export(model, tmp_path / "model.onnx", "onnx", sample=sample())
    assert report.integers.share_of_given >= 0.99
    assert set(report.integers.plan.left_float) == set()
    assert report.max_difference < 1e-3


@needs_onnx
def test_a_wrong_file_is_refused(tmp_path, monkeypatch):
    model = deployed("mobile")
    right = IntegerKernel.integer_bias
    monkeypatch.setattr(exporter, "with_rounded_biases", lambda program, run: run.weights)
    monkeypatch.setattr(
        kernels.IntegerKernel, "integer_bias", lambda self, offset: right(self, offset) + 9000
    )
    with pytest.raises(ExportError, match=r"within 1 of Keras's, in steps of which 255"):
        export(model, tmp_path / "model.onnx", "onnx", sample=sample())
    assert not list(tmp_path.iterdir())
