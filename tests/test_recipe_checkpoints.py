"""Trainings that are killed, interrupted, out of disk or diverging, and go on.

The module is also the script that some tests run in processes of their own:
`python -m tests.test_recipe_checkpoints FOLDER [--wait_at=STEP]`.
"""

import argparse
import contextlib
import functools
import io
import logging
import os
import pathlib
import resource
import signal
import sys
import threading
import time
import zipfile

import keras
import numpy as np
import pytest

from diagconv_tf import DiagonalwiseDepthwiseConv2D, rewrite
from recipes.averaging import SwapAverages, average_statistics
from recipes.checkpoints import Checkpoint, Checkpoints, Snapshot
from recipes.fitting import fit_from
from recipes.interruption import (
    EXIT_INTERRUPTED,
    Interruption,
    LossCheck,
    NonFiniteLossError,
    TrainingInterrupted,
)
from recipes.recording import MetricsLog
from recipes.run_folder import Progress
from tests import forked

BACKEND = keras.backend.backend()
STEPS, EPOCHS, BATCH = 5, 3, 4
# These laws need no backend's own code: they are tested on one of them.
one_backend = pytest.mark.backends("tensorflow")


# A training: model, data, and what is compared


def rmsprop(**arguments):
    return keras.optimizers.RMSprop(0.01, momentum=0.9, centered=True, **arguments)


def sgd(**arguments):
    schedule = keras.optimizers.schedules.CosineDecay(0.1, STEPS * EPOCHS)
    return keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, **arguments)


def uses_averages(optimizer):
    return getattr(optimizer, "use_ema", False)


def make_model(optimizer=None, *, small=True, policy="float32", filters=8, seed=0):
    """Batch norm has moving averages, dropout draws random numbers."""
    keras.utils.set_random_seed(seed)
    layers = [
        keras.layers.Conv2D(filters, 3, dtype=policy, name="conv"),
        keras.layers.DepthwiseConv2D(3, dtype=policy, name="depthwise"),
    ]
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            *([] if small else layers),
            keras.layers.Flatten(name="flat"),
            # On some CPUs TensorFlow's ReLU, fused into this layer, makes 0 of NaN.
            keras.layers.Dense(filters, activation="tanh", dtype=policy, name="hidden"),
            keras.layers.BatchNormalization(dtype=policy, name="norm"),
            keras.layers.Dropout(0.5, name="dropout"),
            keras.layers.Dense(3, name="dense"),
        ]
    )
    optimizer = optimizer or rmsprop(use_ema=True, ema_momentum=0.7)
    if uses_averages(optimizer):
        average_statistics(model, optimizer.ema_momentum)
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def batches(first_step=0, *, broken_at=None, end=STEPS * EPOCHS):
    """Batch number n is a function of n alone, as in the recipes."""
    for step in range(first_step, end):
        rng = np.random.default_rng((7, step))
        images = rng.normal(size=(BATCH, 6, 6, 2)).astype("float32")
        if step == broken_at:
            images[0, 0, 0, 0] = np.nan
        yield images, rng.integers(0, 3, BATCH).astype("int32")


def tf_data(first_step=0):
    import tensorflow as tf

    signature = (
        tf.TensorSpec((BATCH, 6, 6, 2), "float32"),
        tf.TensorSpec((BATCH,), "int32"),
    )
    return tf.data.Dataset.from_generator(lambda: batches(first_step), output_signature=signature)


VALIDATION = next(batches(1000, end=1001))


class Log(keras.callbacks.Callback):
    """Everything that Keras tells a callback."""

    def __init__(self, start=None):
        super().__init__()
        self.record = start.record if start else {"steps": [], "epochs": []}
        self.calls = []

    def on_train_begin(self, logs=None):
        self.calls.append("begin")

    def on_train_end(self, logs=None):
        self.calls.append("end")

    def on_train_batch_end(self, batch, logs=None):
        self.record["steps"].append([batch, logs["loss"], logs["accuracy"]])

    def on_epoch_end(self, epoch, logs=None):
        self.record["epochs"].append([epoch, logs])


class At(keras.callbacks.Callback):
    """Calls `action` after a step, or in what follows after it."""

    def __init__(self, step, action, start=None, when="step"):
        super().__init__()
        self.left = step - (start.step if start else 0)
        self.action = action
        self.when = when

    def call(self, when):
        if not self.left and when == self.when:
            self.action()

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        self.call("step")

    def on_test_batch_end(self, batch, logs=None):
        self.call("validation")

    def on_epoch_end(self, epoch, logs=None):
        self.call("epoch end")


