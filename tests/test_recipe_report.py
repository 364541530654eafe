"""What a recipe's report compares, with what, and that its numbers are of the same minutes."""

import dataclasses
import json
import pathlib
import re

import keras
import numpy as np
import pytest

import diagconv_tf
from diagconv_tf import Plan, rewrite
from recipes import comparing, optimizers, report, step_times
from recipes.choices import chose_stock, explain_choice
from recipes.comparing import KERAS_DEFAULT, ComparedSteps, compare_steps
from recipes.config import Config
from recipes.data.synthetic import repeated_batch
from recipes.processes import Processes
from recipes.report import RunReport, environment
from recipes.results import Trained, VariantResult
from recipes.step_times import StepTimes, Timed, time_in_turn
from recipes.variants import Variant
from tests.fake_clock import FakeClock

one_backend = pytest.mark.backends("tensorflow")

BATCH = (
    np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("float32"),
    np.arange(4, dtype="int32"),
)


class Counting(keras.layers.Layer):
    """Counts its calls in Python: under a compiler, those that trace."""

    calls = 0

    def call(self, x):
        Counting.calls += 1
        return x


def network():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.DepthwiseConv2D(3, name="dw")(Counting()(inputs))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Dropout(0.5)(x))
    return keras.Model(inputs, keras.layers.Dense(6)(x))


def compiled(config=Config(), jit_compile="auto"):  # noqa: B008 - frozen.
    model = network()
    optimizers.compile_model(model, dataclasses.replace(config, jit_compile=jit_compile), 10)
    return model


def repeated():
    import tensorflow as tf

    return tf.data.Dataset.from_tensors(BATCH).repeat()


def batches():
    import tensorflow as tf

    data = tf.data.Dataset.from_tensors(BATCH).repeat()
    return data.map(lambda x, y: (x + 1, y)).prefetch(2)


# Times in turn


@one_backend
def test_what_times_tell():
    mine = StepTimes(((1.0, 3.0, 2.0), (4.0, 4.0, 5.0)), ((4.0, 4.0, 4.0), (5.0, 5.0, 5.0)))
    other = StepTimes(((4.0, 4.0, 4.0), (2.0, 2.0, 2.0)))
    # Of medians 2 and 4: the mean of 1 - 2/4 and 1 - 4/5.
    assert mine.input_wait == pytest.approx(0.35)
    compared = mine.compared_with(other)
    assert (compared.median, compared.lowest, compared.highest) == (1.25, 0.5, 2.0)
    assert str(compared) == "1.25 (0.50–2.00)"
    assert str(other.compared_with(other)) == "1.00"
    assert mine.percentile(50) == 3.5
    assert other.input_wait is None
    # A pipeline cannot be faster than no pipeline.
    assert StepTimes(((2.0,),), ((1.0,),)).input_wait == 0
    assert StepTimes.from_dict(json.loads(json.dumps(dataclasses.asdict(mine)))) == mine


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_models_that_are_timed_stay_as_they_are_and_are_not_compiled_again(momentum):
    models = {name: compiled(Config(ema_momentum=momentum)) for name in ("a", "b")}
    for model in models.values():
        model.fit(batches(), steps_per_epoch=2, verbose=0)
    state = [(*m.variables, *m.optimizer.variables) for m in models.values()]
    before = [np.array(keras.ops.convert_to_numpy(v)) for part in state for v in part]
    calls = Counting.calls
    timed = {name: Timed(model, repeated, batches) for name, model in models.items()}
    found = time_in_turn(timed, turns=2, steps=3)
    if keras.backend.backend() != "torch":
        assert Counting.calls == calls
    for times in found.values():
        assert [len(turn) for turn in times.turns] == [3, 3]
        assert [len(turn) for turn in times.input_turns] == [3, 3]
        assert min(times.samples) > 0
    after = [keras.ops.convert_to_numpy(v) for part in state for v in part]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


