"""The diagconv command: what it does, what it refuses, and how it says so."""

import json
import os
import re
import subprocess
import sys
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from diagconv_tf import Conditions, Plan, inspect_model
from diagconv_tf.text import summarize_error
from tests import model_zoo
from tests.numerics import BACKEND


def _small_model():
    inputs = keras.Input((8, 8, 4))
    x = layers.DepthwiseConv2D(3, padding="same", name="dw1")(inputs)
    x = layers.SeparableConv2D(5, 3, name="separable")(layers.BatchNormalization()(x))
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 4))
    model.fit(x, np.ones((4, 3)), verbose=0)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One of each file that the command may meet."""
    folder = tmp_path_factory.mktemp("models")
    model = _small_model()
    model.save(folder / "model.keras")
    model.save(folder / "model.h5")
    model_zoo.composite().save(folder / "composite.keras")
    model_zoo.nested_and_shared().save(folder / "shared.keras")
    inputs = keras.Input((8, 8, 4))
    keras.Model(inputs, layers.Lambda(lambda x: 2 * x)(inputs)).save(folder / "lambda.keras")
    content = (folder / "model.keras").read_bytes()
    (folder / "truncated.keras").write_bytes(content[: len(content) // 2])
    content = (folder / "model.h5").read_bytes()
    (folder / "truncated.h5").write_bytes(content[: len(content) // 2])
    (folder / "text.keras").write_text("not a model\n")
    (folder / "text.h5").write_text("not a model\n")
    (folder / "model.txt").write_text("not a model\n")
    with zipfile.ZipFile(folder / "other.keras", "w") as archive:
        archive.writestr("readme", "not a model")
    (folder / "saved_model").mkdir()
    (folder / "saved_model" / "saved_model.pb").write_bytes(b"")
    (folder / "empty").mkdir()
    (folder / "bad_plan.json").write_text("{}")
    Plan(Conditions.current(), overrides={"elsewhere": "shifted"}).save(folder / "other_plan.json")
    return folder


@pytest.fixture
def run(folder, command_in):
    return command_in(folder)


def load(path):
    return keras.models.load_model(path)


def lowerings(path):
    return {row.path: row.lowering for row in inspect_model(load(path)).rows}


def test_inspect(run):
    code, out, err = run("inspect model.keras")
    assert (code, err) == (0, "")
    for words in ("dw1", "separable", "DepthwiseConv2D", "stock"):
        assert words in out


def test_inspect_as_json(run):
    code, out, _ = run("inspect model.h5 --batch_size=4 --json")
    content = json.loads(out)
    assert code == 0
    assert content["batch_size"] == 4
    assert [row["path"] for row in content["rows"]] == ["dw1", "separable"]
    assert content["rows"][0]["flops"] == 2 * 4 * 64 * 4 * 9


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_rewrite_and_restore(run, folder, tmp_path, suffix):
    code, out, _ = run(f"rewrite model.{suffix} @/fast.{suffix} --lowering=shifted")
    assert code == 0
    assert "2 of 2" in out
    assert lowerings(tmp_path / f"fast.{suffix}") == {"dw1": "shifted", "separable": "shifted"}
    code, out, _ = run(f"restore @/fast.{suffix} @/stock.keras")
    assert code == 0
    stock, restored = load(folder / "model.keras"), load(tmp_path / "stock.keras")
    assert [type(a) for a in restored.layers] == [type(a) for a in stock.layers]
    assert all(map(np.array_equal, restored.get_weights(), stock.get_weights()))
    if suffix == "keras":
        assert restored.optimizer.iterations == stock.optimizer.iterations == 1
        assert all(
            np.array_equal(*map(keras.ops.convert_to_numpy, pair))
            for pair in zip(restored.optimizer.variables, stock.optimizer.variables, strict=True)
        )


def test_rewrite_a_selection_per_pass(run, tmp_path):
    per_pass = {"forward": "native", "input_gradient": "dense", "kernel_gradient": "shifted"}
    text = json.dumps(per_pass, separators=(",", ":"))
    assert run(f"rewrite model.keras @/a.keras --include=dw* --lowering={text}")[0] == 0
    assert lowerings(tmp_path / "a.keras") == {"dw1": per_pass, "separable": "stock"}
    assert run("rewrite model.keras @/b.keras --exclude=dw1 --lowering=diagonal")[0] == 0
    assert lowerings(tmp_path / "b.keras") == {"dw1": "stock", "separable": "diagonal:32"}


def test_rewrite_by_a_plan(run, tmp_path):
    plan = Plan(Conditions.current(), overrides={"dw1": "dense", "separable": "stock"})
    plan.save(tmp_path / "plan.json")
    assert run("rewrite model.keras @/a.keras --plan=@/plan.json")[0] == 0
    assert lowerings(tmp_path / "a.keras") == {"dw1": "dense", "separable": "stock"}


def test_a_restored_file_loads_where_the_package_is_not(run, folder, tmp_path):
    run("rewrite model.keras @/fast.keras --lowering=shifted")
    run("restore @/fast.keras @/stock.keras")
    code = (
        "import sys; sys.modules['diagconv_tf'] = None\n"
        "import keras, numpy as np\n"
        f"a, b = (keras.models.load_model(p) for p in {[str(tmp_path / 'stock.keras')]!r}"
        f" + {[str(folder / 'model.keras')]!r})\n"
        "assert all(map(np.array_equal, a.get_weights(), b.get_weights()))\n"
        "a.predict(np.ones((2, 8, 8, 4)), verbose=0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    ("name", "format"),
    [("saved", "tf_saved_model"), ("model.tflite", "litert"), ("model.onnx", "onnx")],
)
def test_export(run, tmp_path, name, format):
    pytest.importorskip({"litert": "ai_edge_litert", "onnx": "tf2onnx"}.get(format, "tensorflow"))
    assert run("rewrite model.keras @/fast.keras --lowering=dense")[0] == 0
    code, out, _ = run(f"export @/fast.keras @/{name} --format={format} --json")
    assert code == 0
    assert json.loads(out)["depthwise_found"] == 2
    assert (tmp_path / name).exists()


def test_info(run):
    code, out, _ = run("info")
    assert code == 0
    for words in (f"backend {BACKEND}", "diagonal:32: works here"):
        assert words in out
    assert json.loads(run("info --json")[1])["backend"] == BACKEND


def test_h5_files_that_keras_cannot_compile_are_read_without(run, tmp_path):
    # Keras writes "mse" so that it cannot read it again.
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    model.compile("sgd", "mse", metrics=["mse"])
    model.save(tmp_path / "mse.h5")
    code, _, err = run("inspect @/mse.h5")
    assert code == 0
    assert "without its compile state" in err


def _own_loss(targets, outputs):
    return keras.ops.mean(keras.ops.abs(targets - outputs))


class _OwnLoss(keras.losses.Loss):
    def call(self, targets, outputs):
        return keras.ops.mean(keras.ops.abs(targets - outputs), axis=-1)


def _old_adam(file):
    """Adam's config as Keras 1 and 2 wrote it."""
    config = json.loads(file.attrs["training_config"])
    config["optimizer_config"] = {"class_name": "Adam", "config": {"name": "Adam", "lr": 1e-3}}
    file.attrs["training_config"] = json.dumps(config)


