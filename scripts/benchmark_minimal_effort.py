r"""Times the backward pass of dense layers with minimal effort, against the ordinary one.

A layer has as many inputs as units. Its forms:

- `ordinary`: `keras.layers.Dense`;
- `per example`: each row of the output gradient keeps its k largest elements;
- `unified`: all rows keep the same k units, and the products have k columns;
- `unified, compact`: the same without the zeros of the kernel's gradient, which Keras's
  optimizers need: what an optimizer that knew of them would save;
- `zeros`: these zeros alone.

Passes: `backward` is the gradient by inputs, kernel and bias alone. `step` is a training step
(`train_on_batch`) of two such layers and an output layer of 10 units, with SGD. The forms of
one size, batch and way of compiling take turns. `speed` is the ordinary form's time over the
form's, from the rounds in pairs, and its interval of 95 %: above 1.00 the form is faster.

Example (2 CPU cores, about 3 minutes):

    KERAS_BACKEND=tensorflow python scripts/benchmark_minimal_effort.py \
        --jit_compile=false,true --out=minimal_effort.json
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import bench_common
import keras
import numpy as np
from absl import app, flags
from keras import ops
from rich.table import Table

from diagconv_tf import rewrite
from diagconv_tf.lowbit import LowBitDense, Operands, backends
from diagconv_tf.lowbit.units import MatrixProduct, Units
from diagconv_tf.measurements import paired_ratio
from diagconv_tf.minimal_effort import MinimalEffort, TopK
from diagconv_tf.text import summarize_error
from diagconv_tf.timing import Timings, time_interleaved

ORDINARY, PER_EXAMPLE, UNIFIED, COMPACT, ZEROS = (
    "ordinary",
    "per example",
    "unified",
    "unified, compact",
    "zeros",
)
FORMS = {
    "backward": (ORDINARY, PER_EXAMPLE, UNIFIED, COMPACT, ZEROS),
    "step": (ORDINARY, PER_EXAMPLE, UNIFIED),
}

UNITS = flags.DEFINE_list("units", ["512", "1024", "2048", "4096", "8192"], "Units, and inputs.")
BATCH_SIZE = flags.DEFINE_list("batch_size", ["128"], "Rows.")
RATIO = flags.DEFINE_float("ratio", 1 / 16, "Share of the units that are kept.", 0.0, 1.0)
PASS_NAMES = flags.DEFINE_list("passes", list(FORMS), f"Some of {', '.join(FORMS)}.")
JIT_COMPILE = flags.DEFINE_list(
    "jit_compile",
    ["auto"],
    "true, false, or auto: as Keras would. Only TensorFlow has a choice.",
)
MAX_STEP_UNITS = flags.DEFINE_integer(
    "max_step_units", 4096, "Layers with more units have no steps, which take much memory.", 0
)
ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed calls of each form.", 1)
BUDGET = flags.DEFINE_float("budget_seconds", None, "For the whole run.")
OUT = flags.DEFINE_string("out", None, "File to write: .json or .csv.")

#: Of the interval of a ratio.
_ERROR_RATE = 0.05


@dataclasses.dataclass(frozen=True)
class Group:
    """What the forms that are timed in turn have in common."""

    pass_name: str
    units: int
    batch_size: int
    jit_compile: str

    @property
    def operand(self) -> TopK:
        return TopK(ratio=RATIO.value)


@dataclasses.dataclass(frozen=True)
class Row:
    """One form. Times are seconds; `speed` is the ordinary form's time over this one's."""

    pass_name: str
    units: int
    batch_size: int
    kept: int
    compiled: bool
    form: str
    median: float | None = None
    p10: float | None = None
    p90: float | None = None
    count: int = 0
    first_seconds: float | None = None
    speed: float | None = None
    speed_low: float | None = None
    speed_high: float | None = None
    error: str | None = None


def backward_functions(group: Group) -> dict[str, Callable[[], Any]]:
    """Form → its backward pass, as a function without arguments."""
    n, operand = group.units, group.operand
    rng = np.random.default_rng(0)
    inputs, upstream = (
        ops.convert_to_tensor(rng.normal(size=(group.batch_size, n)).astype("float32"))
        for _ in range(2)
    )
    functions = {}
    for form in (ORDINARY, PER_EXAMPLE, UNIFIED):
        bench_common.seed(0)
        if form == ORDINARY:
            layer = keras.layers.Dense(n)
        else:
            chosen = dataclasses.replace(operand, unified=form == UNIFIED)
            layer = LowBitDense(n, operands=Operands(gradients=chosen))
        layer.build((group.batch_size, n))
        functions[form] = _gradients(layer, inputs, upstream, group.jit_compile)
    kernel = ops.convert_to_tensor(rng.normal(size=(n, n)).astype("float32"))
    product = MatrixProduct(dataclasses.replace(operand, unified=True), Units(n))

    def without_zeros(inputs: Any, kernel: Any, upstream: Any) -> tuple:
        columns = product.columns(upstream)
        few = backends.take(upstream, columns, 1)
        gradient = backends.matmul(few, backends.take(kernel, columns, 1), transposed="second")
        compact = backends.matmul(inputs, few, transposed="first")
        return gradient, compact, columns, ops.sum(upstream, 0)

    def zeros(inputs: Any, kernel: Any, upstream: Any) -> Any:
        # A number that is not known before, so that no compiler makes a constant of it.
        return ops.broadcast_to(ops.multiply(upstream[0, 0], 0.0), (n, n)) + 0.0

    arguments = (inputs, kernel, upstream)
    functions[COMPACT] = _run(without_zeros, arguments, group.jit_compile)
    functions[ZEROS] = _run(zeros, arguments, group.jit_compile)
    return functions


def _run(function: Callable[..., Any], arguments: tuple, jit_compile: str) -> Callable[[], Any]:
    """`function(*arguments)` as this backend trains: compiled, a graph, or eagerly."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        function = jax.jit(function)
    elif backend == "tensorflow":
        import tensorflow as tf

        function = tf.function(
            function, autograph=False, jit_compile=bench_common.compiled(jit_compile)
        )
    else:
        import torch

        function = torch.no_grad()(function)
    return lambda: function(*arguments)


