"""Backward passes of few elements, against NumPy; which layers of a model get them."""

import dataclasses
import inspect

import keras
import numpy as np
import pytest
from keras import layers, ops

from diagconv_tf import LowBit, inspect_model, preview, restore, rewrite
from diagconv_tf.copying import copy_model
from diagconv_tf.lowbit import (
    DoReFaActivations,
    DoReFaGradients,
    DoReFaWeights,
    LowBitConv2D,
    LowBitDense,
    Operands,
)
from diagconv_tf.lowbit.layers import noise_of
from diagconv_tf.lowbit.units import EinsumAxes
from diagconv_tf.minimal_effort import (
    MinimalEffort,
    MinimalEffortEinsumDense,
    MinimalEffortGRU,
    MinimalEffortLSTM,
    RandomK,
    TopK,
)
from diagconv_tf.minimal_effort.operands import chosen
from diagconv_tf.model_tree import walk_layers
from tests import model_zoo, reference
from tests.numerics import BACKEND, MODES, vector_jacobian

K = 3

#: How layers train where nothing else is asked for.
TRAINING_MODE = "graph" if BACKEND == "tensorflow" else MODES[-1]


def to_numpy(tensor):
    return ops.convert_to_numpy(tensor)


# The choice, in NumPy ---------------------------------------------------------


def kept(gradient, k, unified):
    """`gradient`, a matrix in float64, with zeros where it is not kept."""
    rows = np.abs(gradient).sum(0, keepdims=True) if unified else np.abs(gradient)
    mask = np.zeros(rows.shape, bool)
    for row, of in zip(mask, rows, strict=True):
        row[np.argsort(-of, kind="stable")[:k]] = True
    return np.where(mask, gradient, 0)


#: name: (rows, k, what is chosen)
CHOICES = {
    "by magnitude": ([[1, -5, 3, 2]], 2, [[0, 1, 1, 0]]),
    "ties": ([[2, -3, 3, 3, 1]], 2, [[0, 1, 1, 0, 0]]),
    "all equal": ([[1, 1, -1, 1]], 3, [[1, 1, 1, 0]]),
    "fewer than k are not zero": ([[0, 0, 7, 0]], 2, [[1, 0, 1, 0]]),
    "zeros": ([[0, 0, 0]], 1, [[1, 0, 0]]),
    "NaN is largest": ([[1, np.nan, np.inf, 5]], 1, [[0, 1, 0, 0]]),
    "infinities": ([[1, -np.inf, np.inf, 5]], 2, [[0, 1, 1, 0]]),
    "rows of their own": ([[1, 2], [2, 1]], 1, [[0, 1], [1, 0]]),
    "all": ([[1, 2]], 5, [[1, 1]]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_exactly_the_k_largest_are_chosen(name):
    rows, k, wanted = CHOICES[name]
    found = to_numpy(chosen(np.array(rows, "float32"), k))
    assert np.array_equal(found, np.array(wanted, bool))


@pytest.mark.parametrize("mode", MODES[1:] or MODES)
def test_many_ties_are_chosen_as_a_stable_sort_does(mode):
    """A few different numbers, in rows long enough for any method of sorting."""
    gradient = np.random.default_rng(0).integers(-3, 4, (5, 700)).astype("float32")

    for unified in (False, True):
        operand = TopK(100, unified=unified)
        value = vector_jacobian(operand, [gradient], gradient, mode)[0]
        assert np.array_equal(value, kept(gradient, 100, unified))
        if unified:
            columns = np.sort(to_numpy(operand.columns(gradient)))
            assert np.array_equal(columns, np.flatnonzero(kept(gradient, 100, True).any(0)))


def test_groups_choose_each_for_itself():
    gradient = np.random.default_rng(0).normal(size=(4, 2, 5)).astype("float32")
    for unified in (False, True):
        value = to_numpy(TopK(2, unified=unified)(gradient))
        for group in range(2):
            assert np.array_equal(value[:, group], kept(gradient[:, group], 2, unified))
    assert to_numpy(TopK(2, unified=True).columns(gradient)).shape == (2, 2)


def test_random_elements_are_exactly_k_new_with_each_seed_and_evenly_spread():
    gradient = np.ones((400, 16), "float32")
    value = to_numpy(RandomK(4)(gradient, 3))
    assert np.array_equal(value.sum(1), np.full(400, 4.0))
    assert not np.array_equal(value, to_numpy(RandomK(4)(gradient, 4)))
    # Binomial: 100 of 400, with a standard deviation of 8.7.
    assert np.all(np.abs(value.sum(0) - 100) < 5 * 8.7)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "one of `k` and `ratio`.*k=None, ratio=None"),
        ({"k": 2, "ratio": 0.5}, "one of `k` and `ratio`.*k=2, ratio=0.5"),
        ({"k": 0}, "`k`.*at least 1.*k=0"),
        ({"k": 2.0}, "`k`.*integer.*k=2.0"),
        ({"k": True}, "`k`.*integer.*k=True"),
        ({"ratio": 0}, "`ratio`.*above 0.*ratio=0"),
        ({"ratio": 1.01}, "`ratio`.*up to 1.*ratio=1.01"),
        ({"ratio": "all"}, "`ratio`.*number.*ratio='all'"),
    ],
)
def test_numbers_of_elements_that_cannot_be(arguments, words):
    for make in (TopK, RandomK, MinimalEffort):
        with pytest.raises(ValueError, match=f"^Expected {words}"):
            make(**arguments)


