"""Contests: training steps as `fit` runs them, and variants that take nothing from each other."""

import dataclasses
import itertools

import keras
import numpy as np
import pytest

from diagconv_tf import Conditions
from diagconv_tf.lowerings import Diagonal, Shifted
from diagconv_tf.measurements import Measured
from diagconv_tf.spec import STOCK
from diagconv_tf.timing import synchronize
from diagconv_tf.tuning import contest
from diagconv_tf.tuning.contest import Contest, TrainingSteps
from tests import model_zoo
from tests.fake_clock import FakeClock
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


# Steps.


def test_steps_are_those_of_train_on_batch():
    model, other = network(), network()
    model.make_train_function()
    steps = TrainingSteps(model, *batch())
    # Keras's metrics are means over the steps; `train_on_batch` resets them.
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


def test_steps_begin_again_where_they_began():
    model = network()
    model.make_train_function()
    steps = TrainingSteps(model, *batch())
    steps.rewind()
    runs = []
    for _ in range(2):
        runs.append([float(steps.run()[0]["loss"]) for _ in range(3)])
        steps.rewind()
    assert runs[0] == runs[1]
    assert runs[0][2] < runs[0][0]


def test_samples_on_a_device_of_its_own_are_of_several_steps(monkeypatch):
    counts = []
    here = Conditions.current()
    on_gpu = dataclasses.replace(here, device_kind="gpu")
    monkeypatch.setattr(Conditions, "current", lambda *args: on_gpu)
    monkeypatch.setattr(contest, "ROUNDS", 3)
    running = Contest(network(), 4, batch())
    run = running._steps.run
    running._steps.run = lambda: counts.append(1) or run()
    for name in (STOCK, "other"):
        assert running.add(name, {}).error is None
    assert counts == [1, 1]
    assert running.time()["other"].count == 3
    assert len(counts) == 2 + 2 * 3 * contest.STEPS_ON_DEVICE


# Variants.


@pytest.mark.parametrize(
    "jit_compile", {"tensorflow": [False, True], "jax": [True], "torch": [False]}[BACKEND]
)
def test_each_variant_of_the_model_runs_its_own_layers(monkeypatch, jit_compile):
    calls = []
    for cls in (Shifted, Diagonal):
        forward = cls.forward

        def counting(self, *args, forward=forward):
            calls.append(self.name)
            return forward(self, *args)

        monkeypatch.setattr(cls, "forward", counting)
    model = model_zoo.own_training_step()
    model.compile("sgd", "mse", jit_compile=jit_compile)
    # Another batch size each: "shifted" has functions that are kept.
    running = Contest(model, 4 + jit_compile, None, jit_compile)
    monkeypatch.setattr(contest, "next_round", all_of_them)
    monkeypatch.setattr(contest, "ROUNDS", 4)
    assert running.add(STOCK, {}).first_seconds > 0
    assert calls == []
    for name in ("shifted", "dense"):
        assert running.add(name, {"dw1": name}).first_seconds > 0
        assert set(calls) == {name}
        calls.clear()
    steps = running.time()
    assert all(isinstance(step, Measured) and step.ok for step in steps.values())
    assert {name: step.first_seconds > 0 for name, step in steps.items()} == {
        STOCK: True,
        "shifted": True,
        "dense": True,
    }
    assert {len(step.samples) for step in steps.values()} == {4}
    # Eager PyTorch reads the layers at each call, and must find the variant's.
    assert set(calls) == ({"shifted", "dense"} if BACKEND == "torch" else set())


def all_of_them(steps, seconds):
    """In place of `next_round`: a contest that nothing but `ROUNDS` ends."""
    return list(steps)


class DiedError(Exception):
    """A failure at run time, when the step already has the state."""


