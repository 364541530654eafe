"""The recipe: its data, its configurations, its files and its errors."""

import dataclasses
import json
import pathlib

import keras
import numpy as np
import PIL.Image
import pytest
from absl import flags
from absl.testing import flagsaver

from diagconv_tf import DiagonalwiseDepthwiseConv2D, files
from recipes import config as config_module
from recipes import data, report, train
from recipes.config import Config, load_config

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
needs_tensorflow = pytest.mark.skipif(not ON_TENSORFLOW, reason="of the TensorFlow backend only")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def read_all(source):
    return source.images(np.arange(len(source.labels)))


# Data


def test_digits_are_split_into_disjoint_balanced_parts(digits):
    assert len(digits.train.labels) == 1437
    assert len(digits.test.labels) == 360
    assert digits.classes == 10
    images = [{image.tobytes() for image in read_all(part)} for part in (digits.train, digits.test)]
    assert not images[0] & images[1]
    for label in range(10):
        counts = [int(np.sum(part.labels == label)) for part in (digits.train, digits.test)]
        assert counts[1] / sum(counts) == pytest.approx(0.2, abs=0.005)


def test_digits_are_the_pictures_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    # Averaged back to 8x8, each picture is closest to one of its own label.
    pixels = read_all(digits.test)
    assert pixels.shape == (360, 32, 32, 3)
    assert pixels.dtype == np.uint8
    small = pixels[:50].mean(axis=-1).reshape(50, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(50, 64)
    original = load_digits()
    distances = np.linalg.norm(small[:, None] - original.data * (255 / 16), axis=-1)
    assert np.array_equal(original.target[distances.argmin(axis=1)], digits.test.labels[:50])


def test_batches_are_a_function_of_seed_and_epoch(digits):
    def batch(seed=0, epoch=0, index=3, augmentation="crop"):
        batches = data.TrainingBatches(
            digits.train, 64, seed=seed, epoch=epoch, augmentation=augmentation
        )
        return batches[index]

    images, labels = batch()
    assert images.shape == (64, 32, 32, 3)
    assert images.dtype == np.float32
    assert labels.dtype == np.int32
    assert images.min() == -1
    assert 0.9 < images.max() <= 1
    np.testing.assert_array_equal(batch()[0], images)
    np.testing.assert_array_equal(batch(augmentation="none")[1], labels)
    for other in (batch(seed=1), batch(epoch=1), batch(index=4)):
        assert not np.array_equal(other[1], labels)
    assert not np.array_equal(batch(augmentation="none")[0], images)


def test_an_epoch_has_each_image_once(digits):
    batches = data.TrainingBatches(digits.train, 64, seed=5)
    assert len(batches) == 22  # The 29 images of a smaller last batch are left out.
    seen = np.concatenate([batches[index][0] for index in reversed(range(22))])
    in_order = {image.tobytes() for image in data._as_input(read_all(digits.train))}
    keys = [image.tobytes() for image in seen]
    assert len(set(keys)) == 22 * 64
    assert set(keys) <= in_order


def test_evaluation_has_all_images_in_order(digits):
    batches = data.EvaluationBatches(digits.test, 100)
    assert [len(batches[index][1]) for index in range(len(batches))] == [100, 100, 100, 60]
    labels = np.concatenate([batches[index][1] for index in range(len(batches))])
    np.testing.assert_array_equal(labels, digits.test.labels)


def test_fit_asks_for_the_batches_of_each_epoch():
    asked = []

    class Recording(data.TrainingBatches):
        def __getitem__(self, index):
            asked.append((self.epoch, index))
            return super().__getitem__(index)

    source = data.load("synthetic").train
    batches = Recording(source, 128, seed=0)
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(10)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    # Going on at epoch 2, as a training that was interrupted.
    for epochs in (range(2), range(2, 4)):
        asked.clear()
        model.fit(
            batches,
            initial_epoch=epochs[0],
            epochs=epochs[-1] + 1,
            callbacks=[data.FollowEpochs(batches)],
            shuffle=False,
            verbose=0,
        )
        # Before the first epoch Keras looks at one or two batches for their shapes.
        assert asked[-8:] == [(epoch, index) for epoch in epochs for index in range(4)]
        assert len(asked) <= 10


def test_crops_shift_and_flips_mirror():
    # Every pixel tells where it was.
    rows, columns = np.mgrid[1:33, 1:33].astype("uint8")
    image = np.stack([rows, columns, np.full_like(rows, 7)], axis=-1)
    source = data.ArraySource(np.repeat(image[None], 256, axis=0), np.zeros(256, "int32"))
    batches = data.TrainingBatches(source, 256, seed=0, augmentation="crop_flip")
    pixels = np.round((batches[0][0] + 1) * 127.5).astype(int)
    shifts, mirrored = set(), 0
    for picture in pixels:
        inside = picture[..., 2] == 7
        assert (picture[~inside] == 0).all()
        across = picture[16, :, 1][inside[16]]
        if across[0] > across[-1]:
            mirrored += 1
            picture = picture[:, ::-1]
        top, left = picture[16, 16, :2] - 17
        shifts.add((top, left))
        assert inside.sum() == (32 - abs(top)) * (32 - abs(left))
    assert {shift for pair in shifts for shift in pair} == set(range(-4, 5))
    assert 90 < mirrored < 166


def write_image(path, color, size=(40, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, color).save(path)


COLORS = {"cat": (255, 0, 0), "dog": (0, 0, 255)}


@pytest.mark.parametrize("parts", [("",), ("train", "test"), ("train", "val")], ids=str)
def test_folder_of_jpeg_and_png(tmp_path, parts):
    for part in parts:
        for class_name, color in COLORS.items():
            for number in range(5):
                suffix = (".jpg", ".png", ".JPEG")[number % 3]
                write_image(tmp_path / part / class_name / f"{number}{suffix}", color)
    images = data.load(f"folder:{tmp_path}", image_size=48)
    assert images.class_names == ("cat", "dog")
    assert images.image_shape == (48, 48, 3)
    counts = [len(images.train.labels), len(images.test.labels)]
    assert counts == ([8, 2] if parts == ("",) else [10, 10])
    for source in (images.train, images.test):
        pixels = read_all(source)
        assert pixels.shape == (len(source.labels), 48, 48, 3)
        expected = np.array(list(COLORS.values()))[source.labels]
        np.testing.assert_allclose(pixels.mean(axis=(1, 2)), expected, atol=3)


def test_a_file_that_is_no_image_is_named(tmp_path):
    for class_name, color in COLORS.items():
        for number in range(5):
            write_image(tmp_path / class_name / f"{number}.png", color)
    broken = tmp_path / "cat" / "2.png"
    broken.write_bytes(b"no image")
    images = data.load(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match=f"JPEG or PNG.*{broken}"):
        read_all(images.train), read_all(images.test)


@needs_tensorflow
def test_tensorflow_datasets_from_records_on_disk(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 1)),
                "label": tfds.features.ClassLabel(names=["dark", "light"]),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
            )

        def _split_generators(self, dl_manager):
            return {"train": self._examples(20), "validation": self._examples(7)}

        def _examples(self, count):
            for number in range(count):
                pixels = np.full((30 + number, 40, 1), 50 + 150 * (number % 2), "uint8")
                yield number, {"image": pixels, "label": number % 2}

        def _generate_examples(self):
            raise NotImplementedError

    with pytest.raises(ValueError, match=f"tiny_pictures in {tmp_path}.*--download"):
        data.load("tiny_pictures", data_dir=str(tmp_path))
    data.load("tiny_pictures", data_dir=str(tmp_path), download=True)  # Prepares it.
    images = data.load("tiny_pictures", data_dir=str(tmp_path))
    assert images.class_names == ("dark", "light")
    for source, count in ((images.train, 20), (images.test, 7)):
        assert read_all(source).shape == (count, 32, 32, 3)
        assert sorted(source.labels) == sorted(number % 2 for number in range(count))
        expected = np.array([50, 200])[source.labels]
        np.testing.assert_array_equal(read_all(source).mean(axis=(1, 2, 3)), expected)


