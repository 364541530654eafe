"""Whether a lowering computes the right numbers, where the model will train.

The reference is NumPy in float64, written from the definition, so it needs neither
stock nor native to be right. What is checked is what a layer runs, `convolve` and its
gradients by the framework, compiled as the training step is, for every distinct
workload of the variant that would win.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from diagconv_tf.environment import Conditions
from diagconv_tf.lowerings import LoweringLike, convolve, parse
from diagconv_tf.spec import PASSES, ConvSpec

#: Images in a batch that is checked: enough for sums over the batch. More would cost
#: memory and time of the reference.
IMAGES = 2

Convolution = Callable[[Any, Any], Any]


def why_wrong(spec: ConvSpec, lowering: LoweringLike, conditions: Conditions) -> str:
    """What is wrong with the numbers of a lowering; empty where nothing is.

    Args:
        spec: a workload whose sizes are known; at most `IMAGES` of its batch
            are computed.
        lowering: as a layer's `lowering`.
        conditions: whether to compile, and what the device may round to.
    """
    spec = spec.replace(batch=min(spec.batch or IMAGES, IMAGES))
    choice = parse(lowering)
    arrays = random_arrays(spec)
    tensors = [ops.convert_to_tensor(a, dtype=spec.compute_dtype) for a in arrays]
    # The reference has the same rounded inputs.
    wanted = reference(spec, *map(to_numpy, tensors))
    run = compiled_passes(
        lambda x, k: convolve(spec, choice, x, k), PASSES, tensors, bool(conditions.compiled)
    )
    for pass_name, value, want in zip(PASSES, run(), wanted, strict=True):
        most = choice.for_pass(pass_name).tolerance(spec, pass_name, conditions.allows_tf32)
        error = np.linalg.norm(to_numpy(value) - want) / max(float(np.linalg.norm(want)), 1e-30)
        if not error <= most:  # It may be NaN.
            return (
                f"the {pass_name.replace('_', ' ')} of {spec.window_text} on {spec.size_text} has "
                f"a relative error of {error:.2e}, above {most:.2e}"
            )
    return ""


def reference(
    spec: ConvSpec, inputs: np.ndarray, kernel: np.ndarray, output_gradient: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs, input gradient and kernel gradient, in float64, tap by tap.

    Shapes are those of `ConvSpec`.
    """
    batch, groups = spec.batch, spec.groups
    of_input, of_output = spec.input_channels_per_group, spec.output_channels_per_group
    height, width = spec.output_size
    pads = spec.padding_for((spec.height, spec.width))
    x = np.pad(_channels_last(spec, inputs), ((0, 0), *pads, (0, 0)))
    x = x.reshape(*x.shape[:3], groups, of_input)
    g = _channels_last(spec, output_gradient).reshape(batch, height, width, groups, of_output)
    k = kernel.reshape(*spec.kernel_size, of_input, groups, of_output)
    y, dx, dk = np.zeros(g.shape), np.zeros(x.shape), np.zeros(k.shape)
    for row, column in itertools.product(*map(range, spec.kernel_size)):
        window = (
            slice(None),
            *(
                slice(tap * rate, tap * rate + (size - 1) * stride + 1, stride)
                for tap, rate, size, stride in zip(
                    (row, column), spec.dilation_rate, (height, width), spec.strides, strict=True
                )
            ),
        )
        y += np.einsum("nhwgi,igo->nhwgo", x[window], k[row, column])
        dx[window] += np.einsum("nhwgo,igo->nhwgi", g, k[row, column])
        dk[row, column] = np.einsum("nhwgi,nhwgo->igo", x[window], g)
    (top, _), (left, _) = pads
    dx = dx[:, top : top + spec.height, left : left + spec.width]
    return (
        _arranged(spec, y.reshape(batch, height, width, -1)),
        _arranged(spec, dx.reshape(batch, spec.height, spec.width, -1)),
        dk.reshape(spec.kernel_shape),
    )


def _channels_last(spec: ConvSpec, array: np.ndarray) -> np.ndarray:
    return array if spec.data_format == "channels_last" else np.moveaxis(array, 1, -1)


