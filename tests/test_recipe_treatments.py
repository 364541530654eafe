"""Treatments as variants of a recipe: what their text means, how they train, what they leave."""

import dataclasses
import itertools
import json

import keras
import numpy as np
import pytest
from absl import flags

from diagconv_tf import LowBit, MeSimp, rewrite
from diagconv_tf.lowbit import BinaryConnect, DoReFaWeights, StochasticRounding
from diagconv_tf.lowbit.layers import operands_of
from diagconv_tf.minimal_effort import MinimalEffort, RandomK, TopK
from recipes import data, dorefa_models, mlp, models, optimizers, simplifying, train, treatments
from recipes.accuracy_picture import KEPT, bits_text
from recipes.comparing import ComparedSteps
from recipes.config import Config, config_from_flags, define_flags, load_config
from recipes.data.image_data import ImageData
from recipes.data.sources import PixelExamples
from recipes.finetuning import load_start
from recipes.recording import MetricsLog
from recipes.treatments import (
    BinaryConnectTraining,
    DoReFa,
    KernelsAt,
    MinimalEffortTraining,
    RoundedTraining,
)
from recipes.variants import Variant

# These laws need no backend's own code: they are tested on one of them.
one_backend = pytest.mark.backends("jax")

SIGNS = {"delta": 2.0, "offset": 1.0, "limit": 1.0}


def rounded(rounding, batches=1, **grid):
    return RoundedTraining(**{**SIGNS, **grid}, rounding=rounding, batches=batches)


# What the text means


@one_backend
@pytest.mark.parametrize(
    ("text", "expected", "bits"),
    [
        ("dorefa:1,2,6", DoReFa(LowBit(1, 2, 6)), (1, 2, 6)),
        ("dorefa:1:2:6", DoReFa(LowBit(1, 2, 6)), (1, 2, 6)),
        ("dorefa:7,8,32:limit=6", DoReFa(LowBit(7, 8, 32, limit=6.0)), (7, 8, 32)),
        ("dorefa:7,8,32,limit=6", DoReFa(LowBit(7, 8, 32, limit=6.0)), (7, 8, 32)),
        (
            "dorefa:1,32,32:skip=a:skip=b*:include=c:exclude=d:seed=5",
            DoReFa(LowBit(1, skip=("a", "b*"), include=("c",), exclude=("d",), seed=5)),
            (1, 32, 32),
        ),
        (
            "dorefa:1,1,4:skip=none:signed=false",
            DoReFa(LowBit(1, 1, 4, skip=(), signed=False)),
            (1, 1, 4),
        ),
        ("bc", BinaryConnectTraining(), (1, 32, 32)),
        ("sr", rounded("stochastic"), (1, 32, 32)),
        ("r", rounded("nearest"), (1, 32, 32)),
        ("bigsr", rounded("stochastic", 8), (1, 32, 32)),
        ("bigsr:batches=3", rounded("stochastic", 3), (1, 32, 32)),
        (
            "sr:delta=0.125",
            rounded("stochastic", delta=0.125, offset=0.0, limit=None),
            (None, 32, 32),
        ),
        # 17 numbers from -1 to 1, and 16 between them.
        ("r:delta=0.125:limit=1", rounded("nearest", delta=0.125, offset=0.0), (5, 32, 32)),
        (
            "r:delta=0.125:limit=1:offset=0.0625",
            rounded("nearest", delta=0.125, offset=0.0625),
            (4, 32, 32),
        ),
        ("meprop:k=30", MinimalEffortTraining(MinimalEffort(k=30)), (32, 32, 32)),
        (
            "meprop:unified,ratio=0.5:skip=none:include=a",
            MinimalEffortTraining(MinimalEffort(ratio=0.5, unified=True, skip=(), include=("a",))),
            (32, 32, 32),
        ),
        ("random:k=3", MinimalEffortTraining(MinimalEffort(k=3), random=True), (32, 32, 32)),
    ],
)
def test_the_text_of_a_treatment(text, expected, bits):
    treatment = treatments.parse(text)
    assert treatment == expected
    assert treatment.bits == bits
    assert Variant.parse(text).treatment == expected


