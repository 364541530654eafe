"""Quantizers against their formulas, written again in NumPy float64."""

import dataclasses
import math

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diagconv_tf.lowbit import (
    BinaryConnect,
    DoReFaActivations,
    DoReFaGradients,
    DoReFaWeights,
    Operands,
    noise,
)
from tests.numerics import MODES, vector_jacobian

BITS = st.integers(1, 8)
WORDS = st.integers(0, 2**31 - 1)
EXAMPLES = hypothesis.settings(max_examples=25)

#: Standard errors that a mean may be off. More are seen once in 1.7 million tries.
SIGMAS = 5


#: Where a number is subnormal, so is its relative precision.
NUMBERS = st.floats(-8, 8, width=32).map(lambda x: 0.0 if abs(x) < 1e-25 else x)


def tensors():
    """Small float32 arrays; zeros and halves are common, on which rounding depends."""
    return hnp.arrays(
        "float32",
        # JAX compiles every operation for every shape.
        st.sampled_from([(5,), (2, 3, 2, 2)]),
        elements=st.one_of(st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0]), NUMBERS),
    )


def call(operand, *arguments):
    return keras.ops.convert_to_numpy(operand(*arguments))


# The formulas --------------------------------------------------------------


def weight_steps(w, bits):
    """What is rounded, in steps from 0 to n."""
    y = np.tanh(w)
    largest = np.max(np.abs(y)) or 1.0
    return (2**bits - 1) * (y / (2 * largest) + 0.5)


def activation_steps(x, bits, signed, limit):
    n = 2**bits - 1
    if signed:
        return n * (np.clip(x, -limit, limit) / (2 * limit) + 0.5)
    return n * np.clip(x, 0, limit) / limit


def assert_rounded(values, steps, level):
    """`values` are `level(k)` for the integers k next to `steps`, the nearest but for halves."""
    nearest = np.round(steps)
    # float32 may decide otherwise where two integers are as near.
    is_tie = np.abs(np.abs(steps - np.floor(steps)) - 0.5) < 1e-4
    others = np.where(steps > nearest, nearest + 1, nearest - 1)
    by_nearest = np.abs(values - level(nearest)) <= 1e-6 * np.abs(level(nearest))
    by_other = np.abs(values - level(others)) <= 1e-6 * np.abs(level(others))
    assert np.all(by_nearest | (is_tie & by_other))


@EXAMPLES
@hypothesis.given(tensors(), BITS)
def test_weights_are_those_of_the_formula(w, bits):
    values = call(DoReFaWeights(bits), w)
    if bits == 1:
        scale = np.mean(np.abs(w.astype("float64")))
        np.testing.assert_allclose(values, np.where(w >= 0, scale, -scale), rtol=1e-6)
    else:
        n = 2**bits - 1
        assert_rounded(values, weight_steps(w.astype("float64"), bits), lambda k: (2 * k - n) / n)
        assert np.max(np.abs(values)) <= 1
        # The largest weight is an end of the range.
        assert not np.any(w) or np.max(np.abs(values)) == 1


@EXAMPLES
@hypothesis.given(tensors(), BITS, st.booleans(), st.sampled_from([1.0, 6.0, 0.3]))
def test_activations_are_those_of_the_formula(x, bits, signed, limit):
    operand, n = DoReFaActivations(bits, signed, limit), 2**bits - 1
    values = call(operand, x)

    def level(k):
        return limit * (2 * k - n) / n if signed else limit * k / n

    assert_rounded(values, activation_steps(x.astype("float64"), bits, signed, limit), level)
    assert np.max(np.abs(values)) <= np.float32(limit)
    assert signed or np.min(values) >= 0
    assert np.array_equal(call(operand, values), values)


@EXAMPLES
@hypothesis.given(tensors())
def test_binary_connect_is_the_sign(w):
    values = call(BinaryConnect(), w)
    assert np.array_equal(values, np.where(w >= 0, 1, -1))
    assert np.array_equal(call(BinaryConnect(), values), values)