@pytest.mark.backends("tensorflow")
def test_a_ratio_is_rounded_to_units_and_never_to_none():
    found = {(ratio, n): TopK(ratio=ratio).keeps(n) for ratio in (0.01, 0.5, 1.0) for n in (3, 64)}
    assert found == {(0.01, 3): 1, (0.01, 64): 1, (0.5, 3): 2, (0.5, 64): 32, (1.0, 3): 3} | {
        (1.0, 64): 64
    }
    assert TopK(7).keeps(5) == 5


# Layers, against NumPy --------------------------------------------------------


def layer_vjp(layer, inputs, upstream, mode=None):
    """Outputs and the gradients by inputs and variables, while training."""
    variables = layer.trainable_variables
    others = [v.value for v in layer.non_trainable_variables]

    # Not every layer has the argument.
    training = {"training": True} if "training" in inspect.signature(layer.call).parameters else {}

    def call(inputs, *values):
        return layer.stateless_call(values, others, inputs, **training)[0]

    values = [inputs, *map(to_numpy, variables)]
    return vector_jacobian(call, values, upstream, mode or TRAINING_MODE)


def built(make, shape, **arguments):
    """A layer with the same weights each time, inputs, and an output gradient."""
    layer = make(**arguments)
    layer.build(shape)
    rng = np.random.default_rng(0)
    layer.set_weights([rng.normal(size=w.shape) for w in layer.get_weights()])
    outputs = layer.compute_output_shape(shape)
    return layer, *(rng.normal(size=size).astype("float32") for size in (shape, outputs))


def _dense(x, w, b, g, keep):
    rows, flat = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    few = keep(rows)
    return [(few @ w.T).reshape(x.shape), flat.T @ few, rows.sum(0)]


def _einsum_heads(x, w, b, g, keep):
    """abc,cde->abde: units are d and e."""
    matrix = w.reshape(w.shape[0], -1)
    dx, dw, db = _dense(x, matrix, b, g.reshape(*x.shape[:2], -1), keep)
    return [dx, dw.reshape(w.shape), db.reshape(b.shape)]


def _einsum_middle(x, w, b, g, keep):
    """abc,db->adc: units are d, and rows a and c."""
    moved, few = np.moveaxis(x, 1, -1), np.moveaxis(g, 1, -1)
    dx, dw, db = _dense(moved, w.T, None, few, keep)
    return [np.moveaxis(dx, -1, 1), dw.T, db[:, None]]


def _convolution(first, **window):
    def backward(x, w, b, g, keep):
        x, g = ((np.moveaxis(a, 1, -1) if first else a) for a in (x, g))
        few = keep(g.reshape(-1, g.shape[-1])).reshape(g.shape)
        _, dx, dk, _ = reference.conv(x, w, few, **window)
        return [np.moveaxis(dx, -1, 1) if first else dx, dk, g.sum((0, 1, 2))]

    return backward


