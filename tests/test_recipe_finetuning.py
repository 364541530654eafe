"""Models of one's own as the start of a recipe: classifier, pixels, frozen layers, the end."""

import dataclasses
import json
import signal

import keras
import numpy as np
import pytest
from keras import layers

from diagconv_tf import rewrite
from recipes import optimizers, report, train
from recipes.comparing import ComparedSteps
from recipes.config import Config
from recipes.finetuning import (
    freeze_backbone,
    image_input,
    load_start,
    preprocessed_range,
    unfreeze,
)
from recipes.interruption import TrainingInterrupted
from recipes.recording import MetricsLog

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
# These laws need no backend's own code: they are tested on one of them.
one_backend = pytest.mark.backends("tensorflow")


def body(size=8, name="body"):
    """Feature maps of 4 channels."""
    inputs = keras.Input((size, size, 3))
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="dw")(inputs)
    x = layers.BatchNormalization(name="bn")(layers.Conv2D(4, 1, name="pw")(x))
    return keras.Model(inputs, layers.ReLU(name="relu")(x), name=name)


def ending_in(end, size=8):
    features = body(size)
    return keras.Model(features.inputs, end(features.outputs[0]))


def pooled(x):
    return layers.GlobalAveragePooling2D(name="pool")(x)


def convolution(x, activation=None):
    x = layers.GlobalAveragePooling2D(keepdims=True)(x)
    x = layers.Conv2D(3, 1, activation=activation, name="old")(layers.Dropout(0.1)(x))
    return layers.Reshape((3,))(x)


def nested(x):
    inputs = keras.Input(x.shape[1:])
    outputs = layers.Dense(3, activation="softmax", name="old")(pooled(inputs))
    return keras.Model(inputs, outputs, name="top")(x)


#: Ends of models for 3 classes.
ENDS = {
    "Dense softmax": lambda x: layers.Dense(3, activation="softmax", name="old")(pooled(x)),
    "Dense sigmoid": lambda x: layers.Dense(3, activation="sigmoid", name="old")(pooled(x)),
    "Dense logits": lambda x: layers.Dense(3, name="old")(pooled(x)),
    "Softmax layer": lambda x: layers.Softmax()(layers.Dense(3, name="old")(pooled(x))),
    "Activation": lambda x: layers.Activation("softmax")(layers.Dense(3, name="old")(pooled(x))),
    "operation": lambda x: keras.ops.softmax(layers.Dense(3, name="old")(pooled(x))),
    "Conv2D, Reshape, softmax": lambda x: layers.Activation("softmax")(convolution(x)),
    "Conv2D softmax, Reshape": lambda x: convolution(x, "softmax"),
    "Conv2D logits, Reshape": convolution,
    "Conv2D, pooling": lambda x: layers.Softmax()(pooled(layers.Conv2D(3, 1, name="old")(x))),
    "nested": nested,
    "nested, Softmax layer": lambda x: layers.Softmax()(
        keras.Sequential([layers.Flatten(), layers.Dense(3, name="old")], name="top")(x)
    ),
    "all convolutions": lambda x: layers.Softmax()(pooled(layers.Conv2D(3, 3, name="old")(x))),
}


def every_layer(model):
    return {layer.name: layer for layer in model._flatten_layers(include_self=False)}


def numbers(model, images):
    return keras.ops.convert_to_numpy(model(images, training=False))


@one_backend
@pytest.mark.parametrize("name", ENDS)
def test_a_classifier_of_the_right_number_stays(name, tmp_path):
    model = ending_in(ENDS[name])
    path = str(tmp_path / "mine.keras")
    rewrite(model, "shifted").save(path)
    start = load_start(path, (8, 8, 3), 3)
    assert "as it was" in start.head or "as they were" in start.head
    assert type(every_layer(start.model)["dw"]) is layers.DepthwiseConv2D
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    logits, outputs = numbers(start.model, images), numbers(model, images)
    # From the definition of what the model gave.
    exponentials = np.exp(logits)
    expected = {
        "Dense sigmoid": exponentials / (1 + exponentials),
        "Dense logits": logits,
        "Conv2D logits, Reshape": logits,
    }.get(name, exponentials / exponentials.sum(-1, keepdims=True))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5)
    # The sum of probabilities would be 1.
    assert not np.allclose(logits.sum(-1), 1)


