"""The kernels of "fused": what they compute, where they are refused, what they compile to."""

import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import hypothesis
import keras
import numpy as np
import pytest

from diagconv_tf import ConvSpec, why_not
from diagconv_tf.backends import depthwise_tiling as tiling
from diagconv_tf.lowerings import Fused, Native, PerPassChoice, UniformChoice, convolve, fused
from tests import cases
from tests.numerics import (
    BACKEND,
    MODES,
    assert_close,
    expected,
    random_problem,
    vector_jacobian,
)

_SMALL = ConvSpec(batch=2, height=5, width=4, groups=3, padding="same")


def is_suitable(spec):
    return (
        spec.data_format == "channels_last"
        and spec.input_channels_per_group == spec.output_channels_per_group == 1
        and math.prod(spec.kernel_size) <= tiling.MOST_TAPS
    )


SUITABLE = {name: spec for name, spec in cases.NAMED.items() if is_suitable(spec)}

# --- What a program computes, without a framework. ---


def in_numpy(problem, source, kernel):
    """A correlation by the tables of `problem`, which the kernels follow, without masks."""
    vertical, horizontal, tile = problem.vertical, problem.horizontal, problem.tile
    batch, rows, columns, channels = source.shape
    target = np.zeros((batch, vertical.target, horizontal.target, channels))

    def read(row, column):
        inside = 0 <= row < rows and 0 <= column < columns
        return source[:, row, column] if inside else np.zeros((batch, channels))

    trips, shift = problem.loop
    for block, position in itertools.product(range(problem.blocks[0]), range(horizontal.count)):
        sums = [np.zeros((batch, channels)) for _ in range(problem.sums)]
        for trip, (offset, taps, lines) in itertools.product(range(trips), problem.columns):
            column = position * horizontal.source_step + offset + trip * shift
            for row, products in lines:
                values = read(block * tile.rows * vertical.source_step + row, column)
                for total, weight in products:
                    up, across = taps[weight]
                    sums[total] = sums[total] + values * kernel[up, across + trip, 0]
        phases = itertools.product(
            range(tile.rows), range(vertical.target_step), range(horizontal.target_step)
        )
        for total, (i, up, across) in zip(sums, phases, strict=True):
            row = (block * tile.rows + i) * vertical.target_step + up
            column = position * horizontal.target_step + across
            if row < vertical.target and column < horizontal.target:
                target[:, row, column] += total
    return target


def kernel_gradient_in_numpy(problem, source, gradient):
    """The same for a kernel gradient."""
    vertical, horizontal, tile = problem.vertical, problem.horizontal, problem.tile
    _, rows, columns, channels = source.shape
    sums = np.zeros((problem.sums, channels))
    for block, position in itertools.product(range(problem.blocks[0]), range(horizontal.count)):
        for offset, _, lines in problem.columns:
            column = position * horizontal.source_step + offset
            for row, products in lines:
                row = block * tile.rows * vertical.source_step + row
                for total, i in products:
                    output = block * tile.rows + i
                    if 0 <= row < rows and 0 <= column < columns and output < vertical.target:
                        values = source[:, row, column] * gradient[:, output, position]
                        sums[total] += values.sum(0)
    return sums.reshape(vertical.taps, horizontal.taps, 1, channels)


def assert_tables_are_right(spec):
    x, k, g = random_problem(spec)
    sizes = (spec.height, spec.width)
    values = (
        in_numpy(tiling.forward(spec, sizes), x, k),
        in_numpy(tiling.input_gradient(spec, sizes), g, k),
        kernel_gradient_in_numpy(tiling.kernel_gradient(spec, sizes), x, g),
    )
    assert_close(values, expected(spec, x, k, g), 1e-12)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("spec", SUITABLE.values(), ids=SUITABLE)
def test_tables_of_named_cases_equal_the_reference(spec):
    assert_tables_are_right(spec)