#: name: (suffix, loss, edit of the .h5 file, words of the warning)
COMPILE_STATES = {
    "an old optimizer's argument": (".h5", keras.losses.MeanSquaredError(), _old_adam, "'lr'"),
    "a name of Keras's own": (".h5", "mse", None, "keras.metrics.mse"),
    "a loss function": (".keras", _own_loss, None, "'_own_loss' is not known.*--custom_objects"),
    "a loss function, h5": (".h5", _own_loss, None, ""),
    "a loss object": (".keras", _OwnLoss(), None, "'_OwnLoss' is not known.*--custom_objects"),
    "a loss object, h5": (".h5", _OwnLoss(), None, "is not known.*--custom_objects"),
    "a lambda": (".keras", lambda a, b: keras.ops.mean(a - b), None, "--allow_unsafe"),
}


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("name", COMPILE_STATES)
def test_a_model_is_read_whatever_its_compile_state(run, tmp_path, name):
    suffix, loss, edit, words = COMPILE_STATES[name]
    model = keras.Sequential([keras.Input((8, 8, 4)), layers.DepthwiseConv2D(3, name="dw1")])
    model.compile("adam", loss, metrics=["mse"] if loss == "mse" else None)
    model.save(tmp_path / f"model{suffix}")
    if edit:
        with h5py.File(tmp_path / "model.h5", "r+") as file:
            edit(file)
    code, out, err = run(f"rewrite @/model{suffix} @/fast.keras --lowering=shifted")
    assert code == 0
    assert "1 of 1" in out
    (warning,) = [line for line in err.splitlines() if "without its compile state" in line]
    assert re.search(words, warning)
    loaded = load(tmp_path / "fast.keras")
    assert not loaded.compiled
    assert all(map(np.array_equal, loaded.get_weights(), model.get_weights()))