_WINDOW = {"strides": (2, 2), "dilation_rate": (1, 1), "padding": "same"}
_STRIDED = {"filters": 7, "kernel_size": 3, "strides": 2, "padding": "same"}

#: name: (make a layer, given its operands; shape of its inputs; gradients by NumPy)
LAYERS = {
    "dense": (lambda **a: LowBitDense(9, **a), (5, 7), _dense),
    "dense of sequences": (lambda **a: LowBitDense(9, **a), (2, 3, 7), _dense),
    "einsum of heads": (
        lambda **a: MinimalEffortEinsumDense("abc,cde->abde", (4, 2, 4), bias_axes="de", **a),
        (3, 4, 5),
        _einsum_heads,
    ),
    "einsum with units in the middle": (
        lambda **a: MinimalEffortEinsumDense("abc,db->adc", (8, 4), bias_axes="d", **a),
        (3, 5, 4),
        _einsum_middle,
    ),
    "convolution": (
        lambda **a: LowBitConv2D(**_STRIDED, **a),
        (2, 6, 5, 3),
        _convolution(False, groups=1, **_WINDOW),
    ),
    "convolution, channels first": (
        lambda **a: LowBitConv2D(**_STRIDED, data_format="channels_first", **a),
        (2, 3, 6, 5),
        _convolution(True, groups=1, **_WINDOW),
    ),
}
FORMS = {"per example": False, "unified": True}


def expected(backward, layer, inputs, upstream, k, unified):
    arrays = [np.asarray(a, "float64") for a in (inputs, *layer.get_weights(), upstream)]
    return backward(*arrays, lambda rows: kept(rows, k, unified))


def assert_close(values, wanted):
    for value, want in zip(values, wanted, strict=True):
        np.testing.assert_allclose(value, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_kept_elements(name, form):
    """Also the bias: its gradient is whole. The outputs are the stock layer's."""
    make, shape, backward = LAYERS[name]
    if BACKEND == "tensorflow" and name == "convolution, channels first":
        pytest.skip("TensorFlow's own convolutions are channels last on CPUs")
    operands = Operands(gradients=TopK(K, unified=FORMS[form]))
    layer, inputs, upstream = built(make, shape, operands=operands)
    values = layer_vjp(layer, inputs, upstream)
    assert_close(values[1:], expected(backward, layer, inputs, upstream, K, FORMS[form]))
    whole = layer_vjp(built(make, shape)[0], inputs, upstream)
    np.testing.assert_allclose(values[0], whole[0], rtol=1e-6, atol=1e-6)
    assert not np.allclose(values[1], whole[1], atol=0.1)


@pytest.mark.backends("tensorflow")  # The others have one way to train.
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != TRAINING_MODE])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["dense", "convolution", "lstm"])
def test_every_way_to_compile_gives_them(name, form, mode):
    make, shape, backward = LAYERS.get(name) or (RECURRENT[name][0], SEQUENCES, RECURRENT[name][1])
    operands = Operands(gradients=TopK(K, unified=FORMS[form]))
    layer, inputs, upstream = built(make, shape, operands=operands)
    values = layer_vjp(layer, inputs, upstream, mode)
    assert_close(values[1:], expected(backward, layer, inputs, upstream, K, FORMS[form]))


@pytest.mark.backends("tensorflow", "torch")  # JAX compiles each of them.
@pytest.mark.parametrize("form", FORMS)
def test_a_lowering_keeps_the_same_elements(form):
    """A grouped convolution has no product of few columns; its numbers are the same."""
    operands = Operands(gradients=TopK(K, unified=FORMS[form]))
    backward = _convolution(False, groups=3, strides=(1, 1), dilation_rate=(1, 1), padding="same")
    for lowering in ("stock", "shifted"):
        layer, inputs, upstream = built(
            lambda **a: LowBitConv2D(6, 3, groups=3, padding="same", **a),
            (2, 5, 4, 6),
            operands=operands,
            lowering=lowering,
        )
        values = layer_vjp(layer, inputs, upstream)
        assert_close(values[1:], expected(backward, layer, inputs, upstream, K, FORMS[form]))


