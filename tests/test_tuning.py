"""tune: what it measures, what it decides, and what it leaves alone."""

import dataclasses
import itertools
import json
import pathlib

import keras
import numpy as np
import pytest
from keras import layers

from diagconv_tf import Conditions, ConvSpec, Plan, inspect_model, rewrite, tune
from diagconv_tf.lowerings import why_not
from diagconv_tf.measurements import WRONG_NUMBERS, Measured, Workload, ratios_to_stock
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.spec import STOCK
from diagconv_tf.tuning.candidates import contest_variants, layer_candidates
from diagconv_tf.tuning.choosing import choose
from diagconv_tf.tuning.contest import Contest
from diagconv_tf.tuning.sample_batch import sample_batch
from tests import model_zoo
from tests.fake_lab import FAILED, FakeLab, took
from tests.numerics import BACKEND

WRONG = Measured(error=f"{WRONG_NUMBERS}: relative error 1, above 0")

#: Layers of `model_zoo.skip_connections`: each has a workload of its own.
PATHS = ("dw1", "dw2")

#: Without it Keras runs JAX op by op, which takes long.
COMPILED = BACKEND == "jax"


@pytest.fixture
def lab(monkeypatch):
    return FakeLab(monkeypatch)


@pytest.fixture
def run(lab, tmp_path):
    """`tune` in the lab, with an empty cache."""

    def run(model=None, batch_size=2, **arguments):
        model = model or compiled(model_zoo.skip_connections())
        arguments = {"cache_dir": tmp_path, "clock": lab.clock, **arguments}
        return tune(model, batch_size, **arguments)

    return run


def compiled(model, loss="mse"):
    model.compile("sgd", loss, jit_compile=COMPILED)
    return model


def choices(plan, model=None):
    rows = inspect_model(model or model_zoo.skip_connections()).rows
    return {row.path: plan.lowering_for(row) for row in rows}


# The contest decides, by looked-up times.


def test_the_fastest_variant_wins(lab, run):
    lab.steps_by_name({STOCK: 3.0, "shifted": 1.0, "diagonal:32": 2.0})
    plan = run()
    assert choices(plan) == dict.fromkeys(PATHS, "shifted")
    assert lab.variants["shifted"] == dict.fromkeys(PATHS, "shifted")
    assert lab.variants[STOCK] == {}
    assert plan.reason.startswith("shifted: a step takes 3000 ms stock, 1000 ms shifted: 0.33 (")
    assert {name: step.median for name, step in plan.steps.items()} == {
        name: {STOCK: 3.0, "shifted": 1.0, "diagonal:32": 2.0}.get(name, 9.0)
        for name in lab.variants
    }
    # Nothing was measured layer by layer.
    assert lab.measured == []
    assert [w.layers for w in plan.workloads] == [("dw1",), ("dw2",)]
    assert {w.choice for w in plan.workloads} == {None}


#: A share of noise that a sample has of its own.
NOISE = 0.2

CONTESTS = {
    "twice as fast": (took(1.0), took(0.5), "shifted"),
    "equal": (took(1.0), took(1.0), STOCK),
    "a gain below 2 %": (took(1.0), took(0.99), STOCK),
    "a gain of 3 % in all rounds": (took(1.0), took(0.97), "shifted"),
    "a gain of 5 % within the noise": (took(1.0, noise=NOISE), took(0.95, noise=-NOISE), STOCK),
    "a gain of 60 % above the noise": (took(1.0, noise=NOISE), took(0.4, noise=-NOISE), "shifted"),
    "twice as slow": (took(1.0), took(2.0), STOCK),
    "too few rounds": (took(1.0, rounds=2), took(0.5, rounds=2), STOCK),
    "rounds at which no contest ends": (took(1.0, rounds=6), took(0.5, rounds=6), STOCK),
    "far faster in three rounds": (took(1.0, rounds=3), took(0.4, rounds=3), "shifted"),
    "faster in three rounds": (took(1.0, rounds=3), took(0.6, rounds=3), STOCK),
    "faster in five rounds": (took(1.0, rounds=5), took(0.6, rounds=5), "shifted"),
    "failed": (took(1.0), FAILED, STOCK),
    "stock failed": (FAILED, took(2.0), "shifted"),
    # Three times the first step is fine; more must be paid back in 1000 steps.
    "three first steps": (took(1.0, first=10.0), took(0.97, first=30.0), "shifted"),
    "paid back": (took(1.0, first=10.0), took(0.97, first=31.0), "shifted"),
    "not paid back": (took(1.0, first=10.0), took(0.97, first=50.0), STOCK),
    "paid back by a large gain": (took(1.0, first=10.0), took(0.5, first=50.0), "shifted"),
    "not paid back by short steps": (took(0.01, first=10.0), took(0.005, first=50.0), STOCK),
}