@one_backend
@pytest.mark.parametrize("budget", [1e9, 25.0, 0.0])
def test_variants_take_turns_within_a_budget(budget, monkeypatch):
    clock, order = FakeClock(), []

    def fit(model, dataset, steps, clock_):
        order.append((model, dataset, steps))
        clock.advance(2.0)
        return (1.0,) * steps

    monkeypatch.setattr(step_times, "_fit", fit)
    models = [compiled(), compiled()]
    timed = {
        "a": Timed(models[0], lambda: "there", lambda: "read"),
        "b": Timed(models[1], lambda: "there"),
    }
    found = time_in_turn(timed, turns=5, steps=4, budget_seconds=budget, clock=clock)
    turns = {1e9: 5, 25.0: 5, 0.0: 1}[budget]
    assert {len(times.turns) for times in found.values()} == {turns}
    a, b = models
    assert order[:2] == [(a, "there", 0), (b, "there", 0)]
    first = [(a, "there", 4), (a, "read", 4), (b, "there", 4)]
    second = [first[2], *first[:2]]
    assert order[2:] == ([*first, *second] * 3)[: 3 * turns]
    assert (len(found["a"].input_turns), found["b"].input_turns) == (turns, ())


@one_backend
def test_all_processes_make_the_turns_of_the_first(monkeypatch):
    monkeypatch.setattr(step_times, "_fit", lambda *_: (1.0,))
    answers = iter(["go on", "go on", "end"])
    found = time_in_turn({"a": Timed(compiled(), str)}, agreed=lambda mine: next(answers))
    assert len(found["a"].turns) == 2


# Keras's default is among them


def result(name, **values):
    timer = report.diagconv_tf.StepTimer().summary()
    return VariantResult(name, (2.0, 1.0), (0.5,), timer, (), **values)


@pytest.fixture
def timed_names(monkeypatch):
    """Names that take turns, which take no time."""
    found = []

    def time_in_turn(timed, agreed):
        found.append(list(timed))
        return {name: StepTimes(((1.0 + n,),)) for n, name in enumerate(timed)}

    monkeypatch.setattr(comparing, "time_in_turn", time_in_turn)
    return found


def compare(trained, file, make_default=lambda: pytest.fail("made")):
    return compare_steps(trained, make_default, lambda: repeated_batch(BATCH), file, Processes())


@pytest.mark.parametrize(
    ("names", "jit_compile", "expected"),
    [
        (("stock", "shifted"), "auto", ["stock", "shifted"]),
        (("shifted",), "auto", [KERAS_DEFAULT, "shifted"]),
        pytest.param(
            ("stock", "shifted"),
            "true",
            [KERAS_DEFAULT, "stock", "shifted"],
            marks=pytest.mark.skipif(
                keras.backend.backend() != "tensorflow", reason="it compiles by default, or cannot"
            ),
        ),
    ],
    ids=str,
)
def test_keras_default_takes_turns_too(
    names, jit_compile, expected, timed_names, tmp_path, monkeypatch
):
    default = keras.backend.backend() == "jax"  # As on a machine without a GPU.
    monkeypatch.setattr("diagconv_tf.keras_internals.resolve_jit_compile", lambda model: default)
    trained = [Trained(compiled(jit_compile=jit_compile), result(name)) for name in names]
    made = []
    steps = compare(trained, tmp_path / "times.json", lambda: made.append(1) or compiled())
    assert timed_names == [expected]
    assert list(steps.times) == expected
    assert steps.default == expected[0]
    assert bool(made) == (KERAS_DEFAULT in expected)
    # A finished run is not timed again; one with another variant is.
    old = [dataclasses.replace(each, is_new=False) for each in trained]
    assert compare(old, tmp_path / "times.json") == steps
    monkeypatch.setattr(comparing, "_is_default", lambda trained: trained.result.name == "other")
    compare([*old, Trained(compiled(), result("other"), False)], tmp_path / "times.json")
    assert len(timed_names) == 2


@one_backend
def test_a_variant_that_shares_the_model_of_stock_has_its_times(timed_names, tmp_path):
    model = compiled()
    trained = [Trained(model, result(name)) for name in ("stock", "auto")]
    steps = compare(trained, tmp_path / "times.json")
    assert timed_names == [["stock"]]
    assert steps.times["auto"] == steps.times["stock"]


