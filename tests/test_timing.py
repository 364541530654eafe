"""Laws of the one clock, with a fake clock wherever time itself is not the point."""

import functools
import itertools
import time

import keras
import pytest

from diagconv_tf import timing
from diagconv_tf.timing import Timings, synchronize, time_interleaved
from tests.fake_clock import FakeClock

needs_tensorflow = pytest.mark.backends("tensorflow")


def test_interleaving_order():
    calls = []
    names = ["a", "b", "c"]
    functions = {name: lambda name=name: calls.append(name) for name in names}
    results = time_interleaved(functions, rounds=4, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "abc" + "bca" + "cab" + "abc"
    assert list(results) == names
    assert [results[name].count for name in names] == [4, 4, 4]


def test_first_call_and_warmup_are_apart():
    clock = FakeClock()
    durations = iter([60.0, 30.0, 20.0, 1.0, 3.0])
    results = time_interleaved(
        {"a": lambda: clock.advance(next(durations))}, rounds=2, warmup=2, clock=clock
    )
    assert results["a"] == Timings((1.0, 3.0), first_seconds=60.0)


def test_exception_is_kept_and_the_others_go_on():
    calls = []

    def fails_later():
        calls.append(1)
        if len(calls) == 4:  # In the second round that is kept.
            raise MemoryError("too large")
        return None

    def fails():
        raise ValueError("no such lowering")

    results = time_interleaved({"bad": fails, "good": lambda: None, "later": fails_later}, rounds=3)
    assert isinstance(results["bad"].error, ValueError)
    assert results["bad"].first_seconds is None
    assert results["good"].count == 3
    assert results["good"].error is None
    assert isinstance(results["later"].error, MemoryError)
    assert results["later"].first_seconds is not None
    assert results["later"].samples == ()
    assert results["later"].median is None
    assert len(calls) == 4
    assert results["bad"].error.__traceback__ is None
    assert str(results["bad"]) == "failed: ValueError: no such lowering"


def test_keyboard_interrupt_is_raised():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        time_interleaved({"a": interrupted})


def test_budget_ends_with_a_whole_round():
    clock = FakeClock()
    functions = {name: lambda: clock.advance(1.0) for name in "ab"}
    # 2 s for the first calls, 2 s for the warm-up, 3 rounds of 2 s begin in time.
    results = time_interleaved(functions, rounds=100, warmup=1, budget_seconds=9.0, clock=clock)
    assert [results[name].count for name in "ab"] == [3, 3]


def test_budget_leaves_at_least_one_round():
    clock = FakeClock()
    results = time_interleaved(
        {"a": lambda: clock.advance(100.0)}, warmup=9, budget_seconds=1.0, clock=clock
    )
    assert results["a"].count == 1
    assert clock.now == 200.0


def test_who_goes_on_is_selected_after_each_round():
    calls = []

    def function(name):
        if name == "bad":
            raise ValueError("no luck")
        calls.append(name)

    seen = []

    def select(samples):
        seen.append({name: len(times) for name, times in samples.items()})
        return {1: "abc", 2: "ac", 3: ""}[len(seen)]

    functions = {name: functools.partial(function, name) for name in ("a", "b", "c", "bad")}
    results = time_interleaved(functions, rounds=9, warmup=0, select=select)
    assert {name: timing.count for name, timing in results.items()} == {
        "a": 3,
        "b": 2,
        "c": 3,
        "bad": 0,
    }
    assert seen == [{"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 2, "c": 2}, {"a": 3, "b": 2, "c": 3}]
    # The first calls, and three rounds.
    assert "".join(calls) == "abc" + "abc" + "bca" + "ca"


def test_first_calls_may_have_been_made():
    clock = FakeClock()
    results = time_interleaved(
        {"a": lambda: clock.advance(1.0)}, rounds=2, warmup=0, first_calls=False, clock=clock
    )
    assert results["a"] == Timings((1.0, 1.0), first_seconds=None)
    assert clock.now == 2.0


def test_after_a_failure_what_functions_share_is_rebuilt_before_the_next_runs():
    events = []

    def fails():
        events.append("fails")
        raise ValueError("no luck")

    functions = {"bad": fails, "good": lambda: events.append("good")}
    results = time_interleaved(
        functions, rounds=1, warmup=0, on_error=lambda: events.append("rebuilt")
    )
    assert events == ["fails", "rebuilt", "good", "good"]
    assert results["good"].count == 1


def test_wait_for_the_device_is_part_of_the_time(monkeypatch):
    clock = FakeClock()
    waited_for = []

    def wait(value=None):
        waited_for.append(value)
        clock.advance(5.0)

    monkeypatch.setattr(timing, "synchronize", wait)
    results = time_interleaved({"a": lambda: "value"}, rounds=1, clock=clock)
    assert results["a"].samples == (5.0,)
    assert waited_for == [None, "value", "value", "value"]


def test_the_device_is_waited_for_after_the_last_call_of_a_sample(monkeypatch):
    clock = FakeClock()
    waited_for = []

    def wait(value=None):
        waited_for.append(value)
        clock.advance(4.0)

    monkeypatch.setattr(timing, "synchronize", wait)
    values = itertools.count()

    def function():
        clock.advance(1.0)
        return next(values)

    results = time_interleaved({"a": function}, rounds=2, warmup=0, calls=4, clock=clock)
    assert results["a"].first_seconds == 5.0
    assert results["a"].samples == (2.0, 2.0)
    assert waited_for == [None, 0, 4, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calls": 0}, "Expected `calls` to be"),
        ({"rounds": 0}, "Expected `rounds` to be an integer of at least 1. Received: rounds=0"),
        ({"warmup": -1}, "Expected `warmup`"),
        ({"budget_seconds": 0}, "Expected `budget_seconds` to be above 0"),
        ({"functions": {"a": 3}}, "Expected `functions` to map"),
    ],
)
def test_arguments_of_time_interleaved(arguments, message):
    def must_not_run():
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        time_interleaved(**{"functions": {"a": must_not_run}, **arguments})


def test_no_functions_give_no_results():
    assert time_interleaved({}) == {}


def test_timings():
    timings = Timings(tuple(float(n) for n in range(11)))
    assert (timings.p10, timings.median, timings.p90) == (1.0, 5.0, 9.0)
    assert timings.relative_interquartile_range == pytest.approx(5 / 5)
    assert timings.count == 11
    assert Timings().relative_interquartile_range is None
    assert Timings().p10 is None
    assert "median of 11" in str(timings)


def test_synchronize_takes_nested_values():
    x = keras.ops.ones((64, 64))
    synchronize({"a": [x @ x, None], "b": (x, 3, "text")})
    synchronize()


@needs_tensorflow
def test_synchronize_in_a_graph_is_an_error():
    import tensorflow as tf

    with pytest.raises(RuntimeError, match="to be called eagerly"):
        tf.function(synchronize)()


@needs_tensorflow
@pytest.mark.parametrize(("kinds", "waits"), [(["CPU", "CPU"], 0), (["CPU", "GPU"], 1)])
def test_synchronize_waits_where_something_can_be_running(kinds, waits, monkeypatch):
    import tensorflow as tf

    devices = [tf.config.LogicalDevice("name", kind) for kind in kinds]
    calls = []
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda: devices)
    monkeypatch.setattr(tf.test.experimental, "sync_devices", lambda: calls.append(1))
    synchronize()
    assert len(calls) == waits


@needs_tensorflow
def test_synchronize_waits_for_asynchronous_execution():
    import tensorflow as tf

    seen = []
    tf.config.experimental.set_synchronous_execution(False)
    try:
        x = tf.random.normal((1200, 1200))
        slow = tf.py_function(lambda: (time.sleep(0.2), seen.append(1))[1] or 0.0, [], tf.float32)
        synchronize((x @ x, slow))
        assert seen == [1]
    finally:
        tf.config.experimental.set_synchronous_execution(True)