def _with_groups(config):
    """A model's config with the `groups` that Keras 2 wrote for all convolutions."""
    if isinstance(config, list):
        return [_with_groups(value) for value in config]
    if not isinstance(config, dict):
        return config
    found = {key: _with_groups(value) for key, value in config.items()}
    if "Conv" in str(found.get("class_name")):
        found["config"]["groups"] = 1
    return found


def _all_convolutions():
    inputs = keras.Input((8, 8, 4))
    x = layers.DepthwiseConv2D(3, name="dw")(inputs)
    x = layers.Conv2DTranspose(3, 2)(layers.Conv2D(4, 3)(layers.SeparableConv2D(4, 3)(x)))
    x = layers.SeparableConv1D(3, 2)(layers.Reshape((-1, 3))(x))
    x = layers.Conv1DTranspose(2, 2)(layers.DepthwiseConv1D(2)(x))
    return keras.Model(inputs, layers.Conv3DTranspose(2, 1)(layers.Reshape((-1, 1, 1, 2))(x)))


@pytest.mark.backends("tensorflow")
def test_groups_of_one_in_old_h5_files_mean_nothing(run, tmp_path):
    model = _all_convolutions()
    model.save(tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5", "r+") as file:
        config = json.loads(file.attrs["model_config"])
        file.attrs["model_config"] = json.dumps(_with_groups(config))
    assert run("restore @/model.h5 @/stock.keras")[0] == 0
    loaded = load(tmp_path / "stock.keras")
    assert [type(a) for a in loaded.layers] == [type(a) for a in model.layers]
    assert all(map(np.array_equal, loaded.get_weights(), model.get_weights()))


@pytest.mark.backends("tensorflow")
def test_groups_of_one_in_keras_files_are_explained(run, folder, tmp_path):
    with (
        zipfile.ZipFile(folder / "model.keras") as model,
        zipfile.ZipFile(tmp_path / "groups.keras", "w") as archive,
    ):
        for name in model.namelist():
            content = model.read(name)
            if name == "config.json":
                content = json.dumps(_with_groups(json.loads(content)))
            archive.writestr(name, content)
    code, out, err = run("inspect @/groups.keras")
    assert (code, out) == (1, "")
    assert re.search("`groups`.*save the model as .h5", err)
    assert len(err.splitlines()) == 1


@pytest.mark.backends("tensorflow")
def test_the_cause_of_a_deserialization_error_is_shown():
    config = {"name": "x" * 600, "filters": 2, "kernel_size": 1, "nonsense": 3}
    with pytest.raises(TypeError) as error:
        layers.deserialize({"module": "keras.layers", "class_name": "Conv2D", "config": config})
    assert summarize_error(error.value) == (
        "TypeError: Unrecognized keyword arguments passed to Conv2D: {'nonsense': 3}"
    )


def test_custom_objects_and_unsafe_files_have_a_way_in(run):
    code, out, _ = run("inspect composite.keras --custom_objects=tests.model_zoo")
    assert code == 0
    assert "block1/depthwise" in out
    assert run("inspect lambda.keras --allow_unsafe")[0] == 0


#: (arguments, exit code, words of the error)
REFUSALS = [
    ("inspect none.keras", 1, "no such file"),
    ("inspect text.keras", 1, "not a .keras file"),
    ("inspect truncated.keras", 1, "truncated"),
    ("inspect other.keras", 1, "holds no config.json"),
    ("inspect text.h5", 1, "not an .h5 file"),
    ("inspect truncated.h5", 1, "truncated"),
    ("inspect model.txt", 1, "*.keras or *.h5"),
    ("inspect saved_model", 1, "a SavedModel, which holds a graph and no layers"),
    ("inspect empty", 1, "a folder"),
    ("inspect composite.keras", 1, "'Block' is not known.*--custom_objects"),
    ("inspect composite.keras --custom_objects=no.such", 1, "no.such"),
    ("inspect lambda.keras", 1, "Lambda.*--allow_unsafe"),
    ("inspect shared.keras", 1, "shared across nesting levels"),
    ("inspect model.keras --batch_size=0", 2, "whole number >= 1"),
    ("rewrite model.keras model.keras", 1, "exists.*--overwrite"),
    ("rewrite model.keras @/no/a.keras", 1, "existing folder"),
    ("rewrite model.keras @/a.txt", 1, "*.keras or *.h5"),
    ("rewrite model.keras @/a.keras --lowering=diagonal:0", 2, "diagonal:N"),
    ("rewrite model.keras @/a.keras --lowering={", 2, "lowering"),
    ("rewrite model.keras @/a.keras --plan=none.json", 1, "none.json"),
    ("rewrite model.keras @/a.keras --plan=bad_plan.json", 1, "bad_plan.json: Expected a plan"),
    ("rewrite model.keras @/a.keras --plan=other_plan.json", 1, "fits none of its 2"),
    ("rewrite model.keras @/a.keras --plan=a --lowering=dense", 2, "not allowed with"),
    ("rewrite model.keras @/a.keras --include=nothing", 1, "near: "),
    (
        "rewrite composite.keras @/a.keras --custom_objects=tests.model_zoo --lowering=dense",
        1,
        "cannot hold rewritten layers.*block1/depthwise",
    ),
    ("restore model.keras model.h5", 1, "exists.*--overwrite"),
    ("export model.keras @/a.txt --format=onnx", 1, ".onnx"),
    ("export model.keras @/a --format=coreml", 2, "invalid choice"),
    ("export model.keras", 2, "OUT"),
    ("", 2, "COMMAND"),
]


@pytest.mark.parametrize(("line", "code", "words"), REFUSALS, ids=[r[0] for r in REFUSALS])
def test_refusals(run, tmp_path, line, code, words):
    found, out, err = run(line)
    assert (found, out) == (code, "")
    assert re.search(words.replace("*.", r"\*\."), err)
    assert "Traceback" not in err
    # Usage takes its lines; all else takes one, after a word on what was rewritten.
    assert code == 2 or [text.startswith("diagconv: ") for text in err.splitlines()][-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(run, tmp_path, monkeypatch, error):
    (tmp_path / "a.keras").write_text("old")

    def save(self, path, *args, **kwargs):
        with open(path, "w") as file:
            file.write("half")
        raise error

    monkeypatch.setattr(keras.Model, "save", save)
    code, out, err = run("rewrite model.keras @/a.keras --overwrite")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("diagconv: ")
    assert (tmp_path / "a.keras").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.keras"]


def test_the_command_is_installed():
    program = os.path.join(os.path.dirname(sys.executable), "diagconv")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("diagconv_tf ")
