"""Exported files compute what their models do, and nothing is lost on the way."""

import functools
import importlib.util
import json
import os

import keras
import numpy as np
import pytest

from diagconv_tf import DiagonalwiseConv2D, DiagonalwiseDepthwiseConv2D, DiagonalwiseSeparableConv2D
from diagconv_tf.exporting import ExportError, ExportReport, comparing, export, exporter
from diagconv_tf.exporting.base import Requirement
from diagconv_tf.exporting.comparing import Reference
from diagconv_tf.exporting.keras_run import KerasRun
from diagconv_tf.exporting.native import counted_depthwise_calls, native_convolutions
from diagconv_tf.exporting.sample_inputs import SampleInputs
from diagconv_tf.exporting.saved_model import SavedModel
from diagconv_tf.exporting.tensors import leaves

BACKEND = keras.backend.backend()
SUFFIXES = {"tf_saved_model": "", "litert": ".tflite", "onnx": ".onnx"}


def works(format):
    """Whether this backend and machine can write and check the format."""
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
formats = pytest.mark.parametrize("format", FORMATS)

# What the checks are about does not depend on the format: one will do.
ANY_FORMAT = next((format for format in ("onnx", "tf_saved_model") if works(format)), None)
needs_a_format = pytest.mark.skipif(ANY_FORMAT is None, reason=f"{BACKEND} can write nothing here")


def layers_with(lowering):
    """Our layers with a lowering, or Keras's own for None."""
    if lowering is None:
        return (keras.layers.DepthwiseConv2D, keras.layers.SeparableConv2D, keras.layers.Conv2D)
    ours = (DiagonalwiseDepthwiseConv2D, DiagonalwiseSeparableConv2D, DiagonalwiseConv2D)
    return tuple(functools.partial(made_with, cls, lowering) for cls in ours)


def made_with(cls, lowering, *args, **kwargs):
    is_standard = cls is DiagonalwiseConv2D and kwargs.get("groups", 1) == 1
    return cls(*args, **kwargs, **({} if is_standard else {"lowering": lowering}))


def blocks(lowering):
    """A separable and two depthwise convolutions, one with two outputs a channel."""
    depthwise, separable, _ = layers_with(lowering)
    inputs = x = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(6, 3, strides=2, padding="same")(x)
    x = depthwise(3, padding="same", use_bias=False)(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.ReLU(6.0)(x)
    x = depthwise(3, strides=2, padding="same", depth_multiplier=2)(x)
    x = separable(8, 3, padding="same", activation="relu")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(4)(x), name="blocks")


def grouped_convolutions(lowering):
    """One input channel a group, twice, and then three."""
    *_, convolution = layers_with(lowering)
    inputs = x = keras.Input((16, 16, 6))
    x = convolution(6, 5, groups=6, padding="same")(x)
    x = convolution(12, 3, groups=6, padding="same", strides=2)(x)
    x = convolution(8, 3, groups=4, padding="same")(x)
    return keras.Model(inputs, x)


def dict_inputs_list_outputs(lowering):
    depthwise, *_ = layers_with(lowering)
    image = keras.Input((16, 16, 3), name="image")
    ids = keras.Input((5,), dtype="int32", name="ids")
    other = keras.Input((3,), name="other")
    x = keras.layers.GlobalAveragePooling2D()(depthwise(3, padding="same")(image))
    y = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(7, 3)(ids))
    inputs = {"other": other, "image": image, "ids": ids}
    outputs = [keras.layers.Add()([x, y]), keras.layers.Dense(3)(other), keras.layers.Dense(2)(x)]
    return keras.Model(inputs, outputs)


def list_inputs_dict_outputs(lowering):
    depthwise, *_ = layers_with(lowering)
    images = [keras.Input((16, 16, 3)) for _ in range(2)]
    shared = depthwise(3, padding="same")
    x, y = (keras.layers.GlobalAveragePooling2D()(shared(image)) for image in images)
    outputs = {"small": x, "large": keras.layers.Rescaling(10.0)(y), "mid": x + y}
    return keras.Model(images, outputs)


