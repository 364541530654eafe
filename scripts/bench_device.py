"""What the benchmarks do with a device: one pass many times, its ceilings, its memory.

**Why an operation runs several times in one call.** On a GPU the kernel of one
small layer takes some microseconds, and starting a program takes more. So one
timed call runs the operation many times and is divided by their number:

- JAX and TensorFlow with XLA: a loop inside the compiled program. Left alone,
  the compiler would compute what does not change once, outside of the loop
  (the diagonal kernel, a change of layout, the operation itself). So each turn
  writes one element of both arguments, in place, with a value that the compiler
  cannot know to be the old one: it comes from the last result, which therefore
  has to be computed in full before. That adds two tiny kernels to an operation,
  and the loop copies its arguments once a call; `run_nothing` is the same loop
  without the operation, and its time is reported as overhead.
- TensorFlow without XLA: the operations stand one after another in one graph,
  and all results are returned, or else they would be left out as unused.
- PyTorch on CUDA: the operations are recorded into one CUDA graph, where they
  can be, and the graph is replayed. Otherwise they are launched one after
  another and waited for once.
- On a CPU a call takes microseconds to start and milliseconds to run: one
  operation a call. Asking for more there is for trying this file out, not for
  measuring: XLA:CPU compiles the body of a loop otherwise (measured, native input
  gradient of 28x28x64 with stride 2: 24 ms alone, 0.4 in a loop; diagonal:32: 1.7
  alone, 13 in a loop).

Operations take turns on several sets of arguments, so that a set has left the
caches when its turn comes again (unless `sets` is 1).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import bench_common
import keras
import numpy as np
from keras import ops

from diagconv_tf.timing import synchronize, time_interleaved

#: `(first argument, second argument)` of an operation.
Arguments = tuple[Any, Any]
Operation = Callable[[Any, Any], Any]

#: A value that no result has, for a comparison that must not be predictable.
_NEVER = 24_576.0


@dataclasses.dataclass(frozen=True)
class Runner:
    """An operation made ready to be timed.

    Attributes:
        call: runs it `operations` times and returns what to wait for.
        result: returns its result for the first set of arguments.
        operations: how often a call runs it.
        timed_as: how, in a few words.
    """

    call: Callable[[], Any]
    result: Callable[[], Any]
    operations: int
    timed_as: str


def make_runner(
    operation: Operation, sets: Sequence[Arguments], repeats: int, compiled: bool
) -> Runner:
    """How to run an operation `repeats` times on each of `sets` in one call.

    Args:
        operation: a function of two tensors of four axes.
        sets: arguments, all of the same shapes.
        repeats: rounds over `sets`; 0 means one operation a call, on the sets
            in turn.
        compiled: whether a compiler (XLA) makes the program; on PyTorch it
            does not matter.
    """
    backend = keras.backend.backend()
    if repeats == 0:
        return _single_calls(_program(operation, compiled), sets)
    operations = repeats * len(sets)
    if backend == "torch":
        return _torch_runner(operation, sets, repeats)
    if backend == "jax":
        import jax

        loop = jax.jit(functools.partial(_jax_loop, operation, repeats))
        return Runner(
            lambda: loop(sets), lambda: loop(sets)[0], operations, "loop in a compiled program"
        )
    import tensorflow as tf

    make = _tensorflow_loop if compiled else _tensorflow_sequence
    loop = tf.function(functools.partial(make, operation, repeats), jit_compile=compiled)
    timed_as = "loop in a compiled program" if compiled else "sequence in a graph"
    return Runner(lambda: loop(sets), lambda: loop(sets)[0], operations, timed_as)


def random_tensor(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0
) -> Any:
    """Normal random numbers on the device; large tensors repeat four million of them.

    Drawn on the host: a compiling backend would make a program for each shape.
    """
    count = math.prod(shape)
    pool = rng.standard_normal(min(count, 2**22), "float32") * np.float32(scale)
    return ops.cast(ops.convert_to_tensor(np.resize(pool, shape)), dtype)


def run_nothing(first: Any, second: Any) -> Any:
    """The operation whose time is the overhead of a loop."""
    return first[:1, :1, :1, :1] * 0.5


def _program(operation: Operation, compiled: bool) -> Operation:
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(operation)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(operation, jit_compile=compiled)
    import torch

    return torch.no_grad()(operation)


def _single_calls(program: Operation, sets: Sequence[Arguments]) -> Runner:
    turns = itertools.cycle(sets)
    return Runner(lambda: program(*next(turns)), lambda: program(*sets[0]), 1, "one call")


def _jax_loop(operation: Operation, repeats: int, sets: Sequence[Arguments]) -> list[Any]:
    import jax
    import jax.numpy as jnp
    from jax import lax

    shape = jax.eval_shape(operation, *sets[0])

    def touch(tensor: Any, result: Any) -> Any:
        last, own = result[0, 0, 0, 0].astype(tensor.dtype), tensor[0, 0, 0, 0]
        return tensor.at[0, 0, 0, 0].set(jnp.where(last == _NEVER, last, own))

    def turn(_: Any, state: Any) -> Any:
        arguments, results = state
        last, touched, computed = results[-1], [], []
        for pair in arguments:
            pair = tuple(touch(tensor, last) for tensor in pair)
            last = operation(*pair)
            touched.append(pair)
            computed.append(last)
        return touched, computed

    results = [jnp.zeros(shape.shape, shape.dtype) for _ in sets]
    pairs = [tuple(pair) for pair in sets]
    return lax.fori_loop(0, repeats, turn, (pairs, results))[1]


def _tensorflow_loop(operation: Operation, repeats: int, sets: Sequence[Arguments]) -> list[Any]:
    import tensorflow as tf

    def touch(tensor: Any, result: Any) -> Any:
        last, own = tf.cast(result[:1, :1, :1, :1], tensor.dtype), tensor[:1, :1, :1, :1]
        return tf.raw_ops.TensorStridedSliceUpdate(
            input=tensor,
            begin=[0] * 4,
            end=[1] * 4,
            strides=[1] * 4,
            value=tf.where(last == tf.cast(_NEVER, tensor.dtype), last, own),
        )

    def turn(index: Any, arguments: Any, results: Any) -> Any:
        last, touched, computed = results[-1], [], []
        for pair in arguments:
            pair = tuple(touch(tensor, last) for tensor in pair)
            last = operation(*pair)
            touched.append(pair)
            computed.append(last)
        return index + 1, touched, computed

    # For the shape of a result; nothing reads it, so that it is not computed.
    like = operation(*sets[0])
    results = [tf.zeros(like.shape, like.dtype) for _ in sets]
    pairs = [tuple(pair) for pair in sets]
    return tf.while_loop(
        lambda index, *_: index < repeats,
        turn,
        (tf.constant(0), pairs, results),
        maximum_iterations=repeats,
    )[2]


def _tensorflow_sequence(
    operation: Operation, repeats: int, sets: Sequence[Arguments]
) -> list[Any]:
    import tensorflow as tf

    results: list[Any] = []
    for pair in [pair for _ in range(repeats) for pair in sets]:
        # One after another, as in a model; it also keeps equal ones apart.
        with tf.control_dependencies(results[-1:]):
            results.append(operation(*pair))
    return results


def _torch_runner(operation: Operation, sets: Sequence[Arguments], repeats: int) -> Runner:
    import torch

    program = torch.no_grad()(operation)

    def launch() -> Any:
        for _ in range(repeats):
            for pair in sets:
                result = program(*pair)
        return result

    operations = repeats * len(sets)
    launched = Runner(launch, lambda: program(*sets[0]), operations, "launched one after another")
    if bench_common.device_kind() != "gpu":
        return launched
    # As in PyTorch's notes on CUDA graphs: warm up on another stream, record.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        program(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            launch()
    except RuntimeError:
        # Something in it waits for the device, which a graph cannot hold.
        torch.cuda.synchronize()
        return launched
    return dataclasses.replace(launched, call=graph.replay, timed_as="CUDA graph")


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device reaches at its best, measured in this process.

    Attributes:
        bytes_per_second: of a large copy, bytes read plus bytes written.
        flops_per_second: precision → rate of a large matrix product; of
            "default" on a GPU that of "tf32", to which convolutions may round
            even where matrix products do not (PyTorch).
    """

    bytes_per_second: float
    flops_per_second: dict[str, float]

    def limit(self, flops: int, least_bytes: int, precision: str) -> tuple[float, str]:
        """Seconds below which the device cannot get, and what binds: the
        `"memory"` or the `"arithmetic"`.
        """
        memory = least_bytes / self.bytes_per_second
        arithmetic = flops / self.flops_per_second[precision]
        return max((memory, "memory"), (arithmetic, "arithmetic"))