@pytest.mark.parametrize("name", CONTESTS)
def test_a_contest_decides(lab, run, name):
    stock, other, winner = CONTESTS[name]
    assert choose({STOCK: stock, "shifted": other}).name == winner
    lab.step = lambda name, variant: {STOCK: stock, "shifted": other}.get(name, took(30.0))
    plan = run()
    assert set(choices(plan).values()) == {winner}
    assert plan.reason.startswith(f"{winner}: ")
    assert plan.steps[STOCK] == stock
    assert plan.steps["shifted"] == other


@pytest.mark.backends("tensorflow")
def test_what_wins_for_sure_comes_before_what_may_be_faster():
    often = tuple(s * (0.2 if i % 4 else 100.0) for i, s in enumerate(took(1.0).samples))
    perhaps = dataclasses.replace(took(0.2), samples=often)
    steps = {STOCK: took(1.0), "sure": took(0.8), "perhaps": perhaps}
    assert ratios_to_stock(steps)["perhaps"].estimate < 0.8
    assert choose(steps).name == "sure"


def large_kernel():
    """Two layers: `"shifted"` suits the first only."""
    inputs = keras.Input((9, 9, 4))
    x = layers.DepthwiseConv2D(3, padding="same", name="dw1")(inputs)
    x = layers.DepthwiseConv2D(9, padding="same", name="dw2")(x)
    return compiled(keras.Model(inputs, layers.GlobalAveragePooling2D()(x)))


def test_wrong_numbers_never_win(lab, run):
    lab.steps_by_name({STOCK: 3.0, "shifted": 1.0, "diagonal:32": 2.0})
    lab.wrong = {"shifted"}
    model = large_kernel()
    plan = run(model)
    # Blocks as wide as the layer are dense.
    assert choices(plan, model) == dict.fromkeys(PATHS, "dense")
    assert plan.steps["shifted"].error == f"{WRONG_NUMBERS}: no sum"
    # Each distinct workload was checked once, until one was wrong.
    assert len(lab.checked) == len(set(map(str, lab.checked))) == 3
    lab.wrong = {"shifted", "dense"}
    assert set(choices(run(model, refresh=True), model).values()) == {STOCK}