def unknown_size(lowering):
    depthwise, *_ = layers_with(lowering)
    inputs = keras.Input((None, None, 3))
    x = depthwise(3, padding="same")(inputs)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))


class Block(keras.layers.Layer):
    def __init__(self, lowering):
        super().__init__()
        self.depthwise = layers_with(lowering)[0](3, padding="same")

    def build(self, shape):
        self.depthwise.build(shape)

    def call(self, x):
        return self.depthwise(x) + x


def nested(lowering):
    """A model within a model, a composite layer, a wrapped layer, an unused one."""
    depthwise, *_ = layers_with(lowering)
    inner = keras.Sequential([keras.Input((16, 16, 3)), depthwise(3), Block(lowering)])
    inputs = keras.Input((16, 16, 3))
    frames = keras.layers.Reshape((2, 7, 14, 3))(inner(inputs))
    x = keras.layers.TimeDistributed(depthwise(3, strides=2))(frames)
    model = keras.Model(inputs, keras.layers.Flatten()(x))
    model.unused = depthwise(3)
    model.unused.build((None, 8, 8, 4))
    return model


# Model and how many depthwise convolutions it runs.
MODELS = {
    "blocks": (blocks, 3),
    "grouped": (grouped_convolutions, 2),
    "dict in, list out": (dict_inputs_list_outputs, 1),
    "list in, dict out, shared": (list_inputs_dict_outputs, 2),
    "unknown size": (unknown_size, 1),
    "nested": (nested, 4),
}


def randomized(model):
    """Zero biases and moving averages would hide mistakes."""
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if variable.dtype == "float32":
            variable.assign(rng.uniform(0.1, 0.9, variable.shape))
    return model


def leftovers(folder, *expected):
    return sorted({entry.name for entry in folder.iterdir()} - set(expected))


@pytest.mark.parametrize("name", MODELS)
@formats
def test_native(format, name, tmp_path):
    if format != ANY_FORMAT and name not in ("blocks", "grouped", "unknown size"):
        pytest.skip("what this model is about does not depend on the format")
    if BACKEND == "jax" and name not in ("unknown size", "dict in, list out"):
        pytest.skip("JAX compiles each case apart: two are enough")
    build, calls = MODELS[name]
    model = randomized(build("diagonal:4"))
    path = tmp_path / f"model{SUFFIXES[format]}"
    before = [type(layer) for layer in model._flatten_layers()]
    report = export(model, path, format)
    assert report.depthwise_calls == calls
    if (BACKEND, format) == ("jax", "tf_saved_model"):
        assert report.depthwise_found is None
    else:
        assert report.depthwise_found == calls
    assert report.max_relative_difference < 1e-5
    assert report.batch_sizes == (1, 3)
    assert [type(layer) for layer in model._flatten_layers()] == before
    assert not leftovers(tmp_path, path.name)


@pytest.mark.parametrize("lowering", [None, "diagonal:4", "shifted"])
@formats
def test_as_it_is(format, lowering, tmp_path):
    if BACKEND == "torch" and lowering is not None:
        pytest.xfail("while PyTorch traces for ONNX, the sizes of our inputs are no integers")
    if lowering is None and format != ANY_FORMAT:
        pytest.skip("stock layers do not depend on the format")
    if BACKEND == "jax" and lowering != "shifted":
        pytest.skip("JAX compiles each case apart: one is enough")
    depthwise, separable, _ = layers_with(lowering)
    inputs = keras.Input((8, 8, 4))
    x = depthwise(3, padding="same", strides=2)(inputs)
    model = randomized(keras.Model(inputs, separable(4, 3)(x)))
    report = export(model, tmp_path / f"model{SUFFIXES[format]}", format, native=False)
    assert report.max_relative_difference < 1e-5
    assert not report.native
    if report.depthwise_found is not None:
        assert report.depthwise_found == (2 if lowering is None else 0)


