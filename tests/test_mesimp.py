"""Units are counted exactly, lose their weights, and stay away."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

from diagconv_tf import restore, rewrite
from diagconv_tf.copying import copy_model
from diagconv_tf.lowbit import LowBitDense, Operands, StochasticRounding
from diagconv_tf.minimal_effort import MinimalEffort, RandomK, activeness
from diagconv_tf.minimal_effort.activeness import activeness_of, is_counter
from diagconv_tf.minimal_effort.compacting import compact
from diagconv_tf.minimal_effort.mesimp import MeSimp
from diagconv_tf.minimal_effort.unit_graph import unit_graph
from tests import slow_activeness
from tests.numerics import BACKEND

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)).astype("float32")
Y = RNG.normal(size=(40, 3)).astype("float32")
BATCH, K = 8, 4


def perceptron(optimizer="sgd", unified=False, activation="relu", treated=True, **arguments):
    """Two hidden layers of 12 and 10 units."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    x = layers.Dense(12, activation=activation, name="first")(inputs)
    x = layers.Dense(10, activation=activation, name="second")(x)
    model = keras.Model(inputs, layers.Dense(3, name="out")(x))
    if treated:
        model = rewrite(model, MinimalEffort(k=K, unified=unified))
    model.compile(keras.optimizers.get(optimizer), "mse", **arguments)
    return model


def attached(model):
    graph = unit_graph(model)
    found = [(layer, K) for layer in graph.hidden if not layer.reasons]
    activeness.attach(model, graph, found)
    return model


def batch(step):
    start = step * BATCH % len(X)
    return X[start : start + BATCH], Y[start : start + BATCH]


def weights_of(model):
    return [ops.convert_to_numpy(v) for v in model.trainable_variables if not is_counter(v)]


# Activeness ----------------------------------------------------------------------

COUNTED = {
    "per example": {},
    "unified": {"unified": True},
    "eagerly": {"run_eagerly": True},
    "XLA": {"jit_compile": True},
    "accumulation": {
        "optimizer": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=3)
    },
    "averaged weights": {"optimizer": lambda: keras.optimizers.SGD(0.05, use_ema=True)},
    "clipped": {"optimizer": lambda: keras.optimizers.SGD(0.05, global_clipnorm=0.01)},
    "scaled loss": {
        "optimizer": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01))
    },
}


@pytest.mark.parametrize("name", COUNTED)
def test_counters_equal_a_slow_count(name):
    if name == "XLA" and BACKEND != "tensorflow":
        pytest.skip("JAX always compiles; torch.compile takes minutes")
    arguments = dict(COUNTED[name])
    if "optimizer" in arguments:
        arguments["optimizer"] = arguments["optimizer"]()
    unified = arguments.get("unified", False)
    model = attached(perceptron(**arguments))
    expected = [np.zeros(12, int), np.zeros(10, int)]
    steps = 12 if name == "eagerly" else 50
    for step in range(steps):
        x, y = batch(step)
        for total, hits in zip(
            expected, slow_activeness.hits(weights_of(model), x, y, K, unified), strict=True
        ):
            total += hits
        model.train_on_batch(x, y)
    found = activeness_of(model)
    assert [list(found[path].hits) for path in ("first", "second")] == [list(e) for e in expected]
    assert [found[path].examples for path in ("first", "second")] == [steps * BATCH] * 2