def test_a_check_that_fails_is_no_proof(lab, run, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of luck")

    lab.steps_by_name({STOCK: 3.0, "shifted": 1.0})
    monkeypatch.setattr("diagconv_tf.tuning.tuner.checking.why_wrong", fail)
    plan = run()
    assert set(choices(plan).values()) == {STOCK}
    assert "cannot be checked: RuntimeError: out of luck" in plan.steps["shifted"].error


# Keras's default, where the step is compiled in another way.


DEFAULTS = {
    "faster": (took(0.4), "takes 0.40 of this step: compile with jit_compile=False"),
    "slower": (took(2.5), "takes 2.50 of this step"),
    "equal": (took(0.99), "takes 0.99 of this step"),
    "failed": (FAILED, ""),
}


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("name", DEFAULTS)
def test_keras_default_is_timed_beside_the_choice(lab, run, name, monkeypatch):
    lab.default, sentence = DEFAULTS[name]
    lab.steps_by_name({STOCK: 3.0, "shifted": 1.0})
    monkeypatch.setattr(
        "diagconv_tf.keras_internals.resolve_jit_compile", lambda model: False
    )  # As on a machine without a GPU.
    model = model_zoo.skip_connections()
    model.compile("sgd", "mse", jit_compile=True)
    plan = run(model)
    assert lab.compared == [("shifted", dict.fromkeys(PATHS, "shifted"), False)]
    if sentence:
        assert plan.reason.endswith(f". Keras's default, without XLA, {sentence}")
    else:
        assert "Keras's default" not in plan.reason
    assert plan.default_steps == {"shifted": took(1.0, first=1.0), "default": lab.default}
    assert Plan.from_json(plan.to_json()) == plan
    # It is kept as the contest is, unless it failed.
    assert run(model).reason == plan.reason
    assert len(lab.compared) == (2 if name == "failed" else 1)
    # Where stock is the default, there is nothing to time.
    lab.compared.clear()
    model.compile("sgd", "mse", jit_compile=False)
    assert run(model).default_steps == {}
    assert lab.compared == []


@pytest.mark.backends("tensorflow")
def test_keras_default_runs_without_xla_beside_the_choice():
    model = model_zoo.skip_connections()
    model.compile("sgd", "mse", jit_compile=True)
    contest = Contest(model, 2)
    contest.add(STOCK, {})
    steps = contest.compare("shifted", dict.fromkeys(PATHS, "shifted"), "default", False)
    assert set(steps) == {"shifted", "default"}
    assert all(step.ok and step.count == 5 for step in steps.values())
    # The contest is what it was.
    assert set(contest.first) == {STOCK, "shifted"}
    assert contest.model.jit_compile is True
    _, function = contest._variants["default"]
    assert function is not contest._variants["shifted"][1]


# Layer by layer.


def test_layers_are_measured_alone_only_where_it_is_asked_for(lab, run):
    lab.layer = lambda workload, name: took(
        {STOCK: 9.0, "shifted" if workload.spec.strides == (1, 1) else "dense": 1.0}.get(name, 5.0)
    )
    lab.steps_by_name({STOCK: 3.0, "per_layer": 1.0, "shifted": 2.0})
    plan = run(per_layer=True)
    assert lab.variants["per_layer"] == {"dw1": "shifted", "dw2": "dense"}
    assert choices(plan) == {"dw1": "shifted", "dw2": "dense"}
    assert plan.reason.startswith("per_layer: ")
    assert [w.choice for w in plan.workloads] == ["shifted", "dense"]
    assert plan.workloads[0].reason.startswith("a step takes 9000 ms stock, 1000 ms shifted: 0.11")
    assert len(set(lab.measured)) == len(lab.measured)
    # It enters the contest as the others do.
    lab.steps_by_name({STOCK: 3.0, "per_layer": 2.0, "shifted": 1.0})
    plan = run(per_layer=True, refresh=True)
    assert choices(plan) == dict.fromkeys(PATHS, "shifted")
    assert plan.workloads[0].times["shifted"].median == 1.0


def test_a_layer_that_is_not_surely_faster_alone_stays_stock(lab, run):
    lab.layer = lambda workload, name: (
        took(1.0, noise=NOISE) if name == STOCK else took(0.95, noise=-NOISE)
    )
    assert {w.choice for w in run(per_layer=True).workloads} == {STOCK}
    assert "per_layer" not in lab.variants


def test_a_choice_per_layer_that_is_one_for_all_is_timed_once(lab, run):
    lab.by_name({STOCK: 3.0, "shifted": 1.0})
    run(per_layer=True)
    assert "shifted" in lab.variants
    assert "per_layer" not in lab.variants


def test_failures_are_results_and_never_chosen(lab, run):
    lab.by_name({STOCK: 3.0, "shifted": FAILED, "dense": WRONG, "native": FAILED})
    plan = run(per_layer=True)
    assert plan.workloads[0].times["shifted"] == FAILED
    assert "per_layer" not in lab.variants
    assert {w.choice for w in plan.workloads} == {STOCK}


def test_every_workload_is_measured_once_the_largest_first(lab, run):
    inputs = keras.Input((8, 8, 4))
    x = inputs
    for index in range(3):
        x = layers.DepthwiseConv2D(3, padding="same", name=f"dw{index}")(x)
    x = layers.DepthwiseConv2D(5, padding="same", name="large")(x)
    model = compiled(keras.Model(inputs, layers.GlobalAveragePooling2D()(x)))
    plan = run(model, per_layer=True)
    assert [w.layers for w in plan.workloads] == [("dw0", "dw1", "dw2"), ("large",)]
    assert len(set(lab.measured)) == len(lab.measured)


# Layers and their plans.


def test_two_classes_may_have_one_spec(lab, run):
    inputs = keras.Input((8, 8, 4))
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(inputs)
    x = layers.Conv2D(4, 3, groups=4, padding="same", name="grouped")(x)
    model = compiled(keras.Model(inputs, layers.GlobalAveragePooling2D()(x)))

    lab.steps_by_name({STOCK: 3.0, "native": 1.0})
    plan = run(model)
    assert {w.stock_op for w in plan.workloads} == {"conv", "depthwise_conv"}
    # On PyTorch Keras moves axes around its op.
    depthwise = "native" if BACKEND == "torch" else STOCK
    assert choices(plan, model) == {"depthwise": depthwise, "grouped": "native"}
    assert len(plan.overrides) == (depthwise == STOCK)


def test_open_sizes_are_planned_by_path(lab, run):
    inputs = keras.Input((None, None, 4))
    x = layers.DepthwiseConv2D(3, padding="same", name="dw1")(inputs)
    x = layers.DepthwiseConv2D(3, padding="same", name="dw2")(layers.MaxPooling2D()(x))
    model = compiled(keras.Model(inputs, layers.GlobalAveragePooling2D()(x)))
    with pytest.raises(ValueError, match="a sample batch as `data`"):
        run(model)
    lab.layer = lambda workload, name: took(
        {STOCK: 9.0, "shifted" if workload.spec.height == 8 else "dense": 1.0}.get(name, 5.0)
    )
    lab.steps_by_name({STOCK: 3.0, "per_layer": 1.0})
    plan = run(model, data=np.zeros((2, 8, 8, 4), "float32"), per_layer=True)
    assert choices(plan, model) == {"dw1": "shifted", "dw2": "dense"}


def test_nothing_to_rewrite_is_a_plan_that_says_so(lab, run):
    inputs = keras.Input((4,))
    plan = run(compiled(keras.Model(inputs, layers.Dense(2)(inputs))))
    assert {*plan.lowerings, *plan.overrides, *lab.measured, *lab.variants} == set()
    assert "No convolution" in plan.reason


# Time.


def test_a_budget_leaves_out_what_compiles_slowly(lab, run):
    lab.steps_by_name({STOCK: 9.0, "shifted": 1.0})
    lab.step = lambda name, variant: took(1.0 if name == STOCK else 0.1, first=10.0)
    lab.first_step_seconds = 10.0
    names = list(contest_names())
    # Stock and each variant compile for 10 s; 5 s more and the rounds are kept free.
    plan = run(budget_seconds=45.0)
    assert list(plan.steps) == [STOCK, *names][: len(plan.steps)]
    assert {STOCK, "shifted"} <= set(plan.steps)
    assert lab.clock.now <= 45.0
    assert choices(plan) == dict.fromkeys(PATHS, names[0])


def contest_names():
    model = model_zoo.skip_connections()
    return contest_variants(inspect_model(model, 2), Conditions.current(COMPILED))


def test_a_budget_that_is_far_too_small_still_gives_a_plan(lab, run):
    lab.first_step_seconds = 10.0
    plan = run(budget_seconds=1.0, per_layer=True)
    assert lab.measured == []
    assert list(plan.steps) == [STOCK]
    assert set(choices(plan).values()) == {STOCK}
    assert "no other variant was timed" in plan.reason
    assert {w.reason for w in plan.workloads} == {"not measured: no time was left"}


def test_without_a_budget_everything_is_measured(lab, run):
    lab.seconds, lab.first_step_seconds = 1e6, 1e6
    plan = run(per_layer=True)
    assert all(w.times[STOCK].ok for w in plan.workloads)
    assert set(plan.steps) == {STOCK, *contest_names()} | ({"per_layer"} & set(plan.steps))


# The cache. (Keys are tested in test_keys.py.)


def test_a_warm_cache_measures_nothing(lab, run):
    lab.by_name({STOCK: 3.0, "shifted": 1.0, "dense": WRONG})
    lab.steps_by_name({STOCK: 3.0, "shifted": 1.0, "diagonal:32": WRONG})
    cold = run(per_layer=True)
    done = len(lab.measured), len(lab.trained)
    assert done[0] > 0
    assert run(per_layer=True) == cold
    assert (len(lab.measured), len(lab.trained)) == done
    run(per_layer=True, refresh=True)
    assert (len(lab.measured), len(lab.trained)) == (2 * done[0], 2 * done[1])


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_contest_of_which_one_failed_is_run_again_whole(lab, run, per_layer):
    lab.by_name({STOCK: 3.0, "shifted": FAILED})
    lab.steps_by_name({STOCK: 3.0, "shifted": FAILED})
    assert set(choices(run(per_layer=per_layer)).values()) == {STOCK}
    lab.trained.clear()
    lab.measured.clear()
    lab.by_name({STOCK: 3.0, "shifted": 1.0})
    lab.steps_by_name({STOCK: 3.0, "shifted": 1.0})
    assert choices(run(per_layer=per_layer)) == dict.fromkeys(PATHS, "shifted")
    assert {STOCK, "shifted"} <= set(lab.variants)
    assert ({STOCK, "shifted"} <= {name for *_, name in lab.measured}) == per_layer
    lab.trained.clear()
    lab.measured.clear()
    run(per_layer=per_layer)
    assert lab.trained == lab.measured == []


def test_a_variant_more_is_another_contest(lab, run):
    lab.steps_by_name({STOCK: 3.0, "shifted": 1.0})
    run()
    lab.trained.clear()
    lab.layer = lambda workload, name: took(
        {STOCK: 3.0, "shifted" if workload.spec.strides == (1, 1) else "dense": 1.0}.get(name, 9.0)
    )
    run(per_layer=True)
    # With stock in it: today's times are not compared with those of another day.
    assert {STOCK, "shifted", "per_layer"} <= set(lab.variants)


def test_a_contest_that_a_budget_cut_short_is_kept_for_the_same_budget_only(lab, run):
    lab.first_step_seconds = 10.0
    cut = run(budget_seconds=1.0)
    lab.trained.clear()
    assert run(budget_seconds=1.0) == cut
    assert lab.trained == []
    assert set(run().steps) == {STOCK, *contest_names()}
    lab.trained.clear()
    # What is known whole serves a budget, too.
    assert set(run(budget_seconds=1.0).steps) == {STOCK, *contest_names()}
    assert lab.trained == []


# Plans.


def test_a_plan_with_measurements_there_and_back(lab, run, tmp_path):
    lab.by_name({STOCK: took(3.0, first=1.25), "shifted": 1.0, "dense": FAILED})
    lab.steps_by_name({STOCK: 3.0, "shifted": 1.0})
    plan = run(per_layer=True)
    assert plan.workloads
    assert plan.batch_size == 2
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    fields = json.loads((tmp_path / "plan.json").read_text())
    for name in ("reason", "batch_size", "workloads", "steps"):
        del fields[name]
    assert Plan.from_json(json.dumps(fields)) == Plan(
        plan.conditions, plan.lowerings, plan.overrides
    )


def test_a_plan_is_written_through_a_link(tmp_path):
    plan = Plan(Conditions.current(), overrides={"dw1": "shifted"})
    (tmp_path / "target.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    plan.save(tmp_path / "link.json", overwrite=True)
    assert (tmp_path / "link.json").is_symlink()
    assert Plan.load(tmp_path / "target.json") == plan


PUBLISHED = sorted(pathlib.Path(__file__).parent.parent.glob("scripts/results/plan_*.json"))


@pytest.mark.backends("tensorflow")
def test_published_plans_load():
    assert PUBLISHED
    for path in PUBLISHED:
        fields = json.loads(path.read_text())
        plan = Plan.load(path)
        assert len(plan.workloads) == len(fields.get("problems", fields.get("workloads")))
        assert {name: step.median for name, step in plan.steps.items()} == {
            name: step.get("median") for name, step in fields["steps"].items()
        }
        assert Plan.from_json(plan.to_json()) == plan
        assert plan.workloads[0].layers[0] in str(plan)


@pytest.mark.parametrize(
    "broken", [{"steps": {"a": {"median": "x"}}}, {"workloads": [{}]}, {"format": 3}]
)
def test_broken_measurements_in_a_plan_are_refused(broken):
    fields = {**json.loads(Plan(Conditions.current()).to_json()), **broken}
    with pytest.raises(ValueError, match="Expected a plan"):
        Plan.from_json(json.dumps(fields))


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_plan_prints_as_tables(lab, run, per_layer):
    lab.by_name({STOCK: 3.0, "shifted": 1.0})
    lab.steps_by_name({STOCK: 3.0, "shifted": 1.0})
    plan = run(per_layer=per_layer)
    steps = {**plan.steps, "other": FAILED}
    plan = dataclasses.replace(plan, steps=steps, overrides={"elsewhere": "dense"})
    text = str(plan)
    ratio = "0.33 (0.33 to 0.33)"
    for words in ("shifted", "dw1", "8×8×4", "3×3, stride 2×2", ratio, "no luck", "elsewhere"):
        assert words in text
    assert ("stock ms" in text) == per_layer
    assert "elsewhere" in str(Plan(Conditions.current(), overrides={"elsewhere": "dense"}))


# What is not ours stays as it is.


def state_of(model):
    return {
        "classes": [type(place.layer) for place in walk_layers(model)],
        "attributes": [set(vars(place.layer)) for place in walk_layers(model)],
        "functions": [getattr(model, f"{kind}_function") for kind in ("train", "test", "predict")],
        "weights": [np.array(keras.ops.convert_to_numpy(v)).tolist() for v in model.variables],
        "compiled": [vars(model).get(n) for n in ("compiled", "optimizer", "loss", "_jit_compile")],
        "metrics": [m.name for m in model.metrics],
    }


@pytest.mark.parametrize("is_compiled", [True, False])
def test_the_model_is_not_touched(lab, tmp_path, monkeypatch, caplog, is_compiled):
    # The check of numbers is looked up, and training is real.
    monkeypatch.setattr("diagconv_tf.tuning.tuner.Contest", Contest)
    monkeypatch.setattr("diagconv_tf.tuning.tuner.ROUNDS_SECONDS", 1e-3)
    model = model_zoo.skip_connections()
    if is_compiled:
        compiled(model).make_train_function()
    before = state_of(model)
    plan = tune(model, 2, cache_dir=tmp_path)
    assert state_of(model) == before
    assert set(plan.steps) == {STOCK, *contest_names()}
    assert all(step.ok for step in plan.steps.values())
    assert ("is not compiled" in caplog.text) == (not is_compiled)


def test_a_rewritten_model_is_tuned_against_stock(lab, run):
    model = rewrite(compiled(model_zoo.skip_connections()), "dense")
    plan = run(model)
    assert lab.variants[STOCK] == {}
    assert {w.stock_op for w in plan.workloads} == {"depthwise_conv"}


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "batch_size.*at least 1"),
        ({"batch_size": 2.0}, "batch_size.*at least 1"),
        ({"budget_seconds": 0}, "above 0"),
        ({"jit_compile": "yes"}, "jit_compile"),
        ({"model": "model.keras"}, "a keras.Model"),
    ],
)
def test_wrong_arguments(run, arguments, words):
    with pytest.raises(ValueError, match=words):
        run(**arguments)