@formats
def test_the_file_serves_others(format, tmp_path):
    """Read back without any code of ours, at a batch size of its own."""
    model = randomized(unknown_size("diagonal:4"))
    path = str(tmp_path / f"model{SUFFIXES[format]}")
    export(model, path, format)
    x = np.random.default_rng(5).normal(size=(5, 17, 20, 3)).astype("float32")
    if format == "tf_saved_model":
        import tensorflow as tf

        loaded = tf.saved_model.load(path)
        outputs = loaded.serve(x)
    elif format == "litert":
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(path)
        index = interpreter.get_input_details()[0]["index"]
        interpreter.resize_tensor_input(index, x.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(index, x)
        interpreter.invoke()
        outputs = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    else:
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(path)
        (outputs,) = evaluator.run(None, {evaluator.input_names[0]: x})
    wanted = keras.ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(np.asarray(outputs), wanted, atol=1e-5 * np.abs(wanted).max())


class Mine(DiagonalwiseDepthwiseConv2D):
    """A subclass of ours that no rule names: it may have code of its own, so its class stays."""


def test_the_model_is_as_before():
    inputs = x = keras.Input((9, 9, 6))
    per_pass = {"forward": "native", "input_gradient": "shifted", "kernel_gradient": "diagonal:2"}
    x = DiagonalwiseDepthwiseConv2D(3, lowering=per_pass)(x)
    x = DiagonalwiseSeparableConv2D(6, 3, lowering="shifted")(x)
    x = DiagonalwiseConv2D(6, 3, groups=6, lowering="diagonal:2")(x)
    stock = keras.layers.Conv2D(6, 1, groups=6)
    model = keras.Model(inputs, Mine(1, lowering="dense")(stock(x)))

    def state():
        return [(type(layer), layer.get_config(), set(vars(layer))) for layer in model.layers]

    before = state()
    with pytest.raises(KeyboardInterrupt), native_convolutions(model):
        with counted_depthwise_calls(model) as calls:
            model(np.ones((1, 9, 9, 6)))
        native = {DiagonalwiseConv2D, keras.layers.Conv2D}
        assert [type(layer) for layer in model.layers[1:3]] == list(layers_with(None)[:2])
        assert type(model.layers[3]) in native
        assert type(model.layers[5]) is Mine
        ours = [layer for layer in model.layers if hasattr(layer, "lowering")]
        assert {layer.lowering for layer in ours} == {"native"}
        raise KeyboardInterrupt
    assert len(calls) == 5  # `Mine` has our `call`.
    assert state() == before


def test_a_call_of_the_layers_own_stays():
    model = tiny()
    layer = model.layers[0]
    own_call = functools.partial(layer.call)
    layer.call = own_call
    with counted_depthwise_calls(model) as calls:
        model(np.ones((1, 8, 8, 2)))
    assert len(calls) == 1
    assert layer.call is own_call


class Probe(keras.layers.Layer):
    """Writes down what is switched while it runs."""

    def __init__(self, read):
        super().__init__()
        self.read, self.seen = read, []

    def call(self, x):
        self.seen.append(self.read())
        return x


@pytest.mark.backends("torch")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_keras_is_run_without_tf32_and_with_all_else(monkeypatch, precision):
    import torch

    cudnn = torch.backends.cudnn

    def switches():
        others = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic)
        return others, cudnn.allow_tf32, torch.get_float32_matmul_precision()

    monkeypatch.setattr(cudnn, "benchmark", True)
    torch.set_float32_matmul_precision(precision)
    try:
        before = switches()
        probe = Probe(switches)
        model = keras.Sequential([keras.Input((2,)), probe])
        probe.seen.clear()
        KerasRun(model)(np.ones((1, 2)))
        assert probe.seen == [(before[0], False, "highest")]
        assert switches() == before == ((True, True, False), True, precision)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.backends("tensorflow", "jax")