def test_quantized_operands_are_those_that_are_multiplied():
    quantizers = Operands(DoReFaWeights(2), DoReFaActivations(3, True, 2.0))
    operands = dataclasses.replace(quantizers, gradients=TopK(K, unified=True))
    make, shape, _ = LAYERS["dense"]
    layer, inputs, upstream = built(make, shape, operands=operands)
    plain = built(make, shape, operands=quantizers)[0]
    few = kept(upstream.astype("float64"), K, True).astype("float32")
    values, wanted = layer_vjp(layer, inputs, upstream), layer_vjp(plain, inputs, few)
    assert_close(values[:3], wanted[:3])
    np.testing.assert_allclose(values[3], upstream.sum(0), rtol=1e-5)


# Recurrent layers, by a loop in NumPy -----------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_gate(keep, gradient, units):
    """Of each gate the kept elements."""
    parts = np.split(gradient, gradient.shape[-1] // units, axis=-1)
    return np.concatenate([keep(part) for part in parts], axis=-1)


def lstm_gradients(x, w, r, b, g, keep):
    """By inputs, kernels and bias, for the gradient of the last state (Keras's gate order)."""
    units, tape = r.shape[0], []
    h = c = np.zeros((len(x), units))
    for t in range(x.shape[1]):
        i, f, n, o = np.split(x[:, t] @ w + h @ r + b, 4, axis=-1)
        i, f, n, o = sigmoid(i), sigmoid(f), np.tanh(n), sigmoid(o)
        after = f * c + i * n
        tape.append((h, c, i, f, n, o, after))
        h, c = o * np.tanh(after), after
    dx, dw, dr, db = (np.zeros_like(a) for a in (x, w, r, b))
    dh, dc = g, np.zeros_like(g)
    for t in reversed(range(x.shape[1])):
        h, c, i, f, n, o, after = tape[t]
        dc = dc + dh * o * (1 - np.tanh(after) ** 2)
        parts = (dc * n * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - n**2))
        dz = np.concatenate([*parts, dh * np.tanh(after) * o * (1 - o)], axis=-1)
        few = by_gate(keep, dz, units)
        dx[:, t], dh = few @ w.T, few @ r.T
        dw, dr, db = dw + x[:, t].T @ few, dr + h.T @ few, db + dz.sum(0)
        dc = dc * f
    return [dx, dw, dr, db]


def gru_gradients(x, w, r, b, g, keep):
    """The same of a GRU; `b` of two rows means that the reset gate comes after the product."""
    units, after, tape = r.shape[0], b.ndim == 2, []
    ours, recurrent = b if after else (b, np.zeros_like(b))
    h = np.zeros((len(x), units))
    for t in range(x.shape[1]):
        a = x[:, t] @ w + ours
        s = h @ r[:, : 2 * units] + recurrent[: 2 * units]
        z, q = np.split(sigmoid(a[:, : 2 * units] + s), 2, axis=-1)
        m = h @ r[:, 2 * units :] + recurrent[2 * units :]
        inner = q * m if after else (q * h) @ r[:, 2 * units :]
        n = np.tanh(a[:, 2 * units :] + inner)
        tape.append((h, z, q, m, n))
        h = z * h + (1 - z) * n
    dx, dw, dr = (np.zeros_like(v) for v in (x, w, r))
    db, dh = np.zeros((2, 3 * units)), g
    for t in reversed(range(x.shape[1])):
        h, z, q, m, n = tape[t]
        dn = dh * (1 - z) * (1 - n**2)
        dz = dh * (h - n) * z * (1 - z)
        before = dh * z
        if after:
            dq = dn * m * q * (1 - q)
            of_state = np.concatenate([dz, dq, dn * q], axis=-1)
            few = by_gate(keep, of_state, units)
            before, dr = before + few @ r.T, dr + h.T @ few
        else:
            few = keep(dn)
            d_reset = few @ r[:, 2 * units :].T
            dr[:, 2 * units :] += (q * h).T @ few
            dq = d_reset * h * q * (1 - q)
            of_state = np.concatenate([dz, dq], axis=-1)
            few = by_gate(keep, of_state, units)
            before = before + d_reset * q + few @ r[:, : 2 * units].T
            dr[:, : 2 * units] += h.T @ few
        of_inputs = np.concatenate([dz, dq, dn], axis=-1)
        few = by_gate(keep, of_inputs, units)
        dx[:, t], dw = few @ w.T, dw + x[:, t].T @ few
        db[0] += of_inputs.sum(0)
        db[1, : of_state.shape[1]] += of_state.sum(0)
        dh = before
    return [dx, dw, dr, db if after else db[0]]


