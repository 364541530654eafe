"""Laws of `StepTimer`, with a fake clock wherever time itself is not the point.

Run with `-s` to see what a `StepTimer` costs per execution.
"""

import json
import os
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from diagconv_tf import StepTimer, step_timer
from diagconv_tf.timing import Timings
from tests.fake_clock import FakeClock

BACKEND = keras.backend.backend()
needs_multi_step = pytest.mark.skipif(
    BACKEND == "torch",
    reason="Keras allows only steps_per_execution=1 with the PyTorch backend",
)
needs_tensorflow = pytest.mark.backends("tensorflow")


class OwnStep(keras.Sequential):
    def train_step(self, *args):
        return super().train_step(*args)


def make_model(cls=keras.Sequential, **compile_args):
    model = cls([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", **compile_args)
    return model


def make_data(images):
    return np.ones((images, 4), "float32"), np.ones((images, 1), "float32")


def drive(timer, epochs, model=None, gap=0.0):
    """Calls the timer as Keras would.

    `epochs` is a list of epochs, each a list of (announced steps, images,
    seconds) per execution.
    """
    clock = timer._clock
    timer.set_model(model or make_model())
    timer.on_train_begin()
    for epoch, executions in enumerate(epochs):
        clock.advance(1000.0)
        timer.model.reset_metrics()
        timer.on_epoch_begin(epoch)
        step = 0
        for announced, images, seconds in executions:
            timer.on_train_batch_begin(step)
            clock.advance(seconds)
            timer.model.metrics[0].update_state(0.5, sample_weight=images)
            timer.on_train_batch_end(step + announced - 1)
            clock.advance(gap)
            step += announced
        timer.on_epoch_end(epoch)
    timer.on_train_end()
    return timer


def test_first_execution_is_apart_and_warmup_does_not_count():
    epoch = [(1, 8, 60.0), (1, 8, 30.0), (1, 8, 20.0), (1, 8, 2.0), (1, 8, 4.0)]
    timer = drive(StepTimer(warmup=3, clock=FakeClock()), [epoch])
    assert timer.first_step_seconds == 60.0
    assert timer.timings == Timings((2.0, 4.0), first_seconds=60.0)
    assert timer.summary().left_out == 3


def test_first_execution_never_counts():
    timer = drive(StepTimer(warmup=0, clock=FakeClock()), [[(1, 8, 60.0), (1, 8, 2.0)]])
    assert timer.timings.samples == (2.0,)


def test_warmup_counts_steps_not_executions():
    epoch = [(4, 32, 9.0), (4, 32, 8.0), (4, 32, 4.0)]
    timer = drive(StepTimer(warmup=5, clock=FakeClock()), [epoch])
    assert timer.timings.samples == (1.0,)


def test_first_execution_of_an_epoch_and_epoch_ends_do_not_count():
    epoch = [(1, 8, 60.0), (1, 8, 2.0), (1, 8, 2.0)]
    timer = drive(StepTimer(warmup=0, clock=FakeClock()), [epoch] * 3, gap=0.5)
    assert timer.timings.samples == (2.0,) * 6
    assert timer.between_steps.samples == (0.5,) * 6


def test_an_execution_is_divided_by_the_steps_that_ran():
    # Keras announces 3 steps for the last execution too, where 1 runs.
    epoch = [(3, 24, 9.0), (3, 24, 6.0), (3, 8, 3.0)]
    timer = drive(StepTimer(warmup=0, clock=FakeClock()), [epoch] * 2)
    # The last one of the first epoch has a new shape.
    assert timer.timings.samples == (2.0, 2.0, 3.0)


def test_smaller_batch_counts_for_the_rate_only():
    epoch = [(1, 8, 9.0), (1, 8, 2.0), (1, 2, 50.0)]
    later = [(1, 8, 9.0), (1, 8, 2.0), (1, 2, 1.0)]
    timer = drive(StepTimer(warmup=0, clock=FakeClock()), [epoch, later])
    assert timer.timings.samples == (2.0, 2.0)
    assert sorted(timer._all.rates) == [2.0, 4.0, 4.0]
    assert timer.images_per_second == 4.0
    assert timer.summary().batch_size == 8


def test_smaller_batch_within_an_execution_is_no_step():
    epoch = [(3, 24, 9.0), (3, 24, 6.0), (3, 18, 5.0)]
    timer = drive(StepTimer(warmup=0, clock=FakeClock()), [epoch] * 2)
    assert timer.timings.samples == (2.0, 2.0)
    assert 18 / 5.0 in timer._all.rates


def test_batch_size_is_unknown_if_only_one_execution_ran():
    # 8 images: 3 steps were announced, perhaps 2 of 4 images ran.
    timer = drive(StepTimer(warmup=0, clock=FakeClock()), [[(3, 8, 9.0)]] * 2)
    assert timer.summary().batch_size is None
    assert timer.timings.count == 0


def test_own_train_step_uses_batch_size_and_leaves_the_last_execution_out():
    epoch = [(1, 1, 9.0), (1, 1, 2.0), (1, 1, 0.1)]
    timer = StepTimer(warmup=0, batch_size=8, clock=FakeClock())
    drive(timer, [epoch] * 2, model=make_model(OwnStep))
    assert timer.timings.samples == (2.0, 2.0)
    assert timer.images_per_second == 4.0
    assert timer.summary().left_out == 4


def test_unknown_images_are_not_invented():
    timer = StepTimer(warmup=0, clock=FakeClock())
    drive(timer, [[(1, 1, 9.0), (1, 1, 2.0), (1, 1, 2.0)]], make_model(OwnStep))
    assert timer.timings.count == 1
    assert timer.images_per_second is None
    assert timer.summary().batch_size is None
    assert "images/s" not in str(timer.summary())


def test_execution_without_end_is_forgotten():
    # Data that runs out within a step leaves a begin without an end.
    timer = StepTimer(warmup=0, clock=FakeClock())
    drive(timer, [[(1, 8, 9.0), (1, 8, 2.0)]])
    timer.on_train_batch_begin(2)
    timer._clock.advance(500.0)
    timer.on_epoch_begin(1)
    assert timer.timings.samples == (2.0,)


def test_a_second_fit_begins_anew():
    timer = StepTimer(warmup=0, clock=FakeClock())
    drive(timer, [[(1, 8, 9.0), (1, 8, 2.0)]])
    drive(timer, [[(1, 8, 7.0), (1, 8, 3.0)]])
    assert timer.timings == Timings((3.0,), first_seconds=7.0)


def test_summary_without_steps():
    summary = StepTimer().summary()
    assert (summary.count, summary.step_median_seconds) == (0, None)
    assert "not measured" in str(summary)
    assert json.loads(summary.to_json())["images_per_second"] is None


def test_summary_is_one_line_and_json():
    epoch = [(1, 8, 9.0)] + [(1, 8, s) for s in (1.0, 2.0, 3.0)]
    summary = drive(StepTimer(warmup=0, clock=FakeClock()), [epoch]).summary()
    line = str(summary)
    assert "\n" not in line
    assert "2000.000 ms (median of 3, p10 1200.000, p90 2800.000)" in line
    assert "4 images/s" in line
    assert "first step 9.00 s" in line
    fields = json.loads(summary.to_json())
    assert fields["step_median_seconds"] == 2.0
    assert fields["step_p10_seconds"] == pytest.approx(1.2)
    assert fields["step_p90_seconds"] == pytest.approx(2.8)
    assert fields["step_includes_input"] == (BACKEND != "torch")


def test_log_has_a_line_per_epoch_and_a_last_one(tmp_path):
    path = tmp_path / "new folder" / "steps.jsonl"
    timer = StepTimer(warmup=0, log_path=path, clock=FakeClock())
    drive(timer, [[(1, 8, 9.0), (1, 8, s)] for s in (2.0, 4.0)])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["epoch", "epoch", "end"]
    assert [line.get("epoch") for line in lines] == [0, 1, None]
    assert [line["step_median_seconds"] for line in lines] == [2.0, 4.0, 3.0]
    assert [line["count"] for line in lines] == [1, 1, 2]
    assert [line["first_step_seconds"] for line in lines] == [9.0] * 3
    assert os.listdir(path.parent) == ["steps.jsonl"]


def test_log_keeps_what_is_there(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"event": "end"}')
    timer = StepTimer(log_path=path, clock=FakeClock())
    drive(timer, [])
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2


def test_interrupted_write_leaves_whole_lines_and_training_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"event": "end"}\n')
    timer = StepTimer(log_path=path, clock=FakeClock())

    def full_disk(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(step_timer.os, "fsync", full_disk)
    with pytest.warns(UserWarning, match="No space left"):
        drive(timer, [[(1, 8, 1.0)]])
    assert path.read_text() == '{"event": "end"}\n'


@pytest.mark.parametrize("argument", ["log_path", "tensorboard_dir"])
def test_folder_that_cannot_be_written_fails_at_once(tmp_path, argument):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"`{argument}` to lie.*Received"):
        StepTimer(**{argument: tmp_path / "file" / "below"})


def test_log_path_that_is_a_folder_fails_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"to be a file.*Received"):
        StepTimer(log_path=tmp_path)


