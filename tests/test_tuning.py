"""tune: what it measures, what it decides, and what it leaves alone."""

import dataclasses
import itertools
import json

import keras
import numpy as np
import pytest
from keras import layers

from diagconv_tf import Conditions, ConvSpec, Plan, inspect_model, rewrite, tune
from diagconv_tf.lowerings import Diagonal, Shifted, why_not
from diagconv_tf.measurements import WRONG_NUMBERS, Measured
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.spec import PASSES, STOCK
from diagconv_tf.tuning.candidates import first_candidates, further_candidates
from diagconv_tf.tuning.choosing import choose_lowering, choose_variant
from diagconv_tf.tuning.keys import of_problem, of_training_step
from diagconv_tf.tuning.measuring import ProblemBench, tolerance
from diagconv_tf.tuning.problems import Problem, similarity
from diagconv_tf.tuning.pruning import first_samples
from diagconv_tf.tuning.sample_batch import sample_batch
from diagconv_tf.tuning.training_bench import TrainingBench
from tests import model_zoo
from tests.fake_clock import FakeClock
from tests.fake_lab import FAILED, FakeLab, took
from tests.numerics import BACKEND

WRONG = Measured(error=f"{WRONG_NUMBERS}: relative error 1, above 0")

#: Problems of `model_zoo.skip_connections`: two, one layer each.
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


# Decisions, by looked-up times.


def test_the_fastest_lowering_wins(lab, run):
    lab.by_name({STOCK: 3.0, "shifted": 1.0, "dense": 2.0})
    lab.steps_by_name({STOCK: 3.0, "plan": 1.0})
    plan = run()
    assert choices(plan) == dict.fromkeys(PATHS, "shifted")
    assert lab.variants["plan"] == dict.fromkeys(PATHS, "shifted")
    assert "plan: a step takes 3000 ms stock, 1000 ms plan" in plan.reason
    assert plan.steps["plan"].median == 1.0
    for problem in plan.problems:
        assert problem.passes["forward"]["shifted"].median == 1.0
        assert problem.reason == "shifted: 3000 ms against stock's 9000 ms"


def test_each_pass_has_its_own_winner(lab, run):
    lab.by_name({STOCK: 3.0, "shifted": 2.0, ("kernel_gradient", "dense"): 1.0})
    lab.steps_by_name({STOCK: 3.0, "plan": 1.0})
    plan = run()
    mixed = {"forward": "shifted", "input_gradient": "shifted", "kernel_gradient": "dense"}
    assert choices(plan) == dict.fromkeys(PATHS, mixed)
    rewritten = rewrite(model_zoo.skip_connections(), plan)
    assert {row.lowering["kernel_gradient"] for row in inspect_model(rewritten).rows} == {"dense"}


def test_stock_in_one_pass_is_native_where_that_is_the_same(lab, run):
    lab.by_name({STOCK: 3.0, "shifted": 1.0, ("forward", STOCK): 0.5, "native": 8.0})
    lab.steps_by_name({STOCK: 3.0, "plan": 1.0})
    chosen = choices(run())["dw1"]
    # On PyTorch Keras moves axes around its op.
    expected = "shifted" if BACKEND == "torch" else "native"
    assert (chosen if isinstance(chosen, str) else chosen["forward"]) == expected


def test_every_problem_is_measured_once_the_largest_first(lab, run):
    inputs = keras.Input((8, 8, 4))
    x = inputs
    for index in range(3):
        x = layers.DepthwiseConv2D(3, padding="same", name=f"dw{index}")(x)
    x = layers.DepthwiseConv2D(5, padding="same", name="large")(x)
    model = compiled(keras.Model(inputs, layers.GlobalAveragePooling2D()(x)))
    plan = run(model)
    assert [problem.layers for problem in plan.problems] == [("dw0", "dw1", "dw2"), ("large",)]
    assert len(set(lab.measured)) == len(lab.measured)
    assert {pass_name for _, pass_name, _ in lab.measured} == set(PASSES)