@pytest.mark.backends("tensorflow")
@hypothesis.settings(max_examples=40, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(cases.specs(max_channels=3, max_size=20))
def test_tables_of_random_cases_equal_the_reference(spec):
    spec = spec.replace(
        groups=2,
        input_channels_per_group=1,
        output_channels_per_group=1,
        data_format="channels_last",
    )
    hypothesis.assume(is_suitable(spec))
    assert_tables_are_right(spec)


def layers_of(size, widths, kernel_size=(3, 3), batch=64):
    """Depthwise layers `(divisor of the image, channels, stride)`."""
    return [
        ConvSpec(
            batch,
            size // divisor,
            size // divisor,
            channels,
            kernel_size=kernel_size,
            strides=(stride, stride),
            padding="same",
        )
        for divisor, channels, stride in widths
    ]


V1 = [(2, 32, 1), (2, 64, 2), (4, 128, 1), (4, 128, 2), (8, 256, 1), (8, 256, 2), (16, 512, 1)]
V1 += [(16, 512, 2), (32, 1024, 1)]
V2 = [(2, 32, 1), (2, 96, 2), (4, 144, 1), (4, 144, 2), (8, 192, 1), (8, 192, 2), (16, 384, 1)]
V2 += [(16, 576, 1), (16, 576, 2), (32, 960, 1)]
CONVNEXT = [(4, 96, 1), (8, 192, 1), (16, 384, 1), (32, 768, 1)]
NETWORKS = {
    "MobileNetV1 at 224": layers_of(224, V1),
    "MobileNetV2 at 224": layers_of(224, V2),
    "ConvNeXtTiny at 224": layers_of(224, CONVNEXT, (7, 7)),
}


def problems(spec):
    sizes = (spec.height, spec.width)
    return {
        "forward": tiling.forward(spec, sizes),
        "input_gradient": tiling.input_gradient(spec, sizes),
        "kernel_gradient": tiling.kernel_gradient(spec, sizes),
    }


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("specs", NETWORKS.values(), ids=NETWORKS)
def test_programs_fill_an_h100(specs):
    """At least one program for each of its 132 multiprocessors, at batch 64."""
    for spec in specs:
        for name, problem in problems(spec).items():
            rows, columns, depths = problem.blocks
            parts = 64 * rows
            if name == "kernel_gradient":
                parts, _ = problem.splits(64)
            assert parts * columns * depths >= 132, (spec, name)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("specs", NETWORKS.values(), ids=NETWORKS)
def test_sums_of_the_kernel_gradient_cost_few_bytes(specs):
    """They are written and read once; at 7x7 images of 1024 channels the most."""
    limit = 0.4 if specs is NETWORKS["ConvNeXtTiny at 224"] else 0.1
    for spec in specs:
        problem = problems(spec)["kernel_gradient"]
        splits, _ = problem.splits(64)
        moved = 2 * 4 * splits * problem.blocks[1] * problem.sums * problem.channels
        assert moved <= limit * spec.least_bytes(), spec


@pytest.mark.backends("tensorflow")
@hypothesis.settings(max_examples=200, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    cases.specs(max_channels=3000, max_size=300), hypothesis.strategies.integers(1, 99)
)
def test_tiles_fit_a_gpu(spec, batch):
    spec = spec.replace(input_channels_per_group=1, output_channels_per_group=1)
    hypothesis.assume(math.prod(spec.kernel_size) <= tiling.MOST_TAPS)
    for name, problem in problems(spec).items():
        tile = problem.tile
        for number in (tile.columns, tile.channels, tile.warps):
            assert number & (number - 1) == 0
        elements = tile.columns * tile.channels / (32 * tile.warps)
        assert tile.warps <= 4
        assert elements <= 4
        registers = problem.sums * elements + tile.rows * elements * (name == "kernel_gradient")
        assert registers <= 128 or problem.sums == spec.strides[0] * spec.strides[1]
        if name == "kernel_gradient":
            splits, length = problem.splits(batch)
            assert (splits - 1) * length < batch * problem.blocks[0] <= splits * length


# --- Where it is refused. ---

REFUSED = {
    "float64": (_SMALL.replace(compute_dtype="float64"), "received float64"),
    "channels first": (_SMALL.replace(data_format="channels_first"), "'channels_first'"),
    "multiplier": (_SMALL.replace(output_channels_per_group=2), "received 1 and 2"),
    "groups of 2": (_SMALL.replace(input_channels_per_group=2), "received 2 and 1"),
    "too many taps": (_SMALL.replace(kernel_size=(5, 10)), "received 50"),
}


@pytest.fixture
def on_gpu(monkeypatch):
    """Everything is there but the kernels themselves."""
    monkeypatch.setattr(fused, "_WHY_NOT_BACKEND", [])
    monkeypatch.setattr(fused, "_why_not_device", list)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_it_cannot_compute(name, on_gpu):
    spec, reason = REFUSED[name]
    assert why_not(_SMALL, "fused") == []
    (found,) = why_not(spec, "fused")
    assert found.startswith("fused needs ")
    assert found.endswith(reason)


@pytest.mark.parametrize("batch", [None, 2])
def test_takes_unknown_sizes(batch, on_gpu):
    """A layer is built before its sizes are known."""
    assert why_not(_SMALL.replace(batch=batch, height=None, width=None), "fused") == []


DEVICES = {
    None: "received another device",
    (7, 5): "received 7.5",
    (8, 0): None,
    (12, 0): None,
}


@pytest.mark.backends("jax", "torch")
@pytest.mark.parametrize("capability", DEVICES, ids=str)
def test_refuses_other_devices(capability, monkeypatch):
    class Kernels:
        @staticmethod
        def compute_capability():
            return capability

    monkeypatch.setattr(fused, "_WHY_NOT_BACKEND", [])
    monkeypatch.setattr(fused, "_kernels", lambda: Kernels)
    reason = DEVICES[capability]
    assert [text.split("; ")[1] for text in why_not(_SMALL, "fused")] == [reason] * bool(reason)


PACKAGES = {
    "tensorflow": ("tensorflow", "2.21.0", "JAX or PyTorch backend; received 'tensorflow'"),
    "old JAX": ("jax", "0.9.2", "jax >= 0.10; received 0.9.2"),
    "JAX": ("jax", "0.10.2", None),
    "old Triton": ("torch", "3.5.1", "triton >= 3.6; received 3.5.1"),
    "Triton": ("torch", "3.10.0+git1", None),
    "no Triton": ("torch", None, "triton >= 3.6, which is not installed"),
}


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("name", PACKAGES)
def test_refuses_other_packages(name, monkeypatch):
    backend, version, reason = PACKAGES[name]

    def find(package):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    reasons = fused._why_not_backend(backend)
    assert [reason] * bool(reason) == [text.removeprefix(WANTED[backend]) for text in reasons]


WANTED = {"tensorflow": "fused needs Keras's ", "jax": "fused needs ", "torch": "fused needs "}


def test_a_cpu_is_refused_by_layers_too():
    layer = keras.layers.DepthwiseConv2D(3)
    from diagconv_tf import DiagonalwiseDepthwiseConv2D

    layer = DiagonalwiseDepthwiseConv2D(3, lowering="fused")
    with pytest.raises(ValueError, match="cannot be computed with lowering='fused': fused needs"):
        layer.build((2, 8, 8, 4))
    assert layer.weights == []


# --- What the kernels compute, operation by operation on the CPU. ---

#: One case for each way through the kernels. JAX takes some seconds to compile one.
KERNELS = {
    "three images of three tiles": _SMALL.replace(batch=3, height=9, width=3),
    "stride 2, many channels": _SMALL.replace(
        batch=1, height=6, groups=40, strides=(2, 2), padding="same"
    ),
    "loop over columns, two channels a thread": _SMALL.replace(
        kernel_size=(2, 13), dilation_rate=(1, 2), batch=1, height=3
    ),
    "bfloat16, stride above kernel": _SMALL.replace(
        kernel_size=(2, 2), strides=(3, 3), padding="valid", compute_dtype="bfloat16"
    ),
}
if BACKEND == "torch":  # Quick there.
    KERNELS |= {
        "bfloat16": _SMALL.replace(compute_dtype="bfloat16"),
        "float16, stride 2": _SMALL.replace(strides=(2, 2), compute_dtype="float16"),
        **{name: SUITABLE[name] for name in ("unequal strides with dilation", "row kernel")},
    }

INTERPRETED = UniformChoice(Fused(interpret=True))


def is_interpreting():
    return BACKEND == "jax" or os.environ.get("TRITON_INTERPRET") == "1"


interpreted = pytest.mark.skipif(not is_interpreting(), reason="needs TRITON_INTERPRET=1")


@interpreted
@pytest.mark.backends("jax", "torch")
@pytest.mark.slow
@pytest.mark.parametrize("spec", KERNELS.values(), ids=KERNELS)
def test_kernels_equal_the_reference(spec, monkeypatch):
    # So that a program of the kernel gradient sums several tiles, the last one fewer.
    monkeypatch.setattr(tiling, "_GRADIENT_PROGRAMS", 2)
    lowering = INTERPRETED.lowering
    assert lowering.why_not(spec) == []
    problem = random_problem(spec)
    x, k, g = (keras.ops.convert_to_tensor(a, dtype=spec.compute_dtype) for a in problem)
    values = vector_jacobian(lambda x, k: convolve(spec, INTERPRETED, x, k), (x, k), g, MODES[-1])
    rounded = [keras.ops.convert_to_numpy(keras.ops.cast(a, "float32")) for a in (x, k, g)]
    names = ("forward", "input_gradient", "kernel_gradient")
    assert_close(
        values, expected(spec, *rounded), [lowering.tolerance(spec, name, False) for name in names]
    )


@interpreted
@pytest.mark.backends("jax", "torch")
@pytest.mark.slow
def test_a_kernel_for_one_pass_alone_and_the_gradient_of_a_gradient():
    """Each pass is differentiated through the other two."""
    spec = _SMALL.replace(batch=1, height=3, width=3, groups=1, kernel_size=(2, 2))
    choice = PerPassChoice(Native(), Native(), Fused(interpret=True))
    x, k, g = random_problem(spec)
    x, k = np.float32(x), np.float32(k)

    def kernel_gradient_norm(choice):
        def of(x, k):
            def loss(k):
                return keras.ops.sum(keras.ops.square(convolve(spec, choice, x, k)))

            if BACKEND == "jax":
                import jax

                return keras.ops.sum(keras.ops.square(jax.grad(loss)(k)))
            import torch

            (gradient,) = torch.autograd.grad(loss(k), k, create_graph=True)
            return gradient.square().sum()

        return of

    ones = np.float32(1)
    wanted = vector_jacobian(kernel_gradient_norm(UniformChoice(Native())), (x, k), ones, MODES[-1])
    values = vector_jacobian(kernel_gradient_norm(choice), (x, k), ones, MODES[-1])
    for value, want in zip(values, wanted, strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-4)


@interpreted
@pytest.mark.backends("jax", "torch")
def test_batches_without_images():
    spec = _SMALL.replace(batch=0, strides=(2, 2))
    x, k, g = (np.float32(a) for a in random_problem(spec))
    y, dx, dk = vector_jacobian(lambda x, k: convolve(spec, INTERPRETED, x, k), (x, k), g)
    assert (y.shape, dx.shape, dk.shape) == (spec.output_shape, spec.input_shape, k.shape)
    assert not dk.any()


@interpreted
@pytest.mark.backends("jax", "torch")
@pytest.mark.slow
def test_vmap():
    """Over inputs and kernels, and over inputs alone."""
    spec = _SMALL.replace(batch=1, height=3, width=3, groups=2, kernel_size=(2, 2))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *spec.input_shape)).astype("float32")
    k = rng.normal(size=(2, *spec.kernel_shape)).astype("float32")
    kernels = fused._kernels()
    if BACKEND == "jax":
        import jax

        vmap, tensor = jax.vmap, jax.numpy.asarray
    else:
        import torch

        vmap, tensor = torch.func.vmap, torch.tensor
        x, spec = np.moveaxis(x, -1, -3).copy(), spec.replace(data_format="channels_first")

    def forward(x, k):
        return kernels.forward(spec, x, k, True)

    x, k = tensor(x), tensor(k)
    wanted = np.stack([forward(x[i], k[i]) for i in range(2)])
    np.testing.assert_allclose(vmap(forward)(x, k), wanted, rtol=1e-5, atol=1e-6)
    wanted = np.stack([forward(x[i], k[0]) for i in range(2)])
    values = vmap(forward, (0, None))(x, k[0])
    np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.backends("torch")