def _gradients(layer: Any, inputs: Any, upstream: Any, jit_compile: str) -> Callable[[], Any]:
    """The gradients of a layer alone: what the forward pass computes is not needed."""
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        inputs = inputs.detach().requires_grad_()
        wanted = [inputs, *(variable.value for variable in layer.trainable_variables)]
        outputs = layer(inputs)
        return lambda: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)
    if backend == "jax":
        import jax

        def gradients(values: list, inputs: Any, upstream: Any) -> Any:
            def outputs(inputs: Any, values: list) -> Any:
                return layer.stateless_call(values, [], inputs)[0]

            return jax.vjp(outputs, inputs, values)[1](upstream)

        values = [variable.value for variable in layer.trainable_variables]
        return _run(gradients, (values, inputs, upstream), jit_compile)
    import tensorflow as tf

    def gradients_by_tape(inputs: Any, upstream: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs)
        wanted = [inputs, *(variable.value for variable in layer.trainable_variables)]
        return tape.gradient(outputs, wanted, upstream)

    return _run(gradients_by_tape, (inputs, upstream), jit_compile)


def step_functions(group: Group) -> dict[str, Callable[[], Any]]:
    """Form → a training step, as a function without arguments."""
    n = group.units
    rng = np.random.default_rng(0)
    x = rng.normal(size=(group.batch_size, n)).astype("float32")
    y = rng.integers(0, 10, group.batch_size)
    functions = {}
    for form in FORMS["step"]:
        bench_common.seed(0)
        model = keras.Sequential(
            [
                keras.Input((n,)),
                keras.layers.Dense(n, activation="relu"),
                keras.layers.Dense(n, activation="relu"),
                keras.layers.Dense(10),
            ]
        )
        model.compile(
            "sgd",
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=bench_common.compiled(group.jit_compile),
        )
        if form != ORDINARY:
            rewrite(model, MinimalEffort(ratio=RATIO.value, unified=form == UNIFIED), in_place=True)
        functions[form] = lambda model=model: model.train_on_batch(x, y)
    return functions


