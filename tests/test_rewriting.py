"""Models are rewritten and restored, and nothing else about them changes."""

import dataclasses
import logging
import threading
import zipfile

import keras
import numpy as np
import pytest
from keras import layers

from diagconv_tf import (
    DEFAULT_RULES,
    Conditions,
    ConvSpec,
    DiagonalwiseDepthwiseConv2D,
    Plan,
    Rule,
    inspect_model,
    load_weights,
    restore,
    rewrite,
    save_weights,
)
from diagconv_tf.copying import copy_model
from diagconv_tf.layers import LoweredLayer
from diagconv_tf.model_tree import walk_layers
from tests import cases, model_zoo
from tests.numerics import BACKEND

PER_PASS = cases.LOWERINGS["per pass a"]


def ours(model):
    return [place.layer for place in walk_layers(model) if isinstance(place.layer, LoweredLayer)]


def outputs(model, inputs):
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(model(inputs))]


def classes(model):
    return {place.path: type(place.layer) for place in walk_layers(model)}


def configs(model):
    return {place.path: place.layer.get_config() for place in walk_layers(model)}


def variable_paths(model):
    return [variable.path for variable in model.variables]


def gradients(model, inputs):
    """What one step of plain gradient descent adds to the weights."""
    targets = model_zoo.random_targets(model, inputs)
    before = model.get_weights()
    model.compile(keras.optimizers.SGD(1.0), "mse", run_eagerly=BACKEND != "jax")
    model.train_on_batch(inputs, targets)
    steps = [after - value for after, value in zip(model.get_weights(), before, strict=True)]
    model.set_weights(before)
    return steps


def assert_all_close(values, wanted, tolerance=2e-5):
    for value, want in zip(values, wanted, strict=True):
        np.testing.assert_allclose(value, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", model_zoo.MODELS)
def test_there_and_back_in_place(name):
    build, count = model_zoo.MODELS[name]
    model = build()
    inputs = model_zoo.random_inputs(model)
    stock = (classes(model), configs(model), variable_paths(model), model.get_weights())
    stock_outputs = outputs(model, inputs)
    stock_gradients = gradients(model, inputs)
    variables = [id(variable) for variable in model.variables]

    lowering = {"sequential": PER_PASS, "composite": "shifted"}.get(name, "diagonal:3")
    assert rewrite(model, lowering, in_place=True) is model
    assert len(ours(model)) == count
    assert all(layer.lowering == lowering for layer in ours(model))
    assert_all_close(outputs(model, inputs), stock_outputs)
    assert_all_close(gradients(model, inputs), stock_gradients)
    assert variable_paths(model) == stock[2]
    # No second set of weights: the variables are the same objects.
    assert [id(variable) for variable in model.variables] == variables

    assert restore(model, in_place=True) is model
    assert (classes(model), configs(model), variable_paths(model)) == stock[:3]
    assert all(map(np.array_equal, model.get_weights(), stock[3]))
    assert all(map(np.array_equal, outputs(model, inputs), stock_outputs))
    assert not any("_lowering" in vars(place.layer) for place in walk_layers(model))


@pytest.mark.parametrize("name", model_zoo.MODELS)
def test_there_and_back_in_copies(name):
    build, count = model_zoo.MODELS[name]
    model = build()
    inputs = model_zoo.random_inputs(model)
    stock = (classes(model), configs(model), variable_paths(model))
    stock_outputs = outputs(model, inputs)

    rewritten = rewrite(model, "diagonal:3")
    assert ours(model) == []
    assert len(ours(rewritten)) == count
    assert type(rewritten) is type(model)
    assert variable_paths(rewritten) == stock[2]
    assert_all_close(outputs(rewritten, inputs), stock_outputs)

    restored = restore(rewritten)
    assert len(ours(rewritten)) == count
    assert (classes(restored), configs(restored), variable_paths(restored)) == stock
    assert all(map(np.array_equal, restored.get_weights(), model.get_weights()))
    assert all(map(np.array_equal, outputs(restored, inputs), stock_outputs))


def test_a_model_without_a_faithful_copy_names_the_way_out():
    model = model_zoo.composite()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="in_place=True"):
        rewrite(model)
    assert ours(model) == []
    assert len(ours(rewrite(model, "shifted", in_place=True))) == 4


def test_a_copy_of_a_rewritten_composite_keeps_its_lowerings():
    model = rewrite(model_zoo.composite(), "shifted", in_place=True)
    model = rewrite(model, "dense", include="block1/depthwise")
    assert sorted(layer.lowering for layer in ours(model)) == ["dense"] + 3 * ["shifted"]


