"""What "auto" chooses, says, and watches."""

import dataclasses
import json
import logging
import pathlib
import re

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st
from keras import layers

from diagconv_tf import (
    Conditions,
    ConvSpec,
    Plan,
    choose,
    class_swap,
    restore,
    rewrite,
    why_not,
)
from diagconv_tf.auto import parse_or_auto
from diagconv_tf.model_tree import walk_layers
from tests.numerics import BACKEND

RESULTS = pathlib.Path(__file__).parents[1] / "scripts" / "results"
SPEC = ConvSpec(16, 24, 24, 96, padding="same")

one_backend = pytest.mark.backends("tensorflow")


def conditions(backend, device_kind, compiled):
    return Conditions(backend, device_kind, "some device", compiled, ())


# The table ---------------------------------------------------------------


def documented_rows():
    """The rows of the table in the docstring, without its head."""
    lines = [line.strip() for line in choose.__doc__.splitlines() if line.strip().startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@one_backend
def test_the_docstring_is_the_table():
    rows = documented_rows()
    assert len(rows) == 11
    for backend, device, compiled, stock_op, stride, lowering, basis, evidence in rows:
        spec = SPEC if stride == "any" else SPEC.replace(strides=(2, 2))
        for op in ("depthwise_conv", "conv") if stock_op == "any" else (stock_op,):
            here = conditions(backend, device, {"yes": True, "no": False}[compiled])
            choice = choose(spec, here, op)
            assert (choice.reason, choice.basis) == (evidence, basis)
            assert str(choice) == f"{lowering} ({basis}: {evidence})"
            for file in re.findall(r"[\w.]+\.json", evidence):
                assert (RESULTS / file).exists()


#: What `choose` must say, by hand from the README's tables: (backend, compiled, op) → lowering
EXPECTED = {
    ("tensorflow", True, "depthwise_conv"): "shifted",
    ("tensorflow", True, "conv"): "shifted",
    ("tensorflow", False, "depthwise_conv"): "stock",
    ("tensorflow", False, "conv"): "native",
    ("jax", True, "depthwise_conv"): "shifted",
    ("jax", True, "conv"): "shifted",
    ("torch", False, "depthwise_conv"): "stock",
    ("torch", False, "conv"): "stock",
}


@one_backend
@pytest.mark.parametrize(("case", "lowering"), EXPECTED.items())
def test_measured_conditions_on_cpus(case, lowering):
    backend, compiled, op = case
    choice = choose(SPEC, conditions(backend, "cpu", compiled), op)
    assert (choice.lowering, choice.basis) == (lowering, "measured")
    assert str(choice).startswith(f"{lowering} (measured: ")


@one_backend
def test_on_gpus_strides_get_gradients_of_their_own():
    here = conditions("jax", "gpu", True)
    assert choose(SPEC, here).lowering == "stock"
    strided = choose(SPEC.replace(strides=(2, 2)), here)
    assert (strided.lowering, strided.basis) == ("native", "predicted")


@one_backend
def test_the_stock_op_defaults_to_that_of_the_workload():
    here = conditions("tensorflow", "cpu", False)
    assert choose(SPEC, here) == choose(SPEC, here, "depthwise_conv")
    grouped = SPEC.replace(input_channels_per_group=2, groups=48)
    assert choose(grouped, here) == choose(grouped, here, "conv")
    with pytest.raises(ValueError, match="`stock_op` to be one of .*'separable'"):
        choose(SPEC, here, "separable")


@one_backend
@pytest.mark.parametrize("path", sorted(RESULTS.glob("training_*_cpu.json")), ids=lambda p: p.stem)
def test_never_slower_than_stock_where_it_was_measured(path):
    """Against the measurements themselves, not against what the table says of them."""
    found = json.loads(path.read_text())
    environment, rows = found["environment"], found["rows"]
    xla = "xla" in path.stem or environment["backend"] == "jax"
    here = conditions(environment["backend"], environment["device_kind"], xla)
    for model in {row["model"] for row in rows}:
        ratios = {row["variant"]: row["over_stock"] for row in rows if row["model"] == model}
        del ratios["floor"]
        ratios.pop("default", None)  # Stock, under another compiler.
        op = "conv" if model.startswith("ConvNeXt") else "depthwise_conv"
        taps = (7, 7) if op == "conv" else (3, 3)
        choice = choose(SPEC.replace(kernel_size=taps), here, op)
        assert choice.basis == "measured"
        assert ratios[choice.lowering] == min(ratios.values())


@one_backend
@pytest.mark.parametrize("path", sorted(RESULTS.glob("plan_*_cpu.json")), ids=lambda p: p.stem)
def test_the_published_plans_chose_the_same(path):
    """Theirs may differ pass by pass: what has a choice per pass is no worse than `"auto"`."""
    plan = Plan.load(path)
    for spec, lowering in plan.lowerings.items():
        op = "conv" if "convnext" in path.stem else "depthwise_conv"
        choice = choose(spec, plan.conditions, op)
        assert (choice.lowering == "stock") == (lowering == "stock")
        assert choice.basis == "measured"


#: What was never measured, and the words that say so.
NOT_MEASURED = {
    "half precision": ({"compute_dtype": "bfloat16"}, "bfloat16"),
    "double precision": ({"compute_dtype": "float64"}, "float64"),
    "several inputs a group": ({"input_channels_per_group": 2}, "2 → 1 channels"),
    "several outputs a group": ({"output_channels_per_group": 3}, "1 → 3 channels"),
    "one group": ({"groups": 1}, "channels"),
    "many taps": ({"kernel_size": (9, 9)}, "81 taps"),
    "dilation": ({"dilation_rate": (1, 2)}, "dilation"),
    "different strides": ({"strides": (1, 2)}, "different strides"),
    "layout": ({"data_format": "channels_first"}, "channels_first"),
}


@one_backend
@pytest.mark.parametrize("name", NOT_MEASURED)
@pytest.mark.parametrize("op", ["depthwise_conv", "conv"])
@pytest.mark.parametrize("compiled", [True, False])
def test_workloads_that_were_not_measured_stay_stock(name, op, compiled):
    changes, words = NOT_MEASURED[name]
    choice = choose(SPEC.replace(**changes), conditions("tensorflow", "cpu", compiled), op)
    assert (choice.lowering, choice.basis) == ("stock", "unknown")
    assert words in choice.reason
    assert "\n" not in choice.reason


@one_backend
@pytest.mark.parametrize(
    "where",
    [
        ("tensorflow", "cpu", None),
        ("tensorflow", "gpu", False),
        ("tensorflow", "tpu", True),
        ("jax", "cpu", False),
        ("torch", "gpu", False),
        ("torch", "cpu", True),
    ],
)
def test_conditions_that_were_not_measured_stay_stock(where):
    choice = choose(SPEC, conditions(*where))
    assert (choice.lowering, choice.basis) == ("stock", "unknown")
    assert where[0] in choice.reason
    assert where[1] in choice.reason


SPECS = st.builds(
    ConvSpec,
    batch=st.sampled_from([None, 1, 64]),
    height=st.sampled_from([None, 16, 224]),
    width=st.sampled_from([None, 16, 224]),
    groups=st.integers(1, 40),
    input_channels_per_group=st.integers(1, 3),
    output_channels_per_group=st.integers(1, 3),
    kernel_size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.sampled_from(["same", "valid"]),
    compute_dtype=st.sampled_from(["float32", "float16", "bfloat16", "float64"]),
    data_format=st.sampled_from(["channels_last", "channels_first"]),
)
CONDITIONS = st.builds(
    conditions,
    st.sampled_from(["tensorflow", "jax", "torch"]),
    st.sampled_from(["cpu", "gpu", "tpu"]),
    st.sampled_from([True, False, None]),
)


@one_backend
@hypothesis.given(SPECS, CONDITIONS, st.sampled_from([None, "depthwise_conv", "conv"]))
def test_only_what_was_measured_and_can_be_computed_is_chosen(spec, here, op):
    choice = choose(spec, here, op)
    if choice.lowering != "stock":
        assert choice.basis == ("measured" if here.device_kind == "cpu" else "predicted")
        assert why_not(spec, choice.lowering) == []
    assert choice == choose(spec.replace(batch=None, height=None, width=None), here, op)


@one_backend
def test_auto_is_a_lowering_for_those_who_take_it():
    assert parse_or_auto("auto") == "auto"
    assert str(parse_or_auto("diagonal")) == "diagonal:32"
    for wrong in ("atuo", {"forward": "auto"}, None):
        with pytest.raises(ValueError, match='Expected `lowering` to be "auto", "native", '):
            parse_or_auto(wrong)


# rewrite -----------------------------------------------------------------


def network():
    inputs = keras.Input((8, 8, 4))
    x = layers.DepthwiseConv2D(3, name="depthwise")(inputs)
    x = layers.SeparableConv2D(4, 3, name="separable")(x)
    x = layers.Conv2D(4, 3, groups=4, name="grouped")(x)
    x = layers.DepthwiseConv2D(1, depth_multiplier=2, name="unmeasured")(x)
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)), name="network")


