"""What XLA compiles for GPUs computes the same: its forms, run on a CPU."""

import itertools

import keras
import numpy as np
import pytest

from diagconv_tf import ConvSpec, backends
from diagconv_tf.lowerings import convolve, gathered_sum, parse, row_block_gradient
from diagconv_tf.lowerings.row_block_gradient import Blocks
from diagconv_tf.spec import PASSES
from tests import cases
from tests.numerics import (
    BACKEND,
    MODES,
    assert_close,
    expected,
    random_problem,
    run_lowering,
    tolerances,
)
from tests.test_lowerings import keras_x64, native_reference, second_derivatives

pytestmark = pytest.mark.backends("tensorflow", "jax")


@pytest.fixture
def for_gpu(monkeypatch):
    """What is traced takes the forms for GPUs."""
    monkeypatch.setattr(backends.current(), "compiled_for", lambda tensor: "gpu")


@pytest.fixture
def small_limits(monkeypatch):
    """Several blocks an image, and several loops, for workloads that compile fast."""
    monkeypatch.setattr(row_block_gradient, "_NEIGHBOURS", 4)
    monkeypatch.setattr(row_block_gradient, "_ROWS", 6)
    monkeypatch.setattr(row_block_gradient, "_SUMS", 4)


#: A case for each thing that the forms compute in a way of their own. On TensorFlow,
#: which makes the same programs, a few must do.
NAMES = {
    "tensorflow": ["stride 2 same odd", "channels first groups"],
    "jax": [
        "plain",
        "same",
        "stride 2",
        "stride 2 same odd",
        "stride above kernel",
        "unequal strides",
        "unequal strides valid",
        "unequal dilation",
        "strides with dilation",
        "kernel 1x1 stride 2",
        "even kernel",
        "kernel 7x7",
        "multiplier stride 2",
        "groups of 3 to 2",
        "channels first groups",
        "channels first stride 2",
        "one pixel",
    ],
}


def check(spec, lowering="shifted"):
    problem = random_problem(spec)
    with keras_x64():
        values = run_lowering(spec, lowering, *problem, MODES[-1])
    assert_close(values, expected(spec, *problem), tolerances(spec, lowering))


@pytest.mark.usefixtures("for_gpu")
@pytest.mark.parametrize("name", NAMES.get(BACKEND, []))
def test_named_cases_equal_the_reference_in_float64(name):
    check(cases.NAMED[name].replace(compute_dtype="float64"))


@pytest.mark.usefixtures("for_gpu", "small_limits")
@pytest.mark.parametrize("name", ["same", "channels first groups"][: 1 + (BACKEND == "jax")])
def test_several_blocks_and_loops_equal_the_reference(name):
    check(cases.NAMED[name].replace(batch=4, compute_dtype="float64"))