def test_failures_are_results_and_never_chosen(lab, run):
    lab.by_name({STOCK: 3.0, "shifted": FAILED, "dense": 2.0, "native": FAILED})
    lab.steps_by_name({STOCK: 3.0, "plan": 1.0})
    plan = run()
    assert choices(plan) == dict.fromkeys(PATHS, "dense")
    assert plan.problems[0].passes["forward"]["shifted"] == FAILED
    assert "shifted" not in lab.variants
    # And if all fail, stock is left.
    lab.by_name({STOCK: 3.0}, default=FAILED)
    assert set(choices(run(refresh=True)).values()) == {STOCK}


@pytest.mark.parametrize(
    ("stock", "other", "winner"),
    [
        (took(1.0), took(0.5), "plan"),
        (took(1.0), took(1.0), STOCK),
        (took(1.0), took(0.99), STOCK),  # Less than 2 %.
        (took(1.0), took(0.97), "plan"),
        (took(1.0, spread=0.1), took(0.95), STOCK),
        (took(1.0), took(0.95, spread=0.1), STOCK),
        (took(1.0, spread=0.1), took(0.8, spread=0.1), "plan"),
        (took(1.0), took(2.0), STOCK),
        (took(1.0), FAILED, STOCK),
        (FAILED, took(2.0), "plan"),
        # Three times the first step is fine; more must be paid back in 1000 steps.
        (took(1.0, first=10.0), took(0.97, first=30.0), "plan"),
        (took(1.0, first=10.0), took(0.97, first=31.0), "plan"),
        (took(1.0, first=10.0), took(0.97, first=50.0), STOCK),
        (took(1.0, first=10.0), took(0.5, first=50.0), "plan"),
        (took(0.01, first=10.0), took(0.005, first=50.0), STOCK),
    ],
)
def test_the_whole_model_decides(lab, run, stock, other, winner):
    assert choose_variant({STOCK: stock, "plan": other}).name == winner
    lab.by_name({STOCK: 3.0, "shifted": 1.0})
    lab.step = lambda name, variant: {STOCK: stock, "plan": other}.get(name, other)
    plan = run()
    assert set(choices(plan).values()) == {"shifted" if winner == "plan" else STOCK}
    assert plan.reason.startswith(f"{winner}: ")
    assert {**plan.steps} == {STOCK: stock, "plan": other}
    assert {problem.choice for problem in plan.problems} == {"shifted"}


def test_one_lowering_for_all_layers_may_beat_the_plan(lab, run):
    def layer(problem, pass_name, name):
        fast = "shifted" if problem.spec.strides == (1, 1) else "dense"
        return took({fast: 1.0, STOCK: 9.0}.get(name, 1.2))

    lab.layer = layer
    lab.steps_by_name({STOCK: 3.0, "plan": 2.0, "dense": 1.0, "shifted": 1.5})
    plan = run()
    assert lab.variants["plan"] == {"dw1": "shifted", "dw2": "dense"}
    assert lab.variants["dense"] == dict.fromkeys(PATHS, "dense")
    assert choices(plan) == dict.fromkeys(PATHS, "dense")
    assert set(plan.steps) == {STOCK, "plan", "dense", "shifted"}


def test_what_is_not_promising_is_not_trained(lab, run):
    lab.by_name({STOCK: 3.0, "shifted": 1.0, "dense": 2.0})
    run()
    # All layers have "shifted" in the plan.
    assert list(lab.variants) == [STOCK, "plan"]


@pytest.mark.parametrize("near", [True, False])
def test_other_sizes_of_blocks_are_tried_where_blocks_are_near_the_best(lab, run, near):
    inputs = keras.Input((8, 8, 64))
    x = layers.DepthwiseConv2D(3, name="dw")(inputs)
    lab.by_name({STOCK: 3.0, "shifted": 1.0, "diagonal:32": 1.4 if near else 1.6})
    run(compiled(keras.Model(inputs, layers.GlobalAveragePooling2D()(x))))
    tried = {name for _, _, name in lab.measured}
    assert ({"diagonal:16", "dense"} <= tried) == near
    assert {STOCK, "shifted", "diagonal:32"} <= tried