@one_backend
@pytest.mark.parametrize("name", ENDS)
def test_a_classifier_of_another_number_is_replaced(name, tmp_path):
    model = ending_in(ENDS[name])
    path = str(tmp_path / "mine.keras")
    model.save(path)
    start = load_start(path, (8, 8, 3), 5)
    assert start.model.output_shape == (None, 5)
    found = every_layer(start.model)
    # A 3x3 convolution is no classifier: there its means are features.
    assert ("old" in found) == (name == "all convolutions")
    assert found["new_predictions"].activation is keras.activations.linear
    for kept in ("dw", "bn", "pw"):
        for mine, theirs in zip(found[kept].weights, every_layer(model)[kept].weights, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert "Dense of 5 classes" in start.head
    # What was made by one fine-tuning is the start of another.
    start.model.save(path)
    again = load_start(path, (8, 8, 3), 4).model
    assert again.output_shape == (None, 4)
    freeze_backbone(again)
    assert len(again.trainable_weights) == 2


FEATURES = {
    "feature maps": (lambda x: x, {"new_average", "new_predictions"}),
    "features": (pooled, {"new_predictions"}),
    "features after relu": (
        lambda x: layers.Dense(5, activation="relu", name="mine")(pooled(x)),
        {"new_predictions"},
    ),
}


@one_backend
@pytest.mark.parametrize("name", FEATURES)
def test_features_get_a_classifier(name, tmp_path):
    end, new = FEATURES[name]
    ending_in(end).save(tmp_path / "mine.keras")
    start = load_start(str(tmp_path / "mine.keras"), (8, 8, 3), 5)
    assert start.model.output_shape == (None, 5)
    assert {name for name in every_layer(start.model) if name.startswith("new_")} == new


APPLICATIONS = {
    "MobileNet": (dict(alpha=0.25), "Conv2D 'conv_preds'", None),
    "MobileNetV2": (dict(alpha=0.35), "Dense 'predictions'", None),
    "MobileNetV3Small": (dict(alpha=0.75, minimalistic=True), "Conv2D 'logits'", "bytes"),
    "EfficientNetB0": ({}, "Dense 'predictions'", "bytes"),
}


@one_backend
@pytest.mark.parametrize("name", APPLICATIONS)
def test_models_of_keras_applications_are_started_from(name, tmp_path):
    arguments, head, input_range = APPLICATIONS[name]
    path = str(tmp_path / "mine.keras")
    make = getattr(keras.applications, name)
    make(input_shape=(32, 32, 3), weights=None, classes=7, **arguments).save(path)
    found = image_input(path)
    assert (found.size, found.input_range) == (32, input_range)
    start = load_start(path, (32, 32, 3), 5)
    assert start.head == f"new, Dense of 5 classes; before: {head} of 7 classes"
    assert start.model.output_shape == (None, 5)
    freeze_backbone(start.model)
    assert [w.path for w in start.model.trainable_weights] == [
        "new_predictions/kernel",
        "new_predictions/bias",
    ]


def preprocessing(*first):
    inputs = keras.Input((8, 8, 3))
    x = inputs
    for each in first:
        x = each(x)
    return keras.Model(inputs, pooled(body()(x)))


IMAGENET = layers.Normalization(mean=[123.7, 116.3, 103.5], variance=[3410.0, 3260.0, 3290.0])

PREPROCESSINGS = {
    "none": ((), None),
    "random layers alone": ((layers.RandomFlip(),), None),
    "to [0, 1]": ((layers.Rescaling(1 / 255),), "bytes"),
    "to [-1, 1], after random layers": (
        (layers.RandomFlip(), layers.Rescaling(1 / 127.5, -1)),
        "bytes",
    ),
    "by ImageNet's statistics": ((IMAGENET,), "bytes"),
    "by plain operations": ((keras.applications.mobilenet.preprocess_input,), "bytes"),
    "in a nested model": (
        (keras.Sequential([layers.Rescaling(1 / 255), layers.RandomRotation(0.1)]),),
        "bytes",
    ),
    "of [0, 1]": ((layers.Rescaling(2, -1),), "unit"),
    "of [-1, 1]": ((layers.Rescaling(0.5, 0.5),), "symmetric"),
}


@pytest.mark.parametrize("name", PREPROCESSINGS)
def test_the_pixels_that_a_model_wants_are_read_from_it(name):
    first, expected = PREPROCESSINGS[name]
    assert preprocessed_range(preprocessing(*first)) == expected


@one_backend
def test_settings_come_from_the_model_and_doubled_preprocessing_is_told(tmp_path, caplog):
    path = str(tmp_path / "mine.keras")
    inputs = keras.Input((40, 40, 3))
    outputs = body(40)(layers.Rescaling(1 / 255)(inputs))
    keras.Model(inputs, outputs).save(path)
    config = Config(model=path)
    found, warnings = train.with_settings_of_model(config)
    assert (found.image_size, found.input_range, warnings) == (40, "bytes", ())
    told, warnings = train.with_settings_of_model(
        dataclasses.replace(config, input_range="symmetric", image_size=64)
    )
    assert (told.image_size, told.input_range) == (64, "symmetric")
    assert "wants input_range='bytes'. It gets 'symmetric'" in warnings[0]
    assert warnings[0] in caplog.text
    built_in, _ = train.with_settings_of_model(Config())
    assert (built_in.image_size, built_in.input_range) == (32, "symmetric")


@one_backend
@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_the_loss_of_a_model_in_half_precision_is_scaled(suffix, tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = ending_in(ENDS["Dense softmax"])
    finally:
        keras.config.set_dtype_policy("float32")
    model.save(tmp_path / f"mine.{suffix}")
    for classes in (3, 5):
        start = load_start(str(tmp_path / f"mine.{suffix}"), (8, 8, 3), classes).model
        assert start.outputs[0].dtype == "float32"
        optimizers.compile_model(start, Config(), 10)
        assert type(start.optimizer).__name__ == "LossScaleOptimizer"


@one_backend
def test_models_that_do_not_fit_are_refused(tmp_path):
    path = str(tmp_path / "mine.keras")
    ending_in(pooled).save(path)
    with pytest.raises(ValueError, match=r"images of shape \(32, 32, 3\).*mine.keras.*\(8, 8, 3\)"):
        load_start(path, (32, 32, 3), 5)
    with pytest.raises(ValueError, match="no such file"):
        load_start(str(tmp_path / "other.keras"), (8, 8, 3), 5)
    ending_in(lambda x: [pooled(x), x]).save(path)
    with pytest.raises(ValueError, match=r"class scores.*Received: .*shapes \[\(None, 4\), "):
        load_start(path, (8, 8, 3), 5)
    keras.Model(inputs := keras.Input((4,)), layers.Dense(3)(inputs)).save(path)
    with pytest.raises(ValueError, match=r"a model of images.*takes \[\(4,\)\]"):
        image_input(path)


@one_backend
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": "backbone"}, "all weights are new.*freeze='backbone'"),
        ({"model": "a.keras", "unfreeze_after": 2}, "unfreeze_after=2 with freeze='none'"),
        (
            {"model": "a.keras", "freeze": "backbone", "unfreeze_after": 10},
            "less than `epochs`, 10. Received: unfreeze_after=10",
        ),
    ],
    ids=str,
)
def test_wrong_settings_of_freezing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_frozen_layers_keep_their_numbers(tmp_path):
    path = str(tmp_path / "mine.keras")
    inputs = keras.Input((8, 8, 3))
    outputs = layers.Dense(3, name="old")(pooled(body()(inputs)))
    keras.Model(inputs, outputs).save(path)
    model = load_start(path, (8, 8, 3), 5).model
    batch = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("float32"), np.arange(4)

    def changed():
        optimizers.compile_model(model, Config(warmup_fraction=0.0), 10)
        before = {w.path: keras.ops.convert_to_numpy(w) for w in model.weights}
        model.fit(*batch, verbose=0)
        after = {w.path: keras.ops.convert_to_numpy(w) for w in model.weights}
        return {path.split("/")[-2] for path in before if (before[path] != after[path]).any()}

    freeze_backbone(model)
    assert changed() == {"new_predictions"}
    unfreeze(model)
    # Batch norms stay in inference mode.
    assert changed() == {"dw", "pw", "new_predictions"}
    freeze_backbone(model)
    assert changed() == {"new_predictions"}


