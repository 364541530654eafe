"""Times the candidates for one problem, pass by pass, as training would run them.

Compiled like the training step: `tf.function` with or without XLA, `jax.jit`,
or eager PyTorch. What is timed is what a layer calls, `convolve`, and its
gradients by the framework; for stock it is Keras's own op.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from diagconv_tf.environment import Conditions
from diagconv_tf.lowerings import convolve, parse
from diagconv_tf.measurements import WRONG_NUMBERS, Measured
from diagconv_tf.spec import STOCK, ConvSpec
from diagconv_tf.timing import time_interleaved
from diagconv_tf.tuning.problems import Problem
from diagconv_tf.tuning.pruning import first_samples

#: Timed rounds of the candidates that are left after the first.
ROUNDS = 15

#: The rounds of one pass end after so many seconds (but not before the first).
ROUNDS_SECONDS = 1.0

#: Calls in a sample where the device is none of the host's own, because the host may
#: take longer to start one and to wait for it than a GPU computes (not measured yet).
CALLS_ON_DEVICE = 20

#: What takes so many times as long as the best in its first samples is dropped.
DROP_ABOVE = 3.0

#: Unit roundoff: half the distance from 1 to the next number.
_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
_TF32_ROUNDOFF = 2.0**-11


def tolerance(spec: ConvSpec, pass_name: str, conditions: Conditions) -> float:
    """The largest relative error, by norm, of a candidate that may win.

    Rounding errors of a sum of n terms grow like the root of n times the unit
    roundoff (Higham, Accuracy and Stability of Numerical Algorithms, section
    2.8: the rule of thumb for statistically independent errors); the result is
    rounded a few times more. The factors 4 and 16 leave room. Sums of half
    precision are made in float32, and on GPUs standard convolutions of float32
    are allowed TensorFloat-32, as frameworks do.
    """
    taps = int(np.prod(spec.kernel_size))
    terms = {
        "forward": taps * spec.input_channels_per_group,
        "input_gradient": taps * spec.output_channels_per_group,
        "kernel_gradient": (spec.batch or 1) * int(np.prod([n or 1 for n in spec.output_size])),
    }[pass_name]
    rounded = _ROUNDOFF[spec.compute_dtype]
    summed = min(rounded, _ROUNDOFF["float32"])
    if spec.compute_dtype == "float32" and conditions.device_kind != "cpu":
        rounded = _TF32_ROUNDOFF
    return 16 * rounded + 4 * terms**0.5 * summed


class ProblemBench:
    """Candidates for one problem, on inputs that stay on the device.

    Args:
        problem: the problem; its sizes must be known.
        conditions: whether to compile.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        problem: Problem,
        conditions: Conditions,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.problem = problem
        self.conditions = conditions
        self.clock = clock
        rng = np.random.default_rng(0)
        spec = problem.spec
        self._arrays = [
            rng.standard_normal(shape, dtype="float32")
            for shape in (spec.input_shape, spec.kernel_shape, spec.output_shape)
        ]
        self._tensors = self._make_tensors(spec.compute_dtype)

    def measure(
        self,
        pass_name: str,
        names: Sequence[str],
        best: float | None = None,
        rounds: int = ROUNDS,
        seconds: float = ROUNDS_SECONDS,
    ) -> dict[str, Measured]:
        """Times of candidates for one pass.

        Whatever fails, or computes other numbers than native, has an error in
        place of a time; what is far from the best has few samples.

        Args:
            pass_name: `"forward"`, `"input_gradient"` or `"kernel_gradient"`.
            names: lowerings, or `"stock"`.
            best: the best time in seconds that is known already.
            rounds: samples of each candidate that is not dropped.
            seconds: the rounds end after so many seconds.

        Returns:
            Candidate → its times, in the order of `names`.
        """
        results: dict[str, Any] = {}
        functions = {name: self._function(name, pass_name, self._tensors) for name in names}
        keeping = {name: _keeping(results, name, functions[name]) for name in names}
        calls = 1 if self.conditions.device_kind == "cpu" else CALLS_ON_DEVICE
        first = first_samples(keeping, self.clock, calls)
        measured = {name: Measured.from_timings(timings) for name, timings in first.items()}
        measured.update(self._wrong(pass_name, results, measured))
        results.clear()  # All candidates' results together take memory.
        times = [m.median for m in measured.values() if m.ok] + ([best] if best else [])
        left = [n for n, m in measured.items() if m.ok and m.median <= DROP_ABOVE * min(times)]
        if left:
            again = time_interleaved(
                {name: functions[name] for name in left},
                rounds=rounds,
                warmup=0,
                calls=calls,
                budget_seconds=seconds,
                clock=self.clock,
            )
            for name, timings in again.items():
                compile_seconds = measured[name].first_seconds
                measured[name] = Measured.from_timings(timings, compile_seconds)
        return {name: measured[name] for name in names}

    def _wrong(
        self, pass_name: str, results: dict[str, Any], measured: dict[str, Measured]
    ) -> dict[str, Measured]:
        """Errors for the candidates whose numbers are not native's."""
        names = [name for name in results if measured[name].ok and name != STOCK]
        if not names:
            return {}
        try:
            wanted = self._reference(pass_name, results)
        except Exception as error:
            return {
                name: Measured.failed(
                    f"cannot be checked, because native fails: {error}",
                    measured[name].first_seconds,
                )
                for name in names
            }
        scale = max(float(np.linalg.norm(wanted)), 1e-30)

        def error_of(name: str) -> float:
            return float(np.linalg.norm(_to_numpy(results[name]) - wanted)) / scale

        most = tolerance(self.problem.spec, pass_name, self.conditions)
        if STOCK in results and measured[STOCK].ok:
            # Nobody has to be better than what the model does now.
            stock_error = error_of(STOCK)
            most = max(most, 2 * stock_error) if np.isfinite(stock_error) else most
        found = {}
        for name in names:
            error = error_of(name)
            if not error <= most:  # It may be NaN.
                found[name] = Measured.failed(
                    f"{WRONG_NUMBERS}: relative error {error:.2e}, above {most:.2e}",
                    measured[name].first_seconds,
                )
        return found

    def _reference(self, pass_name: str, results: dict[str, Any]) -> np.ndarray:
        """What native computes; for half precision, in float32."""
        dtype = self.problem.spec.compute_dtype
        if dtype in ("float16", "bfloat16"):
            function = self._function("native", pass_name, self._make_tensors("float32"), "float32")
            return _to_numpy(function())
        if "native" in results:
            return _to_numpy(results["native"])
        if STOCK in results and self.problem.native_is_stock:
            return _to_numpy(results[STOCK])
        return _to_numpy(self._function("native", pass_name, self._tensors)())

    def _make_tensors(self, dtype: str) -> list[Any]:
        # Through the compute dtype: the reference has the same rounded inputs.
        own = self.problem.spec.compute_dtype
        return [ops.cast(ops.cast(ops.convert_to_tensor(a), own), dtype) for a in self._arrays]

    def _function(
        self, name: str, pass_name: str, tensors: Sequence[Any], dtype: str | None = None
    ) -> Callable[[], Any]:
        spec = self.problem.spec.replace(compute_dtype=dtype or self.problem.spec.compute_dtype)
        if name == STOCK:
            convolution = _stock_convolution(spec, self.problem.stock_op)
        else:
            choice = parse(name)

            def convolution(x: Any, k: Any) -> Any:
                return convolve(spec, choice, x, k)

        return _pass_function(convolution, pass_name, tensors, bool(self.conditions.compiled))