@pytest.mark.parametrize(
    "arguments", [{"warmup": -1}, {"warmup": 1.5}, {"warmup": True}, {"batch_size": 0}]
)
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=r"to be an integer.*Received: "):
        StepTimer(**arguments)


@needs_tensorflow
def test_tensorboard_scalars(tmp_path):
    import tensorflow as tf

    timer = StepTimer(warmup=0, tensorboard_dir=tmp_path, clock=FakeClock())
    drive(timer, [[(1, 8, 9.0), (1, 8, s)] for s in (2.0, 4.0)])
    (path,) = tmp_path.glob("events*")
    found = {
        (event.step, value.tag): float(tf.make_ndarray(value.tensor))
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    }
    plugins = {
        value.metadata.plugin_data.plugin_name
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    }
    assert plugins == {"scalars"}
    assert found[0, "step_timer/step_median_seconds"] == 2.0
    assert found[1, "step_timer/step_median_seconds"] == 4.0
    assert found[1, "step_timer/images_per_second"] == 2.0


@pytest.mark.skipif(BACKEND == "tensorflow", reason="for the other backends")
def test_tensorboard_without_tensorflow_says_so(tmp_path):
    with pytest.warns(UserWarning, match="TensorBoard scalars need tensorflow"):
        timer = StepTimer(tensorboard_dir=tmp_path, clock=FakeClock())
    drive(timer, [[(1, 8, 1.0)]])


