"""Averages of weights and of batch norms' statistics, in the recipes.

The module is also the script that trains on two devices, which must be asked
for before a framework starts: `python -m tests.test_recipe_averaging`.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import zipfile

import keras
import numpy as np
import pytest
from absl import logging

from diagconv_tf import rewrite
from diagconv_tf.copying import copy_model
from recipes import models, optimizers, train
from recipes.averaging import (
    AveragingBatchNormalization,
    SwapAverages,
    average_statistics,
    finalize_averages,
    stop_averaging,
)
from recipes.checkpoints import Checkpoints
from recipes.config import Config
from recipes.distributing import Distribution
from recipes.fitting import fit_from
from recipes.step_times import Timed, time_in_turn
from tests import forked, tiny_config

BACKEND = keras.backend.backend()
STEPS, BATCH, MOMENTUM = 7, 8, 0.6
# These laws need no backend's own code: they are tested on one of them.
one_backend = pytest.mark.backends("tensorflow")


def network(seed=0):
    """Batch norms of its own, nested, and frozen; all have been trained before."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    inner = keras.Sequential(
        [
            keras.Input((6, 6, 4), name="features"),
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(name="norm"),
        ],
        name="inner",
    )
    frozen = layers.BatchNormalization(name="frozen")
    inputs = keras.Input((6, 6, 2), name="images")
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="depthwise")(inputs)
    x = layers.BatchNormalization(momentum=0.5, name="first")(x)
    x = inner(frozen(layers.ReLU(name="relu")(x)))
    x = layers.GlobalAveragePooling2D(name="pool")(layers.ReLU(name="relu_2")(x))
    x = layers.Dense(3, name="dense")(x)
    model = keras.Model(inputs, x, name="network")
    frozen.trainable = False
    for number, norm in enumerate(norms(model)):
        norm.moving_mean.assign(np.full(4, number / 10))
        norm.moving_variance.assign(np.full(4, 1 + number))
    return model


def norms(model):
    layers = model._flatten_layers()
    return [x for x in layers if isinstance(x, keras.layers.BatchNormalization)]


def compiled(model, **settings):
    """Compiled as in a recipe, with averages where the settings have them."""
    defaults = {"ema_momentum": MOMENTUM, "warmup_fraction": 0.0}
    if BACKEND == "tensorflow":
        defaults["jit_compile"] = "false"  # Compiling would take most of the time.
    config = Config(**{**defaults, **settings})
    if config.ema_momentum:
        average_statistics(model, optimizers.average_momentum(config))
    optimizers.compile_model(model, config, STEPS)
    return model


def batches(first_step=0, count=2 * STEPS):
    for step in range(first_step, count):
        rng = np.random.default_rng((3, step))
        yield rng.normal(1, 2, (BATCH, 6, 6, 2)).astype("float32"), rng.integers(0, 3, BATCH)


VALIDATION = next(batches(100, 101))


def values(variables):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def statistics(model):
    return values(v for x in norms(model) for v in (x.moving_mean, x.moving_variance))


def averages(model):
    return values(v for x in norms(model) for v in x._averages)


def averaged_weights(model):
    return values(model.optimizer._model_variables_moving_average)


def assert_equal(received, expected):
    assert len(received) == len(expected) > 0
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_close(received, expected, rtol=1e-5):
    assert len(received) == len(expected) > 0
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol)


@contextlib.contextmanager
def warnings_of_logger(caplog):
    with caplog.at_level("WARNING", logger=logging.get_absl_logger().name):
        yield lambda: [x for x in caplog.messages if "statistics of the batch norms" in x]