def test_where_stock_wins_every_layer_there_is_no_plan_to_time(lab, run):
    lab.by_name({STOCK: 1.0})
    plan = run()
    assert list(lab.variants) == [STOCK]
    assert set(choices(plan).values()) == {STOCK}
    assert plan.reason.startswith("stock: ")


TIME = 0.010


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        ({STOCK: took(TIME), "shifted": took(TIME / 2)}, "shifted"),
        ({STOCK: took(TIME), "shifted": took(TIME * 0.99)}, STOCK),
        ({STOCK: took(TIME, 0.004), "shifted": took(TIME * 0.9, 0.004)}, STOCK),
        ({STOCK: took(TIME, first=0.1), "shifted": took(TIME / 2, first=0.3)}, "shifted"),
        # 10 s of compilation for 5 ms a step.
        ({STOCK: took(TIME, first=0.1), "shifted": took(TIME / 2, first=10.0)}, STOCK),
        ({STOCK: took(TIME, first=0.1), "shifted": took(TIME / 2, first=4.0)}, "shifted"),
        # The faster of two may cost more than it brings.
        (
            {
                STOCK: took(TIME, first=0.1),
                "diagonal:16": took(TIME * 0.4, first=5.0),
                "shifted": took(TIME / 2, first=0.2),
            },
            "shifted",
        ),
        ({STOCK: FAILED, "shifted": took(TIME)}, "shifted"),
        ({STOCK: took(TIME), "shifted": FAILED}, STOCK),
    ],
)
def test_the_choice_for_one_problem(times, wanted):
    assert choose_lowering(dict.fromkeys(PASSES, times), native_is_stock=True).name == wanted


def test_two_classes_may_pose_one_problem(lab, run):
    inputs = keras.Input((8, 8, 4))
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(inputs)
    x = layers.Conv2D(4, 3, groups=4, padding="same", name="grouped")(x)
    model = compiled(keras.Model(inputs, layers.GlobalAveragePooling2D()(x)))

    def layer(problem, pass_name, name):
        slow = {STOCK: 9.0} if problem.stock_op == "conv" else {}
        return took({STOCK: 1.0, "native": 1.0, **slow}.get(name, 5.0))

    lab.layer = layer
    lab.steps_by_name({STOCK: 3.0, "plan": 1.0})
    plan = run(model)
    assert {problem.stock_op for problem in plan.problems} == {"conv", "depthwise_conv"}
    assert choices(plan, model) == {"depthwise": STOCK, "grouped": "native"}
    assert len(plan.overrides) == 1


def test_open_sizes_are_planned_by_path(lab, run):
    inputs = keras.Input((None, None, 4))
    x = layers.DepthwiseConv2D(3, padding="same", name="dw1")(inputs)
    x = layers.DepthwiseConv2D(3, padding="same", name="dw2")(layers.MaxPooling2D()(x))
    model = compiled(keras.Model(inputs, layers.GlobalAveragePooling2D()(x)))
    with pytest.raises(ValueError, match="a sample batch as `data`"):
        run(model)
    lab.layer = lambda problem, pass_name, name: took(
        {STOCK: 9.0, "shifted" if problem.spec.height == 8 else "dense": 1.0}.get(name, 5.0)
    )
    lab.steps_by_name({STOCK: 3.0, "plan": 1.0})
    plan = run(model, data=np.zeros((2, 8, 8, 4), "float32"))
    assert choices(plan, model) == {"dw1": "shifted", "dw2": "dense"}


def test_nothing_to_rewrite_is_a_plan_that_says_so(lab, run):
    inputs = keras.Input((4,))
    plan = run(compiled(keras.Model(inputs, layers.Dense(2)(inputs))))
    assert {*plan.lowerings, *plan.overrides, *lab.measured, *lab.variants} == set()
    assert "No convolution" in plan.reason


# Time.


