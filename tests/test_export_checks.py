"""What the checks of an export find, and what they let pass."""

import collections
import os
import threading

import keras
import numpy as np
import pytest

from diagconv_tf import DEFAULT_RULES, DiagonalwiseDepthwiseConv2D, Rule
from diagconv_tf.exporting import ExportError, export, exporter
from diagconv_tf.exporting.comparing import Reference
from diagconv_tf.exporting.keras_run import KerasRun, perturbed
from diagconv_tf.exporting.native import native_convolutions
from diagconv_tf.exporting.onnx import Onnx
from diagconv_tf.exporting.sample_inputs import sample_inputs
from diagconv_tf.exporting.tensors import leaves, match
from tests.test_exporting import ANY_FORMAT, BACKEND, SUFFIXES, formats, needs_a_format, works

layers = keras.layers
Pair = collections.namedtuple("Pair", ["z", "a"])


def scaled(x, factors):
    """A structure of `x` times each of `factors`."""
    return keras.tree.map_structure(lambda factor: layers.Rescaling(float(factor))(x), factors)


def weighted_sum(tensors):
    """Tells all of `tensors` apart."""
    flat = keras.tree.flatten(tensors)
    return layers.Add()([layers.Rescaling(float(i + 1))(t) for i, t in enumerate(flat)])


def model_of(inputs, factors):
    return keras.Model(inputs, scaled(weighted_sum(inputs), factors))


def named(*names):
    return [keras.Input((3,), name=name) for name in names]


def dicts():
    """Keys that sort in one way as text and in another as numbers."""
    keys = ("i2", "i9", "i10")
    return model_of(dict(zip(keys, named(*keys), strict=True)), {"b2": 2, "b9": 9, "b10": 10})


def long_lists():
    return model_of([keras.Input((3,)) for _ in range(11)], list(range(1, 12)))


def nested_inputs():
    """Keys that are not the inputs' names, and outputs in an order of their own."""
    inputs = {"p": named("p1", "p0"), "o": dict(zip(("u10", "u2"), named("x", "w"), strict=True))}
    return model_of(inputs, collections.OrderedDict(b2=2, output_1=10, output_0=9))


STRUCTURES = [dicts, long_lists, nested_inputs]


@pytest.mark.parametrize("build", STRUCTURES)
@formats
def test_right_files_of_every_structure_pass(format, build, tmp_path):
    if BACKEND == "jax" and build is not dicts:
        pytest.skip("JAX compiles each case apart: one is enough")
    report = export(build(), tmp_path / f"model{SUFFIXES[format]}", format)
    assert report.max_relative_difference < 1e-6