# Configurations


def config_names():
    folder = pathlib.Path(config_module.__file__).parent / "configs"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", config_names())
def test_config_files_are_named_and_documented(name):
    assert load_config(name).name == name
    path = config_module.CONFIGS / f"{name}.py"
    assert load_config(str(path)) == load_config(name)
    text = path.read_text()
    for word in ("Source:", "Hardware:", "Time:", "Accuracy:", f"--config={name}"):
        assert word in text


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
        ({"model": "resnet"}, "one of mobilenet_v1, mobilenet_v2. Received: model='resnet'"),
        ({"name": "a/b"}, "plain folder name"),
        ({"compare": ("stock", "stock")}, "different lowerings"),
        ({"compare": "stock"}, "a list of strings"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**values)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Config(), **values)


def test_variants_to_train():
    assert Config().variants == ("stock", "diagonal:32")
    assert Config(lowering="shifted").variants == ("stock", "shifted")
    assert Config(lowering="stock").variants == ("stock",)
    assert Config(compare=["dense", "stock"]).variants == ("dense", "stock")
    per_pass = {"forward": "native", "input_gradient": "dense", "kernel_gradient": "shifted"}
    assert train.parse_lowering(json.dumps(per_pass)) == per_pass
    assert train.parse_lowering("stock") is None


