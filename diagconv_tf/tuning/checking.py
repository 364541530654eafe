"""Whether a lowering computes the right numbers, where the model will train.

The reference is NumPy in float64, written from the definition, so it needs neither
stock nor native to be right. What is checked is what a layer runs, `convolve` and its
gradients by the framework, compiled as the training step is, for every distinct
workload of the variant that would win.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from keras import ops

from diagconv_tf.environment import Conditions
from diagconv_tf.lowerings import LoweringLike, convolve, parse
from diagconv_tf.spec import PASSES, ConvSpec
from diagconv_tf.tuning.passes import compile_passes, random_tensors

#: Images in a batch that is checked: enough for sums over the batch. More would cost
#: memory and time of the reference.
IMAGES = 2


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
    tensors = random_tensors(spec)
    # The reference has the same rounded inputs.
    wanted = reference(spec, *map(_to_float64, tensors))
    run = compile_passes(
        lambda x, k: convolve(spec, choice, x, k), PASSES, tensors, bool(conditions.compiled)
    )
    for pass_name, value, want in zip(PASSES, run(), wanted, strict=True):
        most = choice.for_pass(pass_name).tolerance(spec, pass_name, conditions.allows_tf32)
        error = np.linalg.norm(_to_float64(value) - want) / max(float(np.linalg.norm(want)), 1e-30)
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
    first = spec.data_format == "channels_first"
    x, g = (np.moveaxis(a, 1, -1) if first else a for a in (inputs, output_gradient))
    height, width = x.shape[1:3]
    pads = spec.padding_for((height, width))
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    x = x.reshape(*x.shape[:3], spec.groups, -1)
    g = g.reshape(*g.shape[:3], spec.groups, -1)
    k = kernel.reshape(*spec.kernel_size, -1, *g.shape[3:])
    y, dx, dk = np.zeros(g.shape), np.zeros(x.shape), np.zeros(k.shape)
    for taps in itertools.product(*map(range, spec.kernel_size)):
        rows, columns = (
            slice(tap * rate, tap * rate + (size - 1) * stride + 1, stride)
            for tap, rate, size, stride in zip(
                taps, spec.dilation_rate, g.shape[1:3], spec.strides, strict=True
            )
        )
        window = np.s_[:, rows, columns]
        y += np.einsum("nhwgi,igo->nhwgo", x[window], k[taps])
        dx[window] += np.einsum("nhwgo,igo->nhwgi", g, k[taps])
        dk[taps] = np.einsum("nhwgi,nhwgo->igo", x[window], g)
    (top, _), (left, _) = pads
    dx = dx[:, top : top + height, left : left + width]
    y, dx = (a.reshape(*a.shape[:3], -1) for a in (y, dx))
    if first:
        y, dx = np.moveaxis(y, -1, 1), np.moveaxis(dx, -1, 1)
    return y, dx, dk.reshape(kernel.shape)


def _to_float64(value: Any) -> np.ndarray:
    if "float16" in str(value.dtype):  # NumPy has no bfloat16.
        value = ops.cast(value, "float32")
    return np.asarray(ops.convert_to_numpy(value), dtype="float64")
