"""Weights on a grid: the rounding, the optimizer, and the second paper's claims."""

import math

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st
from keras import layers, ops

from diagconv_tf.copying import copy_model
from diagconv_tf.lowbit import BinaryConnect, StochasticRounding
from diagconv_tf.lowbit.rounding import Grid

#: Standard errors that a mean may be off. More are seen once in 1.7 million tries.
SIGMAS = 5

GRIDS = {
    "tenths": Grid(0.1),
    "quarters with an offset": Grid(0.25, offset=0.1, limit=2.0),
    "signs": Grid(2.0, offset=1.0, limit=1.0),
    "signs from below": Grid(2.0, offset=-1.0, limit=1.0),
    "a limit between": Grid(0.5, limit=1.2),
}
#: Of one size: JAX compiles every operation for every shape.
VALUES = st.lists(st.floats(-3, 3, width=32), min_size=8, max_size=8)
EXAMPLES = hypothesis.settings(max_examples=20)


def to_numpy(tensor):
    return ops.convert_to_numpy(tensor)


def seed(number, step=0):
    return np.array([number, step], "int32")


def grid_numbers(grid):
    k = np.arange(-200, 201)
    numbers = grid.offset + grid.delta * k
    return numbers if grid.limit is None else numbers[np.abs(numbers) <= grid.limit + 1e-9]


# The rounding --------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
@EXAMPLES
@hypothesis.given(VALUES)
def test_nearest_is_the_nearest(name, values):
    grid = GRIDS[name]
    rounded = to_numpy(grid.nearest(np.array(values, "float32")))
    distances = np.abs(grid_numbers(grid)[:, None] - np.array(values))
    np.testing.assert_allclose(np.abs(rounded - values), distances.min(axis=0), atol=2e-6)
    assert np.all(np.abs(grid_numbers(grid)[:, None] - rounded).min(axis=0) < 2e-6)


@pytest.mark.parametrize("name", GRIDS)
@EXAMPLES
@hypothesis.given(VALUES, st.integers(0, 2**31 - 1))
def test_stochastic_gives_a_neighbour_and_keeps_the_grid(name, values, number):
    grid = GRIDS[name]
    values = np.array(values, "float32")
    rounded = to_numpy(grid.stochastic(values, seed(number)))
    numbers = grid_numbers(grid)
    assert np.all(np.abs(numbers[:, None] - rounded).min(axis=0) < 2e-6)
    clipped = np.clip(values, numbers.min(), numbers.max())
    assert np.all(np.abs(rounded - clipped) < grid.delta * (1 + 1e-5))
    for step in range(3):
        again = to_numpy(grid.stochastic(rounded, seed(number, step)))
        np.testing.assert_allclose(again, rounded, atol=2e-6)


def test_a_value_on_the_grid_never_moves():
    """However float32 rounds it: by chance some of these would move by a step."""
    values = np.tile((0.1 * np.arange(1000, 2000)).astype("float32"), 300)
    for step in range(3):
        rounded = to_numpy(Grid(0.1).stochastic(values, seed(1, step)))
        np.testing.assert_allclose(rounded, values, atol=1e-3)


def test_ties_go_away_from_zero_and_zero_is_positive():
    assert to_numpy(Grid(1.0).nearest(np.float32([0.5, -0.5, 1.5, 2.5, -2.5]))).tolist() == [
        1.0,
        -1.0,
        2.0,
        3.0,
        -3.0,
    ]
    for name in ("signs", "signs from below"):
        values = np.float32([0.0, 1e-6, -1e-6, 7.0, -7.0])
        assert to_numpy(GRIDS[name].nearest(values)).tolist() == [1, 1, -1, 1, -1]


def bias_in_sigmas(rounding, value, delta):
    count = 40_000
    mean = np.mean(to_numpy(rounding(np.full(count, value, "float32"))).astype("float64"))
    share = value / delta % 1
    return abs(mean - value) / (delta * math.sqrt(share * (1 - share) / count))