def test_weight_decay_spares_biases_and_batch_norms():
    model = keras.Sequential(
        [keras.layers.Input((8, 8, 3)), keras.layers.Conv2D(2, 3, name="conv")]
        + [keras.layers.BatchNormalization(name="bn"), keras.layers.Flatten()]
    )
    # None is zero, which no factor would change.
    model.set_weights([w + 0.5 for w in model.get_weights()])
    before = {v.path: keras.ops.convert_to_numpy(v) for v in model.trainable_variables}
    train.compile_model(model, Config(weight_decay=0.5, warmup_fraction=0.0), 10)
    zeros = [keras.ops.zeros(v.shape) for v in model.trainable_variables]
    model.optimizer.apply(zeros, model.trainable_variables)
    for variable in model.trainable_variables:
        factor = 1 - 0.1 * 0.5 if variable.path.endswith("conv/kernel") else 1.0
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(variable), before[variable.path] * factor, rtol=1e-6
        )


# The recipe

OURS = "diagonal:128"  # Fewer blocks than 32 makes: quicker to compile.


# The run takes a minute on JAX: not one for each process of the tests.
one_worker = pytest.mark.xdist_group("recipe run")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of both variants, with a learning rate that keeps them together."""
    config = Config(
        name="tiny",
        stem="imagenet",  # The smaller one: this is about the files.
        dataset="synthetic",
        width_multiplier=0.25,
        lowering=OURS,
        dropout=0.5,
        batch_size=16,
        epochs=2,
        max_steps=2,
        learning_rate=1e-5,
        output_dir=str(tmp_path_factory.mktemp("runs")),
    )
    return train.run_recipe(config, verbose=0)


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
    expected = {"config.json", "metrics.jsonl", "report.json", "curves.png", "model.keras"}
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
        assert [line["event"] for line in own] == ["step", "step", "epoch", "end"]
        assert [line["loss"] for line in own[:2]] == list(variant.losses)
        assert own[2]["loss"] == pytest.approx(np.mean(variant.losses), rel=1e-5)
        assert own[2]["val_accuracy"] == own[3]["test_accuracy"] == variant.test_accuracy
    rows = json.loads((run.folder / "report.json").read_text())["variants"]
    assert [row["variant"] for row in rows] == ["stock", OURS]
    assert rows[0]["loss_difference"] == 0
    assert rows[1]["loss_difference"] == pytest.approx(
        max(abs(a - b) for a, b in zip(*(v.losses for v in run.variants), strict=True))
    )


@one_worker
def test_table_is_complete_where_the_output_is_no_terminal(run, capsys):
    run.print()
    printed = capsys.readouterr().out
    for text in ("stock", OURS, "test accuracy", "images/s", "first step"):
        assert text in printed
    assert f"{100 * run.variants[1].test_accuracy:.2f} %" in printed
    assert "…" not in printed


@one_worker
def test_saved_models_load_and_give_equal_outputs(run):
    model = keras.saving.load_model(run.folder / "model.keras")
    depthwise = [x for x in model.layers if isinstance(x, keras.layers.DepthwiseConv2D)]
    assert all(isinstance(x, DiagonalwiseDepthwiseConv2D) for x in depthwise)
    images, _ = data.EvaluationBatches(data.load("synthetic").test, 128)[0]
    outputs = keras.ops.convert_to_numpy(model(images[:4], training=False))
    # It is the trained model: its batch norms have moved.
    start = train.build_model(run.config, data.load("synthetic"), "stock")
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(model.get_weights(), start.get_weights(), strict=True)
    )
    if ON_TENSORFLOW:
        import tensorflow as tf

        loaded = tf.saved_model.load(str(run.folder / "saved_model"))
        np.testing.assert_allclose(loaded.serve(images[:4]).numpy(), outputs, atol=1e-5)


@one_worker
@needs_tensorflow
def test_tensorboard_events_have_the_metrics_of_each_epoch(run):
    import tensorflow as tf

    for variant in run.variants:
        folder = run.folder / "tensorboard" / train.file_name(variant.name)
        (path,) = folder.iterdir()
        found = {}
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                found[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
        assert {tag for tag, _ in found} == {"loss", "accuracy", "val_loss", "val_accuracy"}
        assert found["val_accuracy", 0] == pytest.approx(variant.test_accuracy)


def test_results_are_not_overwritten_unasked(tmp_path):
    config = Config(name="a", output_dir=str(tmp_path / "new"))
    first = report.new_run_folder(config)
    (first / "kept").touch()
    second, third = report.new_run_folder(config), report.new_run_folder(config)
    assert [folder.name for folder in (first, second, third)] == ["a", "a-2", "a-3"]
    assert (first / "kept").exists()
    overwriting = dataclasses.replace(config, overwrite=True)
    assert report.new_run_folder(overwriting) == first
    assert not (first / "kept").exists()
    assert second.exists()


def test_only_results_are_overwritten(tmp_path):
    precious = tmp_path / "a" / "thesis.txt"
    precious.parent.mkdir()
    precious.touch()
    with pytest.raises(ValueError, match=r"results of a run.*config\.json"):
        report.new_run_folder(Config(name="a", output_dir=str(tmp_path), overwrite=True))
    assert precious.exists()


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
    (["--model=mobilenet_v3"], 2, "one of mobilenet_v1, mobilenet_v2. Received"),
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


NAMES_OF_TFDS = ("--dataset=digit", "--dataset=cifar10", "--dataset=coco/2017")


@pytest.mark.parametrize(("arguments", "code", "message"), BAD_INPUT, ids=lambda x: str(x))
def test_bad_input_is_one_line_before_any_training(
    arguments, code, message, tmp_path, monkeypatch, capsys
):
    if arguments[0] in NAMES_OF_TFDS and not ON_TENSORFLOW:
        pytest.skip("the names of TensorFlow Datasets need TensorFlow")
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


def test_flags_override_the_config(monkeypatch):
    given = []
    monkeypatch.setattr(train, "run_recipe", lambda config: given.append(config) or pytest.skip())
    arguments = ["--epochs=3", "--compare=stock,shifted", "--learning_rate=1", "--nooverwrite"]
    with flagsaver.flagsaver(), pytest.raises(pytest.skip.Exception):
        train.main(config_module.parse_flags(["train", *arguments]))
    expected = dataclasses.replace(
        load_config("digits_mobilenet_v1"),
        epochs=3,
        compare=("stock", "shifted"),
        learning_rate=1.0,
    )
    assert given == [expected]
    assert "epochs" in flags.FLAGS
