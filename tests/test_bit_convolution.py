"""Products by AND and population count equal integer arithmetic, exactly."""

import functools
import itertools

import keras
import numpy as np
import pytest
from keras import ops

from diagconv_tf import deploy, rewrite
from diagconv_tf.lowbit import LowBit, StochasticRounding, bit_convolution
from diagconv_tf.lowbit.bit_convolution import CodeGrid, PackedKernel, convolve, dense


def draw(rng, grid, shape):
    """Random codes, with both ends, and their integers."""
    codes = rng.integers(0, 2**grid.bits, shape)
    codes.flat[: min(2, codes.size)] = [0, 2**grid.bits - 1][: codes.size]
    return codes, codes * grid.step + grid.offset


def windows_of(image, size, strides, dilation):
    """NumPy's, as `(batch, rows, columns, height, width, channels)`."""
    extent = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    found = np.lib.stride_tricks.sliding_window_view(image, extent, axis=(1, 2))
    found = found[:, :: strides[0], :: strides[1], :, :: dilation[0], :: dilation[1]]
    return found.transpose(0, 1, 2, 4, 5, 3)


def check_dot_products(length, inputs, weights):
    rng = np.random.default_rng(length)
    codes, integers = draw(rng, inputs, (3, length))
    _, kernel = draw(rng, weights, (length, 2))
    found = dense(ops.convert_to_tensor(codes, "int32"), inputs, PackedKernel.of(kernel, weights))
    assert np.array_equal(ops.convert_to_numpy(found), integers @ kernel), (inputs, weights)


