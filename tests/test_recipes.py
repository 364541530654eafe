"""The recipe: its configurations, its files and its errors. (Its data: test_recipe_data.py.)"""

import dataclasses
import itertools
import json
import pathlib
import signal

import keras
import numpy as np
import PIL.Image
import pytest
from absl import app, flags
from absl.testing import flagsaver

from diagconv_tf import DiagonalwiseDepthwiseConv2D, Plan, files, rewrite
from recipes import config as config_module
from recipes import data, models, optimizers, report, train
from recipes.comparing import ComparedSteps
from recipes.config import Config, load_config
from recipes.distributing import Distribution
from recipes.interruption import NonFiniteLossError, TrainingInterrupted
from recipes.profiling import Profile
from recipes.recording import MetricsLog, thinned, thinned_losses
from recipes.report import RunReport, environment
from recipes.results import VariantResult
from recipes.run_folder import Progress, open_run_folder, progress_until
from recipes.variants import Variant

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
needs_tensorflow = pytest.mark.skipif(not ON_TENSORFLOW, reason="of the TensorFlow backend only")
# These laws need no backend's own code: they are tested on one of them.
one_backend = pytest.mark.backends("tensorflow")


# Configurations (the shipped ones: test_recipe_configs.py)


@one_backend
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epohcs": 2}, "Unknown config key. Expected: epochs. Received: epohcs"),
        ({"batchsize": 2}, "Expected: batch_size"),
        ({"zzzz": 2}, "Expected: one of augmentation, "),
        ({"epochs": "2"}, "`epochs` to be an int of at least 1. Received: epochs='2'"),
        ({"epochs": True}, "epochs=True"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"dropout": 1.0}, r"a float of at least 0 below 1\. Received: dropout=1.0"),
        ({"learning_rate": 0.0}, "a float above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        (
            {"model": "resnet"},
            r"mobilenet_v2, .*or the path of a file named.*Received: model=.resnet",
        ),
        ({"name": "a/b"}, "plain folder name"),
        ({"compare": ("stock", "stock")}, "different variants"),
        ({"compare": "stock"}, "a list of strings"),
        ({"decay_epochs": 2.0}, "a list of floats above 0"),
        ({"decay_epochs": ("2", "x")}, "a list of floats above 0"),
        ({"decay_epochs": (5, 2)}, r"several that rise. Received: decay_epochs=\(5.0, 2.0\)"),
        ({"decay_epochs": ()}, "one number, or several"),
        (
            {"model": "a.keras", "dropout": 0.5, "stem": "imagenet"},
            "defaults of stem, dropout: .*model='a.keras' with stem='imagenet', dropout=0.5",
        ),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**values)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Config(), **values)


@one_backend
def test_variants_to_train():
    assert Config().variants == ("stock", "diagonal:32")
    assert Config(lowering="shifted").variants == ("stock", "shifted")
    assert Config(lowering="stock").variants == ("stock",)
    assert Config(compare=["dense", "stock"]).variants == ("dense", "stock")


def depthwise_model():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.DepthwiseConv2D(3, name="dw")(inputs)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(4)(x))


PER_PASS = {"forward": "native", "input_gradient": "dense", "kernel_gradient": "shifted"}


@pytest.mark.parametrize(
    ("name", "lowering", "file_name"),
    [
        ("stock", "stock", "stock"),
        ("diagonal:2", "diagonal:2", "diagonal-2"),
        (json.dumps(PER_PASS), PER_PASS, None),
        ("plan", "shifted", "my-plan"),
        ("tune", "dense", "tune"),
    ],
)
def test_a_variant_makes_the_model_compute_so(name, lowering, file_name, tmp_path, monkeypatch):
    model = depthwise_model()
    monkeypatch.setattr(
        "recipes.variants.tune", lambda model, batch_size: Plan.of_model(rewrite(model, "dense"))
    )
    if name == "plan":
        name = str(tmp_path / "my plan.json")
        Plan.of_model(rewrite(model, "shifted")).save(name)
    variant = Variant.parse(name)
    plan = variant.apply(model, Config())
    layer = model.get_layer("dw")
    if lowering == "stock":
        assert type(layer) is keras.layers.DepthwiseConv2D
    else:
        assert layer.lowering == lowering
    assert isinstance(plan, Plan) == (name == "tune" or name.endswith(".json"))
    if file_name:
        assert variant.file_name == file_name