def interrupt(interruption):
    interruption.signal_name = "SIGTERM"


class SignalAt(Interruption):
    """Notices a signal after a step, whatever callbacks are told."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def asked(self, step=None):
        if self.step is not None and step == self.step:
            interrupt(self)
        return super().asked()


def train(
    model,
    folder=None,
    *,
    data=batches,
    at=0,
    action=None,
    when="step",
    callbacks=(),
    interruption=None,
    **options,
):
    """Goes on from `folder` to the end, or to a signal.

    At a step it calls `action(interruption)`, which by default gives the signal.
    Returns the log of the whole training and what has ended it.
    """
    interruption = interruption or Interruption()
    store = Checkpoints(folder) if folder else None
    start = store.restore(model) if store else None
    log = Log(start)
    action = functools.partial(action or interrupt, interruption)
    options = {"steps_per_epoch": STEPS, "epochs": EPOCHS, "verbose": 0, **options}
    try:
        with interruption:
            fit_from(
                model,
                start,
                data,
                validation_data=VALIDATION,
                callbacks=[
                    At(at, action, start, when),
                    log,
                    *callbacks,
                    *([SwapAverages()] if uses_averages(model.optimizer) else []),
                ],
                checkpoints=store,
                record=lambda: log.record,
                interruption=interruption,
                **options,
            )
    except TrainingInterrupted as error:
        return log, error
    return log, None


def state(model):
    variables = (*model.variables, *model.optimizer.variables)
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def assert_same_state(received, expected):
    for one, other in zip(received, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def main():
    """Trains, and at a step waits for a signal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--wait_at", type=int)
    arguments = parser.parse_args()

    def wait(interruption):
        (arguments.folder / "waiting").touch()
        while not interruption.signal_name:
            time.sleep(0.05)

    _, error = train(make_model(), arguments.folder / "saved", at=arguments.wait_at, action=wait)
    print(error, file=sys.stderr)
    sys.exit(EXIT_INTERRUPTED)


# Going on


OPTIMIZERS = {
    "adam, average, accumulation": lambda: keras.optimizers.Adam(
        0.01, use_ema=True, ema_momentum=0.7, gradient_accumulation_steps=3
    ),
    "sgd, cosine, loss scale": lambda: keras.optimizers.LossScaleOptimizer(sgd(), 2.0**10, 4),
}


@pytest.fixture(scope="module")
def unbroken():
    """State and record of a training that nothing has interrupted."""
    model = make_model()
    log, _ = train(model)
    return state(model), log.record


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_goes_on_within_an_epoch_bit_for_bit(name, tmp_path):
    expected = make_model(OPTIMIZERS[name]())
    expected_log, _ = train(expected)
    averages = [v for v in expected.optimizer.variables if v.name.endswith("_average")]
    assert bool(averages) == ("average" in name)
    assert_same_state(
        [v.numpy() for v in expected.trainable_variables][: len(averages)],
        [v.numpy() for v in averages],
    )
    # Within the second epoch, and within an accumulation of three gradients.
    _, error = train(make_model(OPTIMIZERS[name]()), tmp_path, at=7)
    assert error.step == 7
    ours = make_model(OPTIMIZERS[name](), seed=1)
    log, error = train(ours, tmp_path)
    assert error is None
    # Losses, accuracies and their means over the broken epoch as well.
    assert log.record == expected_log.record
    assert log.calls == ["begin", "end"]
    assert_same_state(state(ours), state(expected))
    # Killed after the last epoch: there is nothing to train, but the weights
    # become their averages.
    again = make_model(OPTIMIZERS[name](), seed=2)
    log, _ = train(again, tmp_path, data=None)
    assert log.calls == ["begin", "end"]
    assert_same_state(state(again), state(expected))


@pytest.mark.parametrize(("when", "epochs"), [("step", 0), ("validation", 0), ("epoch end", 1)])
def test_goes_on_at_the_end_of_an_epoch(when, epochs, unbroken, tmp_path):
    # Before its validation, within that, or after it.
    _, error = train(make_model(), tmp_path, at=STEPS, when=when, save_every=2)
    assert error.step == STEPS
    start = Checkpoints(tmp_path).restore(model := make_model(seed=1))
    assert (start.step, start.epochs) == (STEPS, epochs)
    log, _ = train(model, tmp_path)
    assert log.record == unbroken[1]
    assert_same_state(state(model), unbroken[0])