class Returns(keras.Model):
    """A model that declares nothing."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs_of = outputs

    def call(self, x):
        return self.outputs_of(x)


SUBCLASSED = {
    "dicts": (
        {"b2": 2, "b10": 10, "b9": 9},
        lambda x: {"d2": x["b2"], "d10": x["b10"] + 2 * x["b9"], "d9": x["b9"]},
    ),
    "named tuple": (1, lambda x: Pair(2 * x, 10 * x)),
}


@pytest.mark.parametrize("name", SUBCLASSED)
@formats
def test_right_files_of_subclassed_models_pass(format, name, tmp_path):
    if BACKEND == "jax" and name != "dicts":
        pytest.skip("JAX compiles each case apart: one is enough")
    factors, outputs = SUBCLASSED[name]
    x = np.ones((2, 3), "float32")
    sample = keras.tree.map_structure(lambda factor: factor * x, factors)
    model = Returns(outputs)
    model(sample)
    if isinstance(sample, dict):  # Given in another order than built.
        sample = dict(reversed(sample.items()))
    path = tmp_path / f"model{SUFFIXES[format]}"
    report = export(model, path, format, sample=sample)
    assert report.max_relative_difference < 1e-6


@formats
def test_structures_that_a_format_lacks_are_refused_in_one_line(format, tmp_path):
    x = keras.Input((3,))
    model = keras.Model(x, scaled(x, [{"b10": 1, "b2": 2}, {"b10": 3, "b2": 4}]))
    path = tmp_path / f"model{SUFFIXES[format]}"
    if format == "onnx":
        assert export(model, path, format).max_relative_difference < 1e-6
    else:
        with pytest.raises(ExportError, match="Keras could not export .* non-Tensor") as error:
            export(model, path, format)
        assert "\n" not in str(error.value)


SAMPLES = {
    "as declared": lambda a, b: {"k2": a, "k10": b},
    "in another order": lambda a, b: {"k10": b, "k2": a},
    "with more": lambda a, b: {"other": a, "k10": b, "k2": a},
    "by names of inputs": lambda a, b: {"y": b, "x": a},
    "a list in the order of keys": lambda a, b: [b, a],
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_gets_the_structure_that_the_model_declares(name):
    model = model_of(dict(zip(("k2", "k10"), named("x", "y"), strict=True)), 1)
    a, b = np.zeros((2, 3), "float32"), np.ones((2, 3), "float32")
    ((one, several),) = sample_inputs(model, SAMPLES[name](a, b))
    for inputs in (one, several):
        assert {leaf.name: leaf.value.max() for leaf in inputs.leaves} == {"x": 0, "y": 1}
        assert inputs.structure.keys() == {"k2", "k10"}
    with pytest.raises(ValueError, match=r"Expected `sample` to hold 2 inputs: .*Received: 3"):
        next(sample_inputs(model, [a, a, a]))


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    ("names", "structure", "wanted", "wanted_by_insertion"),
    [
        (["b10", "b2"], {"b2": 0, "b10": 1}, [1, 0], [1, 0]),
        (["z", "a"], Pair(0, 1), [0, 1], [0, 1]),
        (["output_2", "output_0", "output_1"], [0, 1, 2], [2, 0, 1], [2, 0, 1]),
        (["Identity:0", "1"], [0, 1], [0, 1], [0, 1]),
        (["Identity:0", "1"], {"z": 0, "a": 1}, [1, 0], [0, 1]),
        (list("abc"), {"z": [0, 1], "y": 2}, [2, 0, 1], [0, 1, 2]),
        (["output_0"], 0, [0], [0]),
    ],
    ids=str,
)
def test_tensors_are_matched_by_name_and_else_by_order(
    names, structure, wanted, wanted_by_insertion
):
    assert [leaf.value for leaf in match(names, leaves(structure))] == wanted
    matched = match(names, leaves(structure), by_insertion=True)
    assert [leaf.value for leaf in matched] == wanted_by_insertion
    with pytest.raises(ExportError, match="Received: a, b, c, d"):
        match(list("abcd"), leaves(structure))


@needs_a_format
def test_exchanged_outputs_are_found(tmp_path, monkeypatch):
    file_format = exporter._find_format(ANY_FORMAT)
    load = type(file_format).load

    def exchanged(self, path):
        run, runtime = load(self, path)

        def run_exchanged(inputs):
            names, values = zip(*run(inputs), strict=True)
            return list(zip(names, reversed(values), strict=True))

        return run_exchanged, runtime

    monkeypatch.setattr(type(file_format), "load", exchanged)
    with pytest.raises(ExportError, match="differ from Keras"):
        export(dicts(), tmp_path / f"model{SUFFIXES[ANY_FORMAT]}", ANY_FORMAT)


# What is found in numbers. The outputs come from the model, and then one is changed.


def column_scales(scales):
    """A dense layer whose units have these scales."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(len(scales))])
    kernel = np.random.default_rng(0).uniform(0.5, 1.0, (4, len(scales))) * scales
    model.set_weights([kernel, np.zeros(len(scales))])
    return model


def channel_scales(scales, data_format):
    """A convolution whose channels have these scales."""
    shape = (5, 5, 2) if data_format == "channels_last" else (2, 5, 5)
    x = inputs = keras.Input(shape)
    if data_format == "channels_first":  # CPUs have no such convolution.
        x = layers.Permute((2, 3, 1))(x)
    convolution = layers.Conv2D(len(scales), 3)
    x = convolution(x)
    if data_format == "channels_first":
        x = layers.Permute((3, 1, 2))(x)
    kernel, bias = convolution.get_weights()
    convolution.set_weights([np.abs(kernel) * scales, bias])
    return keras.Model(inputs, x)