@one_backend
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dorefa", "bits of weights, activations and gradients, as in 'dorefa:1,2,6'"),
        ("dorefa:1,2", "Received: dorefa:1,2$"),
        ("dorefa:1,2,6,8", "Received: dorefa:1,2,6,8$"),
        ("dorefa:1,two,6", "Received: dorefa:1,two,6"),
        ("dorefa:9,8,8", r"`weights` to be an integer from 1 to 8.*'dorefa:9,8,8'"),
        ("dorefa:32,32,32", "Expected fewer than 32 bits.*'dorefa:32,32,32'"),
        ("dorefa:1,2,6:limt=6", "Unknown option.*Expected: limit. Received: limt"),
        ("dorefa:1,2,6:limit=x", "one number as `limit`. Received: dorefa:1,2,6:limit=x"),
        ("dorefa:1,2,6:limit=1:limit=2", "one number as `limit`"),
        ("dorefa:1,2,6:limit=-1", "`limit` to be a positive number"),
        ("dorefa:1,2,6:signed=yes", "signed=true or signed=false"),
        ("bc:2", "Expected options with a name.*Received: bc:2"),
        ("bc:delta=2", "Unknown option.*Received: delta"),
        ("sr:0.5", "Received: sr:0.5"),
        ("sr:batches=2", "Unknown option"),
        ("sr:delta=0", "`delta` to be a positive number"),
        ("bigsr:batches=0", "`batches` of at least 1"),
        ("bigsr:batches=1.5", "one integer as `batches`"),
        ("meprop:30", "'meprop:unified,k=30'. Received: meprop:30"),
        ("meprop", "one of .*k.* and .*ratio"),
        ("random:3", "'random:k=30' or 'random:ratio=0.05'. Received: random:3"),
        ("random:unified,k=3", "Received: random:unified,k=3"),
        ("dorfa:1,2,6", "Unknown treatment. Expected: dorefa. Received: dorfa"),
    ],
)
def test_wrong_treatments_are_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        treatments.parse(text)
    assert "\n" not in str(error.value)


@one_backend
@pytest.mark.parametrize(
    ("text", "lowering", "treatment"),
    [
        ("stock", "stock", ""),
        ("shifted", "shifted", ""),
        ("bc", "stock", "bc"),
        ("dorefa:1,2,6:include=conv_*", "stock", "dorefa:1,2,6:include=conv_*"),
        ("diagonal:32+dorefa:1,2,6", "diagonal:32", "dorefa:1,2,6"),
        ("a+b.json+sr:delta=0.5", "a+b.json", "sr:delta=0.5"),
        ("a+b.json", "a+b.json", ""),
    ],
)
def test_a_variant_has_a_lowering_and_a_treatment(text, lowering, treatment):
    assert treatments.split(text) == (lowering, treatment)


@one_backend
@pytest.mark.parametrize(
    ("given", "variants"),
    [
        (
            "--compare=stock,dorefa:8,8,8,dorefa:1,2,6",
            ("stock", "dorefa:8,8,8", "dorefa:1,2,6"),
        ),
        (
            "--compare=stock,meprop:unified,k=30,meprop:k=5",
            ("stock", "meprop:unified,k=30", "meprop:k=5"),
        ),
        (
            "--compare=dorefa:7,8,32:limit=6,stock,shifted+sr:delta=0.5,limit=1,r",
            ("dorefa:7,8,32:limit=6", "stock", "shifted+sr:delta=0.5,limit=1", "r"),
        ),
        ("--treatment=dorefa:1,2,6", ("shifted", "shifted+dorefa:1,2,6")),
        ("--compare=stock,bc", ("stock", "bc")),
    ],
)
def test_flags_name_variants(given, variants):
    values = flags.FlagValues()
    define_flags(values)
    values(["train", given])
    assert config_from_flags(Config(lowering="shifted"), values).variants == variants