@pytest.mark.parametrize("kept", [False, True])
def test_compiled_functions_are_renewed(monkeypatch, kept):
    """What fit, evaluate and predict compiled with the old layers is not used again.

    Not even where somebody keeps it, as the traceback of an interrupted `fit` does.
    """
    model = model_zoo.skip_connections()
    inputs = model_zoo.random_inputs(model)
    targets = model_zoo.random_targets(model, inputs)
    model.compile("sgd", "mse")

    def run():
        model.predict(inputs, verbose=0)
        model.evaluate(inputs, targets, verbose=0)
        model.fit(inputs, targets, verbose=0)

    def traced(function):
        calls = []
        with monkeypatch.context() as patch:
            call = DiagonalwiseDepthwiseConv2D.call
            patch.setattr(
                DiagonalwiseDepthwiseConv2D,
                "call",
                lambda self, x: (calls.append(self.name), call(self, x))[1],
            )
            function()
        return len(calls)

    def functions():
        return [getattr(model, f"{kind}_function") for kind in ("train", "test", "predict")]

    run()
    alive = functions() if kept else []
    rewrite(model, "shifted", in_place=True)
    # Each of the three traces, or on PyTorch runs, both layers.
    for function in (
        lambda: model.predict(inputs, verbose=0),
        lambda: model.evaluate(inputs, targets, verbose=0),
        lambda: model.fit(inputs, targets, verbose=0),
    ):
        assert traced(function) >= 2
    alive += functions() if kept else []
    restore(model, in_place=True)
    assert traced(run) == 0


def test_a_models_own_step_stays_and_is_the_one_that_runs():
    """A step that somebody gave to the model itself; and no copy has one of ours."""
    model = model_zoo.skip_connections()
    inputs = model_zoo.random_inputs(model)
    targets = model_zoo.random_targets(model, inputs)
    model.compile("sgd", "mse")
    calls = []

    def own_step(*args, step=model.train_step):
        calls.append("own")
        return step(*args)

    vars(model)["train_step"] = own_step
    model.fit(inputs, targets, verbose=0)
    before = set(vars(model))
    for function in (
        lambda: rewrite(model, "shifted", in_place=True),
        lambda: restore(model, in_place=True),
    ):
        calls.clear()
        function()
        model.fit(inputs, targets, verbose=0)
        assert calls
        assert set(vars(model)) == before
        assert model.train_step is own_step
    del vars(model)["train_step"]
    assert not {"train_step", "test_step", "predict_step"} & set(vars(rewrite(model, "shifted")))


# Selection ---------------------------------------------------------------


def paths_of_ours(model):
    return sorted(p.path for p in walk_layers(model) if isinstance(p.layer, LoweredLayer))


