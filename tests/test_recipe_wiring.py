"""Every setting of a recipe changes what is built, fed or optimised.

A run is stopped where its training would begin, and looked at there.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from diagconv_tf import MeSimp
from recipes import data, models, optimizers, train
from recipes.averaging import AveragingBatchNormalization, SwapAverages
from recipes.config import Config
from recipes.data.image_data import ImageData
from recipes.data.sources import PixelExamples
from recipes.distributing import Distribution
from recipes.profiling import Profile

BACKEND = keras.backend.backend()
SIZE, COUNT, CLASSES = 32, 24, 3
STEPS = 4  # An epoch, of batches of 6.


@pytest.fixture(scope="module", autouse=True)
def one_block():
    """Networks of one block: what is traced is most of the time of a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "_V1_BLOCKS", models._V1_BLOCKS[:1])
        patch.setattr(models, "_V2_STAGES", models._V2_STAGES[:1])
        yield


# Stopped runs

#: Black and white pixels, so that both ends of a range are there; each picture is another one.
PICTURES = 255 * np.random.default_rng(0).integers(2, size=(COUNT, SIZE, SIZE, 3), dtype="uint8")


class StoppedError(Exception):
    pass


@dataclasses.dataclass
class Run:
    """What a run had made when it was to train.

    Attributes:
        loaded: arguments of `data.load`.
        folder: of the results.
        model: compiled.
        batches: of a step: the training's batches from there on.
        fitted: further arguments of `fit_from`.
    """

    loaded: dict[str, Any]
    folder: pathlib.Path
    model: keras.Model
    batches: Callable[[int], Any]
    fitted: dict[str, Any]

    @property
    def optimizer(self):
        return getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)

    @property
    def callbacks(self):
        return [type(callback) for callback in self.fitted["callbacks"]]

    def layers(self, kind):
        return [layer for layer in self.model.layers if isinstance(layer, kind)]

    def first_batches(self):
        """Images and labels of a training's and of an evaluation's first batch."""
        for dataset in (self.batches(0), self.fitted["validation_data"]):
            yield next(iter(dataset.as_numpy_iterator()))

    def rate(self, update):
        self.optimizer.iterations.assign(update)
        return float(keras.ops.convert_to_numpy(self.optimizer.learning_rate))


def stopped(config):
    found = {}

    def load(name, **options):
        found["loaded"] = {"dataset": name, **options}
        examples = PixelExamples(PICTURES, (np.arange(COUNT) % CLASSES).astype("int32"))
        return ImageData(name, examples, examples, ("a", "b", "c"), options["image_size"])

    def fit_from(model, start, make_dataset, **options):
        found.update(model=model, batches=make_dataset, fitted=options)
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(StoppedError):
        patch.setattr(data, "load", load)
        patch.setattr(train, "fit_from", fit_from)
        train.run_recipe(config, verbose=0)
    (folder,) = pathlib.Path(config.output_dir).iterdir()
    return Run(folder=folder, **found)


# What is seen of a setting

DIFFERENT = object()


@dataclasses.dataclass(frozen=True)
class Row:
    """A setting and where it is seen.

    Attributes:
        value: another one than the default.
        look: what is seen of it in a run.
        expected: what must be seen; by default the value. `DIFFERENT`: another thing at each
            place of a tuple than with the default, which is always the same.
        given: further settings.
    """

    value: Any
    look: Callable[[Run], Any]
    expected: Any = None
    given: dict[str, Any] = dataclasses.field(default_factory=dict)


def extremes(run):
    return [(float(x.min()), float(x.max())) for x, _ in run.first_batches()]


def are_original(run):
    """Whether all images of training and evaluation are as they were loaded."""
    known = {picture.tobytes() for picture in PICTURES}
    return [
        all(np.round((x + 1) * 127.5).astype("uint8").tobytes() in known for x in images)
        for images, _ in run.first_batches()
    ]