def lowerings(model):
    return [
        getattr(place.layer, "lowering", "stock")
        for place in walk_layers(model)
        if isinstance(place.layer, (layers.DepthwiseConv2D, layers.SeparableConv2D, layers.Conv2D))
    ]


#: backend → `jit_compile` (None: not compiled yet) → the network's lowerings
REWRITTEN = {
    "tensorflow": {
        True: ["shifted", "shifted", "shifted", "stock"],
        False: ["stock", "stock", "native", "stock"],
        "auto": ["stock", "stock", "native", "stock"],
        None: ["stock", "stock", "native", "stock"],
    },
    "jax": {
        "auto": ["shifted", "shifted", "shifted", "stock"],
        None: ["shifted", "shifted", "shifted", "stock"],
        False: ["stock"] * 4,
    },
    "torch": {"auto": ["stock"] * 4, None: ["stock"] * 4},
}


@pytest.mark.parametrize("jit_compile", REWRITTEN[BACKEND])
def test_rewrite_chooses_by_itself_as_keras_will_compile(caplog, jit_compile):
    model = network()
    if jit_compile is not None:
        model.compile("sgd", "mse", jit_compile=jit_compile)
    expected = REWRITTEN[BACKEND][jit_compile]
    with caplog.at_level(logging.INFO):
        copy = rewrite(model)
    assert lowerings(model) == ["stock"] * 4
    assert lowerings(copy) == expected
    (record,) = [r for r in caplog.records if "convolutions with groups" in r.message]
    changed = 4 - expected.count("stock")
    assert f"network: {changed} of 4 convolutions with groups rewritten." in record.message
    assert "unknown: " in record.message
    assert "\n" not in record.message
    # Those that were rewritten otherwise become what is best.
    rewrite(model, "dense", in_place=True)
    assert rewrite(model, in_place=True) is model
    assert lowerings(model) == expected