def ladder(count):
    """A model with `count` problems; the first has the most FLOPs."""
    inputs = keras.Input((16, 16, 4))
    x = inputs
    for index in range(count):
        x = layers.DepthwiseConv2D(3, padding="valid", name=f"dw{index}")(x)
    return compiled(keras.Model(inputs, layers.GlobalAveragePooling2D()(x)))


def test_a_budget_leaves_out_the_small_problems_and_keeps_the_comparison(lab, run):
    lab.by_name({STOCK: 9.0, "shifted": 1.0})
    lab.step = lambda name, variant: took(1.0 if name == STOCK else 0.1, first=10.0)
    lab.seconds, lab.first_step_seconds = 2.0, 10.0
    plan = run(ladder(6), budget_seconds=70.0)
    done = [problem.layers[0] for problem in plan.problems if problem.passes]
    assert done == [f"dw{index}" for index in range(len(done))]
    assert 2 <= len(done) < 6
    assert lab.clock.now <= 70.0
    assert {STOCK, "plan"} <= set(plan.steps)
    # What was left out has the choice of what was measured, and says so.
    assert lab.variants["plan"] == {f"dw{index}": "shifted" for index in range(6)}
    assert "no time was left" in plan.problems[-1].reason
    assert plan.problems[-1].passes == {}


def test_a_budget_that_is_far_too_small_still_compares(lab, run):
    lab.by_name({STOCK: 9.0, "shifted": 1.0})
    lab.seconds, lab.first_step_seconds = 2.0, 10.0
    plan = run(ladder(3), budget_seconds=1.0)
    assert lab.measured == []
    assert list(plan.steps) == [STOCK]
    assert set(choices(plan, ladder(3)).values()) == {STOCK}
    assert lab.budgets[0] > 0


def test_without_a_budget_everything_is_measured(lab, run):
    lab.seconds, lab.first_step_seconds = 1e6, 1e6
    plan = run(ladder(4))
    assert all(set(problem.passes) == set(PASSES) for problem in plan.problems)


# The cache.


def test_a_warm_cache_measures_nothing(lab, run):
    lab.by_name({STOCK: 3.0, "shifted": 1.0, "dense": WRONG})
    lab.steps_by_name({STOCK: 3.0, "plan": 1.0})
    cold = run()
    done = len(lab.measured), len(lab.trained)
    assert done[0] > 0
    assert run() == cold
    assert (len(lab.measured), len(lab.trained)) == done
    run(refresh=True)
    assert (len(lab.measured), len(lab.trained)) == (2 * done[0], 2 * done[1])


def test_what_failed_is_measured_again(lab, run):
    lab.by_name({STOCK: 3.0, "shifted": 1.0, "dense": FAILED})
    lab.steps_by_name({STOCK: 3.0, "plan": 1.0})
    run()
    assert "dense" in {name for _, _, name in lab.measured}
    lab.measured.clear()
    # Even without time, what did not fail is known.
    plan = run(budget_seconds=1e-9)
    assert lab.measured == []
    assert choices(plan) == dict.fromkeys(PATHS, "shifted")
    lab.by_name({STOCK: 3.0, "shifted": 1.0, "dense": 0.5})
    assert choices(run()) == dict.fromkeys(PATHS, "dense")
    assert {name for _, _, name in lab.measured} == {"dense"}


def test_steps_of_which_one_failed_are_timed_again_together(lab, run):
    lab.by_name({STOCK: 3.0, "shifted": 1.0})
    lab.steps_by_name({STOCK: 3.0, "plan": FAILED})
    assert set(choices(run()).values()) == {STOCK}
    lab.trained.clear()
    lab.steps_by_name({STOCK: 3.0, "plan": 1.0})
    assert choices(run()) == dict.fromkeys(PATHS, "shifted")
    assert {STOCK, "plan"} <= set(lab.variants)
    lab.trained.clear()
    run()
    assert lab.trained == []