def near_zero():
    """A unit that is zero but for the rounding of terms near one."""
    model = keras.Sequential([keras.Input((64,)), layers.Dense(2)])
    model.set_weights([np.tile([[1.0, 1.0], [-1.0, 1.0]], (32, 1)), np.zeros(2)])
    return model


def dead():
    """A unit that is zero whatever comes."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, activation="relu")])
    model.set_weights([np.zeros((4, 2)), np.array([1.0, -1.0])])
    return model


def without_mean():
    """Zeros that an operation without weights rounds."""
    x = keras.Input((4, 4, 2))
    ones = layers.GlobalAveragePooling2D(keepdims=True)(x) + layers.Rescaling(0.0)(x)
    zeros = ones - keras.ops.mean(ones, (1, 2), keepdims=True)
    return keras.Model(x, keras.ops.concatenate([x, zeros]))


#: Model, sample, where to change its output, by how much, and whether that is wrong.
CHANGES = {
    "right": (lambda: column_scales([1e6, 1.0]), np.ones((2, 4)), (..., 0), 0.0, False),
    "a small unit": (lambda: column_scales([1e6, 1.0]), np.ones((2, 4)), (..., 1), 1.0, True),
    "roundings of a small unit": (
        lambda: column_scales([1e6, 1.0]), np.ones((2, 4)), (..., 1), 1e-6, False,
    ),
    "a small channel, last": (
        lambda: channel_scales([1e6, 1.0], "channels_last"), None, (0, 1, 1, 1), 0.5, True,
    ),
    "a small channel, first": (
        lambda: channel_scales([1e6, 1.0], "channels_first"), None, (0, 1, 1, 1), 0.5, True,
    ),
    "roundings near zero": (near_zero, np.ones((2, 64)), (..., 0), 2e-6, False),
    "a wrong number near zero": (near_zero, np.ones((2, 64)), (..., 0), 1e-2, True),
    "a dead unit that is not quite": (dead, np.ones((2, 4)), (..., 1), 3e-8, False),
    "a dead unit that lives": (dead, np.ones((2, 4)), (..., 1), 1e-3, True),
    "not a number": (dead, np.ones((2, 4)), (0, 1), np.nan, True),
    "zeros without weights": (without_mean, None, (0, 0, 0, 0), 1e-7, False),
}  # fmt: skip


@pytest.mark.backends("tensorflow", "torch")
@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_number_is_found_and_roundings_are_not(name):
    build, sample, where, change, wrong = CHANGES[name]
    sample = None if sample is None else sample.astype("float32")
    model = build()
    reference = Reference.of(model, sample, True, DEFAULT_RULES)
    outputs = []
    for expected in reference.outputs:
        (expected,) = expected
        values = expected.leaf.value.copy()
        values[where] += change
        outputs.append([("output_0", values)])
    relative = reference.difference(outputs).relative
    assert (not relative <= reference.tolerance) == wrong, relative


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.backends("tensorflow")
def test_scales_are_of_the_precision(dtype):
    """Two orders of a sum pass in every precision; a part left out does not."""
    model = keras.Sequential([keras.Input((64,)), layers.Dense(5, dtype=dtype)])
    reference = Reference.of(model, None, True, DEFAULT_RULES)
    assert reference.dtype == dtype
    kernel = keras.ops.convert_to_numpy(model.weights[0]).astype("float64")

    def outputs(kernel):
        return [
            [("output_0", (inputs.structure.astype("float64") @ kernel))]
            for inputs in reference.inputs
        ]

    assert reference.difference(outputs(kernel)).relative <= reference.tolerance
    kernel[::4] = 0.0
    assert reference.difference(outputs(kernel)).relative > reference.tolerance


def test_a_run_with_other_weights_leaves_the_model_alone():
    model = keras.Sequential([keras.Input((6, 6, 3)), layers.DepthwiseConv2D(3)])
    before = model.get_weights()
    run, x = KerasRun(model), np.ones((1, 6, 6, 3), "float32")
    weights = perturbed(run.weights, 1e-3, np.random.default_rng(0))
    (exact,), (again,), (moved,) = run(x), run(x), run(x, weights)
    np.testing.assert_array_equal(exact.value, again.value)
    assert 0 < np.abs(moved.value - exact.value).max() < 0.1
    assert all(map(np.array_equal, before, model.get_weights()))


# Depthwise convolutions in files.


def graph_with(kernel_shape, groups, how):
    """An ONNX model with one `Conv`, whose kernel comes from somewhere."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    channels = kernel_shape[1] * groups
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", channels, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    kernel = numpy_helper.from_array(np.ones(kernel_shape, "float32"), "kernel")
    attributes = {} if groups == 1 else {"group": groups}
    conv = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    opsets, functions, inputs, constants, nodes = [helper.make_opsetid("", 17)], [], [x], [], [conv]
    if how == "initializer":
        constants = [numpy_helper.from_array(np.ones(kernel_shape, "float32"), "w")]
    elif how == "constant":
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=kernel))
    elif how == "computed":
        constants = [numpy_helper.from_array(np.ones(kernel_shape[::-1], "float32"), "k")]
        nodes.insert(0, helper.make_node("Transpose", ["k"], ["w"], perm=[3, 2, 1, 0]))
    elif how == "unknown":
        inputs.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, list("abcd")))
    elif how == "in a function":
        opsets.append(helper.make_opsetid("own", 1))
        functions = [helper.make_function("own", "Convolve", ["x", "w"], ["y"], nodes, opsets[:1])]
        constants = [numpy_helper.from_array(np.ones(kernel_shape, "float32"), "w")]
        nodes = [helper.make_node("Convolve", ["x", "w"], ["y"], domain="own")]
    else:
        constants = [
            numpy_helper.from_array(np.ones(kernel_shape, "float32"), "w"),
            numpy_helper.from_array(np.array(True), "condition"),
        ]
        branch = helper.make_graph(nodes, "then", [], [y])
        other = helper.make_node("Identity", ["x"], ["z"])
        z = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
        otherwise = helper.make_graph([other], "else", [], [z])
        nodes = [
            helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=otherwise)
        ]
    graph = helper.make_graph(nodes, "graph", inputs, [y], constants)
    return onnx, helper.make_model(graph, opset_imports=opsets, functions=functions)