class Groups(keras.callbacks.Callback):
    """The first and last batches of the groups of steps that it is told of."""

    def __init__(self):
        super().__init__()
        self.found = []

    def on_train_batch_begin(self, batch, logs=None):
        self.found.append((batch,))

    def on_train_batch_end(self, batch, logs=None):
        self.found[-1] += (batch,)


def test_nothing_waits_for_the_device_within_a_group_of_steps(monkeypatch):
    waited = []
    monkeypatch.setattr(LossCheck, "passes", lambda _, logs, step: waited.append(step) or True)
    groups = Groups()
    options = {"log_every": 4, "log_first": 2, "max_steps": 14}
    train(make_model(), callbacks=[groups], **options)
    expected = [(0, 0), (1, 1), (2, 3), (4, 4)], [(0, 2), (3, 4)], [(0, 1), (2, 3)]
    assert groups.found == [pair for epoch in expected for pair in epoch]
    # Those of epochs, which Keras has read anyway, come once more.
    assert waited == [1, 2, 4, 5, 5, 8, 10, 10, 12, 14, 14]


def test_losses_of_groups_go_on_within_a_group(tmp_path):
    def losses(folder, signal_at=None, log_every=4, before=()):
        store, model = Checkpoints(tmp_path / folder), make_model()
        start = store.restore(model)
        log = MetricsLog("a", io.StringIO(), Progress(dict(before)), start.record if start else {})
        with contextlib.suppress(TrainingInterrupted):
            fit_from(
                model,
                start,
                batches,
                steps_per_epoch=STEPS,
                epochs=EPOCHS,
                validation_data=VALIDATION,
                callbacks=[log],
                checkpoints=store,
                record=log.state,
                interruption=SignalAt(signal_at),
                log_every=log_every,
                verbose=0,
            )
        return log.losses

    whole = losses("whole")
    assert list(whole) == [4, 5, 8, 10, 12, 15]
    before = losses("broken", signal_at=13)
    assert list(before) == [4, 5, 8, 10, 12]
    assert losses("broken", before=before) == whole
    # What a group has is the mean of its steps.
    each = losses("each", log_every=1)
    assert whole[8] == pytest.approx(np.mean([each[step] for step in (6, 7, 8)]), rel=1e-5)


@one_backend
def test_goes_on_from_the_last_epoch_that_was_saved(unbroken, tmp_path):
    class CrashError(Exception):
        pass

    def crash(_):
        raise CrashError

    steps = lambda: [int(path.stem[-8:]) for path in Checkpoints(tmp_path).paths()]  # noqa: E731
    with pytest.raises(CrashError):
        train(make_model(), tmp_path, at=2 * STEPS + 2, action=crash, save_every=2)
    assert steps() == [2 * STEPS]
    log, _ = train(model := make_model(seed=1), tmp_path, save_every=2)
    assert log.record == unbroken[1]
    assert_same_state(state(model), unbroken[0])
    assert steps() == [2 * STEPS, EPOCHS * STEPS]  # The last one always.


def test_tf_data_goes_on_within_an_epoch(unbroken, tmp_path):
    train(make_model(), tmp_path, data=tf_data, at=7)
    log, _ = train(model := make_model(seed=1), tmp_path, data=tf_data)
    assert log.record == unbroken[1]
    assert_same_state(state(model), unbroken[0])


@one_backend
def test_refuses_another_number_of_steps_and_data_that_ends_early(tmp_path):
    train(make_model(), tmp_path, at=STEPS)
    with pytest.raises(ValueError, match=f"epochs of 2 steps. Received: one of step {STEPS}"):
        train(make_model(), tmp_path, steps_per_epoch=2)
    with (
        pytest.warns(UserWarning, match="ran out of data"),
        pytest.raises(ValueError, match="steps in epoch 2. Received: 2 fewer"),
    ):
        train(make_model(), data=lambda step: batches(step, end=2 * STEPS - 2))
    model = make_model()
    model.steps_per_execution = 3
    with pytest.raises(ValueError, match="multiple of the model's steps_per_execution, 3"):
        train(model)


# Files


@pytest.fixture
def trained():
    """A compiled model whose optimizer has been built and whose values are no defaults."""

    def trained(optimizer=None, rewriting=None, **arguments):
        model = make_model(optimizer, small=False, **arguments)
        if rewriting:
            rewrite(model, rewriting, in_place=True)
        model.optimizer.build(model.trainable_variables)
        rng = np.random.default_rng(3)
        for variable in (*model.variables, *model.optimizer.variables):
            variable.assign(rng.integers(0, 99, variable.shape))
        return model

    return trained