# Optimizers


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 10 steps an epoch, 10 epochs; (update, learning rate).
        ({"schedule": "constant", "warmup_fraction": 0.0}, {0: 0.1, 99: 0.1}),
        ({"warmup_fraction": 0.1}, {0: 0.01, 4: 0.05, 9: 0.1, 10: 0.1, 55: 0.05, 100: 0.0}),
        ({"warmup_fraction": 0.0}, {0: 0.1, 50: 0.05, 100: 0.0}),
        (
            {"schedule": "step", "decay_epochs": (3,), "decay_rate": 0.5, "warmup_fraction": 0.1},
            {9: 0.1, 10: 0.1, 39: 0.1, 40: 0.05, 69: 0.05, 70: 0.025},
        ),
        (
            {"schedule": "step", "decay_epochs": (2, 5), "decay_rate": 0.5, "warmup_fraction": 0.1},
            {9: 0.1, 10: 0.1, 29: 0.1, 30: 0.05, 59: 0.05, 60: 0.025, 99: 0.025},
        ),
        # Keras asks for the rate of a batch, also where five of them make an update.
        ({"gradient_accumulation": 5, "warmup_fraction": 0.1}, {0: 0.01, 9: 0.1, 55: 0.05}),
    ],
    ids=str,
)
def test_learning_rates(settings, expected):
    rate = optimizers.learning_rate(Config(**settings), 10)
    for update, value in expected.items():
        found = rate(keras.ops.convert_to_tensor(update)) if callable(rate) else rate
        assert float(found) == pytest.approx(value, rel=1e-5, abs=1e-8)


def test_the_warm_up_has_a_config():
    schedule = optimizers.learning_rate(Config(schedule="step"), 10)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(schedule))
    for update in (0, 5, 20, 50, 90):
        assert float(again(update)) == float(schedule(update))


# The smoothing chooses a loss, whatever the precision.
@pytest.mark.parametrize(
    ("policy", "smoothing"), [("float32", 0.1), ("mixed_float16", 0.0), ("mixed_bfloat16", 0.1)]
)
def test_models_train_in_every_precision(policy, smoothing):
    keras.config.set_dtype_policy(policy)
    try:
        model = depthwise_model()
    finally:
        keras.config.set_dtype_policy("float32")
    config = Config(
        optimizer="rmsprop",
        label_smoothing=smoothing,
        ema_momentum=0.9,
        gradient_accumulation=2,
        weight_decay=1e-4,
        dtype_policy=policy,
    )
    optimizers.compile_model(model, config, 10)
    x, y = np.random.default_rng(0).normal(size=(4, 8, 8, 3)), np.arange(4)
    if smoothing:
        y = np.eye(4)[y]
    logs = model.fit(x, y, batch_size=2, epochs=2, verbose=0).history
    assert all(np.isfinite(logs["loss"]))
    assert 0 <= logs["accuracy"][-1] <= 1
    scaled = type(model.optimizer).__name__ == "LossScaleOptimizer"
    assert scaled == (policy == "mixed_float16")


def test_weight_decay_can_spare_depthwise_kernels():
    inputs = keras.Input((8, 8, 2))
    x = keras.layers.SeparableConv2D(2, 3, use_bias=False, name="sep")(inputs)
    block = keras.Sequential([keras.layers.DepthwiseConv2D(3, use_bias=False, name="dw")])
    model = keras.Model(inputs, keras.layers.Conv2D(2, 1, use_bias=False, name="conv")(block(x)))
    config = Config(weight_decay=0.5, warmup_fraction=0.0, decay_depthwise=False)
    optimizers.compile_model(model, config, 10)
    rewrite(model, "shifted", in_place=True)  # As the recipe does it.
    for variable in model.trainable_variables:
        variable.assign(np.ones(variable.shape))
    zeros = [keras.ops.zeros(v.shape) for v in model.trainable_variables]
    model.optimizer.apply(zeros, model.trainable_variables)
    decayed = {
        "/".join(v.path.split("/")[-2:]): bool(keras.ops.convert_to_numpy(v).mean() < 1)
        for v in model.trainable_variables
    }
    assert decayed == {
        "sep/depthwise_kernel": False,
        "sep/pointwise_kernel": True,
        "dw/kernel": False,
        "conv/kernel": True,
    }


