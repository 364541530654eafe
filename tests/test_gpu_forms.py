"""What XLA compiles for GPUs computes the same: its forms, run on a CPU."""

import pytest

from diagconv_tf import backends
from diagconv_tf.lowerings import row_block_gradient
from diagconv_tf.lowerings.row_block_gradient import Blocks
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
from tests.test_lowerings import keras_x64

pytestmark = pytest.mark.backends("tensorflow", "jax")


@pytest.fixture(autouse=True)
def compiled_for_gpu(monkeypatch):
    monkeypatch.setattr(backends.current(), "compiled_for", lambda tensor: "gpu")


@pytest.fixture
def small_limits(monkeypatch):
    """Several blocks an image, and several loops, for workloads that compile fast."""
    monkeypatch.setattr(row_block_gradient, "_NEIGHBOURS", 4)
    monkeypatch.setattr(row_block_gradient, "_ROWS", 6)
    monkeypatch.setattr(row_block_gradient, "_SUMS", 4)


#: A case for each thing that the forms for GPUs compute in a way of their own. On
#: TensorFlow, which makes the same programs, a few must do.
NAMES = [
    "same",
    "stride 2 same odd",
    "multiplier stride 2",
    "channels first groups",
]
if BACKEND == "jax":
    NAMES += [
        "plain",
        "stride 2",
        "stride 2 same even",
        "stride above kernel",
        "unequal strides",
        "unequal strides valid",
        "unequal dilation",
        "strides with dilation",
        "unequal strides with dilation",
        "kernel 1x1 stride 2",
        "even kernel",
        "kernel 7x7",
        "groups of 3 to 2",
        "channels first stride 2",
        "batch of 1",
        "one pixel",
        "one pixel out",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_named_cases_equal_the_reference_in_float64(name):
    check(cases.NAMED[name].replace(compute_dtype="float64"))


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("name", ["stride 2 same odd", "channels first groups"])
def test_several_blocks_and_loops_equal_the_reference(name):
    check(cases.NAMED[name].replace(batch=4, compute_dtype="float64"))


def check(spec):
    problem = random_problem(spec)
    with keras_x64():
        values = run_lowering(spec, "shifted", *problem, MODES[-1])
    assert_close(values, expected(spec, *problem), tolerances(spec, "shifted"))


class TestBlocks:
    """`Blocks` alone, over many heights and batches."""

    pytestmark = pytest.mark.backends("tensorflow")

    @pytest.mark.parametrize("batch", [None, 0, 1, 2, 7, 61, 64, 96, 256])
    def test_laws(self, batch):
        for height in range(1, 300):
            blocks = Blocks.of(batch, height)
            # They cover every row, and no block lies below the image.
            assert blocks.rows * blocks.per_image >= height
            assert blocks.rows * (blocks.per_image - 1) < height
            assert (batch or 1) % blocks.images == 0
            # XLA makes a loop of the sum; no sum over too many neighbours.
            assert max(blocks.rows, blocks.images) < 32
            is_single = blocks.per_image == 1 and blocks.images == (batch or 1)
            assert blocks.rows * blocks.images < (32 if is_single else 57)

    @pytest.mark.parametrize("height", [112, 56, 28, 14, 7, 32, 16, 8, 4, 2])
    def test_batches_of_64_are_summed_by_28_rows_at_least(self, height):
        blocks = Blocks.of(64, height)
        assert blocks.images * blocks.rows >= 28
        assert blocks.rows * blocks.per_image == height