@pytest.mark.usefixtures("for_gpu")
def test_second_derivatives_equal_those_of_the_native_op():
    spec = cases.NAMED["stride 2 same odd"].replace(compute_dtype="float64")
    x, k, g = random_problem(spec)
    u, v, _ = random_problem(spec, seed=1)

    def shifted(x, k):
        return convolve(spec, parse("shifted"), x, k)

    if BACKEND == "tensorflow":
        import tensorflow as tf

        shifted = tf.function(shifted, jit_compile=True, autograph=False)
    with keras_x64():
        wanted = second_derivatives(native_reference(spec), x, k, g, u, v)
        values = second_derivatives(shifted, x, k, g, u, v)
    for value, want in zip(values, wanted, strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("for_gpu")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_the_results_once(dtype):
    spec = ConvSpec(8, 12, 12, 8, padding="same", compute_dtype=dtype)
    x, k, g = (
        keras.ops.convert_to_numpy(keras.ops.cast(keras.ops.cast(a, dtype), "float32"))
        for a in random_problem(spec)
    )
    values = run_lowering(spec, "shifted", x, k, g, MODES[-1])
    rounding = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    assert_close(values, expected(spec, x, k, g), rounding)


@pytest.mark.usefixtures("for_gpu")
def test_no_images_at_all():
    spec = cases.NAMED["same"].replace(batch=0)
    y, dx, dk = run_lowering(spec, "shifted", *random_problem(spec), MODES[-1])
    assert y.shape == spec.output_shape
    assert dx.shape == spec.input_shape
    np.testing.assert_array_equal(dk, np.zeros(spec.kernel_shape))


@pytest.mark.backends("tensorflow")
@pytest.mark.usefixtures("for_gpu")
@pytest.mark.parametrize("batch", [2, 0])
def test_an_unknown_batch(batch):
    import tensorflow as tf

    spec = cases.NAMED["same"].replace(batch=batch)
    unknown = spec.replace(batch=None)
    signature = [tf.TensorSpec(unknown.input_shape), tf.TensorSpec(spec.kernel_shape)]

    @tf.function(input_signature=signature, jit_compile=True)
    def gradients(x, k):
        with tf.GradientTape() as tape:
            tape.watch([x, k])
            y = convolve(unknown, parse("shifted"), x, k)
            loss = tf.reduce_sum(y * y)
        return y, *tape.gradient(loss, [x, k])

    x, k, _ = random_problem(spec)
    y = expected(spec, x, k, np.zeros(spec.output_shape))[0]
    assert_close([t.numpy() for t in gradients(x, k)], expected(spec, x, k, 2 * y), 1e-5)


@pytest.mark.usefixtures("for_gpu")
def test_what_lies_outside_is_not_read():
    """Indices are moved to the nearest pixel inside; what it holds must not spread."""
    # With gaps between taps, the nearest is not read anyway.
    spec = ConvSpec(1, 7, 8, 2, dilation_rate=(2, 2), padding="same")
    x, k, g = random_problem(spec)
    x[0, 0, 0, 0] = x[0, -1, -1, 0] = np.inf
    y, *_ = run_lowering(spec, "shifted", x, k, g, MODES[-1])
    wanted = expected(spec, np.isinf(x), np.ones(spec.kernel_shape), g)[0] > 0
    np.testing.assert_array_equal(~np.isfinite(y), wanted)


@pytest.mark.usefixtures("for_gpu")
@pytest.mark.parametrize(
    ("name", "is_gathered"),
    [("stride 2 same odd", True), ("same", False), ("groups of 3 to 2", False)],
)
@pytest.mark.parametrize("lowering", ["native", dict.fromkeys(PASSES, "native")], ids=str)
def test_native_gathers_the_input_gradient_of_strided_depthwise_layers(
    lowering, name, is_gathered, monkeypatch
):
    calls = []
    gather = gathered_sum.input_gradient
    monkeypatch.setattr(
        gathered_sum, "input_gradient", lambda *args: calls.append(1) or gather(*args)
    )
    spec = cases.NAMED[name]
    check(spec, lowering)
    assert bool(calls) == is_gathered


class TestCompiledFor:
    """Who asks for the forms: programs that XLA compiles, and none else."""

    @pytest.mark.backends("jax")
    @pytest.mark.parametrize(("kind", "eager"), [("cpu", "cpu"), ("gpu", None), ("tpu", None)])
    def test_on_jax(self, kind, eager, monkeypatch):
        import jax

        backend = backends.current()
        monkeypatch.setattr(backend, "default_device", lambda: (kind, ""))
        found = []
        look = lambda x: found.append(backend.compiled_for(x)) or x  # noqa: E731
        look(jax.numpy.ones(1))
        jax.jit(look)(jax.numpy.ones(1))
        assert found == [eager, kind]

    @pytest.mark.backends("tensorflow")
    @pytest.mark.parametrize("kind", ["cpu", "gpu"])
    def test_on_tensorflow(self, kind, monkeypatch):
        import tensorflow as tf

        backend = backends.current()
        monkeypatch.setattr(backend, "default_device", lambda: (kind, ""))
        found = []
        look = lambda x: found.append(backend.compiled_for(x)) or x  # noqa: E731
        look(tf.ones(1))
        tf.function(look, autograph=False)(tf.ones(1))
        tf.function(look, autograph=False, jit_compile=True)(tf.ones(1))
        assert found == [None, None, kind]

    @pytest.mark.parametrize(
        ("kind", "sizes", "wanted"),
        [
            ("gpu", (8, 8), True),
            ("gpu", (8, "unknown"), False),
            ("cpu", (8, 8), False),
            ("tpu", (8, 8), False),
            (None, (8, 8), False),
        ],
    )
    def test_fits(self, kind, sizes, wanted, monkeypatch):
        monkeypatch.setattr(backends.current(), "compiled_for", lambda tensor: kind)
        assert gathered_sum.fits(None, sizes) == wanted


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_reads_meet_the_taps_of_the_definition(stride, dilation, padding):
    """Input x + pad = output q * stride + tap u * dilation, each triple read once."""
    for size, kernel in itertools.product((9, 12, 13), (1, 2, 3, 5)):
        if padding == "valid" and (kernel - 1) * dilation >= size:
            continue
        spec = ConvSpec(
            1, size, size, 1,
            kernel_size=(kernel, 1), strides=(stride, 1), dilation_rate=(dilation, 1),
            padding=padding,
        )  # fmt: skip
        before = spec.padding_for((size, size))[0][0]
        outputs = range(spec.output_size[0])
        wanted = {
            (q * stride + u * dilation - before, q, u)
            for q, u in itertools.product(outputs, range(kernel))
            if 0 <= q * stride + u * dilation - before < size
        }

        def triples(reads):
            rows = [
                (int(read.indices[i]), i, int(read.taps[i]))
                for read in reads
                for i in np.flatnonzero(read.inside)
            ]
            assert len(rows) == len(set(rows))
            return set(rows)

        assert triples(gathered_sum.reads_of_inputs(spec, 0, size)) == wanted
        by_input = triples(gathered_sum.reads_of_gradient(spec, 0, size))
        assert {(x, q, u) for q, x, u in by_input} == wanted


class TestBlocks:
    pytestmark = pytest.mark.backends("tensorflow")

    @pytest.mark.parametrize("batch", [None, 0, 1, 2, 7, 61, 64, 96, 256])
    def test_laws(self, batch):
        for height in range(1, 300):
            blocks = Blocks.of(batch, height)
            # They cover every row, and no block lies below the image.
            assert blocks.rows * blocks.per_image >= height
            assert blocks.rows * (blocks.per_image - 1) < height
            assert batch is None or batch % blocks.images == 0
            # XLA makes a loop of the sum: not over too many neighbours.
            assert max(blocks.rows, blocks.images) < 32
            is_single = blocks.per_image == 1 and blocks.images == batch
            assert blocks.rows * blocks.images < (32 if is_single else 57)

    @pytest.mark.parametrize("batch", [64, None])
    @pytest.mark.parametrize("height", [112, 56, 28, 14, 7, 32, 16, 8, 4, 2])
    def test_blocks_of_usual_sizes_have_28_rows_at_least(self, height, batch):
        blocks = Blocks.of(batch, height)
        assert blocks.images * blocks.rows >= 28
        assert blocks.rows * blocks.per_image == height