def dying(monkeypatch, after):
    """Lets the step of `"dense"` fail at run time, from its `after`-th call."""
    calls = []

    def fail(value):
        calls.append(1)
        if len(calls) >= after:
            raise DiedError("out of luck")
        return np.asarray(value)

    forward = Diagonal.forward

    def dies(self, spec, inputs, kernel):
        outputs = forward(self, spec, inputs, kernel)
        if BACKEND == "jax":
            import jax

            shape = jax.ShapeDtypeStruct(outputs.shape, outputs.dtype)
            fine = jax.pure_callback(fail, shape, jax.lax.stop_gradient(outputs))
            return outputs + 0 * jax.lax.stop_gradient(fine)
        if BACKEND == "tensorflow":
            import tensorflow as tf

            fine = tf.numpy_function(fail, [tf.stop_gradient(outputs)], outputs.dtype)
            return outputs + 0 * tf.stop_gradient(tf.ensure_shape(fine, outputs.shape))
        fail(outputs.detach())
        return outputs

    monkeypatch.setattr(Diagonal, "forward", dies)


@pytest.mark.parametrize("after", [1, 4], ids=["in its first step", "in a round"])
def test_a_variant_that_dies_takes_no_other_with_it(monkeypatch, after):
    dying(monkeypatch, after)
    monkeypatch.setattr(contest, "next_round", all_of_them)
    monkeypatch.setattr(contest, "ROUNDS", 5)
    running = Contest(network(), 4 + after, None, "auto")
    assert running.add(STOCK, {}).error is None
    added = running.add("dense", {"dw": "dense"})
    assert (added.error is None) == (after > 1), added
    assert running.add("shifted", {"dw": "shifted"}).error is None
    steps = running.time()
    assert steps["dense"].error
    for name in (STOCK, "shifted"):
        assert steps[name].ok, steps[name]
        assert len(steps[name].samples) == 5


# Rounds, by looked-up times.


def run_rounds(seconds, limit=8.0):
    """A contest of functions that take so long; a list is repeated."""
    clock = FakeClock()

    def function(times):
        repeated = itertools.cycle(times if isinstance(times, list) else [times])
        return lambda: clock.advance(next(repeated))

    first = {
        name: Measured.failed("no luck") if times is None else Measured(first_seconds=9.0)
        for name, times in seconds.items()
    }
    functions = {name: times and function(times) for name, times in seconds.items()}
    return contest.time_rounds(functions, first, seconds=limit, calls=1, clock=clock)


#: One round in four takes one of them a fifth longer.
UNSTEADY = [1.0, 1.0, 1.0, 1.2]

#: Times of steps → rounds of each.
ROUNDS = {
    "far faster": ({STOCK: 3.0, "shifted": 1.0}, {STOCK: 3, "shifted": 3}),
    "faster": ({STOCK: 3.0, "shifted": 2.0}, {STOCK: 5, "shifted": 5}),
    "slower": ({STOCK: 3.0, "shifted": 4.0}, {STOCK: 5, "shifted": 5}),
    "far slower": ({STOCK: 3.0, "shifted": 9.0}, {STOCK: 1, "shifted": 1}),
    "equal": ({STOCK: 3.0, "shifted": 3.0}, {STOCK: 5, "shifted": 5}),
    "unsteady": ({STOCK: UNSTEADY, "shifted": 1.1}, {STOCK: 7, "shifted": 7}),
    "unsteady and short": ({STOCK: [0.01, 0.02], "shifted": 0.014}, {STOCK: 31, "shifted": 31}),
    "stock is never dropped": ({STOCK: 9.0, "a": 1.0, "b": 1.0}, {STOCK: 5, "a": 5, "b": 5}),
    "others are": ({STOCK: 9.0, "a": 1.0, "b": 2.5}, {STOCK: 3, "a": 3, "b": 1}),
    "short ones later": ({STOCK: 0.6, "a": [0.06, 0.07], "b": 0.15}, {STOCK: 5, "a": 5, "b": 4}),
    "stock fails": ({STOCK: None, "a": 1.0, "b": 1.5}, {STOCK: 0, "a": 5, "b": 5}),
    "all others fail": ({STOCK: 1.0, "a": None}, {STOCK: 1, "a": 0}),
}


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("name", ROUNDS)
def test_a_contest_runs_as_many_rounds_as_its_decision_needs(name):
    seconds, rounds = ROUNDS[name]
    steps = run_rounds(seconds)
    assert {name: len(step.samples) for name, step in steps.items()} == rounds
    assert all(step.count == len(step.samples) for step in steps.values())
    assert {name: step.first_seconds for name, step in steps.items() if step.ok} == {
        name: 9.0 for name, times in seconds.items() if times
    }