@pytest.mark.parametrize("jit_compile", ["auto", True])
def test_a_model_that_runs_eagerly_is_refused(lab, run, jit_compile):
    model = model_zoo.skip_connections()
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(ValueError, match="(?s)^Expected.*eagerly.*Received: run_eagerly=True$"):
        run(model, jit_compile=jit_compile)
    assert lab.trained == []


@pytest.mark.backends("jax")
@pytest.mark.parametrize("where", ["tune", "compile"])
def test_jax_that_does_not_compile_is_refused(lab, run, where):
    model, arguments = compiled(model_zoo.skip_connections()), {"jit_compile": False}
    if where == "compile":
        model.compile("sgd", "mse", **arguments)
        arguments = {}
    with pytest.raises(ValueError, match="^Expected.*eagerly.*Received: jit_compile=False"):
        run(model, **arguments)
    assert lab.trained == []


def with_integer_inputs():
    inputs = keras.Input((8, 8), dtype="int32")
    x = layers.Embedding(5, 4)(inputs)
    return keras.Model(inputs, model_zoo._head(layers.DepthwiseConv2D(3, name="dw")(x)))


def test_integer_inputs_need_data(lab, run):
    model = compiled(with_integer_inputs())
    with pytest.raises(ValueError, match=r"`data`.*int32"):
        run(model)
    assert lab.trained == []
    data = np.ones((2, 8, 8), "int32")
    assert run(model, data=data).steps[STOCK].ok
    assert keras.backend.standardize_dtype(sample_batch(model, 4, data).x.dtype) == "int32"