@one_backend
def test_a_run_goes_on_without_the_settings_that_are_newer(tmp_path):
    config = Config(name="a", output_dir=str(tmp_path))
    path = open_run_folder(config) / "config.json"
    settings = json.loads(path.read_text())
    del settings["decay_depthwise"]
    path.write_text(json.dumps(settings))
    assert open_run_folder(dataclasses.replace(config, resume=True)) == path.parent
    other = dataclasses.replace(config, resume=True, decay_depthwise=False)
    with pytest.raises(ValueError, match="decay_depthwise was True, is False"):
        open_run_folder(other)


def pooled(x):
    return keras.layers.GlobalAveragePooling2D()(x)


# The recipe

OURS = "diagonal:128"  # Fewer blocks than 32 makes: quicker to compile.


# The run takes long: not one for each process of the tests.
one_worker = pytest.mark.xdist_group("recipe run")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One epoch of both variants, with a learning rate that keeps them together."""
    config = Config(
        name="tiny",
        stem="imagenet",  # The smaller one: this is about the files.
        dataset="synthetic:32",
        width_multiplier=0.25,
        lowering=OURS,
        dropout=0.5,
        batch_size=16,
        epochs=1,
        learning_rate=1e-5,
        output_dir=str(tmp_path_factory.mktemp("runs")),
    )
    with pytest.MonkeyPatch.context() as patch:
        # Fewer blocks: what is traced and compiled is most of the time.
        patch.setattr(models, "_V1_BLOCKS", models._V1_BLOCKS[:3])
        yield train.run_recipe(config, verbose=0)


@one_worker
def test_variants_train_alike_from_the_same_start(run):
    stock, ours = run.variants
    assert (stock.name, ours.name) == ("stock", OURS)
    assert len(stock.losses) == len(ours.losses) == 2
    assert stock.losses[0] != stock.losses[1]
    # The dropout of one half would give other losses, were it not the same.
    np.testing.assert_allclose(ours.losses, stock.losses, rtol=1e-3)
    assert stock.steps.first_step_seconds > 0


@one_worker
def test_run_folder_has_all_files(run):
    names = {path.name for path in run.folder.iterdir()}
    expected = {"config.json", "metrics.jsonl", "report.json", "report.md", "curves.png"}
    expected |= {"model.keras", "class_names.json", "step_times.json", "checkpoints", "results"}
    assert names == expected | ({"saved_model", "tensorboard"} if ON_TENSORFLOW else set())
    settings = json.loads((run.folder / "config.json").read_text())
    assert Config(**settings) == run.config
    with PIL.Image.open(run.folder / "curves.png") as picture:
        assert picture.size[0] > 1000
        assert np.asarray(picture.convert("L")).std() > 5


@one_worker
def test_metrics_and_report_have_the_numbers(run):
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    for variant in run.variants:
        own = [line for line in lines if line["variant"] == variant.name]
        assert [line["event"] for line in own] == ["step", "step", "epoch"]
        assert [line["loss"] for line in own[:2]] == list(variant.losses)
        assert own[2]["loss"] == pytest.approx(np.mean(variant.losses), rel=1e-5)
        assert own[2]["val_accuracy"] == variant.test_accuracy
    report = json.loads((run.folder / "report.json").read_text())
    rows = report["variants"]
    assert [row["variant"] for row in rows] == ["stock", OURS]
    assert rows[0]["loss_difference"] == 0
    assert rows[1]["loss_difference"] == pytest.approx(
        max(abs(a - b) for a, b in zip(*(v.losses for v in run.variants), strict=True))
    )
    assert report["restored_accuracy"] == pytest.approx(run.variants[1].test_accuracy, abs=0.01)


@one_worker
def test_table_is_complete_where_the_output_is_no_terminal(run, capsys):
    run.print()
    printed = capsys.readouterr().out
    markdown = (run.folder / "report.md").read_text()
    for text in ("stock", OURS, "test accuracy", "images/s", "first step", "waits for input"):
        assert text in printed
        assert text in markdown
    assert f"{100 * run.variants[1].test_accuracy:.2f} %" in printed
    assert "…" not in printed
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "- `width_multiplier`: 0.25" in markdown


@one_worker
def test_saved_models_load_and_give_equal_outputs(run):
    model = keras.saving.load_model(run.folder / "model.keras")
    assert not any(isinstance(x, DiagonalwiseDepthwiseConv2D) for x in model.layers)
    assert not model.compiled
    images = data.load("synthetic", image_size=32)
    batch, _ = next(iter(data.evaluation_dataset(images, 4)))
    outputs = keras.ops.convert_to_numpy(model(batch, training=False))
    # Probabilities, where the training was on logits.
    np.testing.assert_allclose(outputs.sum(axis=1), 1, rtol=1e-5)
    # It is the trained model: its batch norms have moved.
    start = train.build_model(run.config, images, Distribution())
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(model.get_weights(), start.get_weights(), strict=True)
    )
    if ON_TENSORFLOW:
        import tensorflow as tf

        loaded = tf.saved_model.load(str(run.folder / "saved_model"))
        np.testing.assert_allclose(loaded.serve(batch).numpy(), outputs, atol=1e-5)


@one_worker
@needs_tensorflow
def test_tensorboard_events_have_the_metrics_of_each_epoch(run):
    import tensorflow as tf

    for variant in run.variants:
        folder = run.folder / "tensorboard" / Variant.parse(variant.name).file_name
        (path,) = folder.iterdir()
        found = {}
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                found[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
        tags = {tag for tag, _ in found}
        assert tags >= {"loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"}
        assert found["val_accuracy", 0] == pytest.approx(variant.test_accuracy)


@one_worker
def test_a_finished_run_that_is_resumed_is_not_trained_again(run, monkeypatch):
    monkeypatch.setattr(keras.Model, "fit", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(train, "export_model", lambda *_: "")
    again = train.run_recipe(dataclasses.replace(run.config, resume=True), verbose=0)
    assert again.folder == run.folder
    assert again.variants == run.variants
    assert again.restored_accuracy == run.restored_accuracy
    other = dataclasses.replace(run.config, resume=True, learning_rate=0.5)
    with pytest.raises(train.RecipeError, match="learning_rate was 1e-05, is 0.5"):
        train.run_recipe(other)


def draw_nothing(title, variants, path):
    """A sixth of a small run would be its picture."""
    pathlib.Path(path).touch()


def small(monkeypatch, tmp_path, **settings):
    """A recipe whose network is too small to be worth anything."""

    def build(image_shape, classes, **_):
        inputs = keras.Input(image_shape)
        x = keras.layers.DepthwiseConv2D(3, strides=4, name="dw")(inputs)
        x = keras.layers.Dropout(0.3)(pooled(x))
        return keras.Model(inputs, keras.layers.Dense(classes)(x))

    monkeypatch.setattr("recipes.models.mobilenet_v1", build)
    monkeypatch.setattr(train, "export_model", lambda *_: "")
    monkeypatch.setattr(report, "draw_curves", draw_nothing)
    monkeypatch.setattr(train, "compare_steps", lambda *_: ComparedSteps())
    values = {"batch_size": 300, "epochs": 3, "output_dir": str(tmp_path), "compare": ("shifted",)}
    return Config(**{**values, **settings})


class CrashError(Exception):
    pass


def crash():
    raise CrashError


@pytest.mark.parametrize(
    ("interrupt", "error"),
    [
        pytest.param(crash, CrashError, id="crash", marks=one_backend),
        pytest.param(lambda: signal.raise_signal(signal.SIGTERM), TrainingInterrupted, id="signal"),
    ],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    tmp_path, monkeypatch, interrupt, error
):
    config = small(monkeypatch, tmp_path, compare=("stock", "shifted"), ema_momentum=0.9)
    whole = train.run_recipe(dataclasses.replace(config, name="whole"), verbose=0)
    steps = []

    def end_of_step(self, batch, logs=None):
        steps.append(batch)
        write_line(self, batch, logs)
        if len(steps) == 12 + 6:  # In the second epoch of the second variant.
            interrupt()

    write_line = MetricsLog.on_train_batch_end
    broken = dataclasses.replace(config, name="broken", max_steps=100)
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(MetricsLog, "on_train_batch_end", end_of_step)
        train.run_recipe(broken, verbose=0)
    resumed = train.run_recipe(dataclasses.replace(broken, resume=True, max_steps=None), verbose=0)
    assert [v.losses for v in resumed.variants] == [v.losses for v in whole.variants]
    assert [v.test_accuracies for v in resumed.variants] == [
        v.test_accuracies for v in whole.variants
    ]
    assert resumed.variants[1].steps.count > 0
    weights = [
        keras.saving.load_model(report.folder / "model.keras").get_weights()
        for report in (whole, resumed)
    ]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)


@one_backend
def test_a_trial_goes_on(tmp_path, monkeypatch):
    config = small(monkeypatch, tmp_path, compare=("stock", "shifted"), epochs=2)
    whole = train.run_recipe(dataclasses.replace(config, name="whole"), verbose=0)
    trial = dataclasses.replace(config, name="trial", max_steps=2)
    short = train.run_recipe(trial, verbose=0)
    assert [len(v.losses) for v in short.variants] == [2, 2]
    again = train.run_recipe(dataclasses.replace(trial, resume=True), verbose=0)
    assert again.variants == short.variants
    resumed = train.run_recipe(dataclasses.replace(trial, resume=True, max_steps=None), verbose=0)
    assert [v.losses for v in resumed.variants] == [v.losses for v in whole.variants]
    assert [v.test_accuracies for v in resumed.variants] == [
        v.test_accuracies for v in whole.variants
    ]


@one_backend
def test_a_trial_that_was_interrupted_at_its_end_trains_no_further_step(tmp_path, monkeypatch):
    # Four steps an epoch.
    config = small(monkeypatch, tmp_path, compare=("stock", "shifted"), epochs=2, max_steps=6)
    whole = train.run_recipe(dataclasses.replace(config, name="whole"), verbose=0)
    config = dataclasses.replace(config, name="broken")
    calls = itertools.count(1)
    # The second test is that after the sixth step.
    ending = interrupt_after(
        MetricsLog, "on_test_begin", lambda: next(calls) == 2 and give_signal()
    )
    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted) as caught:
        patch.setattr(MetricsLog, "on_test_begin", ending)
        train.run_recipe(config, verbose=0)
    assert caught.value.step == 6
    resumed = train.run_recipe(dataclasses.replace(config, resume=True), verbose=0)
    assert [v.losses for v in resumed.variants] == [v.losses for v in whole.variants]
    found, expected = ([v.test_accuracies for v in r.variants] for r in (resumed, whole))
    assert found == expected


def give_signal():
    signal.raise_signal(signal.SIGTERM)


def interrupt_after(kind, name, interrupt):
    """What the method does, and then `interrupt`."""
    former = getattr(kind, name)

    def both(*arguments, **values):
        former(*arguments, **values)
        interrupt()

    return both


@one_backend
def test_variants_have_files_of_their_own(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Plan.of_model(depthwise_model()).save(tmp_path / folder / "plan.json")
    config = Config(compare=(f"{tmp_path}/a/plan.json", f"{tmp_path}/b/plan.json"))
    with pytest.raises(ValueError, match="different names"):
        train.parse_variants(config)


@one_backend
def test_images_that_were_left_out_are_in_the_report(tmp_path, monkeypatch):
    for number in range(20):
        path = tmp_path / "images" / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (40, 40), (10 * number, 0, 0)).save(path)
    path.write_bytes(b"no image")
    config = small(
        monkeypatch,
        tmp_path,
        dataset=f"folder:{tmp_path}/images",
        batch_size=4,
        epochs=1,
        compare=("stock",),
    )
    folder = train.run_recipe(config, verbose=0).folder
    written = json.loads((folder / "report.json").read_text())
    assert written["skipped_files"] == [str(path)]
    assert "cannot be decoded: 1" in (folder / "report.md").read_text()


@one_backend
def test_a_loss_that_is_no_number_ends_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    config = small(monkeypatch, tmp_path, learning_rate=1e30, warmup_fraction=0.0)
    with pytest.raises(NonFiniteLossError) as caught:
        train.run_recipe(config, verbose=0)
    assert "learning rate" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_profiles_have_the_names_of_layers(tmp_path):
    name = "a_layer_in_the_profile"
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.DepthwiseConv2D(3, name=name)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(4)(pooled(x)))
    optimizers.compile_model(model, Config(), 10)
    x, y = np.zeros((64, 8, 8, 3), "float32"), np.zeros(64)
    model.fit(x, y, batch_size=2, verbose=0, callbacks=[Profile(tmp_path)])
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    # PyTorch's trace names modules by their classes.
    assert (b"DepthwiseConv2D" if keras.backend.backend() == "torch" else name.encode()) in content


# Files of a run


@one_backend
def test_results_are_files():
    result = VariantResult("a", (1.0, 2.0), (0.5,), summary(), (0.1, 0.2), "because", 0.75)
    assert VariantResult.from_json(result.to_json()) == result


def summary():
    timer = train.StepTimer().summary()
    return dataclasses.replace(timer, step_median_seconds=0.1)


@one_backend
def test_progress_is_read_up_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert progress_until(path, "a", 0, 0) == Progress()
    events = [
        {"event": "step", "variant": "a", "step": 1, "loss": 3.0},
        {"event": "step", "variant": "a", "step": 2, "loss": 2.0},
        {"event": "epoch", "variant": "a", "step": 2, "epoch": 0, "val_accuracy": 0.5},
        {"event": "step", "variant": "b", "step": 1, "loss": 7.0},
        {"event": "step", "variant": "a", "step": 3, "loss": 1.0},
    ]
    text = "\n".join(map(json.dumps, events)) + '\n{"event": "st'
    path.write_text(text)
    assert progress_until(path, "a", 2, 1) == Progress({1: 3.0, 2: 2.0}, (0.5,))
    assert path.read_text().splitlines() == text.splitlines()[:4]
    assert progress_until(path, "a", 0, 0) == Progress()
    assert path.read_text().splitlines() == text.splitlines()[3:4]


@one_backend
def test_lines_that_were_lost_are_no_error(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    events = [
        {"event": "step", "variant": "a", "step": 1, "loss": 3.0},
        {"event": "step", "variant": "a", "step": 3, "loss": 1.0},
        {"event": "epoch", "variant": "a", "step": 4, "epoch": 1, "val_accuracy": 0.5},
    ]
    path.write_text("\n".join(map(json.dumps, events)))
    with caplog.at_level("WARNING"):
        found = progress_until(path, "a", 4, 2)
    assert found.losses == {1: 3.0, 3: 1.0}
    np.testing.assert_array_equal(found.test_accuracies, [np.nan, 0.5])
    assert "1 of the 2 test accuracies" in caplog.text


@one_backend
@pytest.mark.parametrize("count", [0, 1, 20, 10_020, 10_021, 35_000])
def test_long_loss_curves_are_joined_to_means_of_neighbours(count):
    losses = {2 * step: float(step % 7) for step in range(1, count + 1)}
    found = thinned_losses(losses, keep=20)
    assert list(found.items())[:20] == list(losses.items())[:20]
    assert len(found) == {10_021: 20 + 5001, 35_000: 20 + 8745}.get(count, count)
    assert max(found, default=0) == 2 * count
    if count == 35_000:
        assert found[2 * 24] == np.mean([losses[2 * step] for step in (21, 22, 23, 24)])
    assert len(thinned(range(count))) <= 10_000
    assert set(thinned(range(count))) <= set(range(count))


@one_backend
@pytest.mark.parametrize("accuracies", [(0.5, 0.75), (0.5, np.nan)], ids=str)
def test_reports_of_variants_of_other_lengths_and_with_lost_losses(accuracies, tmp_path):
    longer = VariantResult(
        "a", (3.0, 1.0, 0.5), (0.5, 0.75), summary(), (0.1,), loss_steps=(1, 3, 4)
    )
    shorter = VariantResult("b", (3.5, 2.0, 1.25), accuracies, summary(), (0.1,))
    lost = VariantResult("c", (), (np.nan,), summary(), ())
    report = RunReport(Config(), tmp_path, environment(), (longer, shorter, lost))
    report.write()

    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    rows = read["variants"]
    assert [row["loss_difference"] for row in rows] == [0, 0.5, None]
    assert rows[1]["test_accuracy"] == (None if np.isnan(accuracies[-1]) else 0.75)
    assert "nan" not in (tmp_path / "report.md").read_text()
    assert (tmp_path / "curves.png").exists()


@one_backend
def test_a_test_within_an_epoch_is_no_progress(tmp_path):
    path = tmp_path / "metrics.jsonl"
    step = {"event": "step", "variant": "a", "step": 1, "loss": 3.0}
    epoch = {"event": "epoch", "variant": "a", "step": 1, "epoch": 0, "val_accuracy": 0.5}
    path.write_text(f"{json.dumps(step)}\n{json.dumps(epoch)}")
    assert progress_until(path, "a", 1, 0) == Progress({1: 3.0}, ())
    assert path.read_text().splitlines() == [json.dumps(step)]


@one_backend
def test_a_run_goes_on_with_other_devices_but_no_other_settings(tmp_path):
    config = Config(name="a", output_dir=str(tmp_path))
    folder = open_run_folder(config)
    resumed = dataclasses.replace(config, resume=True, distribution="data_parallel", cpu_devices=2)
    assert open_run_folder(resumed) == folder
    for name, value in (("cache_gb", 1.0), ("batch_size", 7)):
        other = dataclasses.replace(resumed, **{name: value})
        with pytest.raises(ValueError, match=f"{name} was .*, is {value}"):
            open_run_folder(other)


@one_backend
def test_results_are_not_overwritten_unasked(tmp_path):
    config = Config(name="a", output_dir=str(tmp_path / "new"))
    first = open_run_folder(config)
    (first / "kept").touch()
    second, third = open_run_folder(config), open_run_folder(config)
    assert [folder.name for folder in (first, second, third)] == ["a", "a-2", "a-3"]
    assert (first / "kept").exists()
    overwriting = dataclasses.replace(config, overwrite=True)
    assert open_run_folder(overwriting) == first
    assert not (first / "kept").exists()
    assert second.exists()


@one_backend
def test_a_run_of_another_folder_can_be_resumed(tmp_path, monkeypatch):
    config = small(monkeypatch, tmp_path, name="a", epochs=1)
    open_run_folder(config)
    ending = interrupt_after(MetricsLog, "on_train_batch_end", give_signal)
    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted) as caught:
        patch.setattr(MetricsLog, "on_train_batch_end", ending)
        train.run_recipe(config, verbose=0)
    assert f"with --name=a-2 --resume goes on from {tmp_path / 'a-2'}" in str(caught.value)
    report = train.run_recipe(dataclasses.replace(config, name="a-2", resume=True), verbose=0)
    assert report.folder == tmp_path / "a-2"
    assert [len(v.losses) for v in report.variants] == [4]


INPUTS = {
    "model": {"model": "DIR/model.keras"},
    "plan": {"compare": ("stock", "DIR/plans/tune.json")},
    "images": {"dataset": "folder:DIR/images"},
    "records": {"data_dir": "DIR/../a"},
}


@one_backend
@pytest.mark.parametrize("name", INPUTS)
def test_what_a_run_needs_is_not_overwritten(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = open_run_folder(Config(name="a"))
    text = json.dumps(INPUTS[name]).replace("DIR", str(tmp_path / "runs" / "a"))
    config = Config(name="a", overwrite=True, **json.loads(text))
    with pytest.raises(ValueError, match="--overwrite of a folder without what the run needs"):
        open_run_folder(config)
    assert (folder / "config.json").exists()


@one_backend
def test_only_results_are_overwritten(tmp_path):
    precious = tmp_path / "a" / "thesis.txt"
    precious.parent.mkdir()
    precious.touch()
    with pytest.raises(ValueError, match=r"results of a run.*config\.json"):
        open_run_folder(Config(name="a", output_dir=str(tmp_path), overwrite=True))
    assert precious.exists()


@one_backend
def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    files.write_text(path, "old")

    def fail(aside):
        pathlib.Path(aside).write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_aside(path, fail)
    assert path.read_text() == "old\n"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


# Bad input: one line, and no training


BAD_INPUT = [
    (["--epohcs=2"], 2, "'epohcs'. Did you mean: epochs"),
    (["--epochs=two"], 2, "--epochs=two"),
    (["epochs=2"], 2, "Expected flags only. Received: epochs=2"),
    (["--epochs=0"], 2, "`epochs` to be an int of at least 1. Received: epochs=0"),
    (["--model=mobilenet_v3"], 2, "or the path of a file named *.keras"),
    (["--config=digit_mobilenet_v1"], 2, "Expected: digits_mobilenet_v1 or"),
    (["--config=missing/file.py"], 2, "existing file. Received: missing/file.py"),
    (["--dataset=folder:missing"], 1, "existing folder. Received: folder:missing"),
    (["--dataset=digit"], 1, "Unknown dataset. Expected: digits"),
    (["--batch_size=5000"], 1, "at most 1437"),
    (["--dataset=cifar10", "--data_dir=DIR"], 1, "Add --download, or prepare it"),
    (["--dataset=coco/2017", "--data_dir=DIR"], 1, "Expected dataset coco/2017"),
    (["--lowering=diagonal:0"], 1, "diagonal:0"),
    (["--lowering={forward}"], 1, "JSON object. Received: {forward}"),
    (["--compare=stock,shfted"], 1, "shfted"),
    (["--output_dir=FILE/runs"], 1, "`output_dir` to be a folder that can be made and written"),
]


@one_backend
@pytest.mark.parametrize(("arguments", "code", "message"), BAD_INPUT, ids=lambda x: str(x))
def test_bad_input_is_one_line_before_any_training(
    arguments, code, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(keras.Model, "fit", lambda *_, **__: pytest.fail("trained"))
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        train.main(config_module.parse_flags(["train", "--width_multiplier=0.25", *arguments]))
    assert ended.value.code == code
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "runs").exists()


@one_backend
def test_flags_override_the_config(monkeypatch):
    given = []
    monkeypatch.setattr(
        train, "run_recipe", lambda config, *_, **__: given.append(config) or pytest.skip()
    )
    arguments = ["--epochs=3", "--compare=stock,shifted", "--learning_rate=1", "--nooverwrite"]
    arguments += ["--decay_epochs=60,120.5"]
    with flagsaver.flagsaver(), pytest.raises(pytest.skip.Exception):
        train.main(config_module.parse_flags(["train", *arguments]))
    expected = dataclasses.replace(
        load_config("digits_mobilenet_v1"),
        epochs=3,
        compare=("stock", "shifted"),
        learning_rate=1.0,
        decay_epochs=(60.0, 120.5),
    )
    assert given == [expected]
    assert "epochs" in flags.FLAGS


@one_backend
def test_a_lowering_that_is_given_is_not_hidden_by_a_file():
    config = load_config("digits_mobilenet_v1")
    assert config.compare
    with flagsaver.flagsaver():
        config_module.parse_flags(["train", "--lowering=shifted"])
        assert config_module.config_from_flags(config).variants == ("stock", "shifted")
    with flagsaver.flagsaver():
        config_module.parse_flags(["train", "--lowering=shifted", "--compare=stock,native"])
        assert config_module.config_from_flags(config).variants == ("stock", "native")


@one_backend
def test_help_tells_defaults_choices_and_configs(capsys):
    app.define_help_flags()
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        config_module.parse_flags(["train", "--helpfull"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "--epochs: passes over the training images (default: 10)",
        "one of auto, true, false (default: auto)",
        "at these epochs (default: 30.0)",
        "(default: false)",
        *config_module.config_names(),
    ):
        assert part in text, part


@one_backend
def test_a_backend_that_is_none_is_one_line(monkeypatch, capsys):
    def fail(name):
        raise ValueError(f"Unable to import\n{name}")

    monkeypatch.setattr(config_module.importlib, "import_module", fail)
    monkeypatch.setattr(config_module, "silence_tensorflow_log", lambda: None)
    with pytest.raises(SystemExit, match="1"):
        config_module.import_quietly()
    assert capsys.readouterr().err == "error: Unable to import keras\n"


@one_backend
@pytest.mark.parametrize(("terminal", "verbose"), [(True, 1), (False, 2)])
def test_progress_bars_are_for_terminals(terminal, verbose, monkeypatch):
    given = []
    monkeypatch.setattr(
        train, "run_recipe", lambda *_, **options: given.append(options) or pytest.skip()
    )
    monkeypatch.setattr(train.sys.stdout, "isatty", lambda: terminal, raising=False)
    with flagsaver.flagsaver(), pytest.raises(pytest.skip.Exception):
        train.main(config_module.parse_flags(["train"]))
    assert given == [{"verbose": verbose}]
