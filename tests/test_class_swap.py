"""Layers change class completely or not at all, and whatever other threads do meanwhile."""

import contextlib
import functools
import inspect
import sys
import threading

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from diagconv_tf import (
    DEFAULT_RULES,
    DiagonalwiseConv2D,
    DiagonalwiseDepthwiseConv2D,
    DiagonalwiseSeparableConv2D,
    Rule,
    class_swap,
    load_weights,
    restore,
    rewrite,
    save_weights,
)
from diagconv_tf.class_swap import LayerState, instance_attribute
from diagconv_tf.copying import copy_model
from diagconv_tf.exporting.native import counted_depthwise_calls, native_convolutions
from diagconv_tf.inspection import inspect_as_built, inspect_model
from diagconv_tf.layers import LoweredLayer
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.rules import find_family
from tests import model_zoo

# What is tested here knows no backend.
pytestmark = pytest.mark.backends("tensorflow")

#: A thread that does not come this far is one that hangs.
SECONDS = 30


def facts(model):
    """What each layer is, and what it holds of what this package may set."""
    ours = {"_lowering", "call"}
    return [(LayerState.of(p.layer), ours & set(vars(p.layer))) for p in walk_layers(model)]


def functions(model):
    return [getattr(model, f"{kind}_function") for kind in class_swap.STEP_KINDS]


def outputs(model, inputs):
    return np.array(model(inputs))


# All or nothing ----------------------------------------------------------


class Failing(keras.Model):
    """Fails when Keras makes one of its functions, if it shall."""

    fails_at = None

    def make_train_function(self, force=False):
        self._make("train", force)

    def make_test_function(self, force=False):
        self._make("test", force)

    def make_predict_function(self, force=False):
        self._make("predict", force)

    def _make(self, kind, force):
        if self.fails_at == kind:
            raise RuntimeError("no function today")
        getattr(super(), f"make_{kind}_function")(force=force)


def failing_model():
    inputs = keras.Input((8, 8, 4))
    x = layers.DepthwiseConv2D(3, name="dw1")(inputs)
    x = layers.SeparableConv2D(4, 3, name="separable")(x)
    x = layers.Conv2D(4, 3, groups=4, name="grouped")(x)
    model = Failing(inputs, layers.Flatten()(x))
    model.compile("sgd", "mse")
    for kind in class_swap.STEP_KINDS:
        getattr(model, f"make_{kind}_function")()
    return model


@contextlib.contextmanager
def interrupted_at(monkeypatch, number, before):
    """Ctrl-C arrives once, before or after the layer of that number has changed."""
    set_state, calls = LayerState.set, []

    def set_or_stop(state):
        calls.append(state)
        if before and len(calls) == number:
            raise KeyboardInterrupt
        set_state(state)
        if len(calls) == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LayerState, "set", set_or_stop)
        yield