def _keeping(results: dict[str, Any], name: str, function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        results[name] = function()
        return results[name]

    return run


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


def _pass_function(
    convolution: Callable[[Any, Any], Any],
    pass_name: str,
    tensors: Sequence[Any],
    compiled: bool,
) -> Callable[[], Any]:
    """One pass of a convolution as a function without arguments."""
    x, k, g = tensors
    wanted = {"forward": None, "input_gradient": 0, "kernel_gradient": 1}[pass_name]
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return _tensorflow_function(convolution, wanted, (x, k, g), compiled)
    if backend == "jax":
        return _jax_function(convolution, wanted, (x, k, g))
    return _torch_function(convolution, wanted, (x, k, g), compiled)


def _tensorflow_function(
    convolution: Callable, wanted: int | None, tensors: tuple, compiled: bool
) -> Callable[[], Any]:
    import tensorflow as tf

    def run(x: Any, k: Any, g: Any) -> Any:
        if wanted is None:
            return convolution(x, k)
        argument = (x, k)[wanted]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(argument)
            outputs = convolution(x, k)
        return tape.gradient(outputs, argument, g)

    # A graph drops what does not feed its result: of a gradient, the forward
    # pass and the other gradient.
    function = tf.function(run, autograph=False, jit_compile=compiled)
    traced: list[Any] = []

    def call() -> Any:
        if not traced:
            # Not by calling `function`: TensorFlow warns of many such functions.
            traced.append(function.get_concrete_function(*tensors))
        return traced[0](*tensors)

    return call


def _jax_function(convolution: Callable, wanted: int | None, tensors: tuple) -> Callable[[], Any]:
    import jax

    def run(x: Any, k: Any, g: Any) -> Any:
        if wanted is None:
            return convolution(x, k)
        arguments = (x, k)

        def of_wanted(argument: Any) -> Any:
            return convolution(*(argument if i == wanted else a for i, a in enumerate(arguments)))

        return jax.vjp(of_wanted, arguments[wanted])[1](g)[0]

    function = jax.jit(run)
    return lambda: function(*tensors)


def _torch_function(
    convolution: Callable, wanted: int | None, tensors: tuple, compiled: bool
) -> Callable[[], Any]:
    import torch

    x, k, g = tensors
    if compiled:
        convolution = torch.compile(convolution)
    if wanted is None:

        def forward() -> Any:
            with torch.no_grad():
                return convolution(x, k)

        return forward
    arguments = [a.detach().clone() for a in (x, k)]
    arguments[wanted].requires_grad_()
    outputs: list[Any] = []

    def gradient() -> Any:
        if not outputs:  # Eager: the forward pass is not part of the gradient's time.
            outputs.append(convolution(*arguments))
        return torch.autograd.grad(outputs[0], arguments[wanted], g, retain_graph=True)[0]

    return gradient


def _to_numpy(value: Any) -> np.ndarray:
    if "float16" in str(value.dtype):  # bfloat16 is none of NumPy's.
        value = ops.cast(value, "float32")
    return np.asarray(ops.convert_to_numpy(value), "float64")