@EXAMPLES
@hypothesis.given(tensors(), BITS)
def test_gradients_without_noise_are_those_of_the_formula(g, bits):
    operand, n = DoReFaGradients(bits, noise=False), 2**bits - 1
    values = call(operand, g)
    for example, wide in zip(values, g.astype("float64"), strict=True):
        largest = np.max(np.abs(wide))
        if largest == 0:
            assert not np.any(example)
        else:
            steps = n * (wide / (2 * largest) + 0.5)
            assert_rounded(example, steps, lambda k, m=largest: m * (2 * k - n) / n)
    np.testing.assert_allclose(call(operand, values), values, rtol=1e-6)


@EXAMPLES
@hypothesis.given(tensors(), BITS, WORDS, WORDS)
def test_gradients_with_noise_are_neighbours_on_the_grid(g, bits, first, second):
    n = 2**bits - 1
    values = call(DoReFaGradients(bits), g, np.array([first, second], "int32"))
    for example, wide in zip(values, g.astype("float64"), strict=True):
        largest = np.max(np.abs(wide))
        if largest == 0:
            assert not np.any(example)
            continue
        codes = example / largest * n
        np.testing.assert_allclose(codes, 2 * np.round((codes + n) / 2) - n, atol=1e-4)
        # Noise moves a number by half a step, and rounding by another half.
        assert np.all(np.abs(example - wide) <= 2 * largest / n * (1 + 1e-4))
        assert np.all(np.abs(example) <= largest * (1 + 1e-6))


#: Those that have integers.
KERNEL_OPERANDS = {
    **{f"{k} bits": DoReFaWeights(k) for k in (1, 2, 3, 7, 8)},
    "binary": BinaryConnect(),
}


@pytest.mark.parametrize("name", KERNEL_OPERANDS)
def test_codes_and_scale_are_the_values_to_the_bit(name):
    operand = KERNEL_OPERANDS[name]
    w = np.random.default_rng(0).normal(size=(3, 3, 8, 16)).astype("float32")
    codes = operand.codes(w)
    assert np.array_equal(codes.values(), call(operand, w))
    assert codes.codes.dtype == ("int16" if operand.bits == 8 else "int8")
    # Odd numbers only: zero is no level.
    assert np.all(codes.codes % 2 == 1)
    assert len(np.unique(codes.codes)) <= 2**operand.bits == 2**codes.bits
    assert np.max(np.abs(codes.codes)) == 2**operand.bits - 1


# Gradients -----------------------------------------------------------------


def weight_gradient(w, upstream, flows):
    """The derivative of tanh(w) / max|tanh(w)|."""
    y = np.tanh(w)
    largest = np.max(np.abs(y))
    gradient = upstream * (1 - y**2) / largest
    if flows:
        at = np.unravel_index(np.argmax(np.abs(y)), y.shape)
        through = -np.sum(upstream * y) / largest**2
        gradient[at] += through * np.sign(y[at]) * (1 - y[at] ** 2)
    return gradient


def inside(x, low, high):
    return ((x >= low) & (x <= high)).astype("float64")


#: name: (operand, its gradient in terms of the input and the upstream gradient)
GRADIENTS = {
    "weights of 1 bit": (DoReFaWeights(1), lambda w, g: g),
    "weights of 3 bits": (DoReFaWeights(3), lambda w, g: weight_gradient(w, g, True)),
    "weights, maximum fixed": (
        DoReFaWeights(3, gradient_of_max=False),
        lambda w, g: weight_gradient(w, g, False),
    ),
    "float weights": (DoReFaWeights(32), lambda w, g: g),
    "binary": (BinaryConnect(), lambda w, g: g),
    "activations": (DoReFaActivations(2), lambda x, g: g * inside(x, 0, 1)),
    "activations of 1 bit": (DoReFaActivations(1), lambda x, g: g * inside(x, 0, 1)),
    "signed activations": (DoReFaActivations(2, True, 0.5), lambda x, g: g * inside(x, -0.5, 0.5)),
    "float activations": (DoReFaActivations(32), lambda x, g: g),
}