def _arranged(spec: ConvSpec, array: np.ndarray) -> np.ndarray:
    return array if spec.data_format == "channels_last" else np.moveaxis(array, -1, 1)


def random_arrays(spec: ConvSpec) -> list[np.ndarray]:
    """Inputs, kernel and output gradient, normally distributed, the same on each call."""
    rng = np.random.default_rng(0)
    shapes = (spec.input_shape, spec.kernel_shape, spec.output_shape)
    return [rng.standard_normal(shape, dtype="float32") for shape in shapes]


def to_numpy(value: Any) -> np.ndarray:
    """A tensor as float64."""
    if "float16" in str(value.dtype):  # NumPy has no bfloat16.
        value = ops.cast(value, "float32")
    return np.asarray(ops.convert_to_numpy(value), "float64")


def compiled_passes(
    convolution: Convolution, wanted: Sequence[str], tensors: Sequence[Any], compiled: bool
) -> Callable[[], tuple[Any, ...]]:
    """Some of the three passes of a convolution, as training runs them.

    Args:
        convolution: function of inputs and kernel; the gradients are the
            framework's.
        wanted: names of passes, in the order of the results.
        tensors: inputs, kernel and output gradient.
        compiled: whether XLA (or torch.compile) compiles them.

    Returns:
        A function without arguments that returns a tensor for each pass. On
        TensorFlow and JAX it computes nothing that `wanted` does not need; on
        PyTorch one gradient does not include the forward pass.
    """
    backend = keras.backend.backend()
    make = {"tensorflow": _on_tensorflow, "jax": _on_jax, "torch": _on_torch}[backend]
    return make(convolution, tuple(wanted), tuple(tensors), compiled)


def _on_tensorflow(
    convolution: Convolution, wanted: tuple, tensors: tuple, compiled: bool
) -> Callable[[], tuple[Any, ...]]:
    import tensorflow as tf

    def run(x: Any, k: Any, g: Any) -> tuple[Any, ...]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([x, k])
            y = convolution(x, k)
        # A graph drops what does not feed its results.
        dx, dk = tape.gradient(y, (x, k), g)
        return tuple(dict(zip(PASSES, (y, dx, dk), strict=True))[name] for name in wanted)

    function = tf.function(run, autograph=False, jit_compile=compiled)
    traced: list[Any] = []

    def call() -> tuple[Any, ...]:
        if not traced:
            # Not by calling `function`: TensorFlow warns of many such functions.
            traced.append(function.get_concrete_function(*tensors))
        return traced[0](*tensors)

    return call


def _on_jax(
    convolution: Convolution, wanted: tuple, tensors: tuple, compiled: bool
) -> Callable[[], tuple[Any, ...]]:
    import jax

    @jax.jit
    def run(x: Any, k: Any, g: Any) -> tuple[Any, ...]:
        y, gradients = jax.vjp(convolution, x, k)
        dx, dk = gradients(g)
        return tuple(dict(zip(PASSES, (y, dx, dk), strict=True))[name] for name in wanted)

    return lambda: run(*tensors)


def _on_torch(
    convolution: Convolution, wanted: tuple, tensors: tuple, compiled: bool
) -> Callable[[], tuple[Any, ...]]:
    import torch

    x, k, g = tensors
    if compiled:
        convolution = torch.compile(convolution)
    if wanted == ("forward",):

        def forward() -> tuple[Any, ...]:
            with torch.no_grad():
                return (convolution(x, k),)

        return forward
    arguments = {
        "input_gradient": x.detach().clone(),
        "kernel_gradient": k.detach().clone(),
    }
    needed = [arguments[name] for name in wanted if name != "forward"]
    for argument in needed:
        argument.requires_grad_()
    outputs: list[Any] = []

    def gradients() -> tuple[Any, ...]:
        if not outputs:  # Eager: a gradient's time does not include the forward pass.
            outputs.append(convolution(*arguments.values()))
        found = iter(torch.autograd.grad(outputs[0], needed, g, retain_graph=True))
        return tuple(outputs[0].detach() if n == "forward" else next(found) for n in wanted)

    return gradients