@pytest.mark.parametrize("before", [True, False])
def test_saved_models_are_run_without_tf32(monkeypatch, before):
    tf = pytest.importorskip("tensorflow")
    switch = tf.config.experimental
    seen = []

    class Loaded:
        def serve(self, inputs):
            seen.append(switch.tensor_float_32_execution_enabled())
            return [inputs]

    monkeypatch.setattr(tf.saved_model, "load", lambda path: Loaded())
    usual = switch.tensor_float_32_execution_enabled()
    try:
        switch.enable_tensor_float_32_execution(before)
        run, _ = SavedModel().load("path")
        x = np.ones(2)
        run(SampleInputs(x, tuple(leaves(x))))
        assert switch.tensor_float_32_execution_enabled() is before
    finally:
        switch.enable_tensor_float_32_execution(usual)
    assert seen == [False]


@pytest.mark.backends("tensorflow")
@pytest.mark.skipif(not works("onnx"), reason="tf2onnx or onnx is not installed")
def test_onnx_of_normalization_and_exact_gelu(tmp_path):
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[0.5, 2.0, 1.0])(inputs)
    x = keras.layers.DepthwiseConv2D(3)(x)
    model = keras.Model(inputs, keras.activations.gelu(x))
    report = export(model, tmp_path / "model.onnx", "onnx")
    assert report.max_relative_difference < 1e-5

    import onnx

    assert len(onnx.load(tmp_path / "model.onnx").graph.input) == 1


@pytest.mark.backends("torch")
@pytest.mark.skipif(not works("onnx"), reason="onnx is not installed")
def test_an_export_that_bakes_in_a_size_is_found_out(tmp_path):
    inputs = keras.Input((None, None, 3))
    x = keras.layers.DepthwiseConv2D(3, strides=2, padding="same")(inputs)
    with pytest.raises(ExportError, match=r"differ from Keras by at most 0.0001 .* Received"):
        export(keras.Model(inputs, x), tmp_path / "model.onnx", "onnx")
    assert not leftovers(tmp_path)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.depthwise = DiagonalwiseDepthwiseConv2D(3, lowering="diagonal:2")

    def call(self, x):
        return self.depthwise(x)


@needs_a_format
def test_sample(tmp_path):
    """Models that declare no inputs are given some; one example is enough."""
    model = Subclassed()
    sample = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype("float32")
    model(sample)
    path = tmp_path / f"model{SUFFIXES[ANY_FORMAT]}"
    with pytest.raises(ValueError, match=r"Expected `sample`.*Received: sample=None.*Subclassed"):
        export(model, path, ANY_FORMAT)
    report = export(model, path, ANY_FORMAT, sample=sample)
    assert (report.depthwise_calls, report.batch_sizes) == (1, (1, 2))
    for bad in ([sample, sample[:0]], np.float32(1.0)):
        with pytest.raises(ValueError, match="Expected `sample` to be a batch"):
            export(model, path, ANY_FORMAT, sample=bad, overwrite=True)


@pytest.mark.skipif(not works("tf_saved_model"), reason=f"{BACKEND} cannot write it")
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision(policy, tmp_path):
    if BACKEND == "jax" and policy == "mixed_float16":
        pytest.skip("JAX compiles each case apart: one is enough")
    x = inputs = keras.Input((8, 8, 4))
    for _ in range(3):
        x = DiagonalwiseDepthwiseConv2D(3, padding="same", dtype=policy, lowering="shifted")(x)
    report = export(randomized(keras.Model(inputs, x)), tmp_path / "model")
    assert report.tolerance == comparing.TOLERANCES[policy.removeprefix("mixed_")]
    assert report.max_relative_difference < report.tolerance