@pytest.mark.skipif(BACKEND == "tensorflow", reason="for the other backends")
def test_import_without_tensorflow():
    code = (
        "import sys; from diagconv_tf import StepTimer, timing; StepTimer();"
        "timing.synchronize(); assert 'tensorflow' not in sys.modules"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


# Real fits, on a clock that ticks once per reading: a begin, an end, and the
# reading after the bookkeeping, so that an execution takes one second and the
# time between two of them is one second too.


class Slow(keras.callbacks.Callback):
    """Spends time wherever a step must not notice."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def on_train_batch_end(self, batch, logs=None):
        self.clock.advance(100.0)

    def on_epoch_end(self, epoch, logs=None):
        self.clock.advance(1000.0)

    def on_test_batch_end(self, batch, logs=None):
        self.clock.advance(1000.0)


def test_fit_step_by_step(tmp_path):
    clock = FakeClock(tick=1.0)
    path = tmp_path / "steps.jsonl"
    timer = StepTimer(warmup=2, log_path=path, clock=clock)
    x, y = make_data(18)  # Batches of 4, 4, 4, 4, 2.
    make_model().fit(
        x, y, batch_size=4, epochs=3, validation_data=(x, y), verbose=0,
        callbacks=[timer, Slow(clock)],
    )  # fmt: skip
    assert timer.timings.samples == (1.0,) * (2 + 3 + 3)
    assert timer.first_step_seconds == 1.0
    assert sorted(timer._all.rates) == [2.0] * 2 + [4.0] * 8
    assert set(timer.between_steps.samples) == {101.0}
    assert timer.summary().batch_size == 4
    assert timer.summary().left_out == 15 - 8
    events = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    assert events == ["epoch"] * 3 + ["end"]


@needs_multi_step
def test_fit_with_three_steps_per_execution():
    timer = StepTimer(warmup=0, clock=FakeClock(tick=1.0))
    x, y = make_data(40)  # Executions of 3, 3, 3 and 1 steps.
    make_model(steps_per_execution=3).fit(
        x, y, batch_size=4, epochs=2, verbose=0, callbacks=[timer]
    )
    third = 1 / 3
    assert timer.timings.samples == (third, third, third, third, 1.0)
    assert timer.images_per_second == 12.0


@needs_multi_step
def test_fit_that_runs_more_steps_than_an_epoch_has():
    # Keras runs 3 + 3 steps here, although it was asked for 4.
    def batches():
        while True:
            yield make_data(4)

    timer = StepTimer(warmup=0, clock=FakeClock(tick=1.0))
    make_model(steps_per_execution=3).fit(
        batches(), steps_per_epoch=4, epochs=2, verbose=0, callbacks=[timer]
    )
    assert timer.timings.samples == (1 / 3, 1 / 3)


@pytest.mark.skipif(
    BACKEND == "tensorflow", reason="tf.data prefetches in threads: not reproducible"
)
def test_where_the_wait_for_input_is():
    clock = FakeClock(tick=1.0)

    def batches():
        while True:
            clock.advance(10.0)
            yield make_data(4)

    timer = StepTimer(warmup=0, clock=clock)
    make_model().fit(batches(), steps_per_epoch=6, epochs=1, verbose=0, callbacks=[timer])
    waits = timer.timings if timer.summary().step_includes_input else timer.between_steps
    others = timer.between_steps if waits == timer.timings else timer.timings
    # Keras has fetched two batches of a generator before the first step.
    assert set(waits.samples[1:]) == {11.0}
    assert set(others.samples) == {1.0}


def test_nothing_is_lost_when_an_epoch_crashes(tmp_path):
    class Crash(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_end(self, batch, logs=None):
            if self.epoch == 1 and batch == 2:
                raise RuntimeError("crash")

    path = tmp_path / "steps.jsonl"
    timer = StepTimer(warmup=0, log_path=path, clock=FakeClock(tick=1.0))
    x, y = make_data(16)
    with pytest.raises(RuntimeError, match="crash"):
        make_model().fit(x, y, batch_size=4, epochs=3, verbose=0, callbacks=[timer, Crash()])
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["epoch"] == 0
    assert timer.timings.count == 3 + 2
    assert timer.summary().images_per_second == 4.0


def test_step_waits_for_the_device(monkeypatch):
    clock = FakeClock()
    waited_for = []

    def wait(value=None):
        waited_for.append(value)
        clock.advance(5.0)

    monkeypatch.setattr(step_timer, "synchronize", wait)
    timer = drive(StepTimer(warmup=0, clock=clock), [[(1, 8, 2.0)] * 2])
    assert timer.timings.samples == (7.0,)
    assert len(waited_for) == 4


@pytest.mark.skipif(BACKEND != "jax", reason="only JAX keeps the state apart")
def test_fit_waits_for_the_state_and_does_not_write_it_back(monkeypatch):
    waited_for = []
    monkeypatch.setattr(step_timer, "synchronize", lambda v=None: waited_for.append(v))
    writes = []
    model = make_model()
    original = model.jax_state_sync
    model.jax_state_sync = lambda: (writes.append(1), original())
    x, y = make_data(16)
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[StepTimer()])
    assert len(waited_for[1][0]["trainable_variables"]) == 2
    assert len(writes) < 4  # Keras's own, at the end of the epoch.


def test_overhead_is_shown():
    """Prints what the timer adds; asserts only that it keeps to three readings."""
    spent = []

    class Watched(StepTimer):
        def on_train_batch_begin(self, batch, logs=None):
            start = time.perf_counter()
            super().on_train_batch_begin(batch, logs)
            spent.append(time.perf_counter() - start)

        def on_train_batch_end(self, batch, logs=None):
            start = time.perf_counter()
            super().on_train_batch_end(batch, logs)
            spent[-1] += time.perf_counter() - start

    clock = FakeClock(tick=1.0)
    x, y = make_data(800)
    layers = [keras.layers.Dense(4) for _ in range(20)]
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[Watched(clock=clock)])
    median, p90 = 1e6 * np.percentile(spent, [50, 90])
    print(
        f"\nStepTimer in fit, {BACKEND}, {len(model.variables)} variables: "
        f"{median:.0f} us per execution (median of {len(spent)}, p90 {p90:.0f})"
    )
    assert clock.readings == 3 * len(spent)