#: name: (make a layer, given its operands; gradients by NumPy)
RECURRENT = {
    "lstm": (lambda **a: MinimalEffortLSTM(6, **a), lstm_gradients),
    "lstm, gate by gate": (
        lambda **a: MinimalEffortLSTM(6, implementation=1, unroll=True, **a),
        lstm_gradients,
    ),
    "gru": (lambda **a: MinimalEffortGRU(6, **a), gru_gradients),
    "gru, reset before": (lambda **a: MinimalEffortGRU(6, reset_after=False, **a), gru_gradients),
}
SEQUENCES = (4, 3, 5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RECURRENT)
def test_each_gate_of_each_step_keeps_elements_of_its_own(name, form):
    make, backward = RECURRENT[name]
    operands = Operands(gradients=TopK(2, unified=FORMS[form]))
    layer, inputs, upstream = built(make, SEQUENCES, operands=operands)
    values = layer_vjp(layer, inputs, upstream)
    assert_close(values[1:], expected(backward, layer, inputs, upstream, 2, FORMS[form]))


def test_recurrent_layers_do_not_take_the_fused_path_while_they_train(monkeypatch):
    layer, inputs, upstream = built(
        RECURRENT["lstm"][0], SEQUENCES, operands=Operands(gradients=TopK(2))
    )
    stock, calls = layers.LSTM.inner_loop, []

    def counted(*args, **kwargs):
        calls.append(args)
        return stock(*args, **kwargs)

    monkeypatch.setattr(layers.LSTM, "inner_loop", counted)
    layer_vjp(layer, inputs, upstream, "eager")
    assert not calls
    layer(inputs, training=False)
    assert len(calls) == 1
    rewritten = keras.Sequential([keras.Input(SEQUENCES[1:]), layers.LSTM(6, use_cudnn=True)])
    found = preview(rewritten, MinimalEffort(2, skip=())).layers[0]
    assert found.operands is None
    assert "use_cudnn=True" in found.reasons[0]


@pytest.mark.parametrize("name", [*LAYERS, *RECURRENT])
def test_as_many_elements_as_units_are_ordinary_back_propagation_to_the_bit(name, caplog):
    if BACKEND == "tensorflow" and name == "convolution, channels first":
        pytest.skip("TensorFlow's own convolutions are channels last on CPUs")
    make, shape = LAYERS[name][:2] if name in LAYERS else (RECURRENT[name][0], SEQUENCES)
    # One form for each layer, because each is compiled.
    forms = [TopK(9), TopK(ratio=1.0, unified=True), RandomK(9)]
    few = forms if name == "dense" else [forms[len(name) % 2]]
    values = []
    for gradients in (None, *few):
        layer, inputs, upstream = built(make, shape, operands=Operands(gradients=gradients))
        values.append(layer_vjp(layer, inputs, upstream))
    assert all(map(np.array_equal, each, values[0]) for each in values)
    assert [record.message.count("ordinary") for record in caplog.records] == [1] * len(few)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    ("equation", "rank", "count"),
    [
        ("ab,bc->ac", 2, 9),
        ("...b,bc->...c", 4, 9),
        ("abc,cde->abde", 3, 45),
        ("ab,abc->ac", 2, None),  # A kernel for each row.
        ("abc,cd->ad", 3, None),  # Rows that are summed.
        ("ab,b->a", 2, None),  # No units.
    ],
)
def test_equations_that_are_products_of_two_matrices(equation, rank, count):
    axes = EinsumAxes.of(equation, rank)
    shape = (7, 9, 5)[: len(equation.split(",")[1].split("->")[0])]
    assert (axes and axes.units_of(shape).count) == count


