"""One convolution with both gradients, as a training step runs it; times of its candidates.

Compiled like the training step: `tf.function` with or without XLA, `jax.jit`, eager
PyTorch or `torch.compile`. What is timed is what a layer calls, `convolve`, and its
gradients by the framework; for stock it is Keras's own op.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from diagconv_tf.environment import Conditions
from diagconv_tf.lowerings import convolve, parse
from diagconv_tf.measurements import Measured, Workload
from diagconv_tf.spec import STOCK, ConvSpec
from diagconv_tf.tuning.contest import time_first_call, time_rounds

#: The rounds of one workload end after so many seconds, if a decision is possible.
ROUNDS_SECONDS = 1.0

#: Calls in a sample where the device is not the host, because the host may take longer
#: to start one and to wait for it than a GPU computes. (Not measured yet.)
CALLS_ON_DEVICE = 20


def measure_alone(
    workload: Workload,
    names: Sequence[str],
    conditions: Conditions,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Measured]:
    """Times of candidates for a workload, all passes together, on inputs on the device.

    Args:
        workload: the workload; its sizes must be known.
        names: lowerings, and `"stock"`.
        conditions: whether to compile, and for which device.
        clock: returns the time in seconds.

    Returns:
        Candidate → its times, or its error, in the order of `names`.
    """
    tensors = random_tensors(workload.spec)
    functions = {
        name: with_gradients(_convolution(workload, name), tensors, conditions.compiled)
        for name in names
    }
    return time_rounds(
        functions,
        {name: time_first_call(function, clock) for name, function in functions.items()},
        seconds=ROUNDS_SECONDS,
        calls=1 if conditions.device_kind == "cpu" else CALLS_ON_DEVICE,
        clock=clock,
    )


def random_tensors(spec: ConvSpec) -> list[Any]:
    """Inputs, kernel and output gradient, normally distributed, the same on each call."""
    rng = np.random.default_rng(0)
    shapes = (spec.input_shape, spec.kernel_shape, spec.output_shape)
    return [
        ops.convert_to_tensor(rng.standard_normal(shape, dtype="float32"), spec.compute_dtype)
        for shape in shapes
    ]


def with_gradients(
    convolution: Callable[[Any, Any], Any], tensors: Sequence[Any], compiled: bool | None
) -> Callable[[], tuple[Any, Any, Any]]:
    """The three passes of a convolution in one function; the gradients are the framework's.

    Args:
        convolution: function of inputs and kernel.
        tensors: inputs, kernel and output gradient.
        compiled: whether XLA (or torch.compile) compiles them; JAX always does.

    Returns:
        A function without arguments that returns outputs, input gradient and
        kernel gradient; its first call compiles.
    """
    if keras.backend.backend() == "torch":
        import torch

        if compiled:
            convolution = torch.compile(convolution)
        *arguments, g = (tensor.detach().clone() for tensor in tensors)

        def run_eagerly() -> tuple[Any, Any, Any]:
            y = convolution(*(tensor.requires_grad_() for tensor in arguments))
            return y, *torch.autograd.grad(y, arguments, g)

        return run_eagerly

    if keras.backend.backend() == "jax":
        import jax

        def run_functionally(x: Any, k: Any, g: Any) -> tuple[Any, Any, Any]:
            y, gradients = jax.vjp(convolution, x, k)
            return y, *gradients(g)

        return functools.partial(jax.jit(run_functionally), *tensors)

    import tensorflow as tf

    def run(x: Any, k: Any, g: Any) -> tuple[Any, Any, Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([x, k])
            y = convolution(x, k)
        return y, *tape.gradient(y, (x, k), g)

    function = tf.function(run, autograph=False, jit_compile=bool(compiled))
    # Not by calling `function`: TensorFlow warns of many such functions.
    concrete = functools.cache(lambda: function.get_concrete_function(*tensors))
    return lambda: concrete()(*tensors)


def _convolution(workload: Workload, name: str) -> Callable[[Any, Any], Any]:
    """What a layer calls: with a lowering, or as `"stock"`."""
    spec = workload.spec
    if name != STOCK:
        choice = parse(name)
        return lambda x, k: convolve(spec, choice, x, k)
    arguments = {
        "strides": spec.strides,
        "padding": spec.padding,
        "data_format": spec.data_format,
        "dilation_rate": spec.dilation_rate,
    }
    if workload.stock_op == "conv":
        return lambda x, k: ops.conv(x, k, **arguments)
    shape = (*spec.kernel_size, spec.groups, spec.output_channels_per_group)
    return lambda x, k: ops.depthwise_conv(x, ops.reshape(k, shape), **arguments)
