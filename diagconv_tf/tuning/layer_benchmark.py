"""Times the candidates for one workload, pass by pass, as training would run them.

Compiled like the training step: `tf.function` with or without XLA, `jax.jit`, or eager
PyTorch. What is timed is what a layer calls, `convolve`, and its gradients by the
framework; for stock it is Keras's own op.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from diagconv_tf.environment import Conditions
from diagconv_tf.lowerings import convolve, parse
from diagconv_tf.measurements import WRONG_NUMBERS, Measured
from diagconv_tf.spec import PASSES, STOCK, ConvSpec
from diagconv_tf.timing import first_samples, time_interleaved
from diagconv_tf.tuning import checking
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


class LayerBenchmark:
    """The candidates for one workload, on inputs that stay on the device.

    Args:
        workload: the workload; its sizes must be known.
        conditions: whether to compile.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        workload: Workload,
        conditions: Conditions,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.workload = workload
        self.conditions = conditions
        self.clock = clock
        spec = workload.spec
        self._tensors = [
            ops.convert_to_tensor(array, dtype=spec.compute_dtype)
            for array in checking.random_arrays(spec)
        ]

    def measure(
        self, names: Sequence[str], rounds: int = ROUNDS, seconds: float = ROUNDS_SECONDS
    ) -> dict[str, dict[str, Measured]]:
        """Times of candidates for the three passes.

        What fails, or computes wrong numbers, has an error in place of a time;
        what is far from the best has few samples.

        Args:
            names: lowerings, or `"stock"`.
            rounds: samples of each candidate that is not dropped.
            seconds: the rounds of a pass end after so many seconds.

        Returns:
            Pass → candidate → its times, in the order of `names`.
        """
        failed = {name: error for name in names if (error := self._failure(name)) is not None}
        found = {}
        for pass_name in PASSES:
            right = [name for name in names if name not in failed]
            timed = self._measure_pass(pass_name, right, rounds, seconds)
            found[pass_name] = {name: failed.get(name) or timed[name] for name in names}
        return found

    def _failure(self, name: str) -> Measured | None:
        """Why a lowering is not timed; None where it is right."""
        if name == STOCK:
            return None
        try:
            wrong = checking.why_wrong(self.workload.spec, name, self.conditions)
        except Exception as error:
            return Measured.failed(error)
        return Measured.failed(f"{WRONG_NUMBERS}: {wrong}") if wrong else None

    def _measure_pass(
        self, pass_name: str, names: Sequence[str], rounds: int, seconds: float
    ) -> dict[str, Measured]:
        functions = {name: self._function(name, pass_name) for name in names}
        calls = 1 if self.conditions.device_kind == "cpu" else CALLS_ON_DEVICE
        first = first_samples(functions, calls=calls, clock=self.clock)
        measured = {name: Measured.from_timings(timings) for name, timings in first.items()}
        best = min((m.median for m in measured.values() if m.ok), default=0.0)
        left = [n for n, m in measured.items() if m.ok and m.median <= DROP_ABOVE * best]
        again = time_interleaved(
            {name: functions[name] for name in left},
            rounds=rounds,
            warmup=0,
            calls=calls,
            budget_seconds=seconds,
            clock=self.clock,
        )
        for name, timings in again.items():
            measured[name] = Measured.from_timings(timings, measured[name].first_seconds)
        return measured

    def _function(self, name: str, pass_name: str) -> Callable[[], Any]:
        spec = self.workload.spec
        if name == STOCK:
            convolution = _stock_convolution(spec, self.workload.stock_op)
        else:
            choice = parse(name)

            def convolution(x: Any, k: Any) -> Any:
                return convolve(spec, choice, x, k)

        compiled = bool(self.conditions.compiled)
        return checking.compiled_passes(convolution, (pass_name,), self._tensors, compiled)


def _stock_convolution(spec: ConvSpec, stock_op: str) -> Callable[[Any, Any], Any]:
    """What the stock layer calls."""
    arguments = {
        "strides": spec.strides,
        "padding": spec.padding,
        "data_format": spec.data_format,
        "dilation_rate": spec.dilation_rate,
    }
    if stock_op == "conv":
        return lambda x, k: ops.conv(x, k, **arguments)
    shape = (*spec.kernel_size, spec.groups, spec.output_channels_per_group)
    return lambda x, k: ops.depthwise_conv(x, ops.reshape(k, shape), **arguments)