@pytest.mark.parametrize("value", [0.03, -0.71, 1.26])
def test_stochastic_rounding_has_no_bias(value):
    """With a confidence of 1 - 6e-7; a biased one is found out."""
    grid = Grid(0.1)
    assert bias_in_sigmas(lambda v: grid.stochastic(v, seed(1)), value, 0.1) < SIGMAS
    assert bias_in_sigmas(grid.nearest, value, 0.1) > SIGMAS
    shifted = bias_in_sigmas(lambda v: grid.stochastic(v + np.float32(0.002), seed(1)), value, 0.1)
    assert shifted > SIGMAS


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"delta": 0.0}, "delta"),
        ({"delta": "1"}, "delta"),
        ({"delta": 1.0, "limit": -1.0}, "limit"),
        ({"delta": 1.0, "offset": math.nan}, "offset"),
        ({"delta": 2.0, "offset": 1.0, "limit": 0.5}, "within the limit"),
        ({"delta": 1.0, "rounding": "up"}, "rounding"),
        ({"delta": 1.0, "select": "kernel"}, "select"),
        ({"delta": 1.0, "seed": 1.5}, "seed"),
        ({"delta": 1.0, "optimizer": StochasticRounding("sgd", delta=1.0)}, "round yet"),
        (
            {
                "delta": 1.0,
                "optimizer": keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
            },
            "loss scaling outside",
        ),
    ],
)
def test_refusals(arguments, words):
    arguments = {"optimizer": "sgd", **arguments}
    with pytest.raises(ValueError, match=f"(?s)Expected.*{words}.*Received"):
        StochasticRounding(**arguments)


# The optimizer --------------------------------------------------------------


def variables():
    rng = np.random.default_rng(0)
    kernel = keras.Variable(rng.normal(size=(5, 6)).astype("float32"), name="kernel")
    other = keras.Variable(rng.normal(size=(6,)).astype("float32"), name="bias")
    return kernel, other


def chosen(variable):
    return variable.name == "kernel"


def apply(optimizer, gradients, variables):
    """One update, on JAX as a compiled step makes it."""
    gradients = [ops.convert_to_tensor(g) for g in gradients]
    if keras.backend.backend() != "jax":
        optimizer.apply(gradients, variables)
        return
    states = [v.value for v in optimizer.variables], [v.value for v in variables]
    values, state = optimizer.stateless_apply(states[0], gradients, states[1])
    for variable, value in zip([*variables, *optimizer.variables], [*values, *state], strict=True):
        variable.assign(value)


def steps_of(values, delta=0.1):
    return np.asarray(values, "float64") / delta


def is_on_grid(variable, delta=0.1):
    steps = steps_of(to_numpy(variable), delta)
    return np.allclose(steps, np.round(steps), atol=1e-4)


SGD = keras.optimizers.SGD
#: name: (make the inner optimizer, whether Keras's loss scaling goes around it)
INNER = {
    "plain": (lambda: SGD(0.1), False),
    "adam": (lambda: keras.optimizers.Adam(0.1, weight_decay=0.01), False),
    "accumulation": (lambda: SGD(0.1, gradient_accumulation_steps=2), False),
    "averages": (
        lambda: SGD(0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2),
        False,
    ),
    "loss scaling": (lambda: SGD(0.1), True),
}


@pytest.mark.parametrize("name", INNER)
def test_selected_variables_are_on_the_grid_after_every_step(name):
    make, scaled = INNER[name]
    kernel, other = variables()
    optimizer = rounding = StochasticRounding(make(), delta=0.1, select=chosen, seed=1)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(rounding)
    optimizer.build([kernel, other])
    assert is_on_grid(kernel)
    rng = np.random.default_rng(1)
    before = []
    for step in range(4):
        before.append(to_numpy(kernel).copy())
        gradients = [
            optimizer.scale_loss(ops.convert_to_tensor(rng.normal(size=v.shape).astype("float32")))
            for v in (kernel, other)
        ]
        apply(optimizer, gradients, [kernel, other])
        assert is_on_grid(kernel)
        assert not is_on_grid(other)
        waits = name == "accumulation" and step % 2 == 0
        assert np.array_equal(to_numpy(kernel), before[-1]) == waits
    assert int(optimizer.iterations) == (2 if name == "accumulation" else 4)
    optimizer.finalize_variable_values([kernel, other])
    assert is_on_grid(kernel)


def test_the_inner_optimizers_own_loss_scale_is_taken_back():
    kernel, _ = variables()
    optimizer = StochasticRounding(
        SGD(1.0, loss_scale_factor=8.0), delta=0.1, rounding="nearest", select=chosen
    )
    optimizer.build([kernel])
    before = to_numpy(kernel).copy()
    optimizer.apply([optimizer.scale_loss(ops.ones((5, 6)))], [kernel])
    np.testing.assert_allclose(to_numpy(kernel), before - 1, atol=1e-5)


