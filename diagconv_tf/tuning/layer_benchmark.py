"""Times the candidates for one workload, pass by pass, as training would run them.

Compiled like the training step: `tf.function` with or without XLA, `jax.jit`, or eager
PyTorch. What is timed is what a layer calls, `convolve`, and its gradients by the
framework; for stock it is Keras's own op.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keras import ops

from diagconv_tf.environment import Conditions
from diagconv_tf.lowerings import convolve, parse
from diagconv_tf.measurements import WRONG_NUMBERS, Measured
from diagconv_tf.spec import PASSES, STOCK
from diagconv_tf.timing import first_samples, time_interleaved
from diagconv_tf.tuning import checking
from diagconv_tf.tuning.passes import Convolution, compile_passes, random_tensors
from diagconv_tf.tuning.workloads import Workload

#: Timed rounds of the candidates that are left after their first samples.
ROUNDS = 15

#: The rounds of one pass end after so many seconds, but not before the first.
ROUNDS_SECONDS = 1.0

#: Calls in a sample where the device is not the host, because the host may take longer
#: to start one and to wait for it than a GPU computes. (Not measured yet.)
CALLS_ON_DEVICE = 20

#: What takes so many times as long as the best in its first samples is dropped.
DROP_ABOVE = 3.0


def measure_alone(
    workload: Workload,
    names: Sequence[str],
    conditions: Conditions,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Measured]]:
    """Times of candidates for the three passes of a workload, on inputs on the device.

    What fails, or computes wrong numbers, has an error in place of a time; what is
    far from the best has few samples.

    Args:
        workload: the workload; its sizes must be known.
        names: lowerings, or `"stock"`.
        conditions: whether to compile, and for which device.
        clock: returns the time in seconds.

    Returns:
        Pass → candidate → its times, in the order of `names`.
    """
    failed = {name: _failure(workload, name, conditions) for name in names}
    right = [name for name in names if failed[name] is None]
    tensors = random_tensors(workload.spec)
    calls = 1 if conditions.device_kind == "cpu" else CALLS_ON_DEVICE
    found: dict[str, dict[str, Measured]] = {}
    for pass_name in PASSES:
        functions = {
            name: compile_passes(
                convolution(workload, name), (pass_name,), tensors, bool(conditions.compiled)
            )
            for name in right
        }
        timed = measure_functions(functions, calls, clock)
        found[pass_name] = {name: failed[name] or timed[name] for name in names}
    return found


def measure_functions(
    functions: Mapping[str, Callable[[], Any]], calls: int, clock: Callable[[], float]
) -> dict[str, Measured]:
    """Times of functions; only those near the best after the first samples run in rounds."""
    first = first_samples(functions, calls=calls, clock=clock)
    measured = {name: Measured.from_timings(timings) for name, timings in first.items()}
    most = DROP_ABOVE * min((m.seconds for m in measured.values()), default=0.0)
    left = {n: functions[n] for n, m in measured.items() if m.ok and m.seconds <= most}
    again = time_interleaved(
        left, rounds=ROUNDS, warmup=0, calls=calls, budget_seconds=ROUNDS_SECONDS, clock=clock
    )
    for name, timings in again.items():
        measured[name] = Measured.from_timings(timings, measured[name].first_seconds)
    return measured


def convolution(workload: Workload, name: str) -> Convolution:
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


def _failure(workload: Workload, name: str, conditions: Conditions) -> Measured | None:
    """Why a lowering is not timed; None where it is right."""
    if name == STOCK:
        return None
    try:
        wrong = checking.why_wrong(workload.spec, name, conditions)
    except Exception as error:
        return Measured.failed(error)
    return Measured.failed(f"{WRONG_NUMBERS}: {wrong}") if wrong else None