def test_a_model_that_cannot_be_trained_is_refused_before_measuring(lab, run):
    lab.step = lambda name, variant: FAILED
    with pytest.raises(ValueError, match=r"(?s)can be trained; pass a batch.*`data`.*no luck"):
        run(per_layer=True)
    assert lab.measured == []


def test_stock_that_fails_does_not_end_it(lab, run):
    lab.steps_by_name({STOCK: FAILED, "shifted": 1.0})
    plan = run()
    assert "stock fails" in plan.reason
    assert STOCK not in choices(plan).values()


# Batches.


@pytest.mark.parametrize(
    ("loss", "dtype", "shape"),
    [
        ("mse", "float32", (5, 3)),
        ("sparse_categorical_crossentropy", "int32", (5,)),
        (keras.losses.SparseCategoricalCrossentropy(), "int32", (5,)),
        (keras.losses.sparse_categorical_crossentropy, "int32", (5,)),
        (keras.losses.CategoricalCrossentropy(), "float32", (5, 3)),
    ],
)
def test_synthetic_targets_fit_the_loss(loss, dtype, shape):
    batch = sample_batch(compiled(model_zoo.operations(), loss), 5)
    assert tuple(batch.x.shape) == (5, 8, 8, 4)
    assert tuple(batch.y.shape) == shape
    assert keras.backend.standardize_dtype(batch.y.dtype) == dtype
    assert batch.synthetic == ("x", "y")