def test_torch_compile_takes_the_operators_whole():
    import torch

    spec = _SMALL.replace(strides=(2, 2))
    x, k, _ = (torch.tensor(np.float32(a)) for a in random_problem(spec))
    k.requires_grad_()

    def loss(x, k):
        return convolve(spec, INTERPRETED, x, k).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (loss, compiled):
        k.grad = None
        function(x, k).backward()
        if function is loss:
            wanted = k.grad
    torch.testing.assert_close(k.grad, wanted)
    operators = (
        torch.ops.diagconv_tf.fused_forward,
        (x.permute(0, 3, 1, 2), k.detach(), (2, 2), (1, 1), "same"),
    )
    torch.library.opcheck(*operators)


@pytest.mark.backends("torch")
@pytest.mark.slow
@pytest.mark.skipif(is_interpreting(), reason="runs itself")
def test_triton_computes_the_same_in_its_interpreter():
    """In a process of its own: Triton decides once whether it interprets."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs the package triton, which PyTorch's builds for CPUs do not bring")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


# --- What they compile to for an H100, without one. ---


@pytest.fixture(scope="module")
def compiled_for_h100():
    """What the script fused_on_h100.py found, in a process of its own."""
    needed = {"jax": "jax_cuda13_plugin", "torch": "triton"}[BACKEND]
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs the package {needed}, which compiles for GPUs without one")
    script = pathlib.Path(__file__).parent / "fused_on_h100.py"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(script.parents[1])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.backends("jax", "torch")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward", "input_gradient", "kernel_gradient"])
def test_loads_are_vectors_and_nothing_is_spilled(name, compiled_for_h100):
    found = compiled_for_h100[name]
    # Four channels of float32.
    assert found["vector_loads"] >= 10
    assert found["other_loads"] == 0
    assert found["local_memory"] == 0
    assert found["fused_multiply_adds"] > 0
    assert found["multiplications"] == 0
    if BACKEND == "jax":
        assert found["heavy_kernels"] == 1
        # The kernel gradient writes its sums, and a second kernel reads them.
        assert found["bytes_over_least"] <= (1.05 if name == "kernel_gradient" else 1.0001)
