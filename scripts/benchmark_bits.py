r"""Times layers that multiply bits (`BitDense`, `BitConv2D`) against float layers, for inference.

The layers of a shape take turns, call by call. All get the same float inputs:

- `default`: Keras's own float layer, compiled as Keras does by itself here, whatever
  `--jit_compile` says (TensorFlow on CPUs: without XLA). It is what users have, and 1.00;
- `float`: the same, compiled as the layers of bits. Left out where `default` is the same;
- `W/A`: the layer of `deploy(…, kernels="bits")` with W-bit weights and A-bit activations. To
  round the inputs and to pack them is a part of its time.

A ratio is the median of the rounds' ratios (Hodges and Lehmann's, `diagconv_tf.measurements`), so
that noise of a whole round cancels. Each layer of bits is compared with the float layer of the
same quantized kernel and inputs: `relative_error`.

Shapes (`--shapes`, separated by commas): `HxWxC_kK_fF`, a convolution of F filters, e.g.
`14x14x512_k3_f512`; `I_uU`, a dense layer of U units, e.g. `1024_u1024`.

Examples (2 CPU cores):

    KERAS_BACKEND=jax python scripts/benchmark_bits.py --out=bits_jax.json
    KERAS_BACKEND=tensorflow python scripts/benchmark_bits.py --jit_compile=false,true \
        --out=bits_tensorflow.json
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import bench_common
import keras
import numpy as np
from absl import app, flags, logging
from keras import ops
from rich.table import Table

from diagconv_tf import LowBit, deploy, rewrite
from diagconv_tf.measurements import ERROR_RATE, paired_ratio
from diagconv_tf.text import summarize_error
from diagconv_tf.timing import Timings, time_interleaved

SHAPES = flags.DEFINE_list(
    "shapes",
    [
        "28x28x256_k1_f256",
        "14x14x512_k1_f512",
        "28x28x128_k3_f128",
        "14x14x256_k3_f256",
        "7x7x512_k3_f512",
        "1024_u1024",
        "4096_u4096",
    ],
    "Convolutions (HxWxC_kK_fF) and dense layers (I_uU).",
)
BITS = flags.DEFINE_list("bits", ["1/1", "1/2", "2/2", "4/4"], "Of weights / of activations.")
BATCH_SIZE = flags.DEFINE_list("batch_size", ["1", "16"], "Examples; one number or several.")
JIT_COMPILE = flags.DEFINE_list(
    "jit_compile", ["auto"], "true, false or auto, as in Keras; one or several."
)
ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed calls of each layer.", 1)
BUDGET = flags.DEFINE_float(
    "budget_seconds", None, "For the whole run; a group once begun makes all its first calls."
)
OUT = flags.DEFINE_string("out", None, "File to write: .json or .csv.")

DEFAULT, FLOAT = "default", "float"

_CONVOLUTION = re.compile(r"(\d+)x(\d+)x(\d+)_k(\d+)_f(\d+)")
_DENSE = re.compile(r"(\d+)_u(\d+)")


@dataclasses.dataclass(frozen=True)
class Group:
    """What the layers that are timed in turn have in common."""

    shape: str
    batch_size: int
    jit_compile: str

    @property
    def compiled(self) -> bool:
        return bench_common.compiled(self.jit_compile)

    @property
    def layers(self) -> list[str]:
        """In the order of their rows."""
        is_default = self.compiled == bench_common.compiled("auto")
        return [DEFAULT, *([] if is_default else [FLOAT]), *BITS.value]


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer. Times are seconds for one call.

    `scripts/results/README.md` says what each column means.
    """

    shape: str
    batch_size: int
    jit_compile: str
    compiled: bool
    layer: str
    first_seconds: float | None = None
    median: float | None = None
    p10: float | None = None
    p90: float | None = None
    count: int = 0
    over_default: float | None = None
    over_default_low: float | None = None
    over_default_high: float | None = None
    kernel_bytes: int | None = None
    relative_error: float | None = None
    error: str | None = None