def test_synthetic_batches_have_the_models_structure():
    model = model_zoo.several_inputs_and_outputs()
    compiled(model, {"a": "sparse_categorical_crossentropy", "b": "mse"})
    batch = sample_batch(model, 5)
    assert {name: tuple(v.shape) for name, v in batch.x.items()} == {
        "left": (5, 8, 8, 4),
        "right": (5, 4),
    }
    assert {name: tuple(v.shape) for name, v in batch.y.items()} == {"a": (5,), "b": (5, 4)}


def test_given_batches_are_cut_or_repeated():
    model = compiled(model_zoo.operations())
    x, y, weight = np.random.rand(3, 8, 8, 4), np.random.rand(3, 3), np.arange(3.0)
    batch = sample_batch(model, 2, (x, y, weight))
    assert batch.synthetic == ()
    assert tuple(batch.y.shape) == (2, 3)
    batch = sample_batch(model, 4, (x, y, weight))
    repeated = keras.ops.convert_to_numpy(batch.sample_weight)
    assert repeated.tolist() == [0.0, 1.0, 2.0, 0.0]


# Candidates.


def test_candidates_are_possible_and_sensible():
    sizes, kernels = (4, 20, 32, 144, 512), ((3, 3), (7, 7), (15, 15))
    for groups, kernel_size, op in itertools.product(sizes, kernels, ("conv", "depthwise_conv")):
        spec = ConvSpec(2, 16, 16, groups, kernel_size=kernel_size)
        for kind, is_compiled in itertools.product(("cpu", "gpu"), (True, False)):
            where = dataclasses.replace(
                Conditions.current(False), device_kind=kind, compiled=is_compiled
            )
            names = layer_candidates(Workload(spec, op, ()), where)
            assert names[0] == STOCK
            assert len(set(names)) == len(names)
            assert all(not why_not(spec, name) for name in names[1:])
            assert ("native" in names) == (op == "conv" or BACKEND == "torch")
            assert ("shifted" in names) == (np.prod(kernel_size) <= (64 if is_compiled else 25))
            assert "dense" not in names or groups <= 128
            if kind == "cpu" and is_compiled:
                assert not any(name.startswith("diagonal_grouped") for name in names)


