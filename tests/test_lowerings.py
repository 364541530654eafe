"""Every lowering computes the same function, to any order of differentiation."""

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st

from diagconv_tf import ConvSpec, why_not
from diagconv_tf.lowerings import convolve, parse
from diagconv_tf.spec import PASSES
from tests import cases
from tests.numerics import (
    BACKEND,
    MODES,
    THOROUGH,
    assert_close,
    expected,
    random_problem,
    run_lowering,
    tolerances,
    vector_jacobian,
)

# Configurations to draw: as many as the time for tests allows on 2 cores. Where each is
# traced or compiled, that takes as long as it has blocks and taps: there they are few. What
# many of them compute is known from the eager ones, which are of all sizes.
EXAMPLES = {
    ("tensorflow", "eager"): 200,
    ("tensorflow", "graph"): 50,
    ("tensorflow", "xla"): 30,
    ("jax", "eager"): 5,
    ("jax", "compiled"): 50,
    ("torch", "eager"): 400,
}
FEW_PARTS = {"max_channels": 20, "max_size": 8, "max_kernel": 4}

# JAX compiles every case apart: there one of each kind must do.
CHOICES = {
    name: lowering
    for name, lowering in cases.LOWERINGS.items()
    if BACKEND != "jax" or name in ("diagonal:4", "shifted", "per pass a")
}


@pytest.mark.parametrize("lowering", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("spec", cases.NAMED.values(), ids=cases.NAMED)
def test_named_cases_equal_the_reference_in_float64(spec, lowering):
    if why_not(spec, lowering):
        pytest.skip("; ".join(why_not(spec, lowering)))
    spec = spec.replace(compute_dtype="float64")
    problem = random_problem(spec)
    mode = "compiled" if BACKEND == "jax" else "eager"
    with keras_x64():
        values = run_lowering(spec, lowering, *problem, mode)
    assert_close(values, expected(spec, *problem), tolerances(spec, lowering))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_random_configurations_equal_the_reference(mode):
    count = EXAMPLES[BACKEND, mode] * (10 if THOROUGH else 1)
    traced = BACKEND == "jax" or mode != "eager"
    sizes = FEW_PARTS if traced and not THOROUGH else {}

    @hypothesis.settings(
        max_examples=count,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate] + [hypothesis.Phase.shrink] * (mode == "eager"),
    )
    @hypothesis.given(cases.specs(**sizes), cases.lowerings(), st.integers(0, 2**31))
    def law(spec, lowering, seed):
        if why_not(spec, lowering):
            return
        problem = random_problem(spec, seed)
        values = run_lowering(spec, lowering, *problem, mode)
        scales = expected(spec, *map(np.abs, problem))
        assert_close(values, expected(spec, *problem), tolerances(spec, lowering), scales)

    law()


@pytest.mark.parametrize("lowering", ["native", "diagonal:8", "shifted"])
@pytest.mark.parametrize(
    "kernel_size", [(31, 31), (15, 1), (1, 31)], ids=lambda k: f"{k[0]}x{k[1]}"
)
def test_large_kernels(kernel_size, lowering):
    if BACKEND == "jax" and lowering == "shifted" and kernel_size == (31, 31) and not THOROUGH:
        pytest.skip("a minute to compile 961 taps; the other backends and sizes run")
    spec = ConvSpec(1, 33, 32, 10, kernel_size=kernel_size, padding="same")
    problem = random_problem(spec)
    mode = "compiled" if BACKEND == "jax" else "eager"
    values = run_lowering(spec, lowering, *problem, mode)
    assert_close(values, expected(spec, *problem), tolerances(spec, lowering))


SECOND_ORDER = {
    name: cases.NAMED[name]
    for name in ("plain", "stride 2 same odd", "multiplier", "groups of 2", "channels first")
}