# The recurrence


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=one_backend), 3])
def test_averages_follow_the_statistics_and_lag_like_the_weights(accumulation):
    settings = {"gradient_accumulation": accumulation}
    plain, ours = compiled(network(), ema_momentum=0.0, **settings), compiled(network(), **settings)
    momentum = MOMENTUM ** (1 / accumulation)
    expected = statistics(plain)
    assert_equal(averages(ours), expected)
    weights = None
    for step, batch in enumerate(batches()):
        plain.train_on_batch(*batch)
        ours.train_on_batch(*batch)
        expected = [
            momentum * average + (1 - momentum) * new
            for average, new in zip(expected, statistics(plain), strict=True)
        ]
        assert_close(averages(ours), expected)
        # From one update to the next, `MOMENTUM` of the average is left; the first makes it.
        if step >= accumulation - 1 and (step + 2) % accumulation == 0:
            new = values(plain.trainable_variables)
            weights = weights or new
            weights = [MOMENTUM * a + (1 - MOMENTUM) * b for a, b in zip(weights, new, strict=True)]
            assert_close(averaged_weights(ours), weights)
    # The training itself is not disturbed.
    assert_close(statistics(ours), statistics(plain))
    frozen = ours.get_layer("frozen")
    assert_equal(values(frozen._averages), values([frozen.moving_mean, frozen.moving_variance]))
    moved = [np.abs(a - b).max() for a, b in zip(averages(ours), statistics(ours), strict=True)]
    assert sorted(moved)[2] > 1e-3  # The frozen one's two have not moved.


def test_copies_and_rewritten_models_average_too():
    ours = compiled(network())
    others = copy_model(ours), rewrite(ours, "shifted")
    for batch in batches():
        for model in (ours, *others):
            model.train_on_batch(*batch)
    for model in others:
        assert all(type(norm) is AveragingBatchNormalization for norm in norms(model))
        assert_close(averages(model), averages(ours), rtol=1e-4)


@one_backend
def test_batch_norms_of_other_classes_are_left_alone_and_named_in_one_warning(caplog):
    class MyNorm(keras.layers.BatchNormalization):
        pass

    inputs = keras.Input((4,))
    x = MyNorm(name="mine")(keras.layers.BatchNormalization(name="stock")(inputs))
    model = keras.Model(inputs, MyNorm(name="mine_too")(x))
    with warnings_of_logger(caplog) as warnings:
        average_statistics(network(), MOMENTUM)
        assert not warnings()
        average_statistics(model, MOMENTUM)
    (warning,) = warnings()
    assert "mine (MyNorm), mine_too (MyNorm)" in warning
    assert "stock" not in warning
    assert [type(x) for x in norms(model)] == [AveragingBatchNormalization, MyNorm, MyNorm]
    assert len(model.get_layer("mine").variables) == 4
    stop_averaging(model)
    assert [type(x) for x in norms(model)] == [keras.layers.BatchNormalization, MyNorm, MyNorm]


# Evaluation, and the end


class Record(keras.callbacks.Callback):
    """What the model holds before, during and after each evaluation."""

    def __init__(self, *at):
        super().__init__()
        self.at = at
        self.found = []

    def record(self, when):
        if when in self.at:
            model = self.model
            self.found.append(
                [
                    values(model.trainable_variables) + statistics(model),
                    averaged_weights(model) + averages(model),
                ]
            )

    def on_test_begin(self, logs=None):
        self.record("begin")

    def on_test_end(self, logs=None):
        self.record("end")


@functools.cache
def stock():
    return compiled(network(1), ema_momentum=0.0)


def with_values(weights_and_statistics):
    """The stock model with these values; it is evaluated, not trained."""
    model = stock()
    count = len(model.trainable_variables)
    moving = [v for x in norms(model) for v in (x.moving_mean, x.moving_variance)]
    for variable, value in zip(
        [*model.trainable_variables, *moving], weights_and_statistics, strict=True
    ):
        variable.assign(value)
    assert len(weights_and_statistics) > count
    return model


def trained(callbacks=(), **settings):
    model = compiled(network(), **settings)
    history = fit_from(
        model,
        None,
        batches,
        steps_per_epoch=STEPS,
        epochs=2,
        validation_data=VALIDATION,
        callbacks=callbacks,
        verbose=0,
    )
    return model, history.history


def test_it_is_evaluated_with_both_averages_and_trained_with_neither():
    before, swapped, after = Record("begin"), Record("begin"), Record("end")
    _, history = trained([before, SwapAverages(), swapped, after], learning_rate=0.5)
    for epoch in (0, 1):
        (latest, average) = before.found[epoch]
        assert_equal(swapped.found[epoch][0], average)
        assert_equal(swapped.found[epoch][1], latest)
        # Bit for bit.
        assert_equal(after.found[epoch][0], latest)
        assert_equal(after.found[epoch][1], average)
        expected = with_values(average).evaluate(*VALIDATION, verbose=0, return_dict=True)
        assert history["val_loss"][epoch] == pytest.approx(expected["loss"], rel=1e-5)
        assert history["val_accuracy"][epoch] == pytest.approx(expected["accuracy"])
        # Averaged weights with the latest statistics are another model.
        count = len(average) - 6
        mixed = with_values(average[:count] + latest[count:]).evaluate(*VALIDATION, verbose=0)
        assert abs(mixed[0] - expected["loss"]) > 1e-3 * expected["loss"]