@pytest.mark.parametrize(
    "change",
    ["batch size", "optimizer", "loss", "another layer", "trainable", "compiled", "environment"],
)
def test_what_times_depend_on_is_measured_again(lab, run, monkeypatch, change):
    lab.steps_by_name({STOCK: 3.0, "plan": 1.0})
    run()
    trained = len(lab.trained)
    run()
    assert len(lab.trained) == trained
    model, arguments = compiled(model_zoo.skip_connections()), {}
    if change == "batch size":
        arguments = {"batch_size": 3}
    elif change == "optimizer":
        model.compile("adam", "mse", jit_compile=COMPILED)
    elif change == "loss":
        model.compile("sgd", "mae", jit_compile=COMPILED)
    elif change == "another layer":
        outputs = layers.Activation("relu")(model.output)
        model = compiled(keras.Model(model.input, outputs))
    elif change == "trainable":
        model.get_layer("head").trainable = False
    elif change == "compiled":
        if BACKEND == "jax":
            pytest.skip("on JAX nothing else is tuned")
        arguments = {"jit_compile": True}
    elif change == "environment":
        monkeypatch.setenv("XLA_FLAGS", "--xla_something")
    run(model, **arguments)
    assert len(lab.trained) > trained


def test_names_that_keras_counts_up_do_not_matter():
    def key():
        model = compiled(model_zoo.skip_connections())
        conditions = Conditions.current(False)
        return of_training_step(model, inspect_model(model, 2), None, conditions, {"a": {}})

    first, second = key(), key()
    assert first == second
    assert json.loads(json.dumps(first)) == first


def test_lowerings_of_a_problem_are_known_whatever_the_layers_class():
    spec = ConvSpec(2, 8, 8, 4)
    conditions = Conditions.current(False)
    problems = [Problem(spec, op) for op in ("conv", "depthwise_conv")]
    stock, other = ([of_problem(p, n, conditions) for p in problems] for n in (STOCK, "lowerings"))
    assert stock[0] != stock[1]
    assert other[0] == other[1]


# Plans.


def test_a_plan_with_measurements_there_and_back(lab, run, tmp_path):
    lab.by_name({STOCK: took(3.0, 0.5, first=1.25), "shifted": 1.0, "dense": FAILED})
    lab.steps_by_name({STOCK: 3.0, "plan": 1.0})
    plan = run()
    assert plan.problems
    assert plan.batch_size == 2
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    text = (tmp_path / "plan.json").read_text()
    # A line for each thing measured, so that plans can be compared by eye.
    assert '"shifted": {"median": 1.0, "p10": 1.0, "p90": 1.0, "count": 9' in text
    assert max(map(len, text.splitlines())) <= 160
    fields = json.loads(text)
    for name in ("reason", "batch_size", "problems", "steps"):
        del fields[name]
    assert Plan.from_json(json.dumps(fields)) == Plan(
        plan.conditions, plan.lowerings, plan.overrides
    )


@pytest.mark.parametrize("broken", [{"steps": {"a": {"median": "x"}}}, {"problems": [{}]}])
def test_broken_measurements_in_a_plan_are_refused(broken):
    fields = {**json.loads(Plan(Conditions.current()).to_json()), **broken}
    with pytest.raises(ValueError, match="Expected a plan"):
        Plan.from_json(json.dumps(fields))


def test_a_plan_prints_as_tables(lab, run):
    lab.by_name({STOCK: 3.0, "shifted": 1.0})
    lab.steps_by_name({STOCK: 3.0, "plan": 1.0, "dense": FAILED})
    plan = dataclasses.replace(run(), overrides={"elsewhere": "dense"})
    text = str(dataclasses.replace(plan, steps={**plan.steps, "dense": FAILED}))
    for words in ("shifted", "dw1", "8×8×4", "3×3, stride 2×2", "0.33", "no luck", "elsewhere"):
        assert words in text
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
    # Layers are looked up, and training is real.
    monkeypatch.setattr("diagconv_tf.tuning.tuner.TrainingBench", TrainingBench)
    lab.by_name({STOCK: 3.0, "shifted": 1.0})
    model = model_zoo.skip_connections()
    if is_compiled:
        compiled(model).make_train_function()
    before = state_of(model)
    plan = tune(model, 2, cache_dir=tmp_path)
    assert state_of(model) == before
    assert set(plan.steps) == {STOCK, "plan"}
    assert all(step.ok for step in plan.steps.values())
    assert ("is not compiled" in caplog.text) == (not is_compiled)