@one_backend
def test_run_eagerly_is_not_compiled():
    model = network()
    model.compile("sgd", "mse", run_eagerly=True)
    assert lowerings(rewrite(model)) == REWRITTEN["tensorflow"][False]


# Conditions that change --------------------------------------------------


def warnings_of(caplog):
    return [r.message for r in caplog.records if "training starts under other" in r.message]


#: backend → `jit_compile` when the lowerings are chosen, and later, when it trains
CHANGED = {"tensorflow": (True, False), "jax": (True, False), "torch": (False, True)}


def plan_for(compiled):
    return Plan(Conditions.current(compiled), overrides={"depthwise": "shifted"})


@pytest.mark.parametrize("chosen_by", ["auto", "plan"])
def test_training_under_other_conditions_warns_once(caplog, chosen_by):
    planned, trained = CHANGED[BACKEND]
    model = network()
    model.compile("sgd", "mse", jit_compile=planned)
    rewrite(model, "auto" if chosen_by == "auto" else plan_for(planned), in_place=True)
    model.make_train_function()
    assert warnings_of(caplog) == []
    model.compile("sgd", "mse", jit_compile=trained)
    assert warnings_of(caplog) == []
    # `fit` and `train_on_batch` call it at their beginning.
    model.make_train_function()
    model.make_train_function()
    (message,) = warnings_of(caplog)
    assert message.startswith("network: training starts under other conditions than ")
    assert f"compiled {planned} → {trained}" in message
    rewrite(model, in_place=True)
    model.make_train_function()
    assert len(warnings_of(caplog)) == 1