def traces(model):
    """All that could tell that a layer has been another."""
    found = []
    for layer in norms(model):
        dependencies = getattr(layer, "_self_unconditional_dependency_names", {})
        found.append(
            [type(layer), set(vars(layer)), set(dependencies), len(layer._non_trainable_variables)]
        )
        found.append([layer._tracker.locked, layer._tracker.stored_ids.keys()])
        found.append([len(ids) for ids in layer._tracker.stored_ids.values()])
    if BACKEND == "torch":
        found.append([name for name, _ in model.named_parameters()])
        found.append([sorted(layer.torch_params.keys()) for layer in norms(model)])
    return found


def test_at_the_end_the_model_is_stock_and_has_the_averages(tmp_path):
    record = Record("end")
    model, _ = trained([SwapAverages(), record])
    (_, average), untouched = record.found[-1], network()
    assert_equal(values(model.trainable_variables) + statistics(model), average)
    # To be timed, it is trained on: `fit` leaves weights that share arrays with their averages.
    times = time_in_turn({"a": Timed(model, batches)}, turns=1, steps=1)
    assert times["a"].percentile(50) > 0
    assert len(model.variables) > len(untouched.variables)
    stop_averaging(model)
    assert model.train_function is None  # It has updated the averages.
    compiled(untouched, ema_momentum=0.0)
    untouched.fit(*VALIDATION, verbose=0)
    assert traces(model) == traces(untouched)
    assert [v.path for v in model.variables] == [v.path for v in untouched.variables]
    assert model.get_config() == untouched.get_config()
    assert_equal(values(model.trainable_variables) + statistics(model), average)

    expected = with_values(average)
    outputs = expected.predict(VALIDATION[0], verbose=0)
    np.testing.assert_allclose(model.predict(VALIDATION[0], verbose=0), outputs, rtol=1e-5)
    model.compiled, model.optimizer = False, None
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        text = archive.read("config.json").decode()
    assert "recipes" not in text
    assert "Averaging" not in text
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_equal(loaded.get_weights(), expected.get_weights())
    # It can be trained on, as any other.
    optimizers.compile_model(model, Config(), STEPS)
    model.fit(*VALIDATION, verbose=0)


def test_without_averages_nothing_happens():
    model = compiled(network(), ema_momentum=0.0)
    model.fit(*VALIDATION, verbose=0)
    before, functions = model.get_weights(), model.train_function
    finalize_averages(model)
    stop_averaging(model)
    assert model.train_function is functions
    assert_equal(model.get_weights(), before)


def test_a_loss_scale_does_not_hide_the_averages():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = network()
    finally:
        keras.config.set_dtype_policy("float32")
    compiled(model)
    model.fit(batches(), steps_per_epoch=STEPS, verbose=0)
    assert type(model.optimizer).__name__ == "LossScaleOptimizer"
    average = averages(model)
    logs = model.evaluate(*VALIDATION, callbacks=[SwapAverages()], verbose=0)
    assert np.isfinite(logs).all()
    finalize_averages(model)
    assert_equal(statistics(model), average)