def test_one_lowering_for_all_spares_the_layers_that_it_was_not_measured_for(lab, run):
    def layer(problem, pass_name, name):
        if problem.spec.strides == (1, 1):  # Blocks are far from the best: no others are tried.
            return took({STOCK: 1.0}.get(name, 9.0))
        return took({STOCK: 9.0, "diagonal:16": 1.0, "diagonal:32": 1.2}.get(name, 5.0))

    lab.layer = layer
    inputs = keras.Input((8, 8, 64))
    x = layers.DepthwiseConv2D(3, name="dw1")(inputs)
    x = layers.DepthwiseConv2D(3, strides=2, name="dw2")(x)
    run(compiled(keras.Model(inputs, layers.GlobalAveragePooling2D()(x))))
    assert lab.variants["plan"] == {"dw2": "diagonal:16"}
    assert not any("dw1" in variant for variant in lab.variants.values())


def test_a_rewritten_model_is_tuned_against_stock(lab, run):
    lab.by_name({STOCK: 3.0, "shifted": 1.0})
    model = rewrite(compiled(model_zoo.skip_connections()), "dense")
    plan = run(model)
    assert lab.variants[STOCK] == {}
    assert {p.stock_op for p in plan.problems} == {"depthwise_conv"}


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "batch_size.*>= 1"),
        ({"batch_size": 2.0}, "batch_size.*>= 1"),
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
    assert lab.measured == []


@pytest.mark.backends("jax")
@pytest.mark.parametrize("where", ["tune", "compile"])
def test_jax_that_does_not_compile_is_refused(lab, run, where):
    model, arguments = compiled(model_zoo.skip_connections()), {"jit_compile": False}
    if where == "compile":
        model.compile("sgd", "mse", **arguments)
        arguments = {}
    with pytest.raises(ValueError, match="^Expected.*eagerly.*Received: jit_compile=False"):
        run(model, **arguments)
    assert lab.measured == []


def with_integer_inputs():
    inputs = keras.Input((8, 8), dtype="int32")
    x = layers.Embedding(5, 4)(inputs)
    return keras.Model(inputs, model_zoo._head(layers.DepthwiseConv2D(3, name="dw")(x)))


def test_integer_inputs_need_data(lab, run):
    model = compiled(with_integer_inputs())
    with pytest.raises(ValueError, match=r"`data`.*int32"):
        run(model)
    assert lab.measured == []
    data = np.ones((2, 8, 8), "int32")
    assert run(model, data=data).steps[STOCK].ok
    assert keras.backend.standardize_dtype(sample_batch(model, 4, data).x.dtype) == "int32"


def test_a_model_that_cannot_be_trained_is_refused_before_measuring(lab, run):
    lab.step = lambda name, variant: FAILED
    with pytest.raises(ValueError, match=r"(?s)can be trained; pass a batch.*`data`.*no luck"):
        run()
    assert lab.measured == []


def test_stock_that_fails_does_not_end_it(lab, run):
    lab.by_name({STOCK: FAILED, "native": 1.0})
    lab.steps_by_name({STOCK: FAILED})
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
def test_made_up_targets_fit_the_loss(loss, dtype, shape):
    batch = sample_batch(compiled(model_zoo.operations(), loss), 5)
    assert tuple(batch.x.shape) == (5, 8, 8, 4)
    assert tuple(batch.y.shape) == shape
    assert keras.backend.standardize_dtype(batch.y.dtype) == dtype
    assert batch.synthetic == ("x", "y")


def test_several_inputs_and_outputs_are_made_up_in_their_structure():
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


def names_for(spec, stock_op="depthwise_conv", **conditions):
    conditions = dataclasses.replace(Conditions.current(False), **conditions)
    problem = Problem(spec, stock_op)
    return first_candidates(problem, conditions) + further_candidates(problem, conditions)