#: name: (arguments, which of the composite model's layers are rewritten)
SELECTIONS = {
    "a path": ({"include": "block1/depthwise"}, ["block1/depthwise"]),
    "a container": ({"include": "block2"}, ["block2/depthwise", "block2/separable"]),
    "a glob": ({"include": "*/depthwise"}, ["block1/depthwise", "block2/depthwise"]),
    "a list": (
        {"include": ["block1/depthwise", "*2/sep*"]},
        ["block1/depthwise", "block2/separable"],
    ),
    "a function": (
        {"include": lambda row: row.class_name == "SeparableConv2D"},
        ["block1/separable", "block2/separable"],
    ),
    "all but a glob": ({"exclude": "block?/sep*"}, ["block1/depthwise", "block2/depthwise"]),
    "both": ({"include": "block1", "exclude": ["*/separable"]}, ["block1/depthwise"]),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selection(name):
    arguments, expected = SELECTIONS[name]
    model = rewrite(model_zoo.composite(), "shifted", in_place=True, **arguments)
    assert paths_of_ours(model) == expected


def test_any_path_of_a_shared_layer_selects_it():
    model = model_zoo.nested_and_shared()
    rewrite(model, "shifted", include="shared", in_place=True)
    assert [layer.name for layer in ours(model)] == ["shared"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_without_a_match_is_refused_with_near_ones(argument):
    model = model_zoo.composite()
    with pytest.raises(ValueError, match=r"block1/depthwize.*near: .*block1/depthwise"):
        rewrite(model, in_place=True, **{argument: ["block1/depthwize"]})
    with pytest.raises(ValueError, match=argument):
        rewrite(model, in_place=True, **{argument: [3]})
    assert ours(model) == []


# Rules -------------------------------------------------------------------


class FastOwnDepthwise(model_zoo.OwnDepthwise, DiagonalwiseDepthwiseConv2D):
    pass


OWN_RULES = (*DEFAULT_RULES, Rule(model_zoo.OwnDepthwise, FastOwnDepthwise))


def with_own_depthwise():
    inputs = keras.Input((8, 8, 4))
    x = layers.DepthwiseConv2D(3, name="stock")(inputs)
    return keras.Model(inputs, layers.Flatten()(model_zoo.OwnDepthwise(3, name="own")(x)))


def test_a_users_subclass_is_rewritten_by_a_users_rule_only():
    model = with_own_depthwise()
    inputs = model_zoo.random_inputs(model)
    before = outputs(model, inputs)
    assert [layer.name for layer in ours(rewrite(model, "shifted"))] == ["stock"]
    rewrite(model, "shifted", rules=OWN_RULES, in_place=True)
    assert {type(layer) for layer in ours(model)} == {DiagonalwiseDepthwiseConv2D, FastOwnDepthwise}
    assert_all_close(outputs(model, inputs), before)
    with pytest.raises(ValueError, match="FastOwnDepthwise of layer 'own'"):
        restore(model, in_place=True)
    restore(model, rules=OWN_RULES, in_place=True)
    assert list(classes(model).values()) == list(classes(with_own_depthwise()).values())


@pytest.mark.parametrize(
    ("source", "replacement"),
    [
        (layers.DepthwiseConv2D, layers.Dense),
        (DiagonalwiseDepthwiseConv2D, layers.DepthwiseConv2D),
        (layers.DepthwiseConv2D, layers.DepthwiseConv2D),
        ("DepthwiseConv2D", DiagonalwiseDepthwiseConv2D),
    ],
)
def test_rules_that_cannot_be(source, replacement):
    with pytest.raises(ValueError, match="Expected"):
        Rule(source, replacement)


# What is left alone ------------------------------------------------------


def test_layers_left_alone_are_logged_once_with_the_reason(caplog):
    with caplog.at_level(logging.INFO):
        rewrite(with_own_depthwise(), "diagonal_grouped:3", in_place=True)
    (record,) = [record for record in caplog.records if "convolutions" in record.message]
    assert record.levelno == logging.WARNING
    for words in ("0 of 2", "no rule names", "own", "stock", "that 3 divides"):
        assert words in record.message


def test_a_model_without_eligible_layers_is_a_message(caplog):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(inputs))
    with caplog.at_level(logging.INFO):
        assert rewrite(model, in_place=True) is model
    assert "0 of 0 convolutions with groups rewritten" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("model.keras",), "a keras.Model"),
        ((keras.Sequential([layers.Dense(3)]),), "a built model"),
        ((model_zoo.composite, "diagonal:0"), "diagonal:N"),
        ((model_zoo.composite, None), "diagonal:N"),
        ((model_zoo.composite, {"forward": "native"}), "diagonal:N"),
    ],
)
@pytest.mark.parametrize("in_place", [True, False])
def test_refusals(arguments, words, in_place):
    model, *others = arguments
    if callable(model) and not isinstance(model, keras.Model):
        model = model()
    with pytest.raises(ValueError, match=words):
        rewrite(model, *others, in_place=in_place)


# Plans -------------------------------------------------------------------


def spec_of(model, path):
    return next(row.main_spec for row in inspect_model(model, 2).rows if row.path == path)


def test_a_plan_chooses_by_problem_and_by_path():
    model = model_zoo.composite()
    first, second = (spec_of(model, f"block{number}/depthwise") for number in (1, 2))
    assert spec_of(model, "block1/separable") == first
    plan = Plan(
        Conditions.current(),
        {first: PER_PASS, second: "stock"},
        {"block1/separable": "dense"},
    )
    rewrite(model, "native", in_place=True)
    rewrite(model, plan, in_place=True)
    assert {row.path: row.lowering for row in inspect_model(model).rows} == {
        "block1/depthwise": PER_PASS,
        "block1/separable": "dense",
        "block2/depthwise": "stock",
        "block2/separable": "stock",
    }


def test_a_plan_file_holds_the_plan(tmp_path):
    model = rewrite(model_zoo.sequential(), PER_PASS, in_place=True)
    spec = ConvSpec(2, None, 8, 4, strides=(2, 1), compute_dtype="bfloat16")
    plan = Plan(Conditions.current(), {spec: PER_PASS}, Plan.of_model(model).overrides)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    with pytest.raises(FileExistsError, match="overwrite"):
        plan.save(tmp_path / "plan.json")
    plan.save(tmp_path / "plan.json", overwrite=True)