def decay_of_kinds(run):
    """What a step without gradients makes of ones, by the kind of variable."""
    depthwise = {id(layer.kernel) for layer in run.layers(keras.layers.DepthwiseConv2D)}
    variables = run.model.trainable_variables
    for variable in variables:
        variable.assign(np.ones(variable.shape))
    run.optimizer.apply([keras.ops.zeros(v.shape) for v in variables], variables)
    return {
        "depthwise" if id(v) in depthwise else v.name: round(float(np.array(v).mean()), 6)
        for v in variables
    }


CONSTANT = {"schedule": "constant", "warmup_fraction": 0.0}
STEP = {"schedule": "step", "warmup_fraction": 0.0, "decay_epochs": (2,), "decay_rate": 0.1}
RMSPROP = {"optimizer": "rmsprop"}
NO_DECAY = {"bias": 1.0, "gamma": 1.0, "beta": 1.0}


def loaded(value, name):
    return Row(value, lambda run: run.loaded[name])


ROWS = {
    "name": Row("another", lambda run: run.folder.name),
    "output_dir": Row("elsewhere", lambda run: run.folder.parent.name),
    "model": Row("mobilenet_v2", lambda run: run.model.name),
    "stem": Row("imagenet", lambda run: run.layers(keras.layers.Conv2D)[0].strides, (2, 2)),
    "width_multiplier": Row(0.5, lambda run: run.layers(keras.layers.Conv2D)[0].filters, 16),
    "dropout": Row(0.5, lambda run: run.layers(keras.layers.Dropout)[0].rate),
    "batch_norm_momentum": Row(
        0.5,
        lambda run: [x.momentum for x in run.layers(keras.layers.BatchNormalization)],
        [0.5] * 3,
    ),
    "dtype_policy": Row(
        "mixed_bfloat16", lambda run: run.layers(keras.layers.Conv2D)[0].dtype_policy.name
    ),
    "input_range": Row("bytes", extremes, [(0.0, 255.0)] * 2),
    "dataset": loaded("cifar10", "dataset"),
    "data_dir": loaded("there", "data_dir"),
    "download": loaded(True, "download"),
    "corrupt_images": loaded("fail", "corrupt_images"),
    "cache_gb": loaded(1.0, "cache_gb"),
    "shuffle_buffer": loaded(5, "shuffle_buffer"),
    "image_size": Row(
        40,
        lambda run: (
            run.loaded["image_size"],
            run.model.input_shape[1],
            *(x.shape[1] for x, _ in run.first_batches()),
        ),
        (40,) * 4,
    ),
    "augmentation": Row("crop_flip", are_original, [False, True]),
    "batch_size": Row(8, lambda run: [len(x) for x, _ in run.first_batches()], [8, 8]),
    "epochs": Row(
        3,
        lambda run: (
            run.fitted["epochs"],
            len(list(run.batches(0))),
            run.rate(3 * STEPS - 1) < 0.01,
        ),
        (3, 3 * STEPS, True),
    ),
    "max_steps": Row(2, lambda run: (run.fitted["max_steps"], run.fitted["epochs"]), (2, 1)),
    "optimizer": Row("rmsprop", lambda run: type(run.optimizer).__name__, "RMSprop"),
    "learning_rate": Row(0.25, lambda run: run.rate(30), given=CONSTANT),
    "schedule": Row("constant", lambda run: run.rate(39), 0.1),
    "decay_rate": Row(0.5, lambda run: run.rate(4 * STEPS), 0.025, STEP),
    "decay_epochs": Row(
        (3, 5),
        lambda run: [run.rate(update) for update in (11, 12, 19, 20, 39)],
        [0.1, 0.01, 0.01, 0.001, 0.001],
        STEP,
    ),
    "warmup_fraction": Row(0.5, lambda run: [run.rate(9), run.rate(20)], [0.05, 0.1]),
    "momentum": Row(0.5, lambda run: run.optimizer.momentum),
    "rho": Row(0.5, lambda run: run.optimizer.rho, given=RMSPROP),
    "epsilon": Row(0.5, lambda run: run.optimizer.epsilon, given=RMSPROP),
    "weight_decay": Row(
        0.5, decay_of_kinds, {"kernel": 0.95, "depthwise": 0.95, **NO_DECAY}, CONSTANT
    ),
    "decay_depthwise": Row(
        False,
        decay_of_kinds,
        {"kernel": 0.95, "depthwise": 1.0, **NO_DECAY},
        {**CONSTANT, "weight_decay": 0.5},
    ),
    "label_smoothing": Row(
        0.2,
        lambda run: (
            getattr(run.model.loss, "label_smoothing", 0.0),
            *(labels.ndim for _, labels in run.first_batches()),
        ),
        (0.2, 2, 2),
    ),
    "ema_momentum": Row(
        0.9,
        lambda run: (
            run.optimizer.use_ema and run.optimizer.ema_momentum,
            len(run.layers(AveragingBatchNormalization)),
            SwapAverages in run.callbacks,
        ),
        (0.9, 3, True),
    ),
    "gradient_accumulation": Row(4, lambda run: run.optimizer.gradient_accumulation_steps),
    # JAX compiles by default, the others on CPUs do not.
    "jit_compile": Row(
        "false" if BACKEND == "jax" else "true",
        lambda run: bool(run.model.jit_compile),
        BACKEND != "jax",
    ),
    "seed": Row(
        1,
        lambda run: (
            float(np.array(run.layers(keras.layers.Conv2D)[0].kernel)[0, 0, 0, 0]),
            next(run.first_batches())[1].tolist(),
            keras.ops.convert_to_numpy(
                run.layers(keras.layers.Dropout)[0].seed_generator.state
            ).tolist(),
        ),
        DIFFERENT,
    ),
    "standardize": Row(
        True,
        lambda run: len(run.layers(keras.layers.Normalization)),
        1,
        {"model": "mlp", "input_range": "unit"},
    ),
    "simplify": Row(
        0.1,
        lambda run: [x.rate for x in run.fitted["callbacks"] if isinstance(x, MeSimp)],
        [0.1],
        {"model": "mlp", "compare": ("meprop:k=3",)},
    ),
    "checkpoint_epochs": Row(3, lambda run: run.fitted["save_every"]),
    "log_every": Row(7, lambda run: run.fitted["log_every"]),
    "profile": Row(True, lambda run: Profile in run.callbacks),
}