def test_a_checkpoint_has_all_values_and_the_record(trained, tmp_path):
    store, model = Checkpoints(tmp_path / "new" / "folder"), trained(policy="mixed_bfloat16")
    assert store.restore(model) is None
    record = {"losses": [0.1, float("inf")], "text": "ä"}
    metrics = (np.float32([1.5]), np.float32(2))
    path = store.save(Snapshot.of(model, Checkpoint(17, 3, record, metrics)))
    assert [path] == store.paths() == list(path.parent.iterdir())
    other = make_model(small=False, policy="mixed_bfloat16", seed=1)
    assert not other.optimizer.built
    found = store.restore(other)
    assert (found.step, found.epochs, found.record) == (17, 3, record)
    assert_same_state(found.metrics, metrics)
    assert_same_state(state(other), state(model))


def test_bfloat16_variables_are_kept(trained, tmp_path):
    store, model = Checkpoints(tmp_path), trained(policy="bfloat16")
    store.save(Snapshot.of(model, Checkpoint(1)))
    other = make_model(small=False, policy="bfloat16", seed=1)
    store.restore(other)
    assert_same_state(state(other), state(model))


@pytest.mark.parametrize("lowerings", [(None, "diagonal:4"), ("shifted", None)], ids=str)
def test_stock_and_rewritten_models_read_each_others(trained, lowerings, tmp_path):
    store, models = Checkpoints(tmp_path), [trained(rewriting=x) for x in lowerings]
    ours = [isinstance(m.get_layer("depthwise"), DiagonalwiseDepthwiseConv2D) for m in models]
    assert sorted(ours) == [False, True]
    expected = state(models[0])
    store.save(Snapshot.of(models[0], Checkpoint(1)))
    for variable in (*models[1].variables, *models[1].optimizer.variables):
        variable.assign(np.zeros(variable.shape))
    store.restore(models[1])
    assert_same_state(state(models[1]), expected)


OTHERS = {
    "shape": (
        {"filters": 6},
        r"same model, with the variable .*conv/kernel \(3, 3, 2, 6\) float32",
    ),
    "dtype": ({"policy": "float64"}, "float64. Received: .*conv/kernel .* float32"),
    "layers": ({"small": True}, "hidden/kernel .* Received: .*conv/kernel"),
    "optimizer": (
        {"optimizer": lambda: keras.optimizers.Adam(0.1, use_ema=True)},
        "same optimizer, with the variable .*conv_kernel_momentum .* Received: .*_velocity ",
    ),
    "less": (
        {"optimizer": lambda: keras.optimizers.RMSprop(0.1, momentum=0.9, use_ema=True)},
        r"no further one\). Received: .*average_gradient",
    ),
}


@one_backend
@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused_and_left_alone(name, trained, tmp_path):
    store = Checkpoints(tmp_path)
    store.save(Snapshot.of(trained(), Checkpoint(1)))
    arguments, message = OTHERS[name]
    arguments = {"small": False, **arguments}
    other = make_model(arguments.pop("optimizer", lambda: None)(), **arguments)
    before = [variable.numpy().copy() for variable in other.variables]
    with pytest.raises(ValueError, match=message):
        store.restore(other)
    assert_same_state([variable.numpy() for variable in other.variables], before)
    assert len(store.paths()) == 1