def test_candidates_are_possible_and_sensible():
    sizes, kernels = (4, 20, 32, 144, 512), ((3, 3), (7, 7), (15, 15))
    for groups, kernel_size, op in itertools.product(sizes, kernels, ("conv", "depthwise_conv")):
        spec = ConvSpec(2, 16, 16, groups, kernel_size=kernel_size)
        for kind, is_compiled in itertools.product(("cpu", "gpu"), (True, False)):
            where = dataclasses.replace(
                Conditions.current(False), device_kind=kind, compiled=is_compiled
            )
            problem = Problem(spec, op)
            first, further = first_candidates(problem, where), further_candidates(problem, where)
            assert first[0] == STOCK
            names = first + further
            assert len(set(names)) == len(names)
            assert all(not why_not(spec, name) for name in names[1:])
            assert ("native" in names) == (op == "conv" or BACKEND == "torch")
            assert ("shifted" in names) == (np.prod(kernel_size) <= (64 if is_compiled else 25))
            assert "dense" not in names or groups <= 128
            if kind == "cpu" and is_compiled:
                assert not any(name.startswith("diagonal_grouped") for name in names)


def test_blocks_as_wide_as_the_layer_are_dense():
    assert "diagonal:32" not in names_for(ConvSpec(2, 8, 8, 20))
    wide_groups = ConvSpec(2, 8, 8, 4, input_channels_per_group=32)
    assert not {"diagonal:16", "diagonal:32"} & set(names_for(wide_groups, "conv"))


def test_similar_problems_have_the_same_window():
    spec = ConvSpec(2, 16, 16, 32)
    assert similarity(spec, spec) == 0
    assert similarity(spec, spec.replace(groups=64)) == 1
    assert similarity(spec, spec.replace(height=32, width=32)) == 2
    assert similarity(spec, spec.replace(strides=(2, 2))) == np.inf


# Real measuring.

SMALL = ConvSpec(2, 6, 5, 4, padding="same")


def bench(spec=SMALL, stock_op="depthwise_conv"):
    return ProblemBench(Problem(spec, stock_op), Conditions.current(False))


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("stock_op", ["depthwise_conv", "conv"])
def test_all_candidates_of_a_problem_are_measured(pass_name, stock_op):
    names = [STOCK, "native", "shifted", "diagonal:2", "dense"]
    measured = bench(stock_op=stock_op).measure(pass_name, names, rounds=2)
    assert list(measured) == names
    for name, result in measured.items():
        assert result.ok, (name, result)
        assert result.first_seconds > 0


@pytest.mark.parametrize("wrong_pass", PASSES)
def test_wrong_numbers_never_win(monkeypatch, wrong_pass):
    right = getattr(Shifted, wrong_pass)
    monkeypatch.setattr(
        Shifted, wrong_pass, lambda self, spec, *args: right(self, spec, *args) * 1.001
    )
    # Another spec for each pass: functions with gradients of their own are kept.
    problem_bench = bench(SMALL.replace(batch=3 + PASSES.index(wrong_pass)))
    for pass_name in PASSES:
        measured = problem_bench.measure(pass_name, [STOCK, "shifted"], rounds=1)
        assert measured[STOCK].ok
        if pass_name == wrong_pass:
            assert "wrong numbers: relative error 1.00e-03" in measured["shifted"].error
            assert not measured["shifted"].ok
            assert measured["shifted"].lasts
        else:
            assert measured["shifted"].ok


def test_not_a_number_is_wrong(monkeypatch):
    monkeypatch.setattr(
        Shifted, "forward", lambda self, spec, inputs, kernel: inputs * float("nan")
    )
    measured = bench(SMALL.replace(batch=7)).measure("forward", [STOCK, "shifted"], rounds=1)
    assert "wrong numbers" in measured["shifted"].error


