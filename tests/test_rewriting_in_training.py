"""Training goes on as if nothing had happened, on the embedded digits."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, optimizers
from sklearn import datasets

from diagconv_tf import restore, rewrite
from tests.numerics import BACKEND, THOROUGH

OPTIMIZERS = {
    "Adam": functools.partial(optimizers.Adam, 3e-3),
    "SGD": functools.partial(optimizers.SGD, 0.05, momentum=0.9),
    "RMSprop": functools.partial(optimizers.RMSprop, 1e-3),
    "Lion": functools.partial(optimizers.Lion, 3e-3),
}
WITH = {
    "alone": lambda make: make(),
    "loss scale": lambda make: optimizers.LossScaleOptimizer(make(), dynamic_growth_steps=20),
    "EMA": lambda make: make(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=15),
    "accumulation": lambda make: make(gradient_accumulation_steps=4),
}

# TensorFlow keeps optimizers' state under keys of its own; the others do it as PyTorch does.
eager_backends = pytest.mark.backends("tensorflow", "torch")

#: Steps with the stock model, after rewriting in place, and after restoring a copy.
STOCK_STEPS, REWRITTEN_STEPS, RESTORED_STEPS = 20, 17, 13


def _network():
    inputs = keras.Input((4, 4, 4))
    x = layers.DepthwiseConv2D(3, padding="same", name="dw")(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.SeparableConv2D(8, 3, strides=2, padding="same")(x)
    x = layers.Dropout(0.1, seed=3)(x)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def _batches(count, batch_size=16):
    digits = datasets.load_digits()
    # Squares of four pixels are the channels: depthwise layers need some.
    images = digits.images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 4, 4)
    images = images / 16.0
    order = np.random.default_rng(0).permutation(len(images))[: count * batch_size]
    for rows in order.reshape(count, batch_size):
        yield images[rows], digits.target[rows]


def _compiled(policy, make_optimizer):
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    model = _network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(make_optimizer(), loss, auto_scale_loss=False)
    return model


def _losses(model, batches):
    return [float(model.train_on_batch(x, y)) for x, y in batches]


def _values(model):
    variables = (*model.variables, *model.optimizer.variables)
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def _curves(policy, make_optimizer, lowering):
    """Loss curves of the stock model, and of one that is rewritten and restored.

    Both are one model until it is rewritten: compiling is most of the time.
    """
    batches = list(_batches(STOCK_STEPS + REWRITTEN_STEPS + RESTORED_STEPS))
    model = _compiled(policy, make_optimizer)
    # `train_on_batch` reports the mean since the last reset: so each step's own.
    common = _losses(model, batches[:STOCK_STEPS])
    middle = _values(model)
    expected = common + _losses(model, batches[STOCK_STEPS:])
    for variable, value in zip((*model.variables, *model.optimizer.variables), middle, strict=True):
        variable.assign(value)
    rewrite(model, lowering, in_place=True)
    losses = common + _losses(model, batches[STOCK_STEPS:][:REWRITTEN_STEPS])
    restored = restore(model)
    losses += _losses(restored, batches[STOCK_STEPS + REWRITTEN_STEPS :])
    return np.array(expected), np.array(losses)


@pytest.fixture
def float64():
    """Rounding is amplified by training; in float64 it stays below the law's tolerance."""
    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx("float64")
    if BACKEND == "jax":
        import jax

        before = jax.config.jax_enable_x64
        jax.config.update("jax_enable_x64", True)
    yield
    if BACKEND == "jax":
        jax.config.update("jax_enable_x64", before)
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


#: Each optimizer and each addition; all pairs are trained where that is asked for.
PAIRS = [
    (optimizer, extra)
    for number, optimizer in enumerate(OPTIMIZERS)
    for position, extra in enumerate(WITH)
    if THOROUGH or position == number
]


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
@pytest.mark.parametrize(("optimizer", "extra"), PAIRS)
def test_training_goes_on_as_if_nothing_had_happened(optimizer, extra, float64):
    make = functools.partial(WITH[extra], OPTIMIZERS[optimizer])
    expected, losses = _curves("float64", make, "diagonal:3")
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    # It did train, and every step counted.
    assert len(set(expected)) == len(expected)
    assert np.mean(expected[-10:]) < np.mean(expected[:10])


def _apply(model, steps):
    """Updates of the optimizer by gradients that are functions of the step."""
    for step in steps:
        rng = np.random.default_rng(step)
        gradients = [rng.normal(size=v.shape).astype("float32") for v in model.trainable_variables]
        gradients = [keras.ops.convert_to_tensor(gradient) for gradient in gradients]
        model.optimizer.apply(gradients, model.trainable_variables)


def _state(model):
    variables = (*model.variables, *model.optimizer.variables)
    return {v.path: np.array(keras.ops.convert_to_numpy(v)) for v in variables}


@eager_backends
@pytest.mark.parametrize("extra", WITH)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_goes_on_from_its_own_state(optimizer, extra):
    """All pairs, without the model's passes: rewritten in place, then restored in a copy."""

    def compiled():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4, 4, 2)), layers.DepthwiseConv2D(3)])
        model.compile(WITH[extra](OPTIMIZERS[optimizer]), "mse", auto_scale_loss=False)
        return model

    stock, model = compiled(), compiled()
    # Within an accumulation of four gradients.
    _apply(stock, range(9))
    _apply(model, range(3))
    rewrite(model, "diagonal:2", in_place=True)
    _apply(model, range(3, 6))
    model = restore(model)
    _apply(model, range(6, 9))
    expected, found = _state(stock), _state(model)
    assert len(expected) > len(stock.variables)
    assert len(found) == len(expected)
    for (path, value), other in zip(expected.items(), found.values(), strict=True):
        np.testing.assert_array_equal(other, value, err_msg=path)


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
@pytest.mark.parametrize(
    "policy",
    ["mixed_float16", "mixed_bfloat16"]
    if BACKEND == "tensorflow" or THOROUGH
    else ["mixed_float16"],
)
def test_training_in_mixed_precision_goes_on(policy, float64):
    keras.config.set_floatx("float32")
    make = functools.partial(WITH["loss scale"], OPTIMIZERS["SGD"])
    expected, losses = _curves(policy, make, "shifted")
    # Products of two numbers with 11 or 8 bits, and 30 steps to grow in.
    tolerance = {"mixed_float16": 2e-2, "mixed_bfloat16": 1e-1}[policy]
    np.testing.assert_allclose(losses, expected, rtol=tolerance)