# Layers


def float_model(shape: str) -> keras.Model:
    """A model of one float layer, whose inputs are never negative.

    Raises:
        ValueError: if `shape` is no shape.
    """
    if match := _CONVOLUTION.fullmatch(shape):
        height, width, channels, kernel, filters = map(int, match.groups())
        inputs = keras.Input((height, width, channels))
        layer: Any = keras.layers.Conv2D(filters, kernel, padding="same", use_bias=False)
    elif match := _DENSE.fullmatch(shape):
        channels, units = map(int, match.groups())
        inputs = keras.Input((channels,))
        layer = keras.layers.Dense(units, use_bias=False)
    else:
        raise ValueError(f"Expected a shape. Received: {shape}")
    return keras.Model(inputs, layer(inputs))


def parse_bits(text: str) -> LowBit:
    """The treatment that an entry of --bits means.

    Raises:
        ValueError: if it is none.
    """
    match = re.fullmatch(r"([1-8])/([1-8])", text)
    if not match:
        raise ValueError(f"Expected --bits to be W/A, from 1/1 to 8/8. Received: {text}")
    return LowBit(int(match[1]), int(match[2]), signed=False, limit=1.0, skip=())


def program(model: keras.Model, compiled: bool) -> Callable[[Any], Any]:
    """A function of the inputs that computes the model's outputs."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        variables = [
            [variable.value for variable in some]
            for some in (model.trainable_variables, model.non_trainable_variables)
        ]
        # Arguments, not constants: those a compiler would lay out before.
        call = jax.jit(lambda values, x: model.stateless_call(*values, x, training=False)[0])
        return functools.partial(call, variables)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda x: model(x, training=False), jit_compile=compiled)
    import torch

    return torch.no_grad()(lambda x: model(x, training=False))


# Measuring


def benchmark(group: Group, budget_seconds: float | None) -> list[Row]:
    """A row for each layer, in their order; whatever fails, the others go on."""
    blank = functools.partial(Row, **dataclasses.asdict(group), compiled=group.compiled)
    refusal = bench_common.why_not_compiled(group.jit_compile)
    if refusal is None and budget_seconds == 0:
        refusal = "no time left"
    if refusal is not None:
        return [blank(layer=layer, error=refusal) for layer in group.layers]
    bench_common.seed(0)
    stock = float_model(group.shape)
    shape = (group.batch_size, *stock.input_shape[1:])
    rng = np.random.default_rng(0)
    inputs = ops.convert_to_tensor(rng.uniform(-0.2, 1.2, shape).astype("float32"))
    functions: dict[str, Callable[[], Any]] = {}
    facts: dict[str, dict[str, Any]] = {}
    errors: dict[str, str] = {}
    for layer in group.layers:
        try:
            model, expected = stock, None
            if layer not in (DEFAULT, FLOAT):
                low_bit = rewrite(stock, parse_bits(layer))
                model = deploy(low_bit, kernels="bits")
                expected = ops.convert_to_numpy(deploy(low_bit)(inputs, training=False))
            compiled = bench_common.compiled("auto") if layer == DEFAULT else group.compiled
            functions[layer] = functools.partial(program(model, compiled), inputs)
            facts[layer] = {"kernel_bytes": _kernel_bytes(model)}
            if expected is not None:
                found = ops.convert_to_numpy(functions[layer]())
                norm = float(np.linalg.norm(expected))
                facts[layer]["relative_error"] = float(np.linalg.norm(found - expected)) / norm
        except Exception as error:
            errors[layer] = summarize_error(error)
            functions.pop(layer, None)
    timings = time_interleaved(
        functions, rounds=ROUNDS.value, warmup=2, budget_seconds=budget_seconds
    )
    default = timings.get(DEFAULT, Timings()).samples
    rows = []
    for layer in group.layers:
        timing = timings.get(layer, Timings())
        if timing.error is not None:
            errors[layer] = summarize_error(timing.error)
        if layer in errors:
            rows.append(blank(layer=layer, error=errors[layer]))
            continue
        ratio: dict[str, float | None] = {}
        if default and layer != DEFAULT:
            found = paired_ratio(timing.samples, default, ERROR_RATE)
            ends = {"": found.estimate, "_low": found.low, "_high": found.high}
            ratio = {f"over_default{end}": _finite(value) for end, value in ends.items()}
        elif default:
            ratio = {"over_default": 1.0}
        rows.append(
            blank(
                layer=layer,
                # That of bits was made to compare the outputs.
                first_seconds=timing.first_seconds if layer in (DEFAULT, FLOAT) else None,
                median=timing.median,
                p10=timing.p10,
                p90=timing.p90,
                count=timing.count,
                **ratio,
                **facts[layer],
            )
        )
    return rows


def _kernel_bytes(model: keras.Model) -> int:
    """Of all variables: of bits, words and their sums."""
    return sum(ops.convert_to_numpy(variable).nbytes for variable in model.variables)


def _finite(value: float) -> float | None:
    # An interval of too few rounds has no ends.
    return value if 0 < value < float("inf") else None


def make_table(rows: Sequence[Row]) -> Table:
    table = Table(
        title=f"{keras.backend.backend()} on {bench_common.device_kind()}: one call",
        caption="default: Keras's float layer, and its own choice of compiler; W/A: bits of "
        "weights and activations; interval: with an error rate of 1 %",
    )
    for column in ("shape", "conditions", "layer"):
        table.add_column(column, overflow="fold")
    for column in ("ms", "p10", "p90", "/ default", "interval", "kernel kB", "error"):
        table.add_column(column, justify="right")
    group = None
    for row in rows:
        conditions = f"batch {row.batch_size}{' jit' if row.compiled else ''}"
        if group not in (None, (row.shape, conditions)):
            table.add_section()
        group = (row.shape, conditions)
        if row.error:
            table.add_row(*group, row.layer, "failed")
            continue
        ends = [row.over_default_low, row.over_default_high]
        table.add_row(
            *group,
            row.layer,
            *(f"{1e3 * t:.3f}" for t in (row.median, row.p10, row.p90)),
            "" if row.over_default is None else f"{row.over_default:.2f}",
            "" if None in ends else " to ".join(f"{end:.2f}" for end in ends),
            f"{row.kernel_bytes / 1e3:.0f}",
            "" if row.relative_error is None else f"{row.relative_error:.0e}",
        )
    return table


# The command


def check_flags() -> None:
    bench_common.check_out(OUT.value)
    for shape in SHAPES.value:
        if not (_CONVOLUTION.fullmatch(shape) or _DENSE.fullmatch(shape)):
            raise ValueError(
                "Expected --shapes to be HxWxC_kK_fF (a convolution) or I_uU (a dense layer). "
                f"Received: {shape}"
            )
    for text in BITS.value:
        parse_bits(text)
    if unknown := [value for value in JIT_COMPILE.value if value not in ("auto", "true", "false")]:
        raise ValueError(f"Expected --jit_compile to be auto, true or false. Received: {unknown}")
    if not all(size.isdigit() and int(size) for size in BATCH_SIZE.value):
        raise ValueError(f"Expected --batch_size >= 1. Received: {','.join(BATCH_SIZE.value)}")


def main(_: list[str]) -> None:
    try:
        check_flags()
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    logging.set_verbosity(logging.ERROR)  # Each treatment warns of what it changes.
    groups = [
        Group(shape, int(batch_size), jit_compile)
        for jit_compile, batch_size, shape in itertools.product(
            JIT_COMPILE.value, BATCH_SIZE.value, SHAPES.value
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
    bench_common.print_errors((f"{row.layer}, {row.shape}", row.error) for row in rows)


if __name__ == "__main__":
    app.run(main)