def step_probability(rounding="stochastic", learning_rate=0.1, count=20_000):
    """Moves up in one step from .5 towards .5 + .15, on a grid of halves."""
    kernel = keras.Variable(np.full((count, 1), 0.5, "float32"), name="kernel")
    optimizer = StochasticRounding(
        SGD(learning_rate), delta=0.5, rounding=rounding, select=chosen, seed=1
    )
    optimizer.apply([ops.full((count, 1), -1.5)], [kernel])
    moved = to_numpy(kernel) - 0.5
    assert set(np.round(moved.ravel(), 5)) <= {0.0, 0.5}
    return np.mean(moved > 0)


def test_the_probability_of_a_step_is_proportional_to_the_update():
    for rate in (0.1, 0.02):
        wanted = 1.5 * rate / 0.5
        error = math.sqrt(wanted * (1 - wanted) / 20_000)
        assert abs(step_probability(learning_rate=rate) - wanted) < SIGMAS * error
    # R stands still where SR explores.
    assert step_probability("nearest") == 0


class Probe(layers.Layer):
    """The sum of its weights times its inputs."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 1), initializer="zeros", name="kernel")

    def call(self, inputs):
        return ops.matmul(inputs, self.kernel)


def probe_model(count=2000):
    inputs = keras.Input((count,))
    model = keras.Model(inputs, Probe(name="probe")(inputs))
    optimizer = StochasticRounding(SGD(0.1), delta=0.5, select=chosen, seed=2)
    model.compile(optimizer, loss=mean_output)
    return model


@keras.saving.register_keras_serializable(package="test_lowbit_rounding")
def mean_output(targets, outputs):
    return ops.mean(outputs)


keras.saving.register_keras_serializable(package="test_lowbit_rounding")(chosen)
keras.saving.register_keras_serializable(package="test_lowbit_rounding")(Probe)


def train_step(model):
    count = model.input_shape[-1]
    before = to_numpy(model.get_layer("probe").kernel).copy()
    model.train_on_batch(np.full((1, count), -1.5, "float32"), np.zeros((1, 1), "float32"))
    return to_numpy(model.get_layer("probe").kernel) - before


def test_noise_is_new_in_each_compiled_step_and_goes_on_after_saving_and_copying(tmp_path):
    model = probe_model()
    moves = [train_step(model) for _ in range(3)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(moves) for b in moves[:i])
    again = probe_model()
    assert all(np.array_equal(train_step(again), move) for move in moves)

    model.save(tmp_path / "model.keras")
    loaded, copied = keras.models.load_model(tmp_path / "model.keras"), copy_model(model)
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    for _ in range(2):
        move = train_step(model)
        assert np.array_equal(train_step(loaded), move)
        assert np.array_equal(train_step(copied), move)


def any_set(variable):
    return np.any(to_numpy(variable))


@pytest.mark.backends("tensorflow")
def test_the_default_selects_kernels_between_the_first_and_the_last():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="first")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.SeparableConv2D(4, 3, name="separable")(x)
    x = layers.LSTM(3, name="cell")(layers.Reshape((16, 4))(x))
    x = layers.Dense(5, name="hidden")(x)
    model = keras.Model(inputs, layers.Dense(2, name="last")(x))
    optimizer = StochasticRounding(SGD(), delta=0.01)
    optimizer.build(model.trainable_variables)
    on_grid = {
        v.path for v in model.trainable_variables if is_on_grid(v, 0.01) and to_numpy(v).any()
    }
    assert on_grid - {"norm/gamma", "cell/lstm_cell/bias"} == {
        "separable/depthwise_kernel",
        "separable/pointwise_kernel",
        "hidden/kernel",
    }


@pytest.mark.backends("tensorflow")
def test_what_cannot_be_rounded_is_refused_before_anything_changes():
    kernel, other = variables()
    with pytest.raises(ValueError, match=r"Expected variables to round.*Received: none of 1"):
        StochasticRounding("sgd", delta=0.1).build([other])
    half = keras.Variable(np.full((3, 3), 1.0), dtype="float16", name="kernel")
    before = to_numpy(half).copy()
    optimizer = StochasticRounding("sgd", delta=0.001, select=chosen)
    with pytest.raises(ValueError, match=r"Expected a grid.*Received: float16 has 11"):
        optimizer.build([half])
    assert np.array_equal(to_numpy(half), before)
    StochasticRounding("sgd", delta=0.1, select=chosen).build([half])
    assert is_on_grid(half, float(np.float16(0.1))) or np.allclose(to_numpy(half), 1.0)


# The paper's claims -----------------------------------------------------------

#: A function with several minima on 21 points of a grid: f, and its derivative.
POINTS = np.arange(-10, 11) * 0.1
F = np.sin(6 * POINTS) * 0.5 + POINTS**2
SLOPE = 3 * np.cos(6 * POINTS) + 2 * POINTS


def exact_chain(rate, noise):
    """Transition probabilities of SR where gradients are slope ± noise, from the formula."""
    chain = np.zeros((21, 21))
    for i, sign in np.ndindex(21, 2):
        gradient = SLOPE[i] + (noise, -noise)[sign]
        steps = np.clip(POINTS[i] - rate * gradient, -1, 1) / 0.1 + 10
        lower = int(np.floor(steps + 1e-9))
        share = max(steps - lower, 0.0)
        chain[i, min(lower, 20)] += (1 - share) / 2
        chain[i, min(lower + 1, 20)] += share / 2
    return chain


def measured_chain(rate, noise, count=20_000):
    """The same, counted: `count` steps of the optimizer from each point."""
    start = np.repeat(POINTS, count).astype("float32")
    kernel = keras.Variable(start[:, None], name="kernel")
    optimizer = StochasticRounding(
        SGD(rate), delta=0.1, limit=1.0, select=chosen, seed=round(1 / rate)
    )
    signs = np.tile([1.0, -1.0], len(start) // 2)
    gradients = np.repeat(SLOPE, count) + noise * signs
    optimizer.apply([ops.convert_to_tensor(gradients[:, None].astype("float32"))], [kernel])
    ends = np.round(to_numpy(kernel).reshape(21, count) / 0.1).astype(int) + 10
    return np.stack([np.bincount(row, minlength=21) / count for row in ends])


def stationary(chain):
    values, vectors = np.linalg.eig(chain.T)
    law = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    return law / law.sum()


def test_what_sr_converges_to_does_not_depend_on_the_step_size():
    """Section 5 of the paper: α|g| is at most a step of the grid in all three."""
    expected = []
    for rate in (0.009, 0.003, 0.001):
        chain, exact = measured_chain(rate, noise=5.5), exact_chain(rate, noise=5.5)
        errors = np.sqrt(exact * (1 - exact) / 20_000)
        assert np.all(np.abs(chain - exact) <= SIGMAS * errors + 1e-6)
        expected.append(stationary(chain) @ F)
    limit = stationary(exact_chain(1e-4, noise=5.5)) @ F
    # Standard errors of .004, .006 and .015, by simulation.
    assert np.all(np.abs(np.array(expected) - limit) < SIGMAS * np.array([0.004, 0.006, 0.015]))
    # The noise of the gradients, and so the size of a batch, does matter.
    more = stationary(measured_chain(0.005, noise=12.0)) @ F
    assert more > limit + 0.2


def two_minima_by_sr(rate, steps, count=2000):
    """The share of weights at +1, the deeper of two minima at ±1, after many noisy steps."""
    rng = np.random.default_rng(0)
    kernel = keras.Variable(rng.choice([-1.0, 1.0], (count, 1)).astype("float32"), name="kernel")
    optimizer = StochasticRounding(
        SGD(rate), delta=2.0, offset=1.0, limit=1.0, select=chosen, seed=3
    )
    for _ in range(steps):
        gradient = noisy_slope(to_numpy(kernel), rng)
        optimizer.apply([ops.convert_to_tensor(gradient)], [kernel])
    return np.mean(to_numpy(kernel) > 0)


def two_minima_by_bc(rate, steps, count=4000):
    rng = np.random.default_rng(0)
    weights = rng.choice([-1.0, 1.0], count).astype("float32")
    for _ in range(steps):
        signs = to_numpy(BinaryConnect()(weights))
        weights = np.clip(weights - rate * noisy_slope(signs, rng), -1, 1).astype("float32")
    return np.mean(weights > 0)


def noisy_slope(signs, rng):
    slope = np.where(signs > 0, -1.0, 0.6)
    return (slope + 2 * rng.choice([-1.0, 1.0], size=signs.shape)).astype("float32")


@pytest.mark.backends("torch")  # Its single operations are the fastest.
def test_bc_sharpens_with_smaller_steps_and_sr_does_not():
    """SR leaves either minimum at a rate proportional to α, BC at one exponential in 1/α."""
    sr = [two_minima_by_sr(rate, steps) for rate, steps in ((0.4, 40), (0.1, 160))]
    # It leaves where the noise beats the slope: 2 against 1, and against .6.
    wanted = (2 - 0.6) / ((2 - 0.6) + (2 - 1.0))
    assert all(abs(share - wanted) < SIGMAS * 0.5 / math.sqrt(2000) for share in sr)
    bc = [two_minima_by_bc(rate, steps) for rate, steps in ((0.8, 100), (0.2, 600))]
    assert bc[1] > bc[0] + SIGMAS * 0.5 * math.sqrt(2 / 4000)