# Models -----------------------------------------------------------------------


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(8, 3, activation="relu", name="conv")(inputs)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Reshape((4, 8))(x)
    x = layers.EinsumDense("abc,cd->abd", (None, 8), bias_axes="d", name="einsum")(x)
    x = layers.Concatenate()([layers.LSTM(8, name="lstm")(x), layers.GRU(8, name="gru")(x)])
    x = layers.Dense(12, activation="relu", name="dense")(x)
    x = layers.Dense(3, activation="relu", name="narrow")(x)
    model = keras.Model(inputs, layers.Dense(12, name="head")(x))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


X = np.random.default_rng(0).normal(size=(4, 6, 6, 2)).astype("float32")
Y = np.random.default_rng(1).normal(size=(4, 12)).astype("float32")
CLASSES = {
    "conv": LowBitConv2D,
    "einsum": MinimalEffortEinsumDense,
    "lstm": MinimalEffortLSTM,
    "gru": MinimalEffortGRU,
    "dense": LowBitDense,
}


def step(model):
    """The weights after a step from the same weights each time."""
    before = model.get_weights()
    model.train_on_batch(X, Y)
    after = model.get_weights()
    model.set_weights(before)
    return after


@pytest.fixture(scope="module")
def float_model():
    """An untrained model; nobody changes it."""
    return network()


@pytest.fixture(scope="module")
def few():
    """One that trains with four units of each layer; nobody changes it for good."""
    return rewrite(network(), MinimalEffort(4, unified=True), in_place=True)


def test_a_treatment_gives_what_fits_and_says_why_not(few, float_model, caplog):
    assert {
        place.path: type(place.layer)
        for place in walk_layers(few)
        if not type(place.layer).__module__.startswith("keras.")
    } == CLASSES
    for name in CLASSES:
        assert few.get_layer(name).operands == Operands(gradients=TopK(4, unified=True))
    found = preview(float_model, MinimalEffort(4))
    reasons = {layer.path: layer.reasons for layer in found.layers if layer.operands is None}
    assert reasons == {
        "depthwise": ("a depthwise convolution: each of its channels is a product of its own",),
        "narrow": ("ordinary back-propagation: it would keep all of its 3 units",),
        "head": ("the graph's last layer",),
    }
    text = str(found)
    assert all(words in text for words in ("MinimalEffort(k=4)", "top 4 per example", "5 of 8"))
    assert "slower backward pass" in text
    inspection = str(inspect_model(few))
    assert all(words in inspection for words in ("top 4 of the batch", "5 minimal-effort layers"))
    caplog.clear()
    rewrite(float_model, MinimalEffort(ratio=0.5))
    assert len(caplog.records) == 1
    assert "not what the model computes" in caplog.text
    assert "all of its" not in caplog.text.replace("narrow", "")


def test_a_model_trains_with_few_elements_and_keeps_nothing_of_a_step(few, float_model):
    first, second = step(few), step(few)
    assert all(map(np.array_equal, first, second))
    assert [v.path for v in few.weights] == [v.path for v in float_model.weights]
    assert len(few.variables) == len(float_model.variables)
    np.testing.assert_allclose(few.predict(X, verbose=0), float_model.predict(X, verbose=0), 1e-5)
    whole = step(float_model)
    paths = [v.path for v in few.weights]
    moved = [not np.allclose(a, b, atol=1e-6) for a, b in zip(first, whole, strict=True)]
    # The layers behind the last one that was changed have their ordinary gradients.
    assert not any(m for m, path in zip(moved, paths, strict=True) if path.startswith("head"))
    assert moved[paths.index("conv/kernel")]
    assert moved[paths.index("dense/kernel")]
    # Eight of the columns of a kernel stay as they were.
    before, after = (dict(zip(paths, w, strict=True)) for w in (few.get_weights(), first))
    for path, count in (("dense/kernel", 8), ("conv/kernel", 4), ("einsum/kernel", 4)):
        same = (before[path] == after[path]).reshape(-1, before[path].shape[-1]).all(0)
        assert same.sum() >= count


