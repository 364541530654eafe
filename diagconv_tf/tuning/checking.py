"""Whether a lowering computes the right numbers, where the model will train.

The reference is NumPy in float64, written from the definition, so it needs neither
stock nor native to be right. What is checked is what a layer runs, `convolve` and its
gradients by the framework, compiled as the training step is, for every distinct
workload of the variant that would win, at the size that `checked_size` gives.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from keras import ops

from diagconv_tf.environment import Conditions
from diagconv_tf.lowerings import LoweringLike, convolve, parse
from diagconv_tf.spec import PASSES, ConvSpec
from diagconv_tf.tuning.layer_benchmark import random_tensors, with_gradients

#: Images in a batch that is checked: enough for sums over the batch. More would cost
#: memory and time of the reference.
IMAGES = 2

#: More channel groups than these two are left out, but for those beyond a multiple of the
#: first: it is the width of blocks in a contest. `lowerings` treats up to 32 in other ways.
_BLOCK, _GROUPS = 32, 64


def checked_size(spec: ConvSpec, conditions: Conditions) -> ConvSpec:
    """The workload that is checked for `spec`: the same computation, of fewer numbers.

    Under XLA on a CPU a check is the compilation of a program, which depends on
    kernel, strides, dilation, padding on each side, and blocks of channels with
    their rest. Those are kept, and many workloads of a model become one.
    Elsewhere libraries may choose other code for other sizes, and checks take
    less time: there only the batch is made smaller.

    Args:
        spec: a workload whose sizes are known.
        conditions: where it runs.
    """
    spec = spec.replace(batch=min(spec.batch or IMAGES, IMAGES))
    if not (conditions.compiled and conditions.device_kind == "cpu"):
        return spec
    height, width = (
        # Whole strides are left out, and two kernels remain: one at each border.
        size - max(0, (size - 2 * ((taps - 1) * rate + 1)) // stride) * stride
        for size, taps, rate, stride in zip(
            (spec.height or 1, spec.width or 1),
            spec.kernel_size,
            spec.dilation_rate,
            spec.strides,
            strict=True,
        )
    )
    groups = min(spec.groups, _GROUPS + spec.groups % _BLOCK)
    return spec.replace(height=height, width=width, groups=groups)


def why_wrong(spec: ConvSpec, lowering: LoweringLike, conditions: Conditions) -> str:
    """What is wrong with the numbers of a lowering; empty where nothing is.

    Args:
        spec: a workload as `checked_size` returns it.
        lowering: as a layer's `lowering`.
        conditions: whether to compile, and what the device may round to.
    """
    choice = parse(lowering)
    tensors = random_tensors(spec)
    # The reference has the same rounded inputs.
    wanted = reference(spec, *map(_to_float64, tensors))
    run = with_gradients(lambda x, k: convolve(spec, choice, x, k), tensors, conditions.compiled)
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