def test_a_composite_block_is_rewritten_again_after_loading(tmp_path, caplog):
    model = rewrite(model_zoo.composite(), "shifted", in_place=True)
    assert "save `restore(model)`" in caplog.text
    plan = Plan.of_model(model)
    restore(model).save(tmp_path / "model.keras")
    loaded = keras.models.load_model(
        tmp_path / "model.keras", custom_objects={"Block": model_zoo.Block}
    )
    assert ours(loaded) == []
    rewrite(loaded, plan, in_place=True)
    assert Plan.of_model(loaded) == plan


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "conditions": 3}', "\udcff"],
)
def test_what_is_no_plan_is_refused_with_the_file(tmp_path, text):
    (tmp_path / "plan.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="plan.json: "):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_with_a_lowering_that_is_none_is_refused():
    with pytest.raises(ValueError, match="diagonal:N"):
        Plan(Conditions.current(), overrides={"a": "diagonal:x"})


def test_a_plan_that_fits_no_layer_is_refused():
    plan = Plan(Conditions.current(), {ConvSpec(2, 9, 9, 5): "shifted"}, {"nowhere": "shifted"})
    model = model_zoo.composite()
    with pytest.raises(ValueError, match="fits none of its 4"):
        rewrite(model, plan, in_place=True)
    assert ours(model) == []


def test_a_plan_of_other_conditions_says_what_differs(caplog):
    here = Conditions.current()
    elsewhere = dataclasses.replace(
        here, device_kind="abacus", versions=(("keras", "2.0"), *here.versions[1:])
    )
    plan = Plan(elsewhere, overrides={"dw1": "shifted"})
    rewrite(model_zoo.skip_connections(), plan, in_place=True)
    warnings = [r.message for r in caplog.records if "conditions" in r.message]
    assert len(warnings) == 1
    for words in ("device_kind abacus", "keras 2.0"):
        assert words in warnings[0]


def test_open_sizes_take_a_plans_choice_if_there_is_one():
    inputs = keras.Input((None, None, 4))
    model = keras.Model(inputs, layers.DepthwiseConv2D(3, name="dw")(inputs))
    small, large = (ConvSpec(2, size, size, 4) for size in (8, 16))
    here = Conditions.current()
    rewritten = rewrite(model, Plan(here, {small: "shifted", large: "shifted"}))
    assert [layer.lowering for layer in ours(rewritten)] == ["shifted"]
    with pytest.raises(ValueError, match="fits none"):
        rewrite(model, Plan(here, {small: "shifted", large: "dense"}))


# Files -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sequential", "nested and shared", "composite", "subclassed"])
def test_weight_files_go_to_and_from_the_stock_model(name, tmp_path):
    build, _ = model_zoo.MODELS[name]
    stock, rewritten = build(), rewrite(build(), "shifted", in_place=True)
    save_weights(rewritten, tmp_path / "ours.weights.h5")
    stock.load_weights(tmp_path / "ours.weights.h5")
    assert all(map(np.array_equal, stock.get_weights(), rewritten.get_weights()))
    stock.set_weights([value + 1 for value in stock.get_weights()])
    stock.save_weights(tmp_path / "stock.weights.h5")
    load_weights(rewritten, tmp_path / "stock.weights.h5")
    assert all(map(np.array_equal, stock.get_weights(), rewritten.get_weights()))
    assert len(ours(rewritten)) == model_zoo.MODELS[name][1]


def test_weight_files_are_not_overwritten_unasked_nor_left_half_written(tmp_path, monkeypatch):
    model = rewrite(model_zoo.skip_connections(), "shifted", in_place=True)
    path = tmp_path / "a.weights.h5"
    save_weights(model, path)
    content = path.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite"):
        save_weights(model, path)

    def fail(name, *args, **kwargs):
        with open(name, "w") as file:
            file.write("half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(model, "save_weights", fail)
        with pytest.raises(OSError, match="no space"):
            save_weights(model, path, overwrite=True)
    assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.weights.h5"]
    assert len(ours(model)) == 2


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("a.h5", ValueError, ".weights.h5"),
        ("missing/a.weights.h5", ValueError, "existing folder"),
    ],
)
def test_weight_files_that_cannot_be_written(tmp_path, path, error, words):
    model = model_zoo.skip_connections()
    with pytest.raises(error, match=words):
        save_weights(model, tmp_path / path)
    with pytest.raises(FileNotFoundError):
        load_weights(model, tmp_path / "none.weights.h5")


def test_a_restored_model_loads_without_the_package(tmp_path):
    model = restore(rewrite(model_zoo.nested_and_shared(), "shifted"))
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert "diagconv" not in archive.read("config.json").decode()


@pytest.mark.backends("tensorflow")
def test_copying_a_watched_model_reports_nothing_of_the_watch(caplog):
    """What `rewrite` itself put there is no code of the user's."""
    model = keras.Sequential([keras.Input((8, 8, 4)), layers.DepthwiseConv2D(3)])
    model.compile("sgd", "mse", jit_compile=True)
    rewrite(model, in_place=True)
    with caplog.at_level(logging.INFO, logger="absl"):
        caplog.clear()
        duplicate = copy_model(model)
    assert not caplog.messages
    assert vars(duplicate)["make_train_function"].__self__ is duplicate