@needs_a_format
def test_report(tmp_path):
    path = tmp_path / f"model{SUFFIXES[ANY_FORMAT]}"
    report = export(dict_inputs_list_outputs("diagonal:4"), path, ANY_FORMAT, tolerance=1e-3)
    assert isinstance(report, ExportReport)
    files = [file for file in path.rglob("*") if file.is_file()] or [path]
    assert report.file_bytes == sum(file.stat().st_size for file in files)
    fields = json.loads(report.to_json())
    assert fields["path"] == str(path)
    assert fields["batch_sizes"] == [1, 3]
    assert fields["tolerance"] == 1e-3
    for word in (str(path), ANY_FORMAT, f"{report.file_bytes:,} bytes", report.runtime, "scale"):
        assert word in str(report)
    assert "\n" not in str(report)


def tiny():
    return keras.Sequential([keras.Input((8, 8, 2)), keras.layers.DepthwiseConv2D(3)])


def old_file(tmp_path, format):
    """An earlier export, and a function that tells what it holds."""
    path = tmp_path / f"model{SUFFIXES[format]}"
    if SUFFIXES[format]:
        path.write_text("old")
        return path, path.read_text
    path.mkdir()
    (path / "saved_model.pb").write_text("old")
    return path, (path / "saved_model.pb").read_text


def differ(monkeypatch, kind):
    monkeypatch.setattr(Reference, "tolerance", -1.0)


def not_a_number(monkeypatch, kind):
    load = kind.load

    def broken(self, path):
        run, runtime = load(self, path)
        return lambda x: [(name, np.full_like(y, np.nan)) for name, y in run(x)], runtime

    monkeypatch.setattr(kind, "load", broken)


def wrong_shape(monkeypatch, kind):
    load = kind.load

    def broken(self, path):
        run, runtime = load(self, path)
        return lambda x: [(name, y[:1]) for name, y in run(x)], runtime

    monkeypatch.setattr(kind, "load", broken)


def too_few_ops(monkeypatch, kind):
    monkeypatch.setattr(kind, "count_depthwise", lambda self, path: 0)


def unreadable(monkeypatch, kind):
    def write(self, model, path, options):
        if not self.suffix:
            os.makedirs(path)
            path = os.path.join(path, "saved_model.pb")
        with open(path, "wb") as file:
            file.write(b"\xff garbage" * 20)

    monkeypatch.setattr(kind, "write", write)


def interrupted(monkeypatch, kind):
    write = kind.write

    def interrupt(self, *arguments):
        write(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, "write", interrupt)


def full_disk(monkeypatch, kind):
    def write(self, model, path, options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kind, "write", write)


def rename_fails(monkeypatch, kind):
    def fail(source, target, rename=os.rename):
        if "old" not in (os.path.basename(source), os.path.basename(target)):
            raise OSError("no rename")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    monkeypatch.setattr(os, "replace", fail)


FAILURES = {
    differ: (ExportError, "differ from Keras by at most -1 of the outputs' scale. Received: "),
    not_a_number: (ExportError, "Received: nan"),
    wrong_shape: (ExportError, r"Expected outputs of shapes .*\(3, 6, 6, 2\).* Received: .*\(1, 6"),
    too_few_ops: (ExportError, "Expected .* to run .* 1 times.* Received: 0 times"),
    unreadable: (ExportError, "cannot be read|does not run"),
    full_disk: (ExportError, "Keras could not export .* No space left on device"),
    interrupted: (KeyboardInterrupt, None),
    rename_fails: (OSError, "no rename"),
}


@pytest.mark.parametrize("failure", FAILURES)
@formats
def test_a_failure_leaves_the_old_file(format, failure, tmp_path, monkeypatch):
    if format != ANY_FORMAT and failure not in (unreadable, interrupted, rename_fails):
        pytest.skip("what is checked does not depend on the format")
    path, content = old_file(tmp_path, format)
    failure(monkeypatch, type(exporter._find_format(format)))
    error, message = FAILURES[failure]
    with pytest.raises(error, match=message):
        export(tiny(), path, format, overwrite=True)
    assert content() == "old"
    assert not leftovers(tmp_path, path.name)