@one_backend
def test_training_that_keras_starts_is_watched(caplog):
    model = network()
    rewrite(model, plan_for(True), in_place=True)
    assert warnings_of(caplog) == []
    model.compile("sgd", "mse")
    x, y = np.zeros((4, 8, 8, 4)), np.zeros((4, 2))
    model.predict(x, verbose=0)
    assert warnings_of(caplog) == []
    model.fit(x, y, batch_size=2, epochs=2, verbose=0)
    model.train_on_batch(x, y)
    assert len(warnings_of(caplog)) == 1


@one_backend
def test_copies_are_watched_and_restored_models_are_not(caplog):
    model = network()
    model.compile("sgd", "mse", jit_compile=True)
    before = set(vars(model))
    rewritten = rewrite(model)
    assert set(vars(model)) == before
    again = rewrite(rewritten, "dense", include="depthwise")
    restored, explicit = restore(rewritten), rewrite(rewritten, "shifted")
    assert again.make_train_function.__self__ is again
    for each, count in ((rewritten, 1), (again, 1), (restored, 0), (explicit, 0)):
        caplog.clear()
        each.compile("sgd", "mse")
        each.make_train_function()
        assert each.train_function is not None
        assert len(warnings_of(caplog)) == count
    assert set(vars(restored)) == set(vars(explicit)) == before


@one_backend
def test_a_make_train_function_of_the_models_own_stays(caplog):
    model = network()
    model.compile("sgd", "mse")
    vars(model)["make_train_function"] = own = lambda force=False: None
    rewrite(model, plan_for(True), in_place=True)
    assert model.make_train_function is own
    restore(model, in_place=True)
    assert model.make_train_function is own


@one_backend
def test_what_says_nothing_of_conditions_warns_of_none(caplog):
    model = network()
    rewrite(model, dataclasses.replace(plan_for(True), overrides={"grouped": "dense"}))
    inputs = keras.Input((4,))
    dense = rewrite(keras.Model(inputs, layers.Dense(2)(inputs)), in_place=True)
    assert "make_train_function" not in vars(dense)
    unknown = rewrite(model, Plan.of_model(rewrite(model, "shifted")))
    for jit_compile in (True, False):
        unknown.compile("sgd", "mse", jit_compile=jit_compile)
        unknown.make_train_function()
    assert warnings_of(caplog) == []


@one_backend
def test_what_the_rewriting_has_warned_of_is_not_said_again(caplog):
    model = network()
    model.compile("sgd", "mse")
    rewrite(model, plan_for(True), in_place=True)
    assert "made under other conditions: compiled True → False" in caplog.text
    caplog.clear()
    for jit_compile in (False, True):
        model.compile("sgd", "mse", jit_compile=jit_compile)
        model.make_train_function()
    assert warnings_of(caplog) == []


@one_backend
def test_measuring_a_rewritten_model_is_no_training(caplog):
    model = rewrite(network(), plan_for(True), in_place=True)
    model.compile("sgd", "mse")
    class_swap.recompile(model, "train")
    assert model.train_function is not None
    assert warnings_of(caplog) == []