def test_blocks_as_wide_as_the_layer_are_dense():
    def names(spec, stock_op="depthwise_conv"):
        return layer_candidates(Workload(spec, stock_op, ()), Conditions.current(False))

    assert "diagonal:32" not in names(ConvSpec(2, 8, 8, 20))
    wide_groups = ConvSpec(2, 8, 8, 4, input_channels_per_group=32)
    assert "diagonal:32" not in names(wide_groups, "conv")


def test_the_variants_of_a_contest():
    inputs = keras.Input((16, 16, 64))
    x = layers.DepthwiseConv2D(3, name="small")(inputs)
    x = layers.DepthwiseConv2D(9, name="large")(x)
    x = layers.Conv2D(64, 3, groups=64, name="grouped")(x)
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(x))
    inspection = inspect_model(model, 2)

    def of(kind, is_compiled):
        where = dataclasses.replace(
            Conditions.current(False), device_kind=kind, compiled=is_compiled
        )
        return contest_variants(inspection, where)

    on_cpu, on_gpu = of("cpu", True), of("gpu", True)
    assert list(on_cpu) == ["native", "shifted", "diagonal:32"]
    # What a lowering does not suit stays stock.
    assert on_cpu["shifted"] == {"small": "shifted", "grouped": "shifted"}
    assert on_cpu["diagonal:32"] == dict.fromkeys(("small", "large", "grouped"), "diagonal:32")
    assert ("small" in on_cpu["native"]) == (BACKEND == "torch")
    assert on_cpu["native"]["grouped"] == "native"
    assert [*on_gpu][2:] == [
        "diagonal_grouped:32",
        "native/native/shifted",
        "native/native/diagonal:32",
        "diagonal:32",
    ]
    # On a CPU blocks compete only where shifts leave a layer out.
    rows = tuple(row for row in inspection.rows if row.path != "large")
    inspection = dataclasses.replace(inspection, rows=rows)
    assert "diagonal:32" not in of("cpu", True)
    assert "diagonal:32" in of("gpu", True)
    for variants in (on_cpu, on_gpu):
        assert all(list(variants.values()).count(v) == 1 for v in variants.values())