def test_another_backend_is_refused(trained, tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    store.save(Snapshot.of(model := trained(), Checkpoint(1)))
    monkeypatch.setattr(keras.backend, "backend", lambda: "other")
    with pytest.raises(ValueError, match=f"of the other backend.*Received: .*, of {BACKEND}"):
        store.restore(model)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    # Within its values: what says where they begin has no checksum.
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@one_backend
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_checkpoint_is_passed_over(damage, trained, tmp_path, caplog):
    store, model = Checkpoints(tmp_path), trained()
    expected = state(model)
    store.save(Snapshot.of(model, Checkpoint(1)))
    model.variables[0].assign(model.variables[0] + 1)
    damage(store.save(Snapshot.of(model, Checkpoint(2))))
    other = make_model(small=False, seed=1)
    with caplog.at_level(logging.WARNING):
        assert store.restore(other).step == 1
    assert "step-00000002.npz is damaged" in caplog.text
    assert_same_state(state(other), expected)
    # It does not count as one of the two that are kept, and goes with the next.
    store.save(Snapshot.of(model, Checkpoint(3)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000001.npz",
        "step-00000003.npz",
    ]


@one_backend
@pytest.mark.parametrize("error", [OSError("stale handle"), MemoryError()], ids=repr)
def test_a_checkpoint_that_cannot_be_read_now_is_kept(error, trained, tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    for step in (1, 2):
        path = store.save(Snapshot.of(trained(), Checkpoint(step)))

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        # What reads a file, and what makes arrays of it.
        patch.setattr(*(("pathlib.Path.read_bytes", fail) if error.args else (np, "load", fail)))
        store.restore(trained())
    assert store.paths()[-1] == path
    assert store.restore(trained()).step == 2


@one_backend
def test_where_all_are_damaged_nothing_starts_from_the_beginning_unasked(trained, tmp_path):
    store = Checkpoints(tmp_path)
    truncate(store.save(Snapshot.of(trained(), Checkpoint(1))))
    with pytest.raises(ValueError, match="all are damaged. Without --resume"):
        store.restore(trained())


@one_backend
def test_the_newest_are_kept_and_those_of_another_course_removed(trained, tmp_path):
    store, model = Checkpoints(tmp_path, keep=2), trained()
    for step in (1, 2, 3, 4):
        store.save(Snapshot.of(model, Checkpoint(step)))
    assert [path.name[-6:-4] for path in store.paths()] == ["03", "04"]
    # From 3 it went on in another way.
    store.save(Snapshot.of(model, Checkpoint(3)))
    assert [path.name[-6:-4] for path in store.paths()] == ["03"]
    with pytest.raises(ValueError, match="at least 1. Received: keep=0"):
        Checkpoints(tmp_path, keep=0)


@one_backend
def test_a_full_disk_harms_neither_training_nor_checkpoint(unbroken, tmp_path, caplog):
    store = Checkpoints(tmp_path)

    def fill_disk(_):
        # No file may grow beyond this: writing fails in the middle.
        (path,) = store.paths()
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with caplog.at_level(logging.WARNING):
            model = make_model()
            log, _ = train(model, tmp_path, at=STEPS + 1, action=fill_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.record == unbroken[1]
    assert_same_state(state(model), unbroken[0])
    warnings = [x for x in caplog.messages if x.startswith("No checkpoint of step")]
    assert len(warnings) == EPOCHS - 1
    assert "File too large" in warnings[0]
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{STEPS:08}.npz"]
    assert store.restore(make_model(seed=1)).epochs == 1


@one_backend
def test_what_a_kill_in_mid_write_has_left_is_removed(trained, tmp_path):
    left = tmp_path / ".12345-step-00000007.npz"
    left.touch()
    store = Checkpoints(tmp_path)
    assert store.paths() == []
    store.save(Snapshot.of(trained(), Checkpoint(1)))
    assert not left.exists()


# Losses


@one_backend
def test_a_loss_that_is_no_number_stops_at_once(tmp_path):
    model = make_model(keras.optimizers.SGD(0.25))
    data = functools.partial(batches, broken_at=STEPS + 1)
    with pytest.raises(NonFiniteLossError) as stopped:
        train(model, tmp_path, data=data)
    message = str(stopped.value)
    assert len(message.splitlines()) == 1
    for part in (
        f"is nan after step {STEPS + 2}, in epoch 2 (learning rate 0.25, float32)",
        f"after step {STEPS + 1}. Try a lower learning rate",
    ):
        assert part in message
    assert "bfloat16" not in message
    # `--resume` refuses other settings.
    assert "another --name" in message
    start = Checkpoints(tmp_path).restore(model)
    assert start.step == STEPS
    assert all(np.isfinite(value).all() for value in state(model))


@pytest.mark.backends("tensorflow", "jax")  # JAX keeps the weights apart from the model.
@pytest.mark.parametrize(("at", "signalled"), [(2 * STEPS, False), (STEPS + 2, True)])
def test_weights_that_are_no_numbers_are_not_saved(at, signalled, tmp_path):
    model = make_model(keras.optimizers.SGD(0.25))

    def action(interruption):
        """As a step whose gradients overflow: its loss was finite."""
        if BACKEND == "jax":
            model.jax_state_sync()
        weight = model.trainable_variables[0]
        weight.assign(np.full(weight.shape, np.nan, "float32"))
        if signalled:
            interrupt(interruption)

    with pytest.raises(NonFiniteLossError, match=f"Weights are NaN .* after step {at}, in epoch 2"):
        train(model, tmp_path, at=at, action=action)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{STEPS:08}.npz"]


@one_backend
def test_the_loss_is_looked_at_every_so_many_steps_and_before_saving(tmp_path):
    data = functools.partial(batches, broken_at=STEPS)
    for options, step in (
        ({"log_every": 3}, 6),
        ({"log_every": 1000}, 2 * STEPS),
        ({"log_every": 1000, "log_first": STEPS + 3}, STEPS + 1),
        ({"log_every": 1000, "interruption": SignalAt(STEPS + 2)}, STEPS + 2),
    ):
        with pytest.raises(NonFiniteLossError, match=f"after step {step}, in epoch 2"):
            train(make_model(), tmp_path, data=data, **options)
        assert [path.name for path in tmp_path.iterdir()] == [f"step-{STEPS:08}.npz"]


def test_non_finite_gradients_of_a_loss_scale_do_not_stop():
    optimizer = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=2.0**127)
    log, _ = train(make_model(optimizer), epochs=1)
    assert len(log.record["steps"]) == STEPS
    assert float(keras.ops.convert_to_numpy(optimizer.dynamic_scale)) < 2.0**127


@one_backend
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_float16_alone_is_advised_against(policy):
    check = LossCheck()
    assert check.passes({"loss": 1.0}, 1)
    assert check.passes({}, 2)
    assert not check.passes({"loss": float("-inf")}, 3)
    message = str(check.error(make_model(policy=policy), epoch=0))
    assert message.startswith("The loss is -inf after step 3, in epoch 1")
    assert policy in message
    assert ("bfloat16 instead" in message) == (policy == "mixed_float16")


# Signals


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT])
def number(request):
    """A signal, and where it goes when nothing handles it."""
    outside = []
    former = signal.signal(request.param, lambda *_: outside.append(1))
    yield request.param, outside
    signal.signal(request.param, former)


@one_backend
def test_the_first_signal_asks_and_a_second_ctrl_c_ends(number, capfd):
    number, outside = number
    before = handlers()
    with pytest.raises(KeyError), Interruption() as interruption:
        assert handlers() != before
        os.kill(os.getpid(), number)
        assert interruption.signal_name == number.name
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
        raise KeyError
    assert handlers() == before
    assert not outside
    assert capfd.readouterr().err.count("saving after this step") == 1


@one_backend
def test_a_signal_that_came_too_late_is_not_lost(number):
    number, outside = number
    with Interruption():
        os.kill(os.getpid(), number)
        assert not outside
    assert outside


@one_backend
def test_another_thread_handles_no_signals():
    def enter():
        with Interruption():
            found.append(handlers())

    found = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [handlers()]


@one_backend
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # The child does nothing else.
def test_a_forked_worker_is_ended_as_usual():
    with Interruption():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM


@one_backend
def test_a_signal_before_the_first_step_saves_nothing(tmp_path):
    interruption = Interruption()
    interruption.signal_name = "SIGINT"
    with pytest.raises(TrainingInterrupted, match="after step 0.*there is no checkpoint yet"):
        fit_from(
            make_model(),
            None,
            batches,
            steps_per_epoch=STEPS,
            epochs=EPOCHS,
            checkpoints=Checkpoints(tmp_path),
            interruption=interruption,
        )
    assert list(tmp_path.iterdir()) == []


# Processes


@contextlib.contextmanager
def script_that_waits(folder, step):
    """The process, when it has trained for so many steps."""
    (folder / "waiting").unlink(missing_ok=True)
    process = forked.start(__name__, folder, f"--wait_at={step}")
    try:
        while not (folder / "waiting").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        yield process
    finally:
        process.kill()


@one_backend
@pytest.mark.slow
def test_killed_then_preempted_then_done(unbroken, tmp_path):
    with script_that_waits(tmp_path, STEPS + 2) as process:
        process.kill()
    assert [path.name for path in (tmp_path / "saved").iterdir()] == [f"step-{STEPS:08}.npz"]

    with script_that_waits(tmp_path, 2 * STEPS + 3) as process:
        process.send_signal(signal.SIGTERM)
        errors = process.communicate()[1]
    assert process.returncode == EXIT_INTERRUPTED, errors
    path = tmp_path / "saved" / f"step-{2 * STEPS + 3:08}.npz"
    assert f"Interrupted by SIGTERM after step {2 * STEPS + 3}. The same command" in errors
    assert f"--resume goes on from {path}" in errors

    log, _ = train(model := make_model(seed=1), tmp_path / "saved")
    assert log.record == unbroken[1]
    assert_same_state(state(model), unbroken[0])


if __name__ == "__main__":
    main()