@pytest.mark.parametrize("mode", dict.fromkeys((MODES[0], MODES[-1])))
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_straight_through(name, mode):
    operand, reference = GRADIENTS[name]
    rng = np.random.default_rng(3)
    x, upstream = rng.normal(size=(2, 4, 5, 3)).astype("float32")
    # The ends of a clip belong to it, on every backend.
    x[0, 0] = [0.0, 1.0, 0.5]
    x[0, 1] = [-0.0, -0.5, 0.25]
    value, gradient = vector_jacobian(operand, [x], upstream, mode)
    np.testing.assert_allclose(value, call(operand, x), rtol=1e-6)
    wanted = reference(x.astype("float64"), upstream.astype("float64"))
    np.testing.assert_allclose(gradient, wanted, rtol=2e-5, atol=1e-6)


def test_kernels_of_zeros_have_a_level_and_a_gradient():
    for operand in (DoReFaWeights(1), DoReFaWeights(3), BinaryConnect()):
        zeros = np.zeros((2, 3), "float32")
        value, gradient = vector_jacobian(operand, [zeros], zeros + 1)
        assert np.all(np.isfinite(value))
        assert np.all(np.isfinite(gradient))
        assert len(np.unique(value)) == 1


# Noise ---------------------------------------------------------------------


def mix(h):
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def reference_noise(count, first, second):
    with np.errstate(over="ignore"):
        first, second = np.uint32(first), np.uint32(second)
        key = mix(mix(second) + first)
        other = mix((key ^ np.uint32(0x9E3779B9)) + second)
        hashed = mix(mix(np.arange(count, dtype="uint32") ^ key) + other)
    return (((hashed >> np.uint32(9)) + 0.5) / 2**23 - 0.5).astype("float32")


def draw(count, first, second):
    return call(noise.uniform, (count,), np.array([first, second], "int32"))


@EXAMPLES
@hypothesis.given(WORDS, WORDS, st.sampled_from([1, 300]))
def test_the_noise_is_the_same_on_every_backend(first, second, count):
    assert np.array_equal(draw(count, first, second), reference_noise(count, first, second))


@pytest.mark.backends("tensorflow")
def test_the_noise_is_uniform_and_independent():
    """Of the next step, the next seed, and the neighbour; the reference's, which is the same."""
    count = 2**18
    noises = {(s, t): reference_noise(count, s, t) for s in (7, 8) for t in (0, 1, 2)}
    for drawn in noises.values():
        assert abs(drawn.mean()) < SIGMAS / math.sqrt(12 * count)
        # The variance of (u - 1/2)**2 is 1/180.
        assert abs(np.mean(drawn**2) - 1 / 12) < SIGMAS / math.sqrt(180 * count)
        bins = np.histogram(drawn, 256, (-0.5, 0.5))[0]
        chi2 = np.sum((bins - count / 256) ** 2) / (count / 256)
        assert abs(chi2 - 255) < SIGMAS * math.sqrt(2 * 255)
    pairs = [((7, 0), (7, 1)), ((7, 0), (8, 0)), ((7, 1), (8, 0)), ((7, 0), (7, 2))]
    series = [(noises[a], noises[b]) for a, b in pairs]
    series += [(noises[7, 0][:-lag], noises[7, 0][lag:]) for lag in (1, 2, 64)]
    for one, other in series:
        assert abs(np.mean(one * other)) < SIGMAS / (12 * math.sqrt(len(one)))


def bias_in_sigmas(quantize, value, bits):
    """How far the mean of many quantized gradients of `value` is from it, in standard errors."""
    count = 40_000
    g = np.full((1, count), value, "float32")
    g[0, 0] = 1.0  # The maximum.
    n = 2**bits - 1
    mean = np.mean(quantize(g)[0, 1:].astype("float64"))
    share = (value + 1) / 2 * n % 1
    error = 2 / n * math.sqrt(max(share * (1 - share), 1e-4) / count)
    return abs(mean - value) / error


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("value", [0.0, 0.37, -0.9, 0.99])
def test_rounded_gradients_have_no_bias(value, bits):
    """With a confidence of 1 - 6e-7; rounding without noise, or with half of it, is found out."""
    assert bias_in_sigmas(lambda g: call(DoReFaGradients(bits), g, 5), value, bits) < SIGMAS
    without = bias_in_sigmas(lambda g: call(DoReFaGradients(bits, noise=False), g), value, bits)
    assert without > SIGMAS