def test_counters_leave_training_as_it_is_and_go_without_a_trace():
    plain = perceptron("adam")
    counted = attached(copy_model(plain))
    configs = [keras.saving.serialize_keras_object(m.optimizer) for m in (plain, counted)]
    assert configs[0] == configs[1]
    assert len(counted.trainable_weights) == len(plain.trainable_weights) + 2
    for step in range(4):
        for model in (plain, counted):
            model.train_on_batch(*batch(step))
        if step == 1:
            # The copy goes on counting, for itself.
            counted = copy_model(counted)
            assert activeness_of(counted)["first"].examples == 2 * BATCH
    activeness.detach(counted)
    assert vars(counted.optimizer).keys() == vars(plain.optimizer).keys()
    assert [v.path for v in counted.variables] == [v.path for v in plain.variables]
    assert not activeness_of(counted)
    for model in (plain, counted):
        model.train_on_batch(*batch(4))
    states = [[*m.variables, *m.optimizer.variables] for m in (plain, counted)]
    for a, b in zip(*states, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_files_hold_counts(tmp_path):
    model = attached(perceptron("adam"))
    model.train_on_batch(*batch(0))
    path = tmp_path / "counting.weights.h5"
    model.save_weights(path)
    found = activeness_of(model)["second"]
    assert found.hits.any()

    other = attached(perceptron("adam"))
    other.load_weights(path)
    np.testing.assert_array_equal(activeness_of(other)["second"].hits, found.hits)
    assert activeness_of(other)["second"].examples == BATCH
    # A model without counters does not miss them, and its file has none.
    plain = perceptron("adam")
    plain.load_weights(path)
    np.testing.assert_array_equal(plain.layers[1].kernel, model.layers[1].kernel)
    plain.save_weights(path)
    other.load_weights(path)
    model.save(tmp_path / "counting.keras")
    loaded = keras.models.load_model(tmp_path / "counting.keras")
    np.testing.assert_allclose(loaded.predict(X, verbose=0), model.predict(X, verbose=0), 1e-5)
    assert type(loaded.optimizer) is type(plain.optimizer)
    assert int(loaded.optimizer.iterations) == 1


def test_counters_of_convolutions_count_channels_of_examples():
    keras.utils.set_random_seed(0)
    convolution = layers.Conv2D(5, 3, name="c")
    model = keras.Sequential(
        [keras.Input((5, 5, 2)), convolution, layers.GlobalAveragePooling2D(), layers.Dense(2)]
    )
    model = rewrite(model, MinimalEffort(k=2))
    model.compile("sgd", "mse")
    graph = unit_graph(model)
    activeness.attach(model, graph, [(graph.hidden[0], 2)])
    x = RNG.normal(size=(4, 5, 5, 2)).astype("float32")
    y = RNG.normal(size=(4, 2)).astype("float32")
    # Without an activation each position of a channel has the same gradient.
    gradient = (model.predict(x, verbose=0) - y) @ np.transpose(model.layers[-1].kernel)
    model.train_on_batch(x, y)
    expected = sum(slow_activeness.largest(row, 2).astype(int) for row in gradient)
    found = activeness_of(model)["c"]
    assert list(found.hits) == list(expected)
    assert found.examples == 4


@pytest.mark.skipif(BACKEND == "torch", reason="Keras distributes no training on PyTorch")
def test_replicas_count_together():
    command = [sys.executable, "-m", "tests.mesimp_on_replicas"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["hits"] == found["expected"]
    assert found["examples"] == [40, 40]
    assert found["weights are equal"]
    assert found["left"] == found["left by the prunings"]
    assert found["error of the compact model"] < 1e-5


# Pruning -------------------------------------------------------------------------


def deep(activation="relu"):
    """Units with batch norm, dropout and an activation between them and what reads them."""
    keras.utils.set_random_seed(1)
    x = inputs = keras.Input((6,))
    for name in ("first", "second"):
        x = layers.Dense(12, name=name, kernel_regularizer="l2")(x)
        x = layers.BatchNormalization()(x)
        x = layers.Dropout(0.2)(layers.Activation(activation)(x))
    model = keras.Model(inputs, layers.Dense(3, name="out")(x))
    return rewrite(model, MinimalEffort(k=4))


OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "Adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "Adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "averaged weights": lambda: keras.optimizers.AdamW(0.01, use_ema=True, ema_momentum=0.5),
    "scaled loss": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_removed_units_stay_away_and_come_out(name):
    model = deep("sigmoid")
    model.compile(OPTIMIZERS[name](), "mse")
    simplify = MeSimp(rate=0.3, prune_every=0.5, cycle_epochs=1, renew_optimizer=False)
    removed = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: removed.append(unit_graph(model).removed())
    )
    model.fit(X, Y, batch_size=BATCH, epochs=2, verbose=0, callbacks=[simplify, watch])
    assert 0 < removed[0].sum() < 24
    # An epoch of ordinary training later they are the same.
    np.testing.assert_array_equal(removed[0], removed[1])
    smaller = compact(model)
    assert [smaller.get_layer(n).units for n in ("first", "second")] == [
        pruning.after for pruning in simplify.prunings[-2:]
    ]
    expected, outputs = model.predict(X, verbose=0), smaller.predict(X, verbose=0)
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-5)