@pytest.mark.parametrize("lowering", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("spec", SECOND_ORDER.values(), ids=SECOND_ORDER)
def test_second_derivatives_equal_those_of_the_native_op(spec, lowering):
    if why_not(spec, lowering):
        pytest.skip("; ".join(why_not(spec, lowering)))
    spec = spec.replace(compute_dtype="float64")
    x, k, g = random_problem(spec)
    u, v, _ = random_problem(spec, seed=1)

    with keras_x64():
        wanted = second_derivatives(native_reference(spec), x, k, g, u, v)
        values = second_derivatives(
            lambda x, k: convolve(spec, parse(lowering), x, k), x, k, g, u, v
        )
    for value, want in zip(values, wanted, strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-9, atol=1e-9)


def native_reference(spec):
    """Keras's own convolution op for `spec`."""

    def convolution(x, k):
        arguments = {
            "strides": spec.strides,
            "padding": spec.padding,
            "dilation_rate": spec.dilation_rate,
            "data_format": spec.data_format,
        }
        if spec.is_depthwise:
            shape = (*spec.kernel_size, spec.groups, spec.output_channels_per_group)
            return keras.ops.depthwise_conv(x, keras.ops.reshape(k, shape), **arguments)
        return keras.ops.conv(x, k, **arguments)

    return convolution


def second_derivatives(convolution, x, k, g, u, v):
    """Gradients by x, k and g of `<u, dx> + <v, dk>`, with a square on top.

    The square makes the outputs matter twice, so that the gradient by x of the
    input gradient is not zero.
    """
    if BACKEND == "tensorflow":
        import tensorflow as tf

        x, k, g, u, v = map(tf.constant, (x, k, g, u, v))
        with tf.GradientTape() as outer:
            outer.watch([x, k, g])
            with tf.GradientTape() as inner:
                inner.watch([x, k])
                y = convolution(x, k)
                loss = tf.reduce_sum(g * y + y * y)
            dx, dk = inner.gradient(loss, [x, k])
            product = tf.reduce_sum(dx * u) + tf.reduce_sum(dk * v)
        return [t.numpy() for t in outer.gradient(product, [x, k, g])]
    if BACKEND == "jax":
        import jax

        def product(x, k, g):
            def loss(x, k):
                y = convolution(x, k)
                return (g * y + y * y).sum()

            dx, dk = jax.grad(loss, (0, 1))(x, k)
            return (dx * u).sum() + (dk * v).sum()

        return jax.jit(jax.grad(product, (0, 1, 2)))(x, k, g)
    import torch

    x, k, g = (torch.tensor(a, requires_grad=True) for a in (x, k, g))
    y = convolution(x, k)
    dx, dk = torch.autograd.grad((g * y + y * y).sum(), [x, k], create_graph=True)
    product = (dx * torch.tensor(u)).sum() + (dk * torch.tensor(v)).sum()
    return [t.numpy() for t in torch.autograd.grad(product, [x, k, g])]


HALF_LOWERINGS = ["diagonal:8", "dense", "diagonal_grouped:8", "shifted"]


@pytest.mark.parametrize("lowering", HALF_LOWERINGS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_loses_no_more_than_the_native_op(dtype, lowering):
    """Against float64, on operands that are exact in half precision.

    A large batch and image make the kernel gradient a long sum, which an
    accumulator in half precision would lose or overflow.
    """
    spec = ConvSpec(8, 24, 24, 16, padding="same", compute_dtype=dtype)
    rng = np.random.default_rng(0)
    x, g = (np.abs(rng.normal(size=s)) for s in (spec.input_shape, spec.output_shape))
    k = rng.normal(size=spec.kernel_shape)
    x, k, g = (
        keras.ops.convert_to_numpy(keras.ops.cast(keras.ops.cast(a, dtype), "float32"))
        for a in (x, k, g)
    )
    wanted = expected(spec, x, k, g)
    mode = MODES[-1]
    native = run_lowering(spec, "native", x, k, g, mode)
    values = run_lowering(spec, lowering, x, k, g, mode)
    rounding = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    for value, by_native, want in zip(values, native, wanted, strict=True):
        error, native_error = (
            np.linalg.norm(v - want) / np.linalg.norm(want) for v in (value, by_native)
        )
        # One rounding of the result is what the best algorithm must lose.
        assert error <= max(1.05 * native_error, rounding), f"{error:.2e} vs {native_error:.2e}"


@pytest.mark.parametrize("lowering", HALF_LOWERINGS)
def test_float16_kernel_gradients_do_not_overflow_before_the_end(lowering):
    """Terms whose sum fits float16, though sums of their parts do not."""
    spec = ConvSpec(16, 16, 16, 8, kernel_size=(1, 1), compute_dtype="float16")
    x = np.full(spec.input_shape, 8.0)
    g = np.full(spec.output_shape, 8.0)
    g[8:] = -8.0  # The first half of the batch alone sums to 131072 > 65504.
    g[8, 0, 0] = 8.0
    k = np.ones(spec.kernel_shape)
    with np.errstate(over="ignore"):
        dk = run_lowering(spec, lowering, x, k, g, MODES[-1])[2]
        by_native = run_lowering(spec, "native", x, k, g, MODES[-1])[2]
    if not np.isfinite(by_native).all():
        pytest.skip("the native op overflows here")
    np.testing.assert_allclose(dk, 128.0, rtol=1e-2)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("lowering", cases.LOWERINGS.values(), ids=cases.LOWERINGS)
@pytest.mark.parametrize("name", ["plain", "stride 2 same odd", "stride 2 same even", "multiplier"])
def test_unknown_batch_and_size_in_a_graph(name, lowering):
    import tensorflow as tf

    spec = cases.NAMED[name]
    unknown = spec.replace(batch=None, height=None, width=None)
    shape = [None, None, None, spec.input_channels]

    @tf.function(input_signature=[tf.TensorSpec(shape), tf.TensorSpec(spec.kernel_shape)])
    def gradients(x, k):
        with tf.GradientTape() as tape:
            tape.watch([x, k])
            y = convolve(unknown, parse(lowering), x, k)
            loss = tf.reduce_sum(y * y)
        return y, *tape.gradient(loss, [x, k])

    for height, width in ((9, 8), (8, 11)):
        sized = spec.replace(height=height, width=width)
        x, k, _ = random_problem(sized)
        y = expected(sized, x, k, np.zeros(sized.output_shape))[0]
        wanted = expected(sized, x, k, 2 * y)
        assert_close([t.numpy() for t in gradients(x, k)], wanted, 1e-5)


@pytest.mark.parametrize("lowering", ["native", "diagonal:4", "shifted"])
def test_no_images_at_all(lowering):
    spec = cases.NAMED["same"].replace(batch=0)
    y, dx, dk = run_lowering(spec, lowering, *random_problem(spec), MODES[-1])
    assert y.shape == spec.output_shape
    assert dx.shape == spec.input_shape
    assert not dk.any()


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("jit_compile", [None, False, True], ids=["eager", "graph", "xla"])
@pytest.mark.parametrize("lowering", cases.LOWERINGS.values(), ids=cases.LOWERINGS)
@pytest.mark.parametrize("name", ["stride 2 same odd", "groups of 2"])
def test_a_batch_of_none_where_the_batch_is_unknown(name, lowering, jit_compile):
    """An uneven last batch leaves a replica without images."""
    import tensorflow as tf

    spec = cases.NAMED[name].replace(batch=None)
    if why_not(spec, lowering):
        pytest.skip("; ".join(why_not(spec, lowering)))

    def results(x, k):
        with tf.GradientTape() as tape:
            tape.watch([x, k])
            y = convolve(spec, parse(lowering), x, k)
            loss = tf.reduce_sum(y * y)
        return y, *tape.gradient(loss, [x, k])

    if jit_compile is not None:
        signature = [tf.TensorSpec(spec.input_shape), tf.TensorSpec(spec.kernel_shape)]
        results = tf.function(results, input_signature=signature, jit_compile=jit_compile)
    y, dx, dk = results(tf.zeros((0, *spec.input_shape[1:])), tf.fill(spec.kernel_shape, 2.0))
    assert y.shape == (0, *spec.output_shape[1:])
    assert dx.shape == (0, *spec.input_shape[1:])
    np.testing.assert_array_equal(dk, np.zeros(spec.kernel_shape))


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("lowering", cases.LOWERINGS.values(), ids=cases.LOWERINGS)
def test_nothing_outlives_the_graph_it_was_traced_for(lowering):
    import gc
    import weakref

    import tensorflow as tf

    spec = cases.NAMED["plain"]
    graphs = []

    @tf.function(autograph=False)
    def gradients(x, k):
        graphs.append(weakref.ref(tf.compat.v1.get_default_graph()))
        with tf.GradientTape() as tape:
            tape.watch([x, k])
            y = convolve(spec, parse(lowering), x, k)
        return tape.gradient(y, [x, k])

    gradients(tf.ones(spec.input_shape), tf.ones(spec.kernel_shape))
    del gradients
    gc.collect()
    assert [graph() for graph in graphs] == [None]


def depthwise_model(lowering):
    """Two layers of one workload and one of another; `lowering` None means stock layers."""
    from diagconv_tf import rewrite

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.DepthwiseConv2D(3, strides=2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(1),
        ]
    )
    return model if lowering is None else rewrite(model, lowering, in_place=True)


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_fit_with_several_steps_in_a_graph_equals_stock(jit_compile):
    """The steps are a loop of the graph, whose body is a graph of its own."""
    x = np.random.default_rng(0).normal(size=(8, 6, 6, 4)).astype("float32")
    losses = []
    for lowering in (None, "shifted"):
        model = depthwise_model(lowering)
        model.compile("sgd", "mse", jit_compile=jit_compile, steps_per_execution=2)
        fitted = model.fit(x, np.ones((8, 1)), batch_size=2, epochs=2, shuffle=False, verbose=0)
        losses.append(fitted.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_a_saved_model_has_the_gradients(tmp_path):
    import tensorflow as tf

    spec = cases.NAMED["same"]
    signature = [tf.TensorSpec(spec.input_shape), tf.TensorSpec(spec.kernel_shape)]

    def function(x, k):
        # Twice the same pass: its gradient is stored once.
        y = convolve(spec, parse("shifted"), x, k)
        return convolve(spec, parse("shifted"), y, k)

    def gradients(function):
        x, k, g = (tf.constant(a, "float32") for a in random_problem(spec))
        with tf.GradientTape() as tape:
            tape.watch([x, k])
            y = function(x, k)
        return tape.gradient(y, [x, k], g)

    module = tf.Module()
    module.function = tf.function(function, input_signature=signature, autograph=False)
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=True)
    tf.saved_model.save(module, str(tmp_path), options=options)
    loaded = tf.saved_model.load(str(tmp_path))
    for value, want in zip(gradients(loaded.function), gradients(function), strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-5)


@pytest.mark.backends("tensorflow")
def test_retracing_registers_no_more_gradients():
    import gc

    import tensorflow as tf

    from diagconv_tf.backends.tensorflow import _RegisteredGradient

    spec = cases.NAMED["plain"]
    arguments = tf.ones(spec.input_shape), tf.ones(spec.kernel_shape)

    def registered_after_a_trace():
        @tf.function(autograph=False)
        def gradients(x, k):
            with tf.GradientTape() as tape:
                tape.watch([x, k])
                y = convolve(spec, parse("shifted"), x, k)
            return tape.gradient(y, [x, k])

        gradients(*arguments)
        del gradients
        gc.collect()
        return sum(map(len, _RegisteredGradient._free.values()))

    first = registered_after_a_trace()
    assert first
    assert registered_after_a_trace() == first


@pytest.mark.backends("tensorflow")
def test_a_pass_is_traced_once_for_all_layers_of_a_graph(monkeypatch):
    import tensorflow as tf

    from diagconv_tf.lowerings import Shifted

    calls = []
    forward = Shifted.forward
    monkeypatch.setattr(
        Shifted, "forward", lambda self, *args: calls.append(1) or forward(self, *args)
    )
    spec = cases.NAMED["same"]

    @tf.function(autograph=False)
    def three_layers(x, k):
        for _ in range(3):
            x = convolve(spec, parse("shifted"), x, k)
        return x

    three_layers(tf.ones(spec.input_shape), tf.ones(spec.kernel_shape))
    assert len(calls) == 1


def test_a_bad_channel_spreads_within_its_block_alone():
    spec = ConvSpec(1, 5, 5, 8)
    x, k, _ = random_problem(spec)
    x[..., 1] = np.inf

    def bad_outputs(lowering):
        y = vector_jacobian(
            lambda x, k: convolve(spec, parse(lowering), x, k),
            (x.astype("float32"), k.astype("float32")),
            np.ones(spec.output_shape, "float32"),
            MODES[-1],
        )[0]
        return np.flatnonzero(~np.isfinite(y).all((0, 1, 2))).tolist()

    assert bad_outputs("native") == [1]
    assert bad_outputs("shifted") == [1]
    assert bad_outputs("diagonal:4") == [0, 1, 2, 3]


class TestTolerance:
    @pytest.mark.backends("tensorflow")
    @pytest.mark.parametrize(
        ("name", "lowering", "rounds_to_tf32"),
        [
            ("plain", "native", False),
            ("multiplier", "native", False),
            ("groups of 2", "native", True),
            ("one group", "native", True),
            ("plain", "shifted", False),
            ("groups of 2", "shifted", False),
            ("plain", "diagonal:4", True),
            ("plain", "dense", True),
            ("plain", "diagonal_grouped:3", True),
        ],
    )
    def test_tf32_is_allowed_where_standard_convolutions_run(self, name, lowering, rounds_to_tf32):
        spec = cases.NAMED[name]
        own = parse(lowering).for_pass("forward")
        for pass_name in PASSES:
            strict, loose = (own.tolerance(spec, pass_name, tf32) for tf32 in (False, True))
            assert (loose > strict) == rounds_to_tf32
            # One multiplication with factors of 11 bits, of which 2**-11 is the roundoff.
            assert loose >= 2.0**-11 or not rounds_to_tf32
            assert strict <= 1e-5
            for dtype in ("float16", "bfloat16", "float64"):
                typed = spec.replace(compute_dtype=dtype)
                assert own.tolerance(typed, pass_name, True) == own.tolerance(
                    typed, pass_name, False
                )

    @pytest.mark.backends("tensorflow")
    def test_longer_sums_may_lose_more(self):
        def of(spec, pass_name):
            return parse("shifted").for_pass(pass_name).tolerance(spec, pass_name, False)

        spec = cases.NAMED["plain"]
        longer = spec.replace(batch=200)
        assert of(longer, "kernel_gradient") > of(spec, "kernel_gradient")
        assert of(longer, "forward") == of(spec, "forward")
        assert of(spec.replace(kernel_size=(7, 7)), "forward") > of(spec, "forward")


class TestWhyNot:
    def test_nothing_against_what_fits(self):
        for lowering in ("native", "diagonal:4", "dense", "diagonal_grouped:3", "shifted"):
            assert why_not(cases.NAMED["plain"], lowering) == []

    def test_diagonal_grouped_needs_a_divisor_of_the_channels(self):
        reasons = why_not(ConvSpec(1, 8, 8, 144), "diagonal_grouped:32")
        assert len(reasons) == 1
        assert "32" in reasons[0]
        assert "144" in reasons[0]

    def test_diagonal_grouped_needs_whole_groups(self):
        spec = ConvSpec(1, 8, 8, groups=4, input_channels_per_group=6)
        assert any("6" in reason for reason in why_not(spec, "diagonal_grouped:8"))

    def test_the_reasons_of_all_passes_are_told_once(self):
        spec = cases.NAMED["plain"]
        alone = why_not(spec, "diagonal_grouped:5")
        lowering = dict.fromkeys(PASSES, "diagonal_grouped:5") | {"forward": "native"}
        assert why_not(spec, lowering) == alone != []


class TestParse:
    @pytest.mark.parametrize(
        "bad",
        [
            "diagonal:0",
            "diagonal:-1",
            "diagonal:",
            "diagonal:3.5",
            "diagonal:032",
            "diagonal_grouped",
            "Diagonal",
            "",
            32,
            None,
            ["native"],
            {"forward": "native"},
            dict.fromkeys(PASSES, "native") | {"backward": "native"},
            dict.fromkeys(PASSES, "nativ"),
        ],
        ids=repr,
    )
    def test_what_is_refused_lists_what_is_accepted(self, bad):
        with pytest.raises(ValueError, match="Expected `lowering` to be .*Received: lowering="):
            parse(bad)

    @pytest.mark.parametrize(
        "lowering",
        ["native", "diagonal:7", "dense", "diagonal_grouped:16", "shifted"]
        + [cases.LOWERINGS["per pass a"]],
        ids=str,
    )
    def test_round_trip(self, lowering):
        assert parse(lowering).to_config() == lowering
        assert parse(parse(lowering)) == parse(lowering)
        assert hash(parse(lowering)) == hash(parse(lowering))

    def test_diagonal_alone_means_the_authors_32(self):
        assert parse("diagonal") == parse("diagonal:32")


class keras_x64:  # noqa: N801
    """Lets JAX compute in float64 inside a `with`."""

    def __enter__(self):
        if BACKEND == "jax":
            import jax

            self._before = jax.config.jax_enable_x64
            jax.config.update("jax_enable_x64", True)

    def __exit__(self, *_):
        if BACKEND == "jax":
            import jax

            jax.config.update("jax_enable_x64", self._before)
