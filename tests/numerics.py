"""Running a lowering on random numbers, on any backend, in any way it compiles."""

import functools
import os

import keras
import numpy as np

from diagconv_tf import backends
from diagconv_tf.lowerings import convolve, parse
from diagconv_tf.spec import PASSES
from tests import reference

BACKEND = keras.backend.backend()

#: Whether the long form of the tests is asked for; see conftest.py.
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"

#: How each backend can run a function; the last is the one that training uses.
MODES = {
    "tensorflow": ("eager", "graph", "xla"),
    "jax": ("eager", "compiled"),
    "torch": ("eager",),
}[BACKEND]


def random_problem(spec, seed=0):
    """Inputs, kernel and output gradient of `spec` as float64 NumPy arrays."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=spec.input_shape),
        rng.normal(size=spec.kernel_shape),
        rng.normal(size=spec.output_shape),
    )


def expected(spec, x, k, g):
    """`(outputs, input gradient, kernel gradient)` by the NumPy reference."""
    first = spec.data_format == "channels_first"
    x, g = ((np.moveaxis(a, 1, -1) if first else a) for a in (x, g))
    y, dx, dk, _ = reference.conv(
        x,
        k,
        g,
        groups=spec.groups,
        strides=spec.strides,
        dilation_rate=spec.dilation_rate,
        padding=spec.padding,
    )
    return (np.moveaxis(y, -1, 1), np.moveaxis(dx, -1, 1), dk) if first else (y, dx, dk)


def vector_jacobian(function, arguments, cotangent, mode="eager"):
    """`function(*arguments)` and its gradients by each argument.

    Args:
        function: of tensors, returns one tensor.
        arguments: NumPy arrays or tensors.
        cotangent: gradient by the result.
        mode: one of `MODES`.

    Returns:
        `[result, *gradients]` as NumPy arrays.
    """
    arguments = [keras.ops.convert_to_tensor(a) for a in arguments]
    cotangent = keras.ops.convert_to_tensor(cotangent)
    run = _compile(functools.partial(_vjp(), function), mode)
    return [_to_numpy(value) for value in run(cotangent, *arguments)]


def run_lowering(spec, lowering, x, k, g, mode="eager", dtype=None):
    """`[outputs, input gradient, kernel gradient]` of a lowering."""
    dtype = dtype or spec.compute_dtype
    x, k, g = (keras.ops.convert_to_tensor(a, dtype=dtype) for a in (x, k, g))
    return vector_jacobian(functools.partial(convolve, spec, parse(lowering)), (x, k), g, mode)


def tolerances(spec, lowering):
    """For each pass, the relative error that the lowering allows on this device."""
    choice = parse(lowering)
    allows_tf32 = backends.current().default_device()[0] == "gpu"
    return [choice.for_pass(name).tolerance(spec, name, allows_tf32) for name in PASSES]


def assert_close(values, wanted, tolerances, scales=None):
    """`‖value - wanted‖ <= tolerance * ‖scale‖` for each of the three results.

    Args:
        tolerances: one for each result, or one for all.
        scales: what the error is relative to; `wanted` where None. Sums that
            cancel need `expected` of the absolute values, to which rounding
            errors are proportional.
    """
    names = ("outputs", "input gradient", "kernel gradient")
    limits = np.broadcast_to(tolerances, len(names))
    rows = zip(names, values, wanted, scales or wanted, limits, strict=True)
    for name, value, want, scale, limit in rows:
        value = np.asarray(value, "float64")
        assert value.shape == want.shape, f"{name}: shape {value.shape}, expected {want.shape}"
        error = np.linalg.norm(value - want) / max(np.linalg.norm(scale), 1e-30)
        assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.2e}"


def _to_numpy(value):
    if str(value.dtype).endswith("bfloat16"):
        value = keras.ops.cast(value, "float32")
    return keras.ops.convert_to_numpy(value)


def _vjp():
    if BACKEND == "tensorflow":
        import tensorflow as tf

        def vjp(function, cotangent, *arguments):
            with tf.GradientTape() as tape:
                tape.watch(arguments)
                result = function(*arguments)
            return result, *tape.gradient(result, arguments, cotangent)

    elif BACKEND == "jax":
        import jax

        def vjp(function, cotangent, *arguments):
            result, pullback = jax.vjp(function, *arguments)
            return result, *pullback(cotangent)

    else:
        import torch

        def vjp(function, cotangent, *arguments):
            arguments = [a.detach().requires_grad_() for a in arguments]
            result = function(*arguments)
            gradients = torch.autograd.grad(result, arguments, cotangent, create_graph=True)
            return result.detach(), *(g.detach() for g in gradients)

    return vjp


def _compile(function, mode):
    if mode == "eager":
        return function
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, jit_compile=mode == "xla")