#: Settings that no stopped run shows, and the test that does.
ELSEWHERE = {
    "lowering": ("test_recipes", "test_variants_train_alike_from_the_same_start"),
    "treatment": ("test_recipe_treatments", "test_flags_name_variants"),
    "compare": ("test_recipes", "test_a_trial_goes_on"),
    "distribution": ("test_recipe_distribution", "test_two_devices_train_as_one"),
    "cpu_devices": ("test_recipe_distribution", "test_two_devices_train_as_one"),
    "sync_batch_norm": (
        "test_recipe_distribution",
        "test_batch_norms_are_synchronized_under_a_strategy_alone",
    ),
    "freeze": ("test_recipe_finetuning", "test_a_model_with_random_layers_is_trained_in_phases"),
    "unfreeze_after": (
        "test_recipe_finetuning",
        "test_a_model_with_random_layers_is_trained_in_phases",
    ),
    "overwrite": ("test_recipes", "test_results_are_not_overwritten_unasked"),
    "resume": ("test_recipes", "test_a_finished_run_that_is_resumed_is_not_trained_again"),
}


def test_the_tables_have_every_setting():
    assert sorted([*ROWS, *ELSEWHERE]) == sorted(x.name for x in dataclasses.fields(Config))
    for module, name in ELSEWHERE.values():
        text = (pathlib.Path(__file__).parent / f"{module}.py").read_text()
        assert f"\ndef {name}(" in text


