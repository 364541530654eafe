"""One workload alone: its times, and whether its numbers are right."""

import dataclasses

import numpy as np
import pytest

from diagconv_tf import Conditions, ConvSpec
from diagconv_tf.lowerings import Diagonal, Native, Shifted
from diagconv_tf.measurements import WRONG_NUMBERS
from diagconv_tf.spec import PASSES, STOCK
from diagconv_tf.tuning import checking, layer_benchmark
from diagconv_tf.tuning.layer_benchmark import measure_alone, measure_functions
from diagconv_tf.tuning.workloads import Workload
from tests import cases
from tests.fake_clock import FakeClock
from tests.numerics import BACKEND, expected, random_problem

SMALL = ConvSpec(2, 6, 5, 4, padding="same")

#: JAX compiles in any case.
HERE = dataclasses.replace(Conditions.current(False), compiled=False)


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(layer_benchmark, "ROUNDS", 2)


# Numbers.


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("name", cases.NAMED)
def test_the_reference_is_that_of_the_tests(name):
    """Two implementations, by taps and by windows, agree."""
    spec = cases.NAMED[name]
    problem = random_problem(spec)
    for value, wanted in zip(
        checking.reference(spec, *problem), expected(spec, *problem), strict=True
    ):
        np.testing.assert_allclose(value, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "lowering",
    [
        "native",
        "shifted",
        "diagonal:2",
        dict(zip(PASSES, ("shifted", "dense", "native"), strict=True)),
    ],
    ids=str,
)
def test_right_numbers_are_right(lowering):
    assert checking.why_wrong(SMALL.replace(batch=64), lowering, HERE) == ""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_right_numbers_are_right_in_other_precisions(dtype):
    if dtype == "float64" and BACKEND == "jax":
        pytest.skip("JAX makes float64 float32")
    assert checking.why_wrong(SMALL.replace(compute_dtype=dtype), "shifted", HERE) == ""


@pytest.mark.parametrize("wrong_pass", PASSES)
def test_a_thousandth_is_wrong(monkeypatch, wrong_pass):
    right = getattr(Shifted, wrong_pass)
    monkeypatch.setattr(
        Shifted, wrong_pass, lambda self, spec, *args: right(self, spec, *args) * 1.001
    )
    # Another spec for each pass: functions with gradients of their own are kept.
    spec = SMALL.replace(height=7 + PASSES.index(wrong_pass))
    wrong = checking.why_wrong(spec, "shifted", HERE)
    assert wrong.startswith(f"the {wrong_pass.replace('_', ' ')} of 3×3")
    assert "a relative error of 1.00e-03, above " in wrong


def test_not_a_number_is_wrong(monkeypatch):
    monkeypatch.setattr(
        Shifted, "forward", lambda self, spec, inputs, kernel: inputs * float("nan")
    )
    assert "error of nan" in checking.why_wrong(SMALL.replace(height=11), "shifted", HERE)


def test_stock_that_is_broken_lets_nothing_pass(monkeypatch):
    """The reference is neither stock nor native."""
    for owner in (Native, Diagonal):
        forward = owner.forward
        monkeypatch.setattr(
            owner, "forward", lambda self, *args, forward=forward: 2 * forward(self, *args)
        )
    assert checking.why_wrong(SMALL, "dense", HERE)
    assert checking.why_wrong(SMALL.replace(height=12), "shifted", HERE) == ""


@pytest.mark.backends("tensorflow")
def test_tf32_is_allowed_where_the_device_has_it():
    cpu = dataclasses.replace(HERE, device_kind="cpu")
    gpu = dataclasses.replace(HERE, device_kind="gpu", numeric_mode=(("tf32", "True"),))
    off = dataclasses.replace(gpu, numeric_mode=(("tf32", "False"),))
    assert [where.allows_tf32 for where in (cpu, gpu, off)] == [False, True, False]


# Times.


@pytest.mark.parametrize("stock_op", ["depthwise_conv", "conv"])
def test_all_candidates_of_a_workload_are_measured(few_rounds, stock_op):
    names = [STOCK, "native", "shifted", "diagonal:2", "dense"]
    measured = measure_alone(Workload(SMALL, stock_op), names, HERE)
    assert list(measured) == list(PASSES)
    for pass_name, found in measured.items():
        assert list(found) == names
        for name, result in found.items():
            assert result.ok, (pass_name, name, result)
            assert result.first_seconds > 0


def test_what_is_wrong_or_raises_has_an_error_in_every_pass(few_rounds, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(Diagonal, "forward", fail)
    wrong = checking.why_wrong
    monkeypatch.setattr(
        checking, "why_wrong", lambda s, n, c: "a sum" if n == "shifted" else wrong(s, n, c)
    )
    workload = Workload(SMALL, "depthwise_conv")
    measured = measure_alone(workload, [STOCK, "dense", "shifted"], HERE)
    for found in measured.values():
        assert found[STOCK].ok
        assert "out of luck" in found["dense"].error
        assert "\n" not in found["dense"].error
        assert not found["dense"].lasts
        assert found["shifted"].error == f"{WRONG_NUMBERS}: a sum"
        assert found["shifted"].lasts


@pytest.mark.backends("tensorflow")
def test_what_is_far_from_the_best_is_not_timed_further(monkeypatch):
    clock = FakeClock()
    seconds = {STOCK: 10.0, "native": 1.0, "shifted": 2.9}
    functions = {name: lambda s=s: clock.advance(s) for name, s in seconds.items()}
    monkeypatch.setattr(layer_benchmark, "ROUNDS", 5)
    monkeypatch.setattr(layer_benchmark, "ROUNDS_SECONDS", 1e9)
    measured = measure_functions(functions, 1, clock)
    assert {name: m.count for name, m in measured.items()} == {STOCK: 1, "native": 5, "shifted": 5}
    assert {name: m.median for name, m in measured.items()} == seconds


@pytest.mark.backends("tensorflow")
def test_samples_on_a_device_of_its_own_are_of_several_calls(few_rounds, monkeypatch):
    counts = []
    on_gpu = dataclasses.replace(HERE, device_kind="gpu")
    monkeypatch.setattr(
        layer_benchmark, "compile_passes", lambda *arguments: lambda: counts.append(1)
    )
    workload = Workload(SMALL, "depthwise_conv")
    assert measure_alone(workload, [STOCK], on_gpu)["forward"][STOCK].ok
    calls = layer_benchmark.CALLS_ON_DEVICE
    # The first call and a sample; four more of a short one, after a call of their own;
    # then, for the rounds, one call and two samples.
    assert len(counts) == 3 * ((1 + calls) + (1 + 4 * calls) + (1 + 2 * calls))