@pytest.mark.backends("tensorflow")
def test_noise_that_is_shifted_is_found_out(monkeypatch):
    uniform = noise.uniform
    monkeypatch.setattr(noise, "uniform", lambda *arguments: uniform(*arguments) + 0.05)
    assert bias_in_sigmas(lambda g: call(DoReFaGradients(2), g, 5), 0.37, 2) > SIGMAS


def test_the_same_seed_gives_the_same_and_others_give_others():
    g = np.random.default_rng(0).normal(size=(4, 50)).astype("float32")
    operand = DoReFaGradients(2)
    seeds = [(3, 0), (3, 1), (4, 0), (4, 1)]
    drawn = [call(operand, g, np.array(seed, "int32")) for seed in seeds]
    assert np.array_equal(drawn[0], call(operand, g, 3))
    assert all(not np.array_equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_gradients_that_are_not_finite_stay_so():
    """The loss scaling of half precision finds them by it."""
    g = np.array([[1.0, math.inf], [math.nan, 2.0], [1.0, 2.0]], "float32")
    finite = np.isfinite(call(DoReFaGradients(4), g, 0))
    assert not finite[:2].any(axis=1).all()
    assert not finite[0, 1]
    assert not finite[1, 0]
    assert finite[2].all()


# Precision, files, and what is refused ---------------------------------------

OPERANDS = {
    "weights": DoReFaWeights(8),
    "activations": DoReFaActivations(8),
    "signed": DoReFaActivations(8, True, 6.0),
    "gradients": DoReFaGradients(8),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", OPERANDS)
def test_levels_stay_apart_in_every_dtype(name, dtype):
    if dtype == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has no float64 unless it is asked for")
    operand = OPERANDS[name]
    x = keras.ops.convert_to_tensor(np.linspace(-3, 8, 6000, dtype="float32")[None], dtype=dtype)
    values = operand(x)
    assert keras.backend.standardize_dtype(values.dtype) == dtype
    found = np.unique(keras.ops.convert_to_numpy(keras.ops.cast(values, "float32")))
    assert len(found) <= 256
    if dtype != "bfloat16" or name == "activations":
        # 8 bits of bfloat16 resolve 255 steps of [0, 1], but inputs are rounded to it before.
        assert len(found) >= 150


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    "operand",
    [
        DoReFaWeights(3, gradient_of_max=False),
        DoReFaActivations(2, True, 6.0),
        DoReFaGradients(6, seed=4),
        BinaryConnect(),
        Operands(DoReFaWeights(1), None, DoReFaGradients(4)),
        Operands(),
    ],
)
def test_operands_are_values_that_files_hold(operand):
    config = keras.saving.serialize_keras_object(operand)
    assert keras.saving.deserialize_keras_object(config) == operand
    assert hash(operand) == hash(dataclasses.replace(operand))


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("make", [DoReFaWeights, DoReFaActivations, DoReFaGradients])
@pytest.mark.parametrize("bits", [0, 9, 16, -1, 2.0, "2", None, True])
def test_bits_that_are_none(make, bits):
    with pytest.raises(ValueError, match=r"Expected `bits`.*1 to 8, or 32.*Received: bits="):
        make(bits)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DoReFaActivations(2, limit=0), "limit"),
        (lambda: DoReFaActivations(2, limit=math.inf), "limit"),
        (lambda: DoReFaGradients(2, seed=0.5), "seed"),
        (lambda: Operands(kernel=2), "kernel"),
        (lambda: Operands(inputs=DoReFaActivations), "inputs"),
        (lambda: Operands(gradients=DoReFaWeights(2)), "gradients"),
        (lambda: DoReFaWeights(32).codes(np.ones(3)), "at most 8 bits"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=f"Expected.*{words}.*Received"):
        make()
