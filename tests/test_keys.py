"""Cache keys: whatever times depend on changes them, and nothing else does."""

import json

import keras
import numpy as np
import pytest
from keras import layers

from diagconv_tf import Conditions, ConvSpec, environment, inspect_model, rewrite
from diagconv_tf.measurements import Workload
from diagconv_tf.spec import STOCK
from diagconv_tf.tuning import keys
from diagconv_tf.tuning.cache import Cache
from tests import model_zoo
from tests.fake_lab import took
from tests.numerics import BACKEND


def network(optimizer="sgd", loss="mse", **arguments):
    model = model_zoo.skip_connections()
    model.compile(optimizer, loss, **arguments)
    return model


def key(model=None, batch_size=2, data=None, compiled=True, variants=None):
    model = model or network()
    inspection = inspect_model(model, batch_size)
    conditions = Conditions.current(compiled)
    return keys.of_contest(model, inspection, data, conditions, variants or {STOCK: {}})


def two_branches(order):
    """The same layers, connected in another order."""
    inputs = keras.Input((8, 8, 4))
    first, second = (layers.Conv2D(4, 3, padding="same") for _ in range(2))
    norm = layers.BatchNormalization()
    x = norm(second(first(inputs))) if order else second(norm(first(inputs)))
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(x))
    model.compile("sgd", "mse")
    return model


def own_operations(weight=2.0, repeats=2):
    """The same layers, with operations that are no layers."""
    inputs = keras.Input((8, 8, 4))
    x = keras.ops.repeat(layers.DepthwiseConv2D(3)(inputs) * weight, repeats, axis=1)
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(x))
    model.compile("sgd", "mse")
    return model


class OneStep(keras.Model):
    def train_step(self, *args):
        return super().train_step(*args)


class TwoSteps(keras.Model):
    def train_step(self, *args):
        super().train_step(*args)
        return super().train_step(*args)


def own_step(model_class):
    inputs = keras.Input((8, 8, 4))
    x = layers.DepthwiseConv2D(3)(inputs)
    model = model_class(inputs, layers.GlobalAveragePooling2D()(x))
    model.compile("sgd", "mse")
    return model


class Twice(layers.Layer):
    def call(self, inputs):
        return inputs * 2.0


class Exponential(layers.Layer):
    def call(self, inputs):
        return keras.ops.exp(inputs)


def own_layer(layer):
    model = keras.Sequential([keras.Input((8, 8, 4)), layers.DepthwiseConv2D(3), layer])
    model.compile("sgd", "mse")
    return model


def own_loss(times):
    if times == 1:

        def loss(y, p):
            return keras.ops.mean(y - p)

    else:

        def loss(y, p):
            return keras.ops.mean(keras.ops.exp(y - p))

    return network(loss=loss)


def frozen():
    model = network()
    model.get_layer("head").trainable = False
    return model


def longer():
    model = network()
    model = keras.Model(model.input, layers.Activation("relu")(model.output))
    model.compile("sgd", "mse")
    return model


SGD = keras.optimizers.SGD

#: What times depend on: two models, or two sets of arguments, that differ in it alone.
MODELS = {
    "optimizer": (network, lambda: network("adam")),
    "loss": (network, lambda: network(loss="mae")),
    "metrics": (network, lambda: network(metrics=["mae"])),
    "another layer": (network, longer),
    "trainable": (network, frozen),
    "gradient accumulation": (network, lambda: network(SGD(gradient_accumulation_steps=4))),
    "moving averages": (network, lambda: network(SGD(use_ema=True))),
    "clipping": (network, lambda: network(SGD(clipnorm=1.0))),
    "schedule": (network, lambda: network(SGD(keras.optimizers.schedules.CosineDecay(0.1, 9)))),
    "connections": (lambda: two_branches(True), lambda: two_branches(False)),
    "values in operations": (own_operations, lambda: own_operations(weight=0.0)),
    "settings of operations": (own_operations, lambda: own_operations(repeats=3)),
    "the model's own train_step": (lambda: own_step(OneStep), lambda: own_step(TwoSteps)),
    "the code of a layer": (lambda: own_layer(Twice()), lambda: own_layer(Exponential())),
    "the code of a loss": (lambda: own_loss(1), lambda: own_loss(2)),
}


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("name", MODELS)
def test_what_times_depend_on_is_in_the_key(name):
    first, second = MODELS[name]
    assert key(first()) == key(first())
    assert key(first()) != key(second())
    assert None not in (key(first()), key(second()))


def without_source():
    """A class whose source Python does not know, as one typed into a prompt."""
    names = {"layers": layers}
    exec("class Typed(layers.Layer):\n    def call(self, inputs):\n        return inputs", names)
    names["Typed"].__module__ = "__main__"
    return own_layer(names["Typed"]())


class WithoutConfig(layers.Layer):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, inputs):
        return self.function(inputs)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    "model",
    [without_source, lambda: own_layer(WithoutConfig(lambda x: x))],
    ids=["source", "config"],
)
def test_what_cannot_be_told_apart_has_no_key_and_is_not_kept(model, tmp_path):
    assert key(model()) is None
    Cache(tmp_path).write(None, {STOCK: took(1.0)})
    assert Cache(tmp_path).read(None) == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.backends("tensorflow")