def test_there_and_back_is_the_stock_model(few, float_model):
    back = restore(few)
    assert [type(p.layer) for p in walk_layers(back)] == [
        type(p.layer) for p in walk_layers(float_model)
    ]
    assert not any({"_operands", "_noise", "_lowering"} & set(vars(layer)) for layer in back.layers)
    for other in (back, copy_model(few)):
        assert all(map(np.array_equal, other.get_weights(), few.get_weights()))


def test_saved_files_hold_the_operands(few, tmp_path):
    few.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for name, layer_class in CLASSES.items():
        layer = loaded.get_layer(name)
        assert type(layer) is layer_class
        assert layer.operands == few.get_layer(name).operands
    for value, want in zip(step(loaded), step(few), strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)


@pytest.mark.backends("tensorflow")
def test_low_bit_and_minimal_effort_meet_in_either_order(float_model):
    low_bit, effort = LowBit(2, 3, skip="head"), MinimalEffort(4)
    first = rewrite(rewrite(float_model, low_bit), effort)
    second = rewrite(rewrite(float_model, effort), low_bit)
    for name in CLASSES:
        operands = first.get_layer(name).operands
        assert operands == second.get_layer(name).operands
        assert operands.gradients == TopK(4)
        assert (operands.kernel is None) == (name in ("einsum", "lstm", "gru"))
    quantized = rewrite(float_model, LowBit(gradients=6, skip="head"))
    found = {layer.path: layer for layer in preview(quantized, effort).layers}
    assert found["dense"].operands is None
    assert "DoReFaGradients" in found["dense"].reasons[0]
    assert found["lstm"].operands == Operands(gradients=TopK(4))


@pytest.mark.backends("tensorflow")
def test_random_elements_need_a_source_of_noise(float_model):
    model = copy_model(float_model)
    layer = LowBitDense(4, operands=Operands(gradients=RandomK(2, seed=1)))
    assert layer(np.ones((2, 3), "float32")).shape == (2, 4)
    assert noise_of(layer) is not None
    assert noise_of(rewrite(model, MinimalEffort(4)).get_layer("dense")) is None


@pytest.mark.backends("tensorflow")
def test_a_recurrent_layer_at_the_end_is_exempt():
    """Its kernels are its cell's."""
    model = keras.Sequential([keras.Input((3, 4)), layers.Dense(5), layers.LSTM(6)])
    found = preview(model, MinimalEffort(2)).layers
    assert [layer.operands is None for layer in found] == [False, True]
    assert found[1].reasons == ("the graph's last layer",)


#: name: (build a model, treatment, words of the error)
REFUSED = {
    "no graph": (
        model_zoo.subclassed,
        MinimalEffort(1),
        r"a graph.*last layer.*MinimalEffort\(\.\.\., skip=\('.*',\)\)",
    ),
    "nothing fits": (
        lambda: keras.Sequential([keras.Input((3,)), layers.Dense(2)]),
        MinimalEffort(1),
        "fits none of its 1 dense, convolution and recurrent layers",
    ),
    "as many as units": (network, MinimalEffort(12), "fits none of its 8"),
    "a pattern": (network, MinimalEffort(1, include="dens"), "'dens'.*none of 8; near: dense"),
}


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("name", REFUSED)
def test_treatments_that_do_not_fit(name):
    build, treatment, words = REFUSED[name]
    with pytest.raises(ValueError, match=f"Expected.*{words}"):
        rewrite(build(), treatment, in_place=True)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MinimalEffortLSTM(3, operands=Operands(DoReFaWeights(2))), "gradients"),
        (lambda: MinimalEffortLSTM(3, operands=Operands(gradients=DoReFaGradients(2))), "TopK"),
        (
            lambda: MinimalEffortGRU(3, use_cudnn=True, operands=Operands(gradients=TopK(2))),
            "use_cudnn",
        ),
        (
            lambda: rewrite(
                keras.Sequential(
                    [
                        keras.Input((4, 3)),
                        layers.EinsumDense("abc,cd->ad", (2,)),
                        layers.Dense(2),
                    ]
                ),
                MinimalEffort(1),
            ),
            "fits none of its 2",
        ),
    ],
)
def test_layers_that_cannot_be(make, words):
    with pytest.raises(ValueError, match=f"Expected.*{words}"):
        make()