@one_backend
def test_a_timing_that_fails_is_told(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(comparing, "time_in_turn", fail)
    steps = compare([Trained(compiled(), result("stock"))], tmp_path / "times.json")
    assert steps.times == {}
    assert steps.error == "the steps could not be timed: MemoryError: no room"
    text = written(tmp_path, steps=steps).to_markdown()
    assert "**Warning:** the steps could not be timed: MemoryError: no room." in text


@pytest.mark.parametrize("lowering", ["auto", "stock", "shifted", "plan of stock", "plan"])
def test_what_chose_stock_is_told(lowering):
    model = compiled()
    if lowering.startswith("plan"):
        choice = Plan.of_model(model if "stock" in lowering else rewrite(model, "shifted"))
        choice = dataclasses.replace(choice, reason="because")
    else:
        choice = lowering
    variant = Variant(lowering, choice)
    plan = variant.apply(model, Config())
    text = explain_choice(variant, model, plan)
    jax = keras.backend.backend() == "jax"
    assert chose_stock(variant, model) == (
        lowering == "plan of stock" or (lowering == "auto" and not jax)
    )
    if lowering == "auto":
        chosen = "shifted" if jax else "stock"
        assert re.fullmatch(rf"{chosen} \(measured: .*of stock's step.*\) for 1 of 1 layers", text)
    else:
        assert text == ("because" if lowering.startswith("plan") else "")


# The report


def written(folder, variants=None, **values):
    variants = variants or (result("stock", test_top5_accuracy=0.75), result("shifted"))
    return RunReport(Config(), folder, environment(False), variants, 0.5, **values)


@one_backend
def test_the_table_compares_with_keras_default(tmp_path):
    times = {
        KERAS_DEFAULT: StepTimes(((0.1, 0.1),)),
        "stock": StepTimes(((0.2, 0.2),)),
        "shifted": StepTimes(((0.05, 0.07, 0.06),), ((0.12, 0.12, 0.12),)),
    }
    found = written(tmp_path, steps=ComparedSteps(times, KERAS_DEFAULT))
    text = found.to_markdown()
    lines = [[c.strip() for c in x.split("|")[1:-1]] for x in text.splitlines() if x[:1] == "|"]
    table = {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}
    assert list(table) == [KERAS_DEFAULT, "stock", "shifted"]
    assert [row["of Keras's default"] for row in table.values()] == ["1.00", "2.00", "0.60"]
    assert table["shifted"]["median step (p10–p90)"] == "60.0 ms (52.0–68.0)"
    assert table["shifted"]["waits for input"] == "50 %"
    assert table["shifted"]["images/s"] == f"{64 / 0.06:.0f}"
    assert (table["stock"]["top-5"], table["shifted"]["top-5"]) == ("75.00 %", "–")
    assert table[KERAS_DEFAULT]["test accuracy"] == "–"
    for sentence in ("1.00 is Keras's default", "other roundings", "took turns"):
        assert sentence in text
    found.write()
    rows = json.loads((tmp_path / "report.json").read_text())["variants"]
    assert rows[2]["of_default"] == pytest.approx(0.6)


@one_backend
def test_where_stock_is_keras_default_it_is_said(tmp_path):
    steps = ComparedSteps({"stock": StepTimes(((0.1,),)), "shifted": StepTimes(((0.1,),))}, "stock")
    assert (
        "1.00 is `stock`, which is Keras's default here"
        in written(tmp_path, steps=steps).to_markdown()
    )


@one_backend
def test_the_picture_shows_the_times_of_the_table(tmp_path, monkeypatch):
    drawn = []

    def draw(title, variants, path):
        drawn.extend(variants)
        pathlib.Path(path).touch()

    monkeypatch.setattr(report, "draw_curves", draw)
    steps = ComparedSteps({"stock": StepTimes(((0.1, 0.2),))}, "stock")
    written(tmp_path, steps=steps).write()
    assert [variant.step_seconds for variant in drawn] == [(0.1, 0.2), ()]


@one_backend
def test_choices_and_warnings_are_printed_as_written(tmp_path, capsys):
    variants = (result("stock"), result("tune", choice="stock: a step takes 1 ms [sic]"))
    found = written(tmp_path, variants, warnings=("not exported",), head="new")
    found.print()
    printed = capsys.readouterr().out
    for text in ("`tune` chose: stock: a step takes 1 ms [sic]", "not exported"):
        assert text in printed
        assert text in found.to_markdown()
    assert "Classifier: new." in found.to_markdown()


def test_the_conditions_are_in_the_report(monkeypatch):
    found = environment(True)
    conditions = diagconv_tf.Conditions.current(True)
    assert found["device"] == f"{conditions.device_kind}: {conditions.device_name}"
    assert found["keras"] == f"keras {keras.__version__}"
    assert found["compiler"].startswith("with ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", found["date"])
    monkeypatch.setattr(report, "_commit", lambda: None)
    assert environment()["code"] == f"diagconv_tf {diagconv_tf.__version__}"
    monkeypatch.undo()
    commit = report._commit()  # None where the tests run from no checkout.
    assert commit is None or re.fullmatch(r"commit [0-9a-f]{12}( with changes)?", commit)