@pytest.mark.slow
def test_dot_products_of_all_bits_equal_those_of_integers():
    for m, k in itertools.product(range(1, 9), range(1, 9)):
        # Each parity meets each, in turn.
        check_dot_products(33, CodeGrid(m, (m + k // 2) % 2 == 1), CodeGrid(k, k % 2 == 1))


# In a word, words that are full, and more than a turn of the loop takes.
@pytest.mark.parametrize("length", [1, 2, 31, 32, 64, 130])
def test_dot_products_of_any_length_equal_those_of_integers(length):
    for inputs, weights in (
        (CodeGrid(2), CodeGrid(1, True)),
        (CodeGrid(8, True), CodeGrid(4, True)),
    ):
        check_dot_products(length, inputs, weights)


CONVOLUTIONS = {
    "same": dict(size=(3, 3), padding=((1, 1), (1, 1))),
    "valid": dict(size=(3, 2)),
    "strides": dict(size=(3, 3), strides=(2, 3), padding=((0, 1), (1, 1))),
    "dilation": dict(size=(2, 3), dilation=(2, 1), padding=((1, 1), (1, 1))),
    "pointwise": dict(size=(1, 1)),
    "several turns": dict(size=(3, 3), channels=70, padding=((1, 1), (1, 1))),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("compiled", [False, True])
def test_convolutions_equal_those_of_integers(name, compiled):
    case = {
        "strides": (1, 1),
        "dilation": (1, 1),
        "padding": ((0, 0), (0, 0)),
        "channels": 5,
        **CONVOLUTIONS[name],
    }
    rng = np.random.default_rng(0)
    grids = (CodeGrid(1), CodeGrid(2, True))
    # Both have an offset there: all terms are compiled.
    pairs = (
        [(CodeGrid(2, True), CodeGrid(1, True))] if compiled else itertools.product(grids, grids)
    )
    for inputs, weights in pairs:
        codes, integers = draw(rng, inputs, (2, 6, 5, case["channels"]))
        _, kernel = draw(rng, weights, (*case["size"], case["channels"], 4))
        run = functools.partial(
            convolve,
            grid=inputs,
            kernel=PackedKernel.of(kernel, weights),
            strides=case["strides"],
            dilation_rate=case["dilation"],
            padding=case["padding"],
        )
        found = jit(run, compiled)(ops.convert_to_tensor(codes, "int32"))
        padded = np.pad(integers, ((0, 0), *case["padding"], (0, 0)))
        windows = windows_of(padded, case["size"], case["strides"], case["dilation"])
        expected = np.einsum("bhwuvc,uvcn->bhwn", windows, kernel)
        assert np.array_equal(ops.convert_to_numpy(found), expected), (inputs, weights)


def jit(function, compiled):
    """Under XLA where it is asked for and the backend has it."""
    if compiled and keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    if compiled and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # A function of its own: of keyword arguments TensorFlow wants a type.
        return tf.function(lambda codes: function(codes), jit_compile=True)
    return function


def test_all_words_are_counted():
    words = np.array([0, 1, -1, -(2**31), 2**31 - 1, 0x55555555, 0x0F0F0F0F], "int32")
    words = np.concatenate([words, np.random.default_rng(0).integers(-(2**31), 2**31, 1000)])
    counted = bit_convolution._population_count(ops.convert_to_tensor(words.astype("int32")))
    expected = [int(word & 0xFFFFFFFF).bit_count() for word in words.tolist()]
    assert ops.convert_to_numpy(counted).tolist() == expected


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("integers", [[[3]], [[2]], [[-2]], [[0]]])
def test_integers_off_the_grid_are_refused(integers):
    with pytest.raises(ValueError, match=r"Expected integers of CodeGrid\(bits=1, is_odd=True\)"):
        PackedKernel.of(np.array(integers), CodeGrid(1, True))


@pytest.mark.backends("tensorflow")
def test_sums_that_overflow_are_refused():
    kernel = PackedKernel.of(np.zeros((33_100, 1), "int64"), CodeGrid(8))
    with pytest.raises(ValueError, match=r"Expected sums below 2\*\*31. Received: 33100 products"):
        dense(ops.zeros((1, 33_100), "int32"), CodeGrid(8), kernel)
    with pytest.raises(ValueError, match="Expected `bits` to be from 1 to 8. Received: 9"):
        CodeGrid(9)


# Layers ------------------------------------------------------------------


def low_bit_network():
    inputs = keras.Input((9, 8, 2))
    x = keras.layers.Conv2D(6, 3, name="first")(inputs)
    x = keras.layers.Conv2D(5, 3, padding="same", strides=2, activation="relu", name="signed")(x)
    x = keras.layers.Conv2D(4, 2, dilation_rate=2, use_bias=False, name="unsigned")(x)
    x = keras.layers.ReLU()(x)
    x = keras.layers.DepthwiseConv2D(1, name="depthwise")(x)
    x = keras.layers.Dense(7, activation="relu", name="dense")(keras.layers.Flatten()(x))
    model = keras.Model(inputs, keras.layers.Dense(3, name="last")(x))
    for variable in model.trainable_variables:
        if variable.path.endswith("bias"):
            variable.assign(np.linspace(-1, 1, variable.shape[0]))
    return model


IMAGES = np.random.default_rng(0).normal(size=(3, 9, 8, 2)).astype("float32")


@pytest.mark.parametrize("bits", [(1, 2), (3, 4)])
def test_layers_of_bits_compute_what_the_low_bit_layers_do(bits, tmp_path, caplog):
    model = rewrite(low_bit_network(), LowBit(weights=bits[0], activations=bits[1]))
    with caplog.at_level("INFO"):
        deployed = deploy(model, kernels="bits")
    expected = ops.convert_to_numpy(model(IMAGES))
    np.testing.assert_allclose(ops.convert_to_numpy(deployed(IMAGES)), expected, atol=2e-5)
    classes = {layer.name: type(layer).__name__ for layer in deployed.layers}
    assert classes["signed"] == classes["unsigned"] == "BitConv2D"
    assert classes["dense"] == "BitDense"
    assert classes["first"] == "Conv2D"
    assert "3 of 4 low-bit layers multiply bits. depthwise: " in caplog.text
    deployed.save(tmp_path / "bits.keras")
    loaded = keras.saving.load_model(tmp_path / "bits.keras")
    assert np.array_equal(
        ops.convert_to_numpy(loaded(IMAGES)), ops.convert_to_numpy(deployed(IMAGES))
    )


@pytest.mark.backends("torch")
def test_the_kernel_is_kept_as_bits():
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32, use_bias=False)])
    rewrite(model, LowBit(2, 2, skip=()), in_place=True)
    # Compiled as for training: of what is deployed, no variable can be trained.
    model.compile(StochasticRounding("sgd", delta=2.0, select=lambda v: v.trainable), "mse")
    (dense,) = deploy(model, kernels="bits").layers
    assert dense.words.shape == (64 // 32, 2, 32)


@pytest.mark.backends("torch")
def test_models_without_a_layer_for_bits_are_refused():
    model = rewrite(low_bit_network(), LowBit(weights=2))
    with pytest.raises(ValueError, match="signed: its inputs are not quantized"):
        deploy(model, kernels="bits")
    with pytest.raises(ValueError, match='`kernels` to be "float", "int8" or "bits". Received: 2'):
        deploy(model, kernels=2)

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, inputs):
            return self.dense(inputs)

    own = Own()
    own(np.ones((1, 3), "float32"))
    rewrite(own, LowBit(2, 2, skip=()), in_place=True)
    with pytest.raises(ValueError, match="Expected a functional or sequential model"):
        deploy(own, kernels="bits")