def test_units_behind_zeros_stay_away_without_the_callback():
    model = deep("tanh")
    model.compile(keras.optimizers.Adam(0.01), "mse")
    simplify = MeSimp(rate=0.3, prune_every=1.0)
    model.fit(X, Y, batch_size=BATCH, verbose=0, callbacks=[simplify], validation_data=(X, Y))
    removed = unit_graph(model).removed()
    assert removed.any()
    model.fit(X, Y, batch_size=BATCH, epochs=2, verbose=0)
    np.testing.assert_array_equal(unit_graph(model).removed(), removed)
    # Counters do not come along.
    assert compact(attached(copy_model(model))).count_params() == compact(model).count_params()
    for other in (restore(model), rewrite(model, MinimalEffort(k=3)), copy_model(model)):
        np.testing.assert_array_equal(unit_graph(other).removed(), removed)


def test_channels_of_pointwise_convolutions_are_removed():
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((6, 6, 2))
    for name in ("a", "b"):
        x = layers.Conv2D(8, 1, use_bias=False, name=name)(x)
        x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
        x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
        x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    outputs = layers.Dense(2)(layers.GlobalAveragePooling2D()(x))
    model = rewrite(keras.Model(inputs, outputs), MinimalEffort(k=3))
    model.compile("adam", "mse")
    x = RNG.normal(size=(24, 6, 6, 2)).astype("float32")
    y = RNG.normal(size=(24, 2)).astype("float32")
    simplify = MeSimp(rate=0.25, prune_every=0.5)
    model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[simplify])
    smaller = compact(model)
    assert [p.path for p in simplify.prunings[:2]] == ["a", "b"]
    assert [smaller.get_layer(n).filters for n in "ab"] == [p.after for p in simplify.prunings[-2:]]
    assert smaller.count_params() < model.count_params()
    np.testing.assert_allclose(
        smaller.predict(x, verbose=0), model.predict(x, verbose=0), rtol=0, atol=1e-5
    )


def test_evaluation_leaves_no_counters():
    model = perceptron()
    model.evaluate(X, Y, verbose=0, callbacks=[MeSimp()])
    assert len(model.trainable_weights) == 6


def test_prunings_remove_what_is_rarely_active_in_every_other_cycle(monkeypatch):
    model = perceptron()
    seen = []
    read = activeness.ActivenessCounter.read
    monkeypatch.setattr(
        activeness.ActivenessCounter, "read", lambda self: seen.append(read(self)) or seen[-1]
    )
    simplify = MeSimp(rate=0.2, prune_every=0.4, cycle_epochs=2)
    model.fit(X, Y, batch_size=BATCH, epochs=5, verbose=0, callbacks=[simplify])
    # 5 steps an epoch: prunings after the second and the fourth, of 2 layers.
    assert [p.epoch for p in simplify.prunings] == [0] * 4 + [1] * 4 + [4] * 4
    assert [p.examples for p in simplify.prunings[::2]] == [16, 16, 24, 16, 16, 16]
    assert [p.path for p in simplify.prunings[:2]] == ["first", "second"]
    for path in ("first", "second"):
        there = np.ones({"first": 12, "second": 10}[path], bool)
        for pruning, counted in zip(simplify.prunings, seen, strict=True):
            if pruning.path == path:
                assert pruning.threshold == int(0.2 * counted.examples)
                assert pruning.before == there.sum()
                there &= counted.hits >= pruning.threshold
                assert pruning.after == there.sum()
        graph = unit_graph(model)
        layer = next(layer for layer in graph.hidden if layer.path == path)
        np.testing.assert_array_equal(graph.removed()[layer.numbers], ~there)
    assert not any(map(is_counter, model.trainable_variables))


def test_an_optimizer_starts_anew_with_a_cycle():
    counts = []
    for renew in (True, False):
        model = perceptron(keras.optimizers.Adam(0.01))
        watch = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs, m=model: counts.append(int(m.optimizer.iterations))
        )
        simplify = MeSimp(0.01, cycle_epochs=2, renew_optimizer=renew)
        model.optimizer.learning_rate = 0.02
        model.fit(X, Y, batch_size=BATCH, epochs=4, verbose=0, callbacks=[simplify, watch])
        np.testing.assert_allclose(float(model.optimizer.learning_rate), 0.02, rtol=1e-6)
    assert counts == [5, 10, 5, 10, 5, 10, 15, 20]