# Recipes


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The settings of a tiny recipe that averages."""
    monkeypatch.setattr(models, "mobilenet_v1", models.mobilenet_v1)
    monkeypatch.setattr(train, "export_model", lambda *_: "")
    draw_nothing = lambda title, variants, path: pathlib.Path(path).touch()  # noqa: E731
    monkeypatch.setattr("recipes.report.draw_curves", draw_nothing)
    return dataclasses.replace(
        tiny_config.get_config(),
        epochs=3,
        ema_momentum=0.8,
        learning_rate=0.5,
        compare=("stock", "shifted"),
        output_dir=str(tmp_path),
    )


@one_backend
def test_a_recipe_averages_and_goes_on_when_it_is_finished(recipe, monkeypatch):
    report = train.run_recipe(recipe, verbose=0)
    found = [variant.test_accuracy for variant in report.variants]
    assert report.restored_accuracy == found[-1]
    for variant in ("stock", "shifted"):
        (path,) = Checkpoints(report.folder / "checkpoints" / variant).paths()[-1:]
        with np.load(path) as archive:
            names = json.loads(archive["manifest"].tobytes())["model"]
            saved = {name.split("/")[-1]: archive[str(i)] for i, (name, *_) in enumerate(names)}
    model = keras.saving.load_model(report.folder / "model.keras")
    (norm,) = norms(model)
    assert_equal(
        values([norm.moving_mean, norm.moving_variance]),
        [saved["moving_mean_average"], saved["moving_variance_average"]],
    )
    assert not np.allclose(saved["moving_mean_average"], saved["moving_mean"], rtol=1e-3)

    monkeypatch.setattr(keras.Model, "fit", lambda *_, **__: pytest.fail("trained"))
    again = train.run_recipe(dataclasses.replace(recipe, resume=True), verbose=0)
    assert again.variants == report.variants
    assert again.restored_accuracy == report.restored_accuracy
    other = keras.saving.load_model(again.folder / "model.keras")
    assert_equal(other.get_weights(), model.get_weights())


# Several devices


def on_devices(distribution, sync=True):
    """Trains and evaluates on these devices: what is found, as lists."""
    config = Config(sync_batch_norm=sync)
    with distribution.scope():
        model = network()
        distribution.prepare(model, config)
        compiled(model)
        images, labels = (np.concatenate(part) for part in zip(*batches(), strict=True))
        # `fit` and not `train_on_batch`, which on TensorFlow gives every replica the whole batch.
        # Its end would put the averages into the weights.
        model.optimizer.finalize_variable_values = lambda variables: None
        model.fit(images, labels, batch_size=BATCH, shuffle=False, verbose=0)
        del model.optimizer.finalize_variable_values
        before = on_each_device(model)
        logs = model.evaluate(*VALIDATION, batch_size=BATCH, callbacks=[SwapAverages()], verbose=0)
        after = on_each_device(model)
        found = {"averages": averages(model), "weights": averaged_weights(model), "logs": logs}
        finalize_averages(model)
        finals = on_each_device(model)
        stop_averaging(model)
        found["again"] = model.evaluate(*VALIDATION, batch_size=BATCH, verbose=0)
        found["final"] = statistics(model)
    return {
        **{name: [np.asarray(x).tolist() for x in value] for name, value in found.items()},
        "devices": len(before[0]),
        "exchanged": all(map(np.array_equal, before, after)),
        "differ": any(not np.array_equal(x[0], x[-1]) for x in before),
        # Each device has taken its own averages.
        "finals": all(map(np.array_equal, finals[::2], finals[1::2])),
    }


def on_each_device(model):
    """Statistics and averages, in turn, as every device has them."""
    pairs = [
        pair
        for x in norms(model)
        for pair in zip((x.moving_mean, x.moving_variance), x._averages, strict=True)
    ]
    found = []
    for variable in (v for pair in pairs for v in pair):
        if BACKEND == "tensorflow":
            found.append([x.numpy() for x in getattr(variable.value, "values", [variable.value])])
        else:
            found.append([np.asarray(x.data) for x in variable.value.addressable_shards])
    return found


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
def test_two_devices_average_as_one():
    process = forked.start(__name__)
    one = on_devices(Distribution())
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    found = json.loads(output)
    two = found["two"]
    for name in ("averages", "weights", "logs", "final", "again"):
        assert_close(two[name], one[name], rtol=1e-3)
    for each in found.values():
        assert each["devices"] == 2
        assert each["exchanged"]
        assert each["finals"]
        assert_close([each["again"]], [each["logs"]])
        assert_equal(each["final"], each["averages"])
    assert not two["differ"]
    if BACKEND == "tensorflow":  # On JAX there is one whole batch always.
        assert found["apart"]["differ"]


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        both = Distribution.start(Config(distribution="data_parallel", cpu_devices=2))
        findings = {"two": on_devices(both)}
        if BACKEND == "tensorflow":
            findings["apart"] = on_devices(both, sync=False)
    print(json.dumps(findings))