@formats
def test_overwrite(format, tmp_path):
    path, _ = old_file(tmp_path, format)
    with pytest.raises(FileExistsError, match="exists; overwrite=True"):
        export(tiny(), path, format)
    export(tiny(), path, format, overwrite=True)
    assert path.is_dir() == (format == "tf_saved_model")
    assert not leftovers(tmp_path, path.name)


def test_overwrite_spares_what_is_no_export(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "photo").write_text("dear")
    with pytest.raises(ValueError, match=r"SavedModel folder.*photos', which is something else"):
        exporter._check_path(folder, exporter._find_format("tf_saved_model"), overwrite=True)
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(ValueError, match=r"to be a file.*which is something else"):
        exporter._check_path(tmp_path / "model.onnx", exporter._find_format("onnx"), overwrite=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "pickle"}, r"Expected `format` to be one of .*'onnx'\. Received: .*'pickle'"),
        ({"model": "a path"}, r"Expected .*keras.Model.* Received: 'a path'"),
        ({"model": keras.Sequential([keras.layers.Dense(1)])}, "Expected a built model.*[Cc]all"),
        ({"path": "no/such/folder/m"}, "in an existing folder. Received: .*no/such/folder/m"),
        ({"format": "litert", "path": "m.onnx"}, r"\*\.tflite .*Received: path=.*m\.onnx"),
        ({"format": "onnx", "path": "model"}, r"\*\.onnx for format='onnx'"),
        ({"path": "m.tflite"}, r"a folder for format='tf_saved_model'.*m\.tflite"),
    ],
    ids=str,
)
def test_refused_before_long_work(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(Reference, "of", lambda *a: pytest.fail("long work"))
    arguments = {"model": tiny(), **arguments}
    arguments["path"] = str(tmp_path / arguments.get("path", "model"))
    with pytest.raises(ValueError, match=message) as error:
        export(**arguments)
    assert "\n" not in str(error.value)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("format", SUFFIXES)
def test_missing_packages_are_named(format, tmp_path, monkeypatch):
    monkeypatch.setattr(Reference, "of", lambda *a: pytest.fail("long work"))
    monkeypatch.setattr(Requirement, "is_installed", False)
    path = tmp_path / f"model{SUFFIXES[format]}"
    with pytest.raises((ImportError, ValueError)) as error:
        export(tiny(), path, format)
    if isinstance(error.value, ImportError):
        extra = {"litert": "litert", "onnx": "onnx", "tf_saved_model": "tensorflow"}[format]
        assert "is not installed: pip install " in str(error.value)
        assert extra in str(error.value)
    else:
        assert "KERAS_BACKEND=tensorflow" in str(error.value)


@needs_a_format
def test_inputs_that_cannot_be_made_up(tmp_path):
    path = tmp_path / f"model{SUFFIXES[ANY_FORMAT]}"
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.ops.log(-keras.ops.abs(inputs)))
    with pytest.raises(ValueError, match="Expected finite outputs.* pass .* as `sample`"):
        export(model, path, ANY_FORMAT)
    inputs = keras.Input((None, None, 3))
    small = keras.layers.Cropping2D(400)(inputs)
    model = keras.Model(inputs, keras.layers.DepthwiseConv2D(3)(small))
    with pytest.raises((ValueError, ExportError), match="as `sample`"):
        export(model, path, ANY_FORMAT)
    assert not leftovers(tmp_path)


@pytest.mark.skipif(not importlib.util.find_spec("onnx"), reason="onnx is not installed")
@pytest.mark.skipif(not works("onnx"), reason=f"{BACKEND} cannot write onnx here")
def test_onnx_without_onnxruntime(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    report = export(tiny(), tmp_path / "model.onnx", "onnx")
    assert "reference evaluator" in report.runtime