def measure_ceilings(precisions: Sequence[str], rounds: int = 7) -> Ceilings:
    """Measures copy bandwidth, and the matrix rate of each precision.

    The best round counts, not the median: a ceiling is what the device can do.
    No precision is held to be slower than float32, to which one can convert.

    Args:
        precisions: names of `PRECISIONS`; those not to be had are left out.
        rounds: timed copies and products.
    """
    rates: dict[str, float] = {}
    available = [name for name in precisions if bench_common.why_no_precision(name) is None]
    for name in dict.fromkeys(["float32", *available]):
        allowed = name
        if name == "default" and bench_common.why_no_precision("tf32") is None:
            allowed = "tf32"
        with bench_common.precision_mode(allowed):
            rates[name] = max(_matrix_rates(bench_common.PRECISIONS[name].dtype, rounds))
    return Ceilings(
        bytes_per_second=_copy_bandwidth(rounds),
        flops_per_second={name: max(rate, rates["float32"]) for name, rate in rates.items()},
    )


def _best_seconds(function: Callable[[], Any], rounds: int) -> float:
    timings = time_interleaved({"it": function}, rounds=rounds)["it"]
    if timings.error is not None:
        raise timings.error
    return min(timings.samples)


def _copy_bandwidth(rounds: int) -> float:
    """Bytes per second, read plus written."""
    if bench_common.device_kind() == "cpu":
        return _cpu_copy_bandwidth(rounds)
    # XLA copies the argument of a loop before it writes to it. With so many
    # passes that one does not count.
    elements, repeats = 2**28, 100
    x = random_tensor(np.random.default_rng(0), (elements,), "float32")
    backend = keras.backend.backend()
    if backend == "torch":
        y = ops.zeros_like(x)

        def copies() -> Any:
            for _ in range(repeats):
                y.copy_(x)
            return y

        seconds = _best_seconds(copies, rounds)
    else:
        # Scaled in place, by a number that the compiler does not know: an
        # elementwise pass is a copy that cannot be left out.
        scale = ops.ones(())
        loop = _compiled_loop(lambda value, factor: value * factor, repeats)
        seconds = _best_seconds(lambda: loop(x, scale), rounds)
    return 2 * 4 * elements * repeats / seconds