HOWS = ["initializer", "constant", "computed", "unknown", "in a function", "in a branch"]
KERNELS = {
    "ordinary": ((4, 3, 3, 3), 1, 0),
    "ordinary, of one channel": ((4, 1, 3, 3), 1, 0),
    "grouped": ((6, 3, 3, 3), 2, 0),
    "depthwise": ((3, 1, 3, 3), 3, 1),
    "depthwise, multiplier": ((6, 1, 3, 3), 3, 1),
}


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_onnx_counts_convolutions_of_as_many_groups_as_channels(kernel, how, tmp_path):
    shape, groups, count = KERNELS[kernel]
    onnx, model = graph_with(shape, groups, how)
    onnx.save(model, str(tmp_path / "model.onnx"))
    assert Onnx().count_depthwise(str(tmp_path / "model.onnx")) == count


@pytest.mark.backends("tensorflow", "torch")
@formats
def test_convolutions_of_one_channel_are_not_confused(format, tmp_path):
    """An ordinary one is not depthwise. A depthwise one is, where the format tells them apart."""
    x = inputs = keras.Input((8, 8, 1))
    x = layers.DepthwiseConv2D(3, depth_multiplier=2)(layers.Conv2D(1, 1)(x))
    x = layers.DepthwiseConv2D(3)(x)
    report = export(keras.Model(inputs, x), tmp_path / f"model{SUFFIXES[format]}", format)
    count = 1 if format == "onnx" else 2
    assert report.depthwise_calls == count
    assert report.depthwise_found in (None, count)


class MyDepthwise(layers.DepthwiseConv2D):
    def call(self, x):
        return 2.0 * super().call(x)


class MyFast(MyDepthwise, DiagonalwiseDepthwiseConv2D):
    pass


