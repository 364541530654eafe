"""`diagconv tune` and `diagconv cache`."""

import json

import keras
import pytest
from keras import layers

from diagconv_tf import Plan
from tests.fake_lab import STOCK, FakeLab
from tests.test_tuning import with_integer_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    inputs = keras.Input((8, 8, 4))
    x = layers.DepthwiseConv2D(3, padding="same", name="dw1")(inputs)
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))
    model.compile("sgd", "mse")
    model.save(folder / "model.keras")
    with_integer_inputs().save(folder / "integers.keras")
    (folder / "there.json").write_text("old")
    return folder


@pytest.fixture
def lab(monkeypatch):
    lab = FakeLab(monkeypatch)
    lab.by_name({STOCK: 3.0, "shifted": 1.0})
    lab.steps_by_name({STOCK: 3.0, "shifted": 1.0})
    return lab


@pytest.fixture
def run(lab, folder, command_in, tmp_path, monkeypatch):
    monkeypatch.setenv("DIAGCONV_CACHE_DIR", str(tmp_path / "cache"))
    return command_in(folder)


def test_tune_writes_a_plan_that_rewrite_takes(run, tmp_path):
    code, out, err = run("tune model.keras --batch_size=2 --out=@/plan.json")
    assert code == 0
    for words in ("dw1", "shifted", "1000"):
        assert words in out
    assert "1000 ms shifted" in err
    plan = Plan.load(tmp_path / "plan.json")
    assert list(plan.lowerings.values()) == ["shifted"]
    assert run("rewrite model.keras @/fast.keras --plan=@/plan.json")[0] == 0
    loaded = keras.models.load_model(tmp_path / "fast.keras")
    assert loaded.get_layer("dw1").lowering == "shifted"


def test_tune_as_json(run, tmp_path):
    code, out, _ = run("tune model.keras --batch_size=2 --out=@/plan.json --json")
    assert code == 0
    assert Plan.from_json(out) == Plan.load(tmp_path / "plan.json")


def test_options_arrive(run, lab):
    command = "tune model.keras --batch_size=2 --out=@/plan.json --overwrite"
    assert run(f"{command} --budget_seconds=1e-9 --cache_dir=@/own")[0] == 0
    assert list(lab.variants) == [STOCK]
    lab.trained.clear()
    assert run(command)[0] == 0
    done = len(lab.trained)
    assert done > 1
    assert run(command)[0] == 0
    assert len(lab.trained) == done
    assert run(f"{command} --refresh")[0] == 0
    assert len(lab.trained) == 2 * done
    assert lab.measured == []
    assert run(f"{command} --per_layer")[0] == 0
    assert lab.measured != []
    plan = json.loads(run(f"{command} --json --jit_compile=true")[1])
    assert plan["conditions"]["compiled"] is True


def test_the_cache_is_listed_and_cleared(run, tmp_path):
    assert "0 entries" in run("cache --list")[1]
    run("tune model.keras --batch_size=2 --out=@/plan.json --per_layer")
    code, out, _ = run("cache --list")
    assert code == 0
    assert "2 entries" in out
    for words in (str(tmp_path / "cache"), "3×3 on 2×8×8×4", "training steps of functional"):
        assert words in out
    content = json.loads(run("cache --list --json")[1])
    assert len(content["entries"]) == 2
    assert json.loads(run("cache --clear --json")[1])["removed"] == 2
    assert "0 removed" in run("cache --clear")[1]
    assert "0 entries" in run("cache --list --cache_dir=@/none")[1]


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("tune model.keras --out=@/a.json", 2, "--batch_size"),
        ("tune model.keras --batch_size=2", 2, "--out"),
        ("tune model.keras --batch_size=0 --out=@/a.json", 2, "whole number"),
        ("tune model.keras --batch_size=2 --out=there.json", 1, "--overwrite"),
        ("tune model.keras --batch_size=2 --out=@/no/a.json", 1, "existing folder"),
        ("tune model.keras --batch_size=2 --out=@/a.json --jit_compile=yes", 2, "invalid choice"),
        ("tune model.keras --batch_size=2 --out=@/a.json --budget_seconds=-1", 2, "above 0"),
        ("tune model.keras --batch_size=2 --out=@/a.json --budget_seconds=x", 2, "above 0"),
        ("tune integers.keras --batch_size=2 --out=@/a.json", 1, "`data`"),
        ("tune none.keras --batch_size=2 --out=@/a.json", 1, "no such file"),
        ("cache", 2, "--list"),
        ("cache --list --clear", 2, "not allowed with"),
    ],
)
def test_refusals(run, lab, tmp_path, line, code, words):
    found, out, err = run(line)
    assert (found, out) == (code, "")
    assert words in err
    assert "Traceback" not in err
    assert lab.trained == []
    assert not (tmp_path / "a.json").exists()


@pytest.mark.backends("jax")
def test_jax_that_does_not_compile_is_one_line(run, lab):
    code, out, err = run("tune model.keras --batch_size=2 --out=@/a.json --jit_compile=false")
    assert (code, out) == (1, "")
    assert "Received: jit_compile=False" in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["tune", "cache"])
def test_help_shows_examples(run, command):
    code, out, _ = run(f"{command} --help")
    assert code == 0
    assert f"examples:\n  diagconv {command}" in out