def base(folder, **settings):
    values = {"name": "wired", "compare": ("stock",), "width_multiplier": 0.25, "batch_size": 6}
    values |= {"dropout": 0.1, "output_dir": str(folder / "runs"), "momentum": 0.9}
    return Config(**{**values, **settings})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Runs without the changed setting: one for all rows of the same given settings."""
    runs = {}

    def plain(given):
        key = repr(given)
        if key not in runs:
            runs[key] = stopped(base(tmp_path_factory.mktemp("plain"), **given))
        return runs[key]

    return plain


@pytest.mark.parametrize("field", ROWS)
def test_a_setting_changes_what_is_built_fed_or_optimised(field, plain, tmp_path):
    row = ROWS[field]
    before = row.look(plain(row.given))
    value = str(tmp_path / row.value) if field == "output_dir" else row.value
    found = row.look(stopped(base(tmp_path, **{**row.given, field: value})))
    if row.expected is DIFFERENT:
        again = row.look(stopped(base(tmp_path / "again", **row.given)))
        assert again == before
        assert all(a != b for a, b in zip(before, found, strict=True))
        return
    expected = row.value if row.expected is None else row.expected
    assert before != expected
    assert found == pytest.approx(expected, rel=1e-5)


# Logits and probabilities


def built(config):
    config, _ = train.with_settings_of_model(config)
    images = data.load("synthetic", image_size=config.image_size)
    return train.build_model(config, images, Distribution())


def with_bias(model, values):
    """`model` with these logits, whatever the image."""
    kernel, bias = model.trainable_variables[-2:]
    kernel.assign(np.zeros(kernel.shape))
    bias.assign(np.array(values))
    return bias


@pytest.mark.parametrize("network", ["mobilenet_v1", "mobilenet_v2"])
def test_logits_are_of_single_precision_where_layers_are_of_half(network):
    model = built(Config(model=network, width_multiplier=0.25, dtype_policy="mixed_bfloat16"))
    values = [20.001, *[0.0] * 9]
    with_bias(model, values)
    logits = keras.ops.convert_to_numpy(model(np.zeros((1, SIZE, SIZE, 3), "float32")))
    np.testing.assert_array_equal(logits, [np.array(values, "float32")])


def test_an_example_that_is_wrong_by_far_has_its_gradient_in_half_precision():
    """Of cross-entropy and a softmax p it is p minus the label, for any logits."""
    config = Config(
        width_multiplier=0.25,
        dtype_policy="mixed_bfloat16",
        learning_rate=1.0,
        momentum=0.0,
        **CONSTANT,
    )
    model = built(config)
    optimizers.compile_model(model, config, 10)
    before = [20.0, *[0.0] * 9]
    bias = with_bias(model, before)
    model.train_on_batch(np.zeros((2, SIZE, SIZE, 3), "float32"), np.array([1, 1]))
    change = keras.ops.convert_to_numpy(bias) - before
    np.testing.assert_allclose(change, [-1, 1, *[0.0] * 8], atol=1e-5)


def test_probabilities_are_the_softmax_of_the_trained_logits():
    model = built(Config(width_multiplier=0.25))
    saved = models.with_probabilities(model)
    assert [v.path for v in saved.variables] == [v.path for v in model.variables]
    assert saved.input is model.input  # As a tensor, not as a list: so it is served.
    for _ in range(2):
        images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype("float32")
        logits, found = (keras.ops.convert_to_numpy(m(images)) for m in (model, saved))
        exponentials = np.exp(logits)
        expected = exponentials / exponentials.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        model.trainable_variables[-1].assign(np.arange(10.0))  # The weights are shared.
    # A model that has a layer of this name, and half precision.
    inputs = keras.Input((4,), dtype="float32")
    half = keras.layers.Dense(3, name="probabilities", dtype="bfloat16")(inputs)
    again = models.with_probabilities(keras.Model(inputs, half))
    assert again.outputs[0].dtype == "float32"