@one_backend
@pytest.mark.parametrize(
    ("given", "variants"),
    [
        (["--treatment=bc"], ("stock", "bc")),
        (["--lowering=dense"], ("stock", "dense")),
        (["--lowering=dense", "--compare=stock,r"], ("stock", "r")),
        (["--epochs=3"], ("stock", "shifted")),
    ],
)
def test_what_is_given_replaces_what_a_config_compares(given, variants):
    values = flags.FlagValues()
    define_flags(values)
    values(["train", *given])
    config = Config(lowering="stock", compare=("stock", "shifted"))
    assert config_from_flags(config, values).variants == variants


@one_backend
def test_a_treatment_is_compared_with_its_lowering():
    assert Config(lowering="stock", treatment="bc").variants == ("stock", "bc")
    # `compare` stands in place of both, as it does of `lowering` alone.
    assert Config(treatment="bc", compare=("stock", "r")).variants == ("stock", "r")


@one_backend
def test_treatments_have_files_of_their_own():
    names = ["sr:delta=0.125", "sr:delta=0.25", "dorefa:1,2,6", "shifted+dorefa:1,2,6"]
    assert len({variant.file_name for variant in map(Variant.parse, names)}) == len(names)
    assert Variant.parse("dorefa:7,8,32:limit=0.5").file_name == "dorefa-7-8-32-limit-0.5"


# How they train