@pytest.mark.parametrize("order", ["first", "last"])
def test_a_resumed_training_is_the_same(order, tmp_path):
    def train(model, *others, epochs=4):
        # Prunings do not end with an epoch, so that counts cross its end.
        simplify = MeSimp(rate=0.2, prune_every=0.4, cycle_epochs=3)
        callbacks = [simplify, *others] if order == "first" else [*others, simplify]
        model.fit(
            X, Y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks
        )

    class StoppedError(Exception):
        pass

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise StoppedError

    straight, first, second = (perceptron("adam") for _ in range(3))
    train(straight)
    backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
    with pytest.raises(StoppedError):
        train(first, backup, Interrupt())
    train(second, keras.callbacks.BackupAndRestore(tmp_path))
    for a, b in zip(straight.variables, second.variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # The interrupted model still counts; another `fit` goes on, and cleans up.
    assert activeness_of(first)
    train(first)
    assert not activeness_of(first)


def test_the_rest_of_a_broken_epoch_does_not_begin_it_again():
    """Prunings, and what is done at the begin of a cycle, are told by the batches' numbers."""
    model = perceptron(keras.optimizers.Adam(0.01))
    simplify = MeSimp(rate=0.2, prune_every=0.4, cycle_epochs=2)
    simplify.set_model(model)
    simplify.set_params({"steps": 5})
    simplify.on_train_begin()

    def go_on(epoch, batch):
        model.train_on_batch(X[:BATCH], Y[:BATCH])
        simplify.on_epoch_begin(epoch)
        simplify.on_train_batch_begin(batch)
        before = int(model.optimizer.iterations), activeness_of(model)["first"].examples
        simplify.on_train_batch_end(batch)
        return (*before, len(simplify.prunings) // 2)

    assert go_on(4, 1) == (1, BATCH, 1)  # The first pruning comes after two batches.
    assert go_on(4, 2) == (2, BATCH, 1)  # As many as were there: counts start after a pruning.
    assert go_on(4, 0) == (0, 0, 1)  # A cycle begins: the optimizer and the counts are new.
    simplify.on_train_end()


def mistakes():
    plain = perceptron(treated=False)
    yield "rate 0", lambda: MeSimp(rate=0), "Expected `rate` to be a number above 0"
    yield "rate 1", lambda: MeSimp(rate=1), "Expected `rate` to be a number above 0"
    yield "never", lambda: MeSimp(prune_every=0), "Expected `prune_every` to be a fraction"
    yield "cycles", lambda: MeSimp(cycle_epochs=0), "Expected `cycle_epochs` to be an integer"
    yield "renew", lambda: MeSimp(renew_optimizer=1), "Expected `renew_optimizer` to be a bool"
    yield "stock", lambda: fit(plain), "Expected a model with minimal-effort layers"
    yield "all units", lambda: fit(perceptron(), rate=0.99), "Expected a `rate` at which some unit"
    rounding = StochasticRounding("sgd", 0.1)
    yield "grid", lambda: fit(perceptron(rounding)), "Expected an optimizer that leaves zeros"
    inputs = keras.Input((6,))
    hidden = layers.Dense(12)(inputs)
    outputs = layers.Dense(3)(layers.Add()([layers.Dense(12)(hidden), hidden]))
    added = rewrite(keras.Model(inputs, outputs), MinimalEffort(k=4))
    added.compile("sgd", "mse")
    yield "added", lambda: fit(added), "reads its outputs"
    softmax = perceptron(activation="softmax")
    yield "softmax", lambda: fit(softmax), "its activation mixes units"
    frozen = perceptron()
    for layer in frozen.layers[:-1]:
        layer.trainable = False
    frozen.compile("sgd", "mse")
    yield "frozen", lambda: fit(frozen), "it is frozen"
    kept_at_random = LowBitDense(12, operands=Operands(gradients=RandomK(4)))
    random = keras.Sequential([keras.Input((6,)), kept_at_random, layers.Dense(3)])
    random.compile("sgd", "mse")
    yield "random", lambda: fit(random), "trains with the top k"


def fit(model, rate=0.1):
    model.fit(X, Y, batch_size=BATCH, verbose=0, callbacks=[MeSimp(rate)])


MISTAKES = (
    "rate 0",
    "rate 1",
    "never",
    "cycles",
    "renew",
    "stock",
    "all units",
    "grid",
    "added",
    "softmax",
    "frozen",
    "random",
)


@pytest.fixture(scope="module")
def mistaken():
    return {name: (call, message) for name, call, message in mistakes()}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_in_one_line(name, mistaken):
    call, message = mistaken[name]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "Received: " in str(error.value)
    assert "\n" not in str(error.value)


def test_all_mistakes_are_tried(mistaken):
    assert set(MISTAKES) == mistaken.keys()