# Whole runs


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A model with preprocessing, random layers and a nested backbone, in two phases."""
    inputs = keras.Input((32, 32, 3))
    x = layers.RandomFlip(name="flip")(inputs)
    x = body(32)(layers.Rescaling(1 / 255)(layers.AveragePooling2D(1)(x)))
    path = str(tmp_path / "mine.keras")
    keras.Model(inputs, layers.Dense(3, name="old")(pooled(x))).save(path)
    monkeypatch.setattr(report, "draw_curves", lambda *_: open(_[-1], "w").close())
    return Config(
        model=path,
        dataset="digits",
        batch_size=400,
        epochs=2,
        freeze="backbone",
        unfreeze_after=1,
        compare=("stock", "auto"),
        warmup_fraction=0.0,
        output_dir=str(tmp_path / "runs"),
    )


def test_a_model_with_random_layers_is_trained_in_phases(config):
    found = train.run_recipe(config, verbose=0)
    (stock, auto) = found.variants
    assert len(stock.losses) == len(auto.losses) == 6
    assert len(stock.test_accuracies) == 2
    assert stock.test_top5_accuracy > stock.test_accuracy
    written = json.loads((found.folder / "report.json").read_text())
    assert written["warnings"] == []
    assert written["head"] == "new, Dense of 10 classes; before: Dense 'old' of 3 classes"
    text = (found.folder / "report.md").read_text()
    assert "top-5" in text
    assert bool(found.exported) == (found.folder / "saved_model").exists() == ON_TENSORFLOW
    names = json.loads((found.folder / "class_names.json").read_text())
    model = keras.saving.load_model(found.folder / "model.keras")
    assert model.output_shape == (None, len(names)) == (None, 10)
    before = {w.path: w for w in keras.saving.load_model(config.model).weights}
    changed = {
        path.split("/")[-2]
        for path, weight in ((w.path, w) for w in model.weights)
        if path not in before or (np.array(weight) != np.array(before[path])).any()
    }
    assert changed == {"dw", "pw", "new_predictions"}


@pytest.mark.backends("jax")
@pytest.mark.parametrize("step", [2, 3, 5])
def test_phases_go_on_after_an_interruption(step, config, monkeypatch):
    monkeypatch.setattr(train, "compare_steps", lambda *_: ComparedSteps())
    config = dataclasses.replace(config, compare=("stock",), log_every=1)
    whole = train.run_recipe(dataclasses.replace(config, name="whole"), verbose=0)
    config = dataclasses.replace(config, name="broken")
    former = MetricsLog.on_train_batch_end

    def interrupting(self, batch, logs=None):
        former(self, batch, logs)
        if len(self.losses) == step:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted) as caught:
        patch.setattr(MetricsLog, "on_train_batch_end", interrupting)
        train.run_recipe(config, verbose=0)
    assert caught.value.step == step
    resumed = train.run_recipe(dataclasses.replace(config, resume=True), verbose=0)
    assert [v.losses for v in resumed.variants] == [v.losses for v in whole.variants]
    assert resumed.restored_accuracy == whole.restored_accuracy


@pytest.mark.backends("tensorflow")
def test_an_export_that_fails_costs_nothing(config, monkeypatch):
    def fail(*_):
        raise RuntimeError("no luck with layer 'flip'")

    monkeypatch.setattr(train, "export_model", fail)
    monkeypatch.setattr(train, "compare_steps", lambda *_: ComparedSteps())
    config = dataclasses.replace(config, compare=("stock",), epochs=1, unfreeze_after=None)
    found = train.run_recipe(config, verbose=0)
    for text in (found.folder / "report.md", found.folder / "report.json"):
        assert "not exported: RuntimeError: no luck with layer 'flip'" in text.read_text()
    assert (found.folder / "model.keras").exists()
    assert (found.folder / "curves.png").exists()
