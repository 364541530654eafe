"""One workload alone: its times, and whether its numbers are right."""

import dataclasses

import numpy as np
import pytest

from diagconv_tf import Conditions, ConvSpec
from diagconv_tf.lowerings import Diagonal, Native, Shifted
from diagconv_tf.measurements import Workload
from diagconv_tf.spec import PASSES, STOCK
from diagconv_tf.tuning import checking, contest, layer_benchmark
from diagconv_tf.tuning.layer_benchmark import measure_alone
from tests import cases
from tests.numerics import BACKEND, expected, random_problem

SMALL = ConvSpec(2, 6, 5, 4, padding="same")

#: JAX compiles in any case.
HERE = dataclasses.replace(Conditions.current(False), compiled=False)


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(contest, "ROUNDS", 2)


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
@pytest.mark.parametrize("name", cases.NAMED)
def test_a_smaller_check_keeps_what_a_program_depends_on(name):
    spec = cases.NAMED[name]
    compiled = dataclasses.replace(HERE, device_kind="cpu", compiled=True)

    def geometry(spec):
        pads = spec.padding_for((spec.height, spec.width))
        fixed = dataclasses.replace(spec, batch=1, height=99, width=99, groups=1)
        return fixed, pads, spec.groups > 32, spec.groups % 32, spec.groups > 64

    large = spec.replace(batch=64, height=spec.height + 40, width=spec.width + 36)
    for wanted in (large, large.replace(groups=200), large.replace(groups=512), spec):
        checked = checking.checked_size(wanted, compiled)
        assert geometry(checked)[:4] == geometry(wanted)[:4]
        assert checked.batch == min(wanted.batch, 2)
        assert checked.groups < 96
        for size, length, taps, rate, stride in zip(
            (checked.height, checked.width),
            (wanted.height, wanted.width),
            spec.kernel_size,
            spec.dilation_rate,
            spec.strides,
            strict=True,
        ):
            # Both borders, and not much more.
            extent = (taps - 1) * rate + 1
            assert size == length or 2 * extent <= size < 2 * extent + stride
        # Libraries may choose by size.
        for where in (
            dataclasses.replace(compiled, compiled=False),
            dataclasses.replace(compiled, device_kind="gpu"),
        ):
            kept = checking.checked_size(wanted, where)
            assert kept == wanted.replace(batch=min(wanted.batch, 2))


@pytest.mark.backends("tensorflow")
def test_many_workloads_of_a_model_are_checked_at_one_size():
    sizes = [(48, 32), (24, 144), (12, 192), (6, 384), (6, 576), (6, 960)]
    compiled = dataclasses.replace(HERE, device_kind="cpu", compiled=True)
    checked = {
        checking.checked_size(ConvSpec(16, size, size, groups, padding="same"), compiled).groups
        for size, groups in sizes
    }
    assert checked == {32, 64 + 16, 64}


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
    measured = measure_alone(Workload(SMALL, stock_op, ()), names, HERE)
    assert list(measured) == names
    for name, result in measured.items():
        assert result.error is None, (name, result)
        assert result.first_seconds > 0
    # Of the same rounds.
    assert measured[STOCK].ok


def test_what_raises_has_an_error_and_takes_no_other_with_it(few_rounds, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(Diagonal, "forward", fail)
    workload = Workload(SMALL, "depthwise_conv", ())
    measured = measure_alone(workload, [STOCK, "dense", "shifted"], HERE)
    assert measured[STOCK].ok
    assert measured["shifted"].error is None
    assert "out of luck" in measured["dense"].error
    assert "\n" not in measured["dense"].error
    assert not measured["dense"].lasts


@pytest.mark.backends("tensorflow")
def test_samples_on_a_device_of_its_own_are_of_several_calls(few_rounds, monkeypatch):
    counts = []
    on_gpu = dataclasses.replace(HERE, device_kind="gpu")
    monkeypatch.setattr(
        layer_benchmark, "with_gradients", lambda *arguments: lambda: counts.append(1)
    )
    monkeypatch.setattr(contest, "next_round", lambda steps, seconds: list(steps))
    workload = Workload(SMALL, "depthwise_conv", ())
    assert measure_alone(workload, [STOCK], on_gpu)[STOCK].ok
    # The first call and two samples.
    assert len(counts) == 1 + 2 * layer_benchmark.CALLS_ON_DEVICE