CHANGES = {
    "stock → ours": (None, lambda model: rewrite(model, "shifted", in_place=True)),
    "ours → ours": ("dense", lambda model: rewrite(model, "shifted", in_place=True)),
    "ours → stock": ("dense", lambda model: restore(model, in_place=True)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_interrupted_in_place_changes_nothing(monkeypatch, change):
    lowering, run = CHANGES[change]
    model = failing_model()
    if lowering:
        rewrite(model, lowering, in_place=True)
    before = facts(model), functions(model), set(vars(model))
    for number in (1, 2, 3):
        for early in (True, False):
            with interrupted_at(monkeypatch, number, early), pytest.raises(KeyboardInterrupt):
                run(model)
            assert (facts(model), functions(model), set(vars(model))) == before
    for kind in class_swap.STEP_KINDS:
        model.fails_at = kind
        with pytest.raises(RuntimeError, match="today"):
            run(model)
        model.fails_at = None
        assert (facts(model), functions(model)) == before[:2]
    run(model)
    assert facts(model) != before[0]
    assert not set(map(id, functions(model))) & set(map(id, before[1]))


def test_what_is_interrupted_in_a_copy_leaves_the_model(monkeypatch):
    model = model_zoo.composite()
    before = facts(model)
    with interrupted_at(monkeypatch, 2, True), pytest.raises(KeyboardInterrupt):
        rewrite(model, "shifted")
    assert facts(model) == before


@pytest.mark.parametrize("number", range(1, 19, 2))
def test_ctrl_c_at_any_moment_of_a_temporary_change_restores_all(monkeypatch, number):
    """On entering or leaving, whichever layer is being changed."""
    model = rewrite(model_zoo.composite(), "shifted", in_place=True)
    before = facts(model)
    with (
        contextlib.suppress(KeyboardInterrupt),
        interrupted_at(monkeypatch, number, False),
        native_convolutions(model),
    ):
        pass
    assert facts(model) == before


# Threads -----------------------------------------------------------------


class WatchedLock:
    """A re-entrant lock that says when a thread has to wait for it."""

    def __init__(self):
        self.inner, self.awaited = threading.RLock(), threading.Event()

    def __enter__(self):
        if not self.inner.acquire(blocking=False):
            self.awaited.set()
            assert self.inner.acquire(timeout=SECONDS)

    def __exit__(self, *error):
        self.inner.release()


class Thread(threading.Thread):
    """A thread whose result, or error, is that of `join`."""

    def __init__(self, run):
        super().__init__(daemon=True)
        self._run, self.result, self.error = run, None, None
        self.start()

    def run(self):
        try:
            self.result = self._run()
        except BaseException as error:
            self.error = error

    def get(self):
        self.join(SECONDS)
        assert not self.is_alive()
        if self.error:
            raise self.error
        return self.result


def save(model, folder, meanwhile):
    def slow_save(path):
        meanwhile()
        keras.Model.save_weights(model, path)

    with instance_attribute_of_test(model, "save_weights", slow_save):
        save_weights(model, folder / f"{threading.get_ident()}.weights.h5", overwrite=True)


def load(model, folder, meanwhile):
    def slow_load(path, skip_mismatch):
        meanwhile()
        keras.Model.load_weights(model, path, skip_mismatch=skip_mismatch)

    with instance_attribute_of_test(model, "load_weights", slow_load):
        load_weights(model, folder / "stock.weights.h5")


def run_natively(model, folder, meanwhile):
    with native_convolutions(model):
        meanwhile()


def count(model, folder, meanwhile):
    with counted_depthwise_calls(model):
        meanwhile()


@contextlib.contextmanager
def instance_attribute_of_test(model, name, value):
    """Without the lock, and gone only when the thread that set it is done."""
    vars(model).setdefault(name, value)
    try:
        yield
    finally:
        if vars(model).get(name) is value:
            del vars(model)[name]


OPERATIONS = {"save": save, "load": load, "native": run_natively, "count": count}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def model(folder):
    """One for all, since the law is that it comes back as it was."""
    model = model_zoo.composite()
    model.save_weights(folder / "stock.weights.h5")
    return rewrite(model, "shifted", in_place=True)


@pytest.mark.parametrize("second", OPERATIONS)
@pytest.mark.parametrize("first", OPERATIONS)
def test_overlapping_operations_leave_the_model_as_it_was(
    monkeypatch, folder, model, first, second
):
    """The second begins while the first is in its middle; in between, others infer."""
    lock = WatchedLock()
    monkeypatch.setattr(class_swap, "lock", lock)
    inputs = model_zoo.random_inputs(model)
    before, wanted = facts(model), outputs(model, inputs)
    others = []

    def meanwhile():
        if not others:
            others.append(Thread(lambda: OPERATIONS[second](model, folder, lambda: None)))
            assert lock.awaited.wait(SECONDS)
            inferred = Thread(lambda: outputs(model, inputs)).get()
            np.testing.assert_allclose(inferred, wanted, rtol=1e-5, atol=1e-5)

    OPERATIONS[first](model, folder, meanwhile)
    others[0].get()
    assert facts(model) == before
    assert np.array_equal(outputs(model, inputs), wanted)


READERS = {
    "copy": lambda model: [type(place.layer) for place in walk_layers(copy_model(model))],
    "inspect": lambda model: [row.lowering for row in inspect_model(model).rows],
    "inspect as built": lambda model: [row.lowering for row in inspect_as_built(model).rows],
}


@pytest.mark.parametrize("reader", READERS)
def test_who_decides_by_class_waits_for_the_class_of_the_model(monkeypatch, model, reader):
    lock = WatchedLock()
    monkeypatch.setattr(class_swap, "lock", lock)
    read = READERS[reader]
    wanted = read(model)
    with native_convolutions(model):
        thread = Thread(lambda: read(model))
        assert lock.awaited.wait(SECONDS)
    assert thread.get() == wanted


@pytest.mark.parametrize("inner", OPERATIONS)
@pytest.mark.parametrize("outer", OPERATIONS)
def test_operations_nest(folder, model, outer, inner):
    before = facts(model)
    called = []

    def meanwhile():
        called.append(OPERATIONS[inner])
        if len(called) == 1:
            OPERATIONS[inner](model, folder, lambda: None)

    OPERATIONS[outer](model, folder, meanwhile)
    assert called
    assert facts(model) == before


@pytest.mark.parametrize("operation", ["save", "load"])
def test_saving_and_loading_do_not_change_what_a_call_runs(monkeypatch, folder, model, operation):
    """A call that begins before, inside or ends after runs our own code, to the last bit."""
    inputs = model_zoo.random_inputs(model)
    wanted = outputs(model, inputs)
    arrived, go = threading.Event(), threading.Event()

    def slow_activation(x):
        if threading.current_thread() in callers:
            arrived.set()
            assert go.wait(SECONDS)
        return x

    callers = []
    first = next(p.layer for p in walk_layers(model) if p.path == "block1/depthwise")
    monkeypatch.setitem(vars(first), "activation", slow_activation)

    def call_in_the_middle():
        callers.append(threading.current_thread())
        return outputs(model, inputs)

    before_it = Thread(call_in_the_middle)
    assert arrived.wait(SECONDS)
    inside = []

    def meanwhile():
        assert isinstance(first, DiagonalwiseDepthwiseConv2D)
        assert type(first).__name__ == "DepthwiseConv2D"
        arrived.clear()
        inside.append(Thread(call_in_the_middle))
        assert arrived.wait(SECONDS)
        go.set()
        assert np.array_equal(before_it.get(), wanted)
        go.clear()

    OPERATIONS[operation](model, folder, meanwhile)
    go.set()
    assert np.array_equal(inside[0].get(), wanted)


def called_with(layer, inputs, change, line):
    """The outputs of `layer.call`, with `change` made before that line of our layers' code.

    As another thread would make it, but at a known moment. Also returned is the
    number of lines.
    """
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != inspect.getsourcefile(LoweredLayer):
            return None
        if event == "line":
            count += 1
            if count == line:
                sys.settrace(None)
                change()
                sys.settrace(trace)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return np.array(layer.call(inputs)), count
    finally:
        sys.settrace(before)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["native for a while", "stock for good"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.DepthwiseConv2D(3),
        lambda: layers.SeparableConv2D(4, 3),
        lambda: layers.Conv2D(4, 3, groups=4),
    ],
    ids=["depthwise", "separable", "grouped"],
)
def test_a_call_is_right_whenever_its_class_changes(make, change):
    inputs = keras.Input((8, 8, 4))
    model = rewrite(keras.Model(inputs, make()(inputs)), "native", in_place=True)
    layer = model.layers[1]
    ours, family = LayerState.of(layer), find_family(type(layer))
    x = keras.ops.convert_to_tensor(model_zoo.random_inputs(model))
    wanted, lines = called_with(layer, x, None, None)
    for line in range(1, lines + 1):
        with contextlib.ExitStack() as stack:
            if change == "native for a while":
                swap = functools.partial(stack.enter_context, native_convolutions(model))
            else:
                swap = ours.with_lowering(family, "stock").set
            found, _ = called_with(layer, x, swap, line)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        ours.set()


def test_counts_are_those_of_the_own_thread(model):
    inputs = model_zoo.random_inputs(model)
    with counted_depthwise_calls(model) as calls:
        model(inputs)
        Thread(lambda: model(inputs)).get()
    assert sorted(calls) == sorted(
        f"block{n}/{k}" for n in (1, 2) for k in ("depthwise", "separable")
    )


def test_an_instance_attribute_is_restored_or_gone():
    class Owner:
        value = 1

    owner = Owner()
    with instance_attribute(owner, "value", 2), instance_attribute(owner, "value", 3):
        assert owner.value == 3
    assert owner.value == 1
    assert vars(owner) == {}
    owner.value = 4
    with pytest.raises(KeyError), instance_attribute(owner, "value", 2):
        raise KeyError
    assert owner.value == 4


# Classes of one's own ----------------------------------------------------


class MyFast(model_zoo.OwnDepthwise, DiagonalwiseDepthwiseConv2D):
    pass


class MyConv(layers.Conv2D):
    pass


class MyFastConv(MyConv, DiagonalwiseConv2D):
    pass


class WithoutRule(DiagonalwiseSeparableConv2D):
    pass


class OwnCall(DiagonalwiseDepthwiseConv2D):
    def call(self, inputs):
        return 3 * super().call(inputs)


class Scaled(model_zoo.OwnDepthwise):
    """A replacement that has nothing of ours."""


MY_RULES = (
    *DEFAULT_RULES,
    Rule(model_zoo.OwnDepthwise, MyFast),
    Rule(MyConv, MyFastConv),
)

#: name: (make the layer, the same layer without this package, rules, and under
#: `native_convolutions` its class and how many convolutions it is known to run)
CLASSES = {
    "rule": (
        lambda: MyFast(3),
        lambda: model_zoo.OwnDepthwise(3),
        MY_RULES,
        (model_zoo.OwnDepthwise, 1),
    ),
    "rule not given": (
        lambda: MyFast(3),
        lambda: model_zoo.OwnDepthwise(3),
        DEFAULT_RULES,
        (MyFast, 1),
    ),
    # TensorFlow's depthwise op, which stock Keras does not run.
    "convolution, rule": (
        lambda: MyFastConv(4, 3, groups=4),
        lambda: MyConv(4, 3, groups=4),
        MY_RULES,
        (MyFastConv, 1),
    ),
    "several channels a group": (
        lambda: MyFastConv(4, 3, groups=2),
        lambda: MyConv(4, 3, groups=2),
        MY_RULES,
        (MyConv, 0),
    ),
    "no rule": (
        lambda: WithoutRule(4, 3),
        lambda: layers.SeparableConv2D(4, 3),
        DEFAULT_RULES,
        (WithoutRule, 1),
    ),
    # What it runs is its own affair.
    "a call of its own": (
        lambda: OwnCall(3),
        lambda: layers.DepthwiseConv2D(3),
        DEFAULT_RULES,
        (OwnCall, 0),
    ),
    "nothing of ours": (
        lambda: Scaled(3),
        lambda: model_zoo.OwnDepthwise(3),
        (*DEFAULT_RULES, Rule(model_zoo.OwnDepthwise, Scaled)),
        (model_zoo.OwnDepthwise, 1),
    ),
}


def model_of(make_layer):
    inputs = keras.Input((8, 8, 4))
    x = layers.DepthwiseConv2D(1)(inputs)
    return keras.Model(inputs, layers.Flatten()(make_layer()(x)))


def groups(path):
    with h5py.File(path) as file:
        names = []
        file.visit(names.append)
        return names


@pytest.mark.parametrize("name", CLASSES)
def test_weight_files_of_own_classes_are_those_of_the_stock_model(tmp_path, name):
    make, make_stock, rules, _ = CLASSES[name]
    model, stock = model_of(make), model_of(make_stock)
    save_weights(model, tmp_path / "ours.weights.h5", rules=rules)
    stock.save_weights(tmp_path / "stock.weights.h5")
    assert groups(tmp_path / "ours.weights.h5") == groups(tmp_path / "stock.weights.h5")
    values = stock.get_weights()
    stock.load_weights(tmp_path / "ours.weights.h5")
    assert all(map(np.array_equal, stock.get_weights(), model.get_weights()))
    load_weights(model, tmp_path / "stock.weights.h5", rules=rules)
    assert all(map(np.array_equal, model.get_weights(), values))


@pytest.mark.parametrize("name", CLASSES)
def test_own_classes_run_natively_with_their_own_code(name):
    make, _, rules, (inside, known) = CLASSES[name]
    model = model_of(make)
    inputs = model_zoo.random_inputs(model)
    before, wanted = facts(model), outputs(model, inputs)
    with native_convolutions(model, rules), counted_depthwise_calls(model, rules) as calls:
        layer = model.layers[2]
        assert type(layer) is inside
        assert getattr(layer, "lowering", "native") == "native"
        np.testing.assert_allclose(outputs(model, inputs), wanted, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1 + known
    assert facts(model) == before
