"""The three passes of one convolution, as a training step runs and compiles them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from diagconv_tf.spec import PASSES, ConvSpec, Pass

#: A function of inputs and kernel.
Convolution = Callable[[Any, Any], Any]


def random_tensors(spec: ConvSpec) -> list[Any]:
    """Inputs, kernel and output gradient, normally distributed, the same on each call."""
    rng = np.random.default_rng(0)
    shapes = (spec.input_shape, spec.kernel_shape, spec.output_shape)
    return [
        ops.convert_to_tensor(rng.standard_normal(shape, dtype="float32"), spec.compute_dtype)
        for shape in shapes
    ]


def compile_passes(
    convolution: Convolution, wanted: Sequence[Pass], tensors: Sequence[Any], compiled: bool
) -> Callable[[], tuple[Any, ...]]:
    """Some of the three passes of a convolution; the gradients are the framework's.

    Args:
        convolution: function of inputs and kernel.
        wanted: names of passes, in the order of the results.
        tensors: inputs, kernel and output gradient.
        compiled: whether XLA (or torch.compile) compiles them; JAX always does.

    Returns:
        A function without arguments that returns a tensor for each pass; its first
        call compiles. On TensorFlow and JAX it computes nothing that `wanted` does
        not need; on PyTorch a gradient does not include the forward pass.
    """
    backend = keras.backend.backend()
    if backend == "torch":
        return _torch_passes(convolution, wanted, tensors, compiled)
    all_passes = _tensorflow_passes if backend == "tensorflow" else _jax_passes

    def run(x: Any, k: Any, g: Any) -> tuple[Any, ...]:
        # A compiled graph drops what does not feed its results.
        found = dict(zip(PASSES, all_passes(convolution, x, k, g), strict=True))
        return tuple(found[name] for name in wanted)

    if backend == "jax":
        import jax

        return functools.partial(jax.jit(run), *tensors)
    import tensorflow as tf

    function = tf.function(run, autograph=False, jit_compile=compiled)
    # Not by calling `function`: TensorFlow warns of many such functions.
    concrete = functools.cache(lambda: function.get_concrete_function(*tensors))
    return lambda: concrete()(*tensors)


def _tensorflow_passes(convolution: Convolution, x: Any, k: Any, g: Any) -> tuple[Any, ...]:
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([x, k])
        y = convolution(x, k)
    return y, *tape.gradient(y, (x, k), g)


def _jax_passes(convolution: Convolution, x: Any, k: Any, g: Any) -> tuple[Any, ...]:
    import jax

    y, gradients = jax.vjp(convolution, x, k)
    return y, *gradients(g)


def _torch_passes(
    convolution: Convolution, wanted: Sequence[Pass], tensors: Sequence[Any], compiled: bool
) -> Callable[[], tuple[Any, ...]]:
    import torch

    if compiled:
        convolution = torch.compile(convolution)
    x, k, g = (tensor.detach().clone() for tensor in tensors)
    arguments = dict(zip(PASSES[1:], (x, k), strict=True))
    needed = [arguments[name].requires_grad_() for name in wanted if name in arguments]
    if not needed:
        return lambda: (convolution(x, k),)
    outputs = functools.cache(lambda: convolution(x, k))

    def run() -> tuple[Any, ...]:
        found = iter(torch.autograd.grad(outputs(), needed, g, retain_graph=True))
        return tuple(outputs() if name == "forward" else next(found) for name in wanted)

    return run