def test_what_raises_has_its_error(monkeypatch):
    def fail(*args):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(Diagonal, "forward", fail)
    measured = bench().measure("forward", [STOCK, "dense"], rounds=1)
    assert "out of luck" in measured["dense"].error
    assert "\n" not in measured["dense"].error
    assert not measured["dense"].lasts
    assert measured[STOCK].ok


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_are_measured_and_checked(dtype):
    spec = SMALL.replace(compute_dtype=dtype)
    if dtype == "float64" and BACKEND == "jax":
        pytest.skip("JAX makes float64 float32")
    measured = bench(spec).measure("kernel_gradient", [STOCK, "shifted", "dense"], rounds=1)
    assert all(result.ok for result in measured.values()), measured


def test_tolerances_grow_with_the_sum_and_the_roundoff():
    here = dataclasses.replace(Conditions.current(), device_kind="cpu")
    small, large = SMALL, SMALL.replace(height=60, width=50)
    assert tolerance(small, "forward", here) == tolerance(large, "forward", here) < 3e-6
    assert tolerance(small, "kernel_gradient", here) < tolerance(large, "kernel_gradient", here)
    assert tolerance(large, "kernel_gradient", here) < 3e-5
    half = small.replace(compute_dtype="float16")
    assert 5e-3 < tolerance(half, "forward", here) < 1e-2
    gpu = dataclasses.replace(here, device_kind="gpu")
    assert 5e-3 < tolerance(small, "forward", gpu) < 1e-2


def test_what_is_far_from_the_best_is_not_timed_further(monkeypatch):
    clock = FakeClock()
    seconds = {STOCK: 10.0, "native": 1.0, "shifted": 2.9}
    problem_bench = ProblemBench(Problem(SMALL, "depthwise_conv"), Conditions.current(False), clock)
    make = problem_bench._function

    def slow(name, *args):
        function = make(name, *args)

        def run():
            clock.advance(seconds[name])
            return function()

        return run

    monkeypatch.setattr(problem_bench, "_function", slow)
    measured = problem_bench.measure("forward", list(seconds), rounds=5, seconds=1e9)
    assert {name: m.count for name, m in measured.items()} == {STOCK: 1, "native": 5, "shifted": 5}
    assert {name: m.median for name, m in measured.items()} == seconds
    # A best that is known from before counts as well.
    measured = problem_bench.measure("forward", ["shifted"], best=0.5, rounds=5, seconds=1e9)
    assert measured["shifted"].count == 1


def test_one_interruption_of_short_calls_drops_nothing():
    clock = FakeClock()
    # First calls, first samples, four more; then only long calls are not repeated.
    seconds = {"short": [9.0, 0.15, 0.01, 0.01, 0.01, 0.01, 0.01], "long": [9.0, 0.5]}

    def function(name):
        return lambda: clock.advance(seconds[name].pop(0))

    timings = first_samples({name: function(name) for name in seconds}, clock)
    assert seconds == {"short": [], "long": []}
    assert timings["short"].first_seconds == pytest.approx(9.0)
    assert timings["short"].median == pytest.approx(0.01)
    assert timings["long"].median == pytest.approx(0.5)


def test_what_fails_when_it_is_repeated_has_failed():
    clock = FakeClock()
    calls = iter([None, None, None, ValueError("no luck")])

    def function():
        clock.advance(0.01)
        if error := next(calls):
            raise error

    assert "no luck" in str(first_samples({"short": function}, clock)["short"].error)


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
    model = compiled(model_zoo.own_training_step())
    # Another batch size each: "shifted" has functions that are kept.
    training = TrainingBench(model, 4 + jit_compile, None, jit_compile)
    monkeypatch.setattr("diagconv_tf.tuning.training_bench.DROP_ABOVE", 1e9)
    assert training.add(STOCK, {}).ok
    assert calls == []
    for name in ("shifted", "dense"):
        assert training.add(name, {"dw1": name}).ok
        assert set(calls) == {name}
        calls.clear()
    steps = training.time([STOCK, "dense", "shifted"], rounds=2)
    assert all(isinstance(step, Measured) and step.ok for step in steps.values())
    # Eager PyTorch reads the layers at each call, and must find the variant's.
    assert set(calls) == ({"shifted", "dense"} if BACKEND == "torch" else set())