def _cpu_copy_bandwidth(rounds: int) -> float:
    # NumPy with a thread a core, into memory that is there already: the same
    # ceiling for every backend, whatever its allocator does.
    elements, threads = 2**25, os.cpu_count() or 1
    source = np.random.default_rng(0).random(elements, "float32")
    target = np.zeros_like(source)
    parts = np.array_split(np.arange(elements), threads)
    slices = [slice(part[0], part[-1] + 1) for part in parts]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(pool.map(lambda part: np.copyto(target[part], source[part]), slices))

        return 2 * source.nbytes / _best_seconds(copy, rounds)


def _matrix_rates(dtype: str, rounds: int) -> Iterator[float]:
    """FLOPs per second of square products, of growing size while it is cheap."""
    on_cpu = bench_common.device_kind() == "cpu"
    repeats = 1 if on_cpu else 10
    rng = np.random.default_rng(0)
    for size in (256, 1024, 2048) if on_cpu else (1024, 2048, 4096, 8192):
        flops = 2 * size**3 * repeats
        # With this scale the product of many such matrices neither grows nor
        # vanishes.
        first = random_tensor(rng, (size, size), dtype, scale=1 / math.sqrt(size))
        second = random_tensor(rng, (size, size), dtype)
        if keras.backend.backend() == "torch" or on_cpu:
            product = _program(ops.matmul, compiled=True)

            def products(product=product, first=first, value=second) -> Any:
                for _ in range(repeats):
                    value = product(first, value)
                return value

        else:
            loop = _compiled_loop(lambda value, factor: ops.matmul(factor, value), repeats)

            def products(loop=loop, first=first, second=second) -> Any:
                return loop(second, first)

        seconds = _best_seconds(products, rounds)
        yield flops / seconds
        if on_cpu and dtype == "float32":
            one, two = np.asarray(first), np.asarray(second)
            yield flops / _best_seconds(lambda one=one, two=two: one @ two, rounds)
        if on_cpu and seconds > 0.02:
            return


def _compiled_loop(step: Callable[[Any, Any], Any], repeats: int) -> Callable[[Any, Any], Any]:
    """`value = step(value, factor)`, `repeats` times in one compiled program."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(
            lambda value, factor: jax.lax.fori_loop(
                0, repeats, lambda _, value: step(value, factor), value
            )
        )
    import tensorflow as tf

    @tf.function(jit_compile=True)
    def loop(value: Any, factor: Any) -> Any:
        return tf.while_loop(
            lambda index, _: index < repeats,
            lambda index, value: (index + 1, step(value, factor)),
            (tf.constant(0), value),
            maximum_iterations=repeats,
        )[1]

    return loop


@dataclasses.dataclass(frozen=True)
class MemoryReading:
    """Bytes on the device: in use now, and at the most so far."""

    in_use: int
    peak: int


def read_memory(reset_peak: bool = False) -> MemoryReading | None:
    """What the backend tells of its GPU's memory; None where it tells nothing.

    Args:
        reset_peak: forget the peak before reading, where the backend can
            (TensorFlow and PyTorch; JAX keeps it since its start).
    """
    if bench_common.device_kind() != "gpu":
        return None
    synchronize()
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        stats = jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" not in stats:
            return None
        return MemoryReading(stats["bytes_in_use"], stats["peak_bytes_in_use"])
    if backend == "tensorflow":
        import tensorflow as tf

        if reset_peak:
            tf.config.experimental.reset_memory_stats("GPU:0")
        stats = tf.config.experimental.get_memory_info("GPU:0")
        return MemoryReading(stats["current"], stats["peak"])
    import torch

    if reset_peak:
        torch.cuda.reset_peak_memory_stats()
    return MemoryReading(torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())


def peak_memory(function: Callable[[], Any]) -> tuple[Any, int | None]:
    """`function()`, and the most bytes it had in use above what was in use before.

    The bytes are None where they are not known: on a CPU, and on JAX where
    something before needed more, because its peak cannot be reset.
    """
    before = read_memory(reset_peak=True)
    value = function()
    if before is None:
        return value, None
    synchronize(value)
    after = read_memory()
    if after is None or (keras.backend.backend() == "jax" and after.peak <= before.peak):
        return value, None
    return value, after.peak - before.in_use