def benchmark(group: Group, seconds: float | None) -> list[Row]:
    """One row for each form of a group."""
    forms = FORMS[group.pass_name]
    why = bench_common.why_not_compiled(group.jit_compile)
    if why is None and group.pass_name == "step" and group.units > MAX_STEP_UNITS.value:
        why = f"Expected at most {MAX_STEP_UNITS.value} units for steps. Received: {group.units}"
    if why is None and seconds is not None and seconds <= 0:
        why = "no time was left"
    if why is not None:
        return [_row(group, form, error=why) for form in forms]
    make = backward_functions if group.pass_name == "backward" else step_functions
    try:
        functions = make(group)
    except Exception as error:  # Out of memory, say: a result too.
        return [_row(group, form, error=summarize_error(error)) for form in forms]
    timings = time_interleaved(functions, rounds=ROUNDS.value, budget_seconds=seconds)
    return [_measured(group, form, timings) for form in forms]


def _measured(group: Group, form: str, timings: Mapping[str, Timings]) -> Row:
    timed, ordinary = timings[form], timings[ORDINARY]
    if timed.error is not None:
        return _row(group, form, error=summarize_error(timed.error))
    values: dict[str, Any] = {}
    if timed.samples and ordinary.samples:
        ratio = paired_ratio(ordinary.samples, timed.samples, _ERROR_RATE)
        finite = np.isfinite(ratio.high)
        values = {
            "speed": ratio.estimate,
            "speed_low": ratio.low if finite else None,
            "speed_high": ratio.high if finite else None,
        }
    return _row(
        group,
        form,
        median=timed.median,
        p10=timed.p10,
        p90=timed.p90,
        count=timed.count,
        first_seconds=timed.first_seconds,
        **values,
    )


def _row(group: Group, form: str, **values: Any) -> Row:
    units = group.units
    return Row(
        group.pass_name,
        units,
        group.batch_size,
        units if form == ORDINARY else group.operand.keeps(units),
        bench_common.compiled(group.jit_compile),
        form,
        **values,
    )


def make_table(rows: list[Row]) -> Table:
    table = Table(title=f"Keras on {keras.backend.backend()}", title_justify="left")
    for name in ("pass", "units", "batch", "compiled", "form", "kept"):
        table.add_column(name)
    for name in ("ms", "p10 … p90", "speed", "95 %"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [row.pass_name, str(row.units), str(row.batch_size), str(row.compiled)]
        cells += [row.form, str(row.kept)]
        if row.median is None or row.p10 is None or row.p90 is None:
            table.add_row(*cells, "failed" if row.error else "", "", "", "")
            continue
        cells += [f"{1e3 * row.median:.2f}", f"{1e3 * row.p10:.2f} … {1e3 * row.p90:.2f}"]
        cells.append("" if row.speed is None else f"{row.speed:.2f}")
        interval = row.speed_low is not None and row.speed_high is not None
        table.add_row(*cells, f"{row.speed_low:.2f} … {row.speed_high:.2f}" if interval else "")
    return table


def check_flags() -> None:
    """Refuses flags before anything is timed.

    Raises:
        ValueError: if one has no such value.
    """
    bench_common.check_out(OUT.value)
    for holder in (UNITS, BATCH_SIZE):
        if not all(text.isdecimal() and int(text) > 0 for text in holder.value):
            raise ValueError(
                f"Expected --{holder.name} to be positive integers. Received: {holder.value}"
            )
    if not RATIO.value:
        raise ValueError(f"Expected --ratio above 0. Received: {RATIO.value}")
    for holder, known in ((PASS_NAMES, FORMS), (JIT_COMPILE, ("true", "false", "auto"))):
        for name in holder.value:
            if name not in known:
                raise ValueError(
                    f"Expected --{holder.name} of {', '.join(known)}. Received: {name}"
                )


def main(_: list[str]) -> None:
    try:
        check_flags()
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    groups = [
        Group(pass_name, int(units), int(batch_size), jit_compile)
        for pass_name, jit_compile, batch_size, units in itertools.product(
            PASS_NAMES.value, JIT_COMPILE.value, BATCH_SIZE.value, UNITS.value
        )
    ]
    settings = bench_common.flag_values(flags.FLAGS.get_key_flags_for_module(sys.argv[0]))
    rows = bench_common.measure_groups(
        groups,
        benchmark,
        bench_common.environment(settings),
        budget_seconds=BUDGET.value,
        out=OUT.value,
    )
    bench_common.print_table(make_table(rows))
    bench_common.print_errors((f"{row.form}, {row.units} units", row.error) for row in rows)


if __name__ == "__main__":
    app.run(main)
