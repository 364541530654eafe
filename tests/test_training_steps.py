"""Steps without what `train_on_batch` does around them compute the same."""

import dataclasses

import keras
import numpy as np
import pytest

from diagconv_tf import Conditions, ConvSpec
from diagconv_tf.timing import synchronize
from diagconv_tf.training_steps import TrainingSteps
from diagconv_tf.tuning import measuring, training_bench
from diagconv_tf.tuning.measuring import ProblemBench
from diagconv_tf.tuning.problems import Problem
from diagconv_tf.tuning.training_bench import TrainingBench
from tests.numerics import BACKEND


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.DepthwiseConv2D(3, name="dw")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    model.compile(keras.optimizers.Adam(0.1), "mse", metrics=["mae"])
    return model


def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, 6, 6, 3)).astype("float32"), rng.normal(size=(4, 2))


def test_steps_are_those_of_train_on_batch():
    model, other = network(), network()
    model.make_train_function()
    steps = TrainingSteps(model, *batch())
    # Keras's metrics are means over the steps; `train_on_batch` begins them anew.
    losses = [float(other.train_on_batch(*batch(), return_dict=True)["loss"]) for _ in range(3)]
    for number in range(1, 4):
        logs, state = steps.run()
        synchronize((logs, state))
        assert float(logs["loss"]) == pytest.approx(np.mean(losses[:number]), rel=1e-5)
    assert losses[2] < losses[0]
    trained = state[0] if BACKEND == "jax" else [v.value for v in model.trainable_variables]
    for value, variable in zip(trained, other.trainable_variables, strict=True):
        value, wanted = map(keras.ops.convert_to_numpy, (value, variable))
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-6)


def test_samples_on_a_device_of_its_own_are_of_several_steps(monkeypatch):
    counts = []
    here = Conditions.current()
    on_gpu = dataclasses.replace(here, device_kind="gpu")
    monkeypatch.setattr(Conditions, "current", lambda *args: on_gpu)
    bench = TrainingBench(network(), 4, batch())
    run = bench._steps.run
    bench._steps.run = lambda: counts.append(1) or run()
    assert bench.add("stock", {}).ok
    # The first step and a sample; four more of a short one, after a step of their own.
    steps = training_bench.STEPS_ON_DEVICE
    assert len(counts) == 1 + steps + 1 + 4 * steps


def test_samples_of_one_layer_on_a_device_of_its_own_are_of_several_calls():
    spec = ConvSpec(batch=2, height=4, width=4, groups=4, padding="same")
    on_gpu = dataclasses.replace(Conditions.current(False), device_kind="gpu")
    bench = ProblemBench(Problem(spec, "depthwise_conv"), on_gpu)
    make, counts = bench._function, []

    def counted(*args):
        function = make(*args)
        return lambda: counts.append(1) or function()

    bench._function = counted
    assert bench.measure("forward", ["native"], rounds=2)["native"].ok
    calls = measuring.CALLS_ON_DEVICE
    # As above; then, for the rounds, one call and two samples.
    assert len(counts) == (1 + calls) + (1 + 4 * calls) + (1 + 2 * calls)