def network():
    """A convolution at each end, a depthwise one and a dense layer between them."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(4, 3, activation="relu", name="first")(inputs)
    x = keras.layers.DepthwiseConv2D(3, activation="relu", name="dw")(x)
    x = keras.layers.Dense(4, activation="relu", name="dense")(x)
    x = keras.layers.Conv2D(5, 2, name="last")(x)
    return keras.Model(inputs, keras.layers.Flatten()(x))


def kernel(model, name):
    return keras.ops.convert_to_numpy(model.get_layer(name).kernel)


def trained(text, steps=3):
    """The variant, and a model that has made some steps in its way."""
    variant = Variant.parse(text)
    config = variant.settings(Config(learning_rate=0.5, warmup_fraction=0.0))
    model = network()
    optimizers.compile_model(model, config, 10, variant.wrap)
    variant.apply(model, config)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(8, 6, 6, 3)).astype("float32")
    labels = rng.integers(0, 5, 8)
    for _ in range(steps):
        model.train_on_batch(images, labels)
    return variant, model, images


def test_a_lowering_and_bits_go_together():
    _, model, _ = trained("shifted+dorefa:1,2,6:limit=2")
    expected = rewrite(rewrite(network(), "shifted"), LowBit(1, 2, 6, limit=2.0))
    for name in ("first", "dw", "dense", "last"):
        layers = [each.get_layer(name) for each in (model, expected)]
        assert operands_of(layers[0]) == operands_of(layers[1])
    assert model.get_layer("dw").lowering == "shifted"
    assert operands_of(model.get_layer("dense")).kernel == DoReFaWeights(1)


def test_a_deployed_model_computes_what_was_trained():
    variant, model, images = trained("dorefa:2,4,8")
    deployed = variant.finish(model)
    outputs = [keras.ops.convert_to_numpy(m(images, training=False)) for m in (model, deployed)]
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-6, atol=1e-7)
    for name in ("dw", "dense"):
        assert len(np.unique(kernel(deployed, name))) <= 4 < len(np.unique(kernel(model, name)))
    assert variant.keeps_float_weights


def test_bc_computes_with_signs_of_float_weights_that_stay_within_one():
    variant, model, images = trained("bc")
    for name in ("first", "dw"):
        assert operands_of(model.get_layer(name)).kernel == BinaryConnect()
        assert np.abs(kernel(model, name)).max() <= 1
        assert len(np.unique(kernel(model, name))) > 2
    for name in ("dense", "last"):
        assert operands_of(model.get_layer(name)).kernel is None
    # The steps are large: without the limit there would be larger ones.
    assert max(np.abs(kernel(model, name)).max() for name in ("first", "dw")) == 1
    deployed = variant.finish(model)
    for name in ("first", "dw"):
        assert set(np.unique(kernel(deployed, name))) <= {-1, 1}
    outputs = [keras.ops.convert_to_numpy(m(images, training=False)) for m in (model, deployed)]
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("text", ["sr", "r", "bigsr", "sr:delta=0.125"])
def test_rounded_weights_are_on_the_grid(text):
    variant, model, _ = trained(text)
    delta = 0.125 if "delta" in text else 2.0
    for name in ("first", "dw"):
        steps = (kernel(model, name) - (delta == 2)) / delta
        np.testing.assert_array_equal(steps, np.round(steps))
        if delta == 2:
            assert np.abs(kernel(model, name)).max() == 1
    for name in ("dense", "last"):
        assert len(np.unique(kernel(model, name))) > 10
    finished = variant.finish(model)
    for a, b in zip(model.get_weights(), finished.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not variant.keeps_float_weights
    assert isinstance(model.optimizer, StochasticRounding)


@one_backend
def test_updates_of_big_sr_have_more_batches_and_are_as_many():
    config = Config(epochs=6, gradient_accumulation=2, decay_epochs=(2.0, 4.5))
    changed = Variant.parse("bigsr:batches=4").settings(config)
    assert changed.epochs / changed.gradient_accumulation == 6 / 2
    assert changed.gradient_accumulation == 8
    assert changed.decay_epochs == (8.0, 18.0)
    assert Variant.parse("sr").settings(config) == config
    frozen = Config(model="a.keras", freeze="backbone", epochs=6, unfreeze_after=2)
    assert Variant.parse("bigsr:batches=4").settings(frozen).unfreeze_after == 8
    _, model, _ = trained("bigsr:batches=4", steps=8)
    assert int(model.optimizer.iterations) == 2
    # Steps that only accumulate change nothing; the eighth is the second update.
    _, before, _ = trained("bigsr:batches=4", steps=7)
    _, earlier, _ = trained("bigsr:batches=4", steps=4)
    assert np.array_equal(kernel(before, "dense"), kernel(earlier, "dense"))
    assert not np.array_equal(kernel(before, "dense"), kernel(model, "dense"))


def test_minimal_effort_ends_in_the_weights_that_it_trained():
    variant, model, images = trained("meprop:unified,k=2")
    assert operands_of(model.get_layer("dense")).gradients == TopK(2, unified=True)
    _, ordinary, _ = trained("stock")
    assert not np.array_equal(kernel(ordinary, "first"), kernel(model, "first"))
    finished = variant.finish(model)
    assert type(finished.get_layer("dense")) is keras.layers.Dense
    for a, b in zip(model.get_weights(), finished.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_random_elements_are_kept_in_the_places_of_the_largest():
    _, model, _ = trained("random:k=2")
    _, largest, _ = trained("meprop:k=2")
    assert operands_of(model.get_layer("dense")).gradients == RandomK(2)
    for a, b in zip(model.layers, largest.layers, strict=True):
        assert (operands_of(a).gradients is None) == (operands_of(b).gradients is None)
    assert not np.array_equal(kernel(largest, "first"), kernel(model, "first"))


@one_backend
@pytest.mark.parametrize(
    ("text", "kept", "above"),
    [
        ("stock", None, "all"),
        ("dorefa:1,2,6", None, "all"),
        ("meprop:k=10", 10, "10"),
        ("random:ratio=0.05", 0.05, "5 %"),
        ("meprop:ratio=1.0", None, "all"),
    ],
)
def test_the_elements_that_are_kept(text, kept, above):
    variant = Variant.parse(text)
    assert variant.kept == kept
    assert KEPT.text(KEPT.amount(variant)) == above


@one_backend
def test_the_selection_of_kernels_has_a_config():
    selection = KernelsAt(("a/kernel",))
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(selection))
    assert again == selection


@one_backend
def test_a_model_without_convolutions_has_nothing_to_round():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="convolutions before its last layer"):
        treatments.parse("sr").wrap(keras.optimizers.SGD(), model)


@one_backend
def test_adam_has_the_settings():
    config = Config(optimizer="adam", momentum=0.8, epsilon=1e-5, weight_decay=0.01)
    adam = optimizers.make_optimizer(config, 10)
    assert type(adam) is keras.optimizers.Adam
    assert (adam.beta_1, adam.epsilon, adam.weight_decay) == (0.8, 1e-5, 0.01)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_learning_rate_follows_the_batches_of_the_training(accumulation):
    config = Config(
        gradient_accumulation=accumulation,
        schedule="step",
        decay_epochs=(1.0, 2.0),
        decay_rate=0.5,
        learning_rate=0.1,
        warmup_fraction=0.0,
        epochs=3,
    )
    model = network()
    optimizers.compile_model(model, config, 2)
    rates = []
    for _ in range(6):
        rates.append(float(keras.ops.convert_to_numpy(model.optimizer.learning_rate)))
        model.train_on_batch(np.ones((1, 6, 6, 3), "float32"), np.ones(1, "int32"))
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.05, 0.05, 0.025, 0.025], rtol=1e-6)


# Networks


@one_backend
@pytest.mark.parametrize(
    ("build", "shape", "width", "kernels"),
    [
        (
            models.small_cnn,
            (8, 8, 3),
            1.0,
            [(3, 3, 3, 32), (3, 3, 32, 32), (3, 3, 32, 64), (3, 3, 64, 64), (64, 7)],
        ),
        (
            dorefa_models.svhn_cnn,
            (40, 40, 3),
            1.0,
            [
                (5, 5, 3, 48),
                *[(3, 3, *ends) for ends in ((48, 64), (64, 64), (64, 128))],
                *[(3, 3, 128, 128)] * 2,
                (5, 5, 128, 512),
                (512, 7),
            ],
        ),
        (
            dorefa_models.alexnet,
            (224, 224, 3),
            0.25,  # Dense layers of full width would take seconds.
            [
                (12, 12, 3, 96 // 4),
                (5, 5, 48 // 4, 256 // 4),
                (3, 3, 256 // 4, 384 // 4),
                (3, 3, 192 // 4, 384 // 4),
                (3, 3, 192 // 4, 256 // 4),
                (6 * 6 * 256 // 4, 4096 // 4),
                (4096 // 4, 4096 // 4),
                (4096 // 4, 7),
            ],
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_networks_have_the_shapes_of_their_sources(build, shape, width, kernels):
    model = build(shape, 7, width_multiplier=width)
    assert [tuple(w.shape) for w in model.weights if w.name == "kernel"] == kernels
    assert model.output_shape == (None, 7)
    with pytest.raises(ValueError, match="at least"):
        build((3, 8, 3), 7)


@one_backend
def test_a_stem_is_of_mobilenets():
    with pytest.raises(ValueError, match="`stem` with a MobileNet only"):
        Config(model="small_cnn", stem="imagenet")
    with pytest.raises(ValueError, match="at least 32"):
        models.mobilenet_v1((16, 16, 3), 7)


@one_backend
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_the_mlp_takes_gray_pixels_that_are_standardised(data_format, monkeypatch):
    monkeypatch.setattr(keras.config, "image_data_format", lambda: data_format)
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(70, 4, 5, 3), dtype="uint8")[:, :, :4]
    pixels[:, 0, 0] = 7  # The same in all images.
    examples = PixelExamples(pixels, np.zeros(70, "int32"))
    other = PixelExamples(pixels[:1], np.zeros(1, "int32"))
    images = ImageData("pixels", examples, other, ("a", "b"), 4)
    statistics = mlp.PixelStatistics.of(images, "unit")
    gray = pixels.mean(axis=-1).reshape(70, -1) / 255
    np.testing.assert_allclose(statistics.mean, gray.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(statistics.variance, gray.var(axis=0).mean(), rtol=1e-5)
    model = mlp.mlp(images.image_shape, 2, width_multiplier=0.01, statistics=statistics)
    (batch,) = data.evaluation_dataset(
        dataclasses.replace(images, test=examples), 70, input_range="unit"
    ).as_numpy_iterator()
    standard = keras.Model(model.input, model.get_layer("standardize").output)(batch[0])
    expected = (gray - gray.mean(axis=0)) / gray.var(axis=0).mean() ** 0.5
    np.testing.assert_allclose(standard, expected, atol=1e-5)
    kernels = [tuple(w.shape) for w in model.weights if w.name == "kernel"]
    assert kernels == [(16, 5), (5, 5), (5, 2)]
    with pytest.raises(ValueError, match="at least one of the 500 units"):
        mlp.mlp(images.image_shape, 2, width_multiplier=0.001)


@one_backend
def test_standardisation_is_of_the_mlp():
    with pytest.raises(ValueError, match="`standardize` with model='mlp' only"):
        Config(standardize=True)


# A run


SMALL = Config(
    name="bits",
    model="small_cnn",
    width_multiplier=0.125,
    image_size=8,
    batch_size=360,
    epochs=2,
    optimizer="adam",
    learning_rate=0.01,
    compare=("stock", "bigsr:batches=2", "dorefa:1,2,6"),
)


# The run takes long: not one for each process of the tests.
one_worker = pytest.mark.xdist_group("recipe run of treatments")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs"))
    return train.run_recipe(dataclasses.replace(SMALL, output_dir=folder), verbose=0)


@one_worker
def test_the_report_shows_bits_and_speaks_of_no_rounding(run, capsys):
    run.print()
    texts = [capsys.readouterr().out, (run.folder / "report.md").read_text()]
    for text in texts:
        assert "bits (W, A, G)" in text
        assert "1, 2, 6" in text
        assert "loss difference" not in text
    assert "change what is computed" in texts[1]
    rows = json.loads((run.folder / "report.json").read_text())["variants"]
    assert [row["bits"] for row in rows] == [[32, 32, 32], [1, 32, 32], [1, 2, 6]]
    assert [row["loss_difference"] for row in rows] == [None] * 3
    assert (run.folder / "bits.png").stat().st_size > 10_000


@one_worker
def test_big_sr_makes_as_many_updates(run):
    stock, big, _ = run.variants
    assert len(stock.losses) == 3 * 2
    assert len(big.losses) == 2 * len(stock.losses)


@one_worker
def test_what_is_saved_is_what_was_tested(run):
    images = data.load("digits", image_size=8)
    test = data.evaluation_dataset(images, 360, augmentation="none")
    deployed = keras.saving.load_model(run.folder / "model.keras")
    deployed.compile(metrics=["accuracy"], loss="sparse_categorical_crossentropy")
    found = deployed.evaluate(test, return_dict=True, verbose=0)["accuracy"]
    assert found == pytest.approx(run.restored_accuracy, abs=1e-6)
    assert found == pytest.approx(run.variants[-1].test_accuracy, abs=0.01)
    # Not the float weights, of which the other file is made.
    low_bit = keras.saving.load_model(run.folder / "low_bit.keras")
    assert operands_of(low_bit.get_layer("conv_2")).kernel == DoReFaWeights(1)
    signs = kernel(low_bit, "conv_2")
    assert len(np.unique(signs)) > 2
    assert len(np.unique(kernel(deployed, "conv_2"))) == 2
    np.testing.assert_array_equal(np.sign(kernel(deployed, "conv_2")), np.sign(signs))


@one_worker
def test_another_training_can_start_from_the_float_weights(run):
    path = str(run.folder / "low_bit.keras")
    low_bit = keras.saving.load_model(path)
    start = load_start(path, (8, 8, 3), 10).model
    layer = start.get_layer("conv_2")
    assert type(layer) is keras.layers.Conv2D
    np.testing.assert_array_equal(kernel(start, "conv_2"), kernel(low_bit, "conv_2"))


def test_a_low_bit_run_goes_on_with_the_noise_that_it_would_have_had(run, tmp_path, monkeypatch):
    steps = []

    write_line = MetricsLog.on_train_batch_end

    def end_of_step(self, batch, logs=None):
        steps.append(batch)
        write_line(self, batch, logs)
        if len(steps) == 4:  # In the second epoch.
            raise KeyboardInterrupt

    config = dataclasses.replace(
        SMALL, compare=("dorefa:1,2,6",), output_dir=str(tmp_path), max_steps=100
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsLog, "on_train_batch_end", end_of_step)
        train.run_recipe(config, verbose=0)
    monkeypatch.setattr(train, "export_model", lambda *_: "")
    resumed = train.run_recipe(dataclasses.replace(config, resume=True, max_steps=None), verbose=0)
    assert resumed.variants[0].losses == run.variants[-1].losses


def test_the_configs_of_treatments_name_some_that_are_known():
    names = ("digits_lowbit", "digits_binary", "digits_lowbit_mobilenet_v1", "digits_meprop")
    for name in (*names, "svhn_dorefa", "imagenet_dorefa_alexnet", "mnist_meprop"):
        variants = [Variant.parse(text) for text in load_config(name).variants]
        assert variants[0].treatment is None  # What the others are compared with.
        assert all(variant.treatment is not None for variant in variants[1:])
    assert bits_text((None, 32, 32)) == "–, 32, 32"


# Fewer units


SIMPLIFIED = Config(
    name="simplified",
    model="mlp",
    width_multiplier=0.04,
    standardize=True,
    image_size=8,
    input_range="unit",
    batch_size=36,  # 39 steps an epoch, of which the first 20 are told of.
    epochs=2,
    optimizer="adam",
    learning_rate=0.003,
    schedule="constant",
    warmup_fraction=0.0,
    compare=("stock", "random:ratio=0.5", "meprop:k=5"),
    simplify=0.3,
)


@pytest.fixture(scope="module")
def simplified(tmp_path_factory):
    """A run, and the callbacks that removed units in it."""
    callbacks = []

    def begin(*args, **kwargs):
        callbacks.append(MeSimp(*args, **kwargs))
        return callbacks[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "export_model", lambda *_: "")
        patch.setattr(train, "compare_steps", lambda *_: ComparedSteps())
        patch.setattr(simplifying, "MeSimp", begin)
        folder = str(tmp_path_factory.mktemp("runs"))
        config = dataclasses.replace(SIMPLIFIED, output_dir=folder)
        yield train.run_recipe(config, verbose=0), callbacks


one_simplified = pytest.mark.xdist_group("recipe run that removes units")


@one_simplified
def test_units_go_eight_times_an_epoch(simplified):
    _, (_, callback) = simplified  # The first one looked whether there are such units.
    by_layer = [pruning for pruning in callback.prunings if pruning.path == "dense_1"]
    assert [pruning.epoch for pruning in by_layer] == [0] * 8 + [1] * 8
    steps = [pruning.examples // 36 for pruning in by_layer]
    assert steps == [5, 5, 5, 5, 5, 5, 5, 4] * 2


@one_simplified
def test_the_saved_model_is_without_the_removed_units(simplified):
    run, (_, callback) = simplified
    left = {pruning.path: pruning.after for pruning in callback.prunings}
    assert 0 < min(left.values()) < 20
    model = keras.saving.load_model(run.folder / "model.keras")
    assert {path: model.get_layer(path).units for path in left} == left
    found = run.simplified["meprop:k=5"]
    assert dict(zip(found.layers, found.units, strict=True)) == {
        path: (20, after) for path, after in left.items() if after < 20
    }
    a, b = left["dense_1"], left["dense_2"]
    sizes = [(64, 20, 20, 10), (64, a, b, 10)]
    products = [sum(x * y for x, y in itertools.pairwise(s)) for s in sizes]
    assert found.flops == tuple(2 * product for product in products)
    biases = [sum(s[1:]) for s in sizes]
    assert [p - q for p, q in zip(found.parameters, products, strict=True)] == biases
    model.compile(metrics=["accuracy"], loss="sparse_categorical_crossentropy")
    test = data.evaluation_dataset(
        data.load("digits", image_size=8), 360, augmentation="none", input_range="unit"
    )
    accuracy = model.evaluate(test, return_dict=True, verbose=0)["accuracy"]
    assert accuracy == pytest.approx(found.test_accuracy, abs=1e-6)
    assert accuracy == pytest.approx(run.variants[-1].test_accuracy, abs=0.01)


@one_simplified
def test_the_report_says_what_went(simplified, capsys):
    run, _ = simplified
    run.print()
    found = run.simplified["meprop:k=5"]
    for text in (capsys.readouterr().out, (run.folder / "report.md").read_text()):
        assert f"`meprop:k=5`: units: dense_1 20 → {found.units[0][1]}" in text
        assert f"test accuracy of {100 * found.test_accuracy:.2f} %" in text
    rows = json.loads((run.folder / "report.json").read_text())["variants"]
    assert [row["kept"] for row in rows] == [None, 0.5, 5]
    assert [row["simplified"] is None for row in rows] == [True, True, False]
    assert (run.folder / "kept.png").stat().st_size > 10_000
    assert not (run.folder / "bits.png").exists()


@one_simplified
@pytest.mark.parametrize("stop", [3, 39 + 22])  # Between two prunings, told of or not.
def test_a_training_that_removes_units_goes_on(stop, simplified, tmp_path, monkeypatch):
    run, _ = simplified
    monkeypatch.setattr(train, "export_model", lambda *_: "")
    monkeypatch.setattr(train, "compare_steps", lambda *_: ComparedSteps())
    config = dataclasses.replace(SIMPLIFIED, compare=("meprop:k=5",), output_dir=str(tmp_path))
    trial = train.run_recipe(dataclasses.replace(config, max_steps=stop), verbose=0)
    assert max(trial.variants[0].loss_steps) == stop
    resumed = train.run_recipe(dataclasses.replace(config, resume=True), verbose=0)
    assert resumed.simplified["meprop:k=5"] == run.simplified["meprop:k=5"]
    models = [keras.saving.load_model(each.folder / "model.keras") for each in (run, resumed)]
    for a, b in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(a, b)
    # What is finished is loaded, counters and all, and gives the same.
    again = train.run_recipe(dataclasses.replace(config, resume=True), verbose=0)
    assert again.simplified == resumed.simplified


def test_averages_of_weights_and_removed_units_go_together(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "export_model", lambda *_: "")
    monkeypatch.setattr(train, "compare_steps", lambda *_: ComparedSteps())
    config = dataclasses.replace(
        SIMPLIFIED, compare=("meprop:k=5",), output_dir=str(tmp_path), ema_momentum=0.9, epochs=1
    )
    run = train.run_recipe(config, verbose=0)
    found = run.simplified["meprop:k=5"]
    assert found.parameters[1] < found.parameters[0]
    assert found.test_accuracy == pytest.approx(run.variants[0].test_accuracy, abs=0.01)


@one_backend
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {
                "model": "small_cnn",
                "standardize": False,
                "width_multiplier": 0.25,
                "ema_momentum": 0.9,
            },
            "Expected a minimal-effort layer that can lose units.*AveragingBatchNormalization",
        ),
        ({"compare": ("stock", "random:k=3")}, "'meprop:k=30'. Received: simplify=0.3 with stock"),
        ({"compare": ("meprop:k=20",)}, "Expected a treatment for the model 'mlp'"),
    ],
)
def test_what_cannot_lose_units_is_refused_before_the_training(settings, message, tmp_path):
    config = dataclasses.replace(SIMPLIFIED, output_dir=str(tmp_path), **settings)
    with pytest.raises(train.RecipeError, match=message) as error:
        train.run_recipe(config, verbose=0)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@one_backend
def test_frozen_layers_lose_no_units():
    with pytest.raises(ValueError, match="`simplify` without `freeze`"):
        Config(model="a.keras", freeze="backbone", simplify=0.1)