@pytest.mark.backends("tensorflow", "torch")
@needs_a_format
def test_rules_reach_the_checks(tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 4)), MyFast(3, lowering="diagonal:2")])
    path = tmp_path / f"model{SUFFIXES[ANY_FORMAT]}"
    report = export(model, path, ANY_FORMAT, rules=(*DEFAULT_RULES, Rule(MyDepthwise, MyFast)))
    assert report.depthwise_calls == 1
    assert report.depthwise_found in (None, 1)
    assert type(model.layers[0]) is MyFast


# What goes on around an export.


class ActsAsInTraining(layers.Layer):
    """Like Keras's random layers, but surely."""

    def call(self, x, training=True):
        return 2.0 * x if training else x


@needs_a_format
def test_layers_that_act_as_in_training_are_exported_for_inference(tmp_path):
    x = keras.Input((4,))
    model = keras.Model(x, ActsAsInTraining(name="augmentation")(x))
    report = export(model, tmp_path / f"model{SUFFIXES[ANY_FORMAT]}", ANY_FORMAT)
    assert report.max_difference == 0
    assert not model._inbound_nodes


class CallsInTraining(keras.Model):
    """No graph: nobody can call its layers in another way."""

    def __init__(self):
        super().__init__()
        self.augmentation = ActsAsInTraining(name="augmentation")

    def call(self, x):
        return self.augmentation(x)


@needs_a_format
def test_layers_that_act_as_in_training_are_named(tmp_path):
    model = CallsInTraining()
    sample = np.ones((2, 4), "float32")
    model(sample)
    path = tmp_path / f"model{SUFFIXES[ANY_FORMAT]}"
    with pytest.raises(ExportError, match=r"differ from Keras.*training=False.*augmentation") as e:
        export(model, path, ANY_FORMAT, sample=sample)
    assert "\n" not in str(e.value)


@needs_a_format
def test_exports_of_several_threads_run_one_at_a_time(tmp_path, monkeypatch):
    """And leave the switches of the process as they were."""
    file_format = type(exporter._find_format(ANY_FORMAT))
    write = file_format.write
    writing, most, second = [], [], threading.Thread()

    def recorded(self, model, path, options):
        nonlocal second
        writing.append(path)
        most.append(len(writing))
        if path.startswith(str(tmp_path)) and "first" in os.path.basename(path):
            second = threading.Thread(target=run, args=("second",))
            second.start()
            second.join(0.2)  # It cannot end before this export does.
            assert second.is_alive()
        write(self, model, path, options)
        writing.remove(path)

    def run(name):
        model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
        export(model, tmp_path / f"{name}{SUFFIXES[ANY_FORMAT]}", ANY_FORMAT)

    monkeypatch.setattr(file_format, "write", recorded)
    run("first")
    second.join()
    assert most == [1, 1]
    assert works(ANY_FORMAT)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        assert not tf.config.functions_run_eagerly()
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}{SUFFIXES[ANY_FORMAT]}" for name in ("first", "second")
    }


@needs_a_format
def test_an_export_inside_swapped_layers_waits_for_no_other(tmp_path):
    def run(name):
        model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
        export(model, tmp_path / f"{name}{SUFFIXES[ANY_FORMAT]}", ANY_FORMAT)

    def inside():
        with native_convolutions(model):
            second.start()
            second.join(0.2)  # It has begun, and waits.
            run("first")

    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    first = threading.Thread(target=inside, daemon=True)
    second = threading.Thread(target=run, args=("second",), daemon=True)
    first.start()
    first.join(120)
    second.join(120)
    assert not first.is_alive()
    assert not second.is_alive()


def test_the_trace_serves_every_batch_size():
    """On TensorFlow as on export, however many runs the statistics need."""
    traces = []

    class Counted(layers.Layer):
        def call(self, x):
            traces.append(x.shape)
            return 2.0 * x

    model = keras.Sequential([keras.Input((4,)), Counted()])
    traces.clear()
    reference = Reference.of(model, None, True, DEFAULT_RULES)
    assert [inputs.batch_size for inputs in reference.inputs] == [1, 3]
    assert len(traces) <= {"tensorflow": 1, "jax": 2, "torch": 6}[BACKEND]