def test_so_are_the_arguments():
    base = key()
    data = np.zeros((2, 8, 8, 4), "float32")
    for other in (
        key(batch_size=3),
        key(data=data),
        key(compiled=False),
        key(variants={STOCK: {}, "shifted": {"dw1": "shifted"}}),
    ):
        assert other != base
    assert key(data=data) == key(data=data + 1)


@pytest.mark.backends("tensorflow")
def test_names_that_keras_counts_up_and_rates_do_not_matter():
    first, second = key(), key()
    assert first == second
    assert json.loads(json.dumps(first)) == first
    assert key(network(SGD(0.1))) == key(network(SGD(0.2)))


@pytest.mark.backends("tensorflow")
def test_neither_paths_nor_lowerings_of_the_model_matter():
    """The contest sets the lowerings, and Keras counts up the names in paths."""

    def of(model):
        row = inspect_model(model, 2).rows[0]
        return row.path, key(model, variants={STOCK: {}, "shifted": {row.path: "shifted"}})

    (path, first), (other, second) = of(own_operations()), of(own_operations())
    assert path != other
    assert first == second
    assert of(rewrite(own_operations(), "shifted"))[1] == first


@pytest.mark.backends("tensorflow")
def test_a_workloads_key_has_all_candidates_that_are_measured_together():
    spec, here = ConvSpec(2, 8, 8, 4), Conditions.current(False)
    base = keys.of_workload(Workload(spec, "conv", ()), [STOCK, "shifted"], here)
    assert base != keys.of_workload(Workload(spec, "conv", ()), [STOCK, "shifted", "dense"], here)
    assert base != keys.of_workload(Workload(spec, "depthwise_conv", ()), [STOCK, "shifted"], here)
    assert json.loads(json.dumps(base)) == base


@pytest.mark.backends("tensorflow")
def test_all_code_of_the_package_is_in_the_key(monkeypatch, tmp_path):
    for name in ("layers.py", "tuning/contest.py", "timing.py", "lowerings/shifted.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    monkeypatch.setattr(keys, "__file__", str(tmp_path / "tuning" / "keys.py"))
    digest = keys._code_of_package.__wrapped__
    before = digest()
    for path in tmp_path.rglob("*.py"):
        path.write_text("after")
        assert digest() != before
        path.write_text("before")
    assert digest() == before


# Where it runs.


def tensorflow_threads(monkeypatch):
    import tensorflow as tf

    for name in ("intra_op", "inter_op"):
        function = f"get_{name}_parallelism_threads"
        yield name, lambda f=function: monkeypatch.setattr(tf.config.threading, f, lambda: 77)
    from diagconv_tf import keras_internals

    yield (
        "deterministic",
        lambda: monkeypatch.setattr(keras_internals, "is_tensorflow_deterministic", lambda: True),
    )


def torch_threads(monkeypatch):
    import torch

    yield "intra_op", lambda: monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    yield "inter_op", lambda: monkeypatch.setattr(torch, "get_num_interop_threads", lambda: 77)
    yield (
        "deterministic",
        lambda: monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True),
    )
    for name in ("enabled", "deterministic"):
        yield (
            f"cudnn.{name}",
            lambda n=name: monkeypatch.setattr(
                torch.backends.cudnn, n, not getattr(torch.backends.cudnn, n)
            ),
        )


def settings(monkeypatch, tmp_path):
    """`(name, function that changes it)` of what times depend on besides the model."""
    if BACKEND == "tensorflow":
        yield from tensorflow_threads(monkeypatch)
    if BACKEND == "torch":
        yield from torch_threads(monkeypatch)
    for variable in ("XLA_FLAGS", "OMP_NUM_THREADS", "TF_ENABLE_ONEDNN_OPTS"):
        yield variable, lambda v=variable: monkeypatch.setenv(v, "--other")
    yield "cpus", lambda: monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(77)))
    (tmp_path / "driver").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  555.42.02  x")
    yield (
        "driver",
        lambda: monkeypatch.setattr(environment, "_NVIDIA_DRIVER", tmp_path / "driver"),
    )


def test_what_the_process_has_set_is_a_condition(monkeypatch, tmp_path):
    workload = Workload(ConvSpec(2, 8, 8, 4), "conv", ())
    monkeypatch.setattr(environment.backends.current(), "default_device", lambda: ("gpu", "Abacus"))

    def now():
        return keys.of_workload(workload, [STOCK], Conditions.current(True))

    before = now()
    assert now() == before
    for name, change in settings(monkeypatch, tmp_path):
        change()
        after = now()
        assert after != before, name
        before = after
    assert dict(Conditions.current().settings)["driver"] == "555.42.02"


def test_packages_may_be_installed_under_other_names(monkeypatch):
    """tensorflow-cpu and tf-nightly have no metadata as `tensorflow`."""
    import importlib.metadata

    def none(name):
        raise importlib.metadata.PackageNotFoundError(name)

    before = Conditions.current()
    monkeypatch.setattr(importlib.metadata, "version", none)
    assert Conditions.current() == before
    assert all(version for _, version in before.versions)
