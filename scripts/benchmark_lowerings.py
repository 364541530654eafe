r"""Times single convolutions: shapes x passes x lowerings, against the device's limit.

The limit (roofline) of a pass is the larger of two times: the fewest bytes it
must move (`ConvSpec.least_bytes`) over the bandwidth of a large copy, and its
multiplications and additions (`ConvSpec.flops`) over the rate of a large matrix
product in the same precision. Both ceilings are measured first, on the same
device and in the same process. `limit share` is limit / median: 1 means that
no lowering can be faster.

Shapes (`--shapes`, separated by commas):

- `NAME@SIZE`: the distinct depthwise convolutions of a keras.applications model
  for images of SIZE pixels, e.g. `MobileNetV2@224`, those first that have the
  largest share of its depthwise work. `:5x5` keeps only such kernels, `:b512`
  means 512 images in place of `--batch_size`, `:top2` keeps the first two; in
  this order, e.g. `EfficientNetB0@224:5x5:top2`. `mobilenet_v1_cifar@32` and
  `mobilenet_v2_cifar@32` are the recipes' networks with the stem for small images;
- `HxWxC_kK_sS`, e.g. `56x56x128_k3_s1`, with `_valid` where nothing is padded
  and `_bN` for N images: the names in the tables;
- `main`: ten shapes, of MobileNet and MobileNetV2 at 224, the recipes' MobileNet
  at 32 with 512 images, EfficientNetB0's 5x5 and ConvNeXtTiny's 7x7 at 224;
- `all`: all of MobileNet and MobileNetV2 at 224, both recipes' at 32,
  ConvNeXtTiny's 7x7 and EfficientNetB0's 5x5 at 224.

The lowerings of a shape, pass, precision, layout and way of compiling take
turns. All shapes come in the first precision, layout and way of compiling, then
in the next: where time runs out, the last ones are missing. The passes are the
lowerings' own. A lowering that fails, is refused or skipped is a row with its
error, and so is every combination for which no time is left.
Each result is compared with that of the framework's own op in float32, from the
same rounded arguments. On a GPU one timed call runs the operation many times,
so that starting it does not hide its kernels: how, and what that adds
(`overhead`), is told at the top of bench_device.py.

Example (2 CPU cores, 2 minutes):

    KERAS_BACKEND=jax python scripts/benchmark_lowerings.py --out=lowerings.json

A GPU: each is meant to end within 10 minutes (none was measured yet), for after
the budget only the first calls of one group are still made. JAX and XLA spend
most of it compiling; TensorFlow without XLA should be through sooner, and comes
first. PyTorch compiles nothing:

    KERAS_BACKEND=jax python scripts/benchmark_lowerings.py --shapes=main --batch_size=64 \
        --lowerings=native,diagonal:32,shifted --precision=default,bfloat16 \
        --budget_seconds=480 --out=lowerings_jax.json --pictures=lowerings_jax
    KERAS_BACKEND=tensorflow python scripts/benchmark_lowerings.py --shapes=main --batch_size=64 \
        --lowerings=native,diagonal:32,shifted --jit_compile=false,true \
        --budget_seconds=480 --out=lowerings_tensorflow.json --pictures=lowerings_tensorflow
    KERAS_BACKEND=torch python scripts/benchmark_lowerings.py --shapes=main --batch_size=64 \
        --lowerings=native,diagonal:32,diagonal_grouped:32,dense \
        --layouts=channels_last,channels_first --precision=default,bfloat16 \
        --budget_seconds=300 --out=lowerings_torch.json --pictures=lowerings_torch
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import bench_common
import bench_device
import bench_roofline
import bench_shapes
import keras
import numpy as np
from absl import app, flags
from bench_rows import Row
from keras import ops
from rich.table import Table

from diagconv_tf import ConvSpec, backends, why_not
from diagconv_tf.lowerings import LoweringChoice, parse
from diagconv_tf.lowerings.diagonal import Diagonal
from diagconv_tf.lowerings.shifted import Shifted
from diagconv_tf.spec import PASSES
from diagconv_tf.text import summarize_error
from diagconv_tf.timing import Timings, time_interleaved

SHAPES = flags.DEFINE_list(
    "shapes",
    ["56x56x128_k3_s1", "57x57x128_k3_s2_valid", "14x14x512_k3_s1"],
    "Models (NAME@SIZE, then :KxK, :bN, :topN), shapes (HxWxC_kK_sS), main or all.",
)
LOWERINGS = flags.DEFINE_list(
    "lowerings", ["native", "diagonal:32", "shifted"], "Lowerings; A/B/C is one for each pass."
)
PASS_NAMES = flags.DEFINE_list("passes", list(PASSES), f"Some of {', '.join(PASSES)}.")
PRECISION = flags.DEFINE_list(
    "precision",
    None,
    f"Some of {', '.join(bench_common.PRECISIONS)}. None: float32 on a CPU, elsewhere default.",
)
LAYOUTS = flags.DEFINE_list("layouts", ["channels_last"], "channels_last, channels_first or both.")
JIT_COMPILE = flags.DEFINE_list(
    "jit_compile",
    ["auto"],
    "true, false, or auto: as Keras would. Only TensorFlow has a choice: JAX is compiled, "
    "and PyTorch's operations are not compiled here.",
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images.", 1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed calls of each candidate.", 1)
REPEATS = flags.DEFINE_integer(
    "repeats",
    None,
    "Rounds over the sets of arguments within one timed call; 0: one operation a call. "
    "None: 0 on a CPU, elsewhere so many that a call at the limit takes 2 milliseconds, "
    "20 at least.",
    0,
)
ROTATE_MB = flags.DEFINE_integer(
    "rotate_mb",
    256,
    "Sets of arguments take turns; together with their results they are so large, or 16 sets. "
    "0: one set, which then may stay in a cache.",
    0,
)
MAX_PARTS = flags.DEFINE_integer(
    "max_parts",
    128,
    "Convolutions (of shifted: taps) in one program of several operations, on TensorFlow and "
    "JAX. A lowering of many gets fewer sets of arguments; one that has more by itself is "
    "skipped, because it would compile for minutes.",
    1,
)
BUDGET = flags.DEFINE_float(
    "budget_seconds", None, "For the whole run; a group once begun makes all its first calls."
)
OUT = flags.DEFINE_string("out", None, "File to write: .json or .csv.")
PICTURES = flags.DEFINE_string("pictures", None, "Folder for pictures.")

_MAX_SETS = 16
_MAX_GRAPH_OPERATIONS = 32
_MAX_RESULT_BYTES = 4 * 2**30
_MAX_LAUNCHES = 20_000


@dataclasses.dataclass(frozen=True)
class Group:
    """What the lowerings that are timed in turn have in common."""

    shape: bench_shapes.Shape
    pass_name: str
    precision: str
    layout: str
    compiled: bool

    @property
    def spec(self) -> ConvSpec:
        dtype = bench_common.PRECISIONS[self.precision].dtype
        return self.shape.spec.replace(data_format=self.layout, compute_dtype=dtype)


# One operation


def make_operation(
    spec: ConvSpec, choice: LoweringChoice, pass_name: str
) -> bench_device.Operation:
    """One pass of a lowering, as a function of the two tensors that it reads.

    As a layer does, it changes to the layout in which the backend computes.
    """
    lowering = choice.for_pass(pass_name)
    layout = backends.current().preferred_data_format(spec.data_format)
    inner = spec.replace(data_format=layout)

    def move(tensor: Any, target: str) -> Any:
        if layout == spec.data_format:
            return tensor
        return ops.transpose(tensor, (0, 2, 3, 1) if target == "channels_last" else (0, 3, 1, 2))

    def forward(inputs: Any, kernel: Any) -> Any:
        outputs = lowering.forward(inner, move(inputs, layout), kernel)
        return move(outputs, spec.data_format)

    def input_gradient(output_gradient: Any, kernel: Any) -> Any:
        gradient = lowering.input_gradient(
            inner, move(output_gradient, layout), kernel, inner.input_shape
        )
        return move(gradient, spec.data_format)

    def kernel_gradient(inputs: Any, output_gradient: Any) -> Any:
        return lowering.kernel_gradient(inner, move(inputs, layout), move(output_gradient, layout))

    return {
        "forward": forward,
        "input_gradient": input_gradient,
        "kernel_gradient": kernel_gradient,
    }[pass_name]


def draw_arguments(spec: ConvSpec, pass_name: str, count: int) -> list[bench_device.Arguments]:
    """`count` sets of the two tensors that a pass reads, of normal random numbers."""
    shapes = {
        "forward": (spec.input_shape, spec.kernel_shape),
        "input_gradient": (spec.output_shape, spec.kernel_shape),
        "kernel_gradient": (spec.input_shape, spec.output_shape),
    }[pass_name]
    rng = np.random.default_rng(0)
    return [
        tuple(bench_device.random_tensor(rng, shape, spec.compute_dtype) for shape in shapes)
        for _ in range(count)
    ]


def reference_result(group: Group, arguments: bench_device.Arguments) -> Any:
    """The framework's own op on the same numbers, in float32 and without TF32."""
    spec = group.spec.replace(compute_dtype="float32")
    operation = make_operation(spec, parse("native"), group.pass_name)
    with bench_common.precision_mode("float32"):
        wide = [ops.cast(tensor, "float32") for tensor in arguments]
        return bench_device.make_runner(operation, [wide], 0, compiled=False).result()


def relative_error(result: Any, reference: Any) -> float | None:
    """`‖result − reference‖ / ‖reference‖`; None where it is not finite."""
    result = ops.cast(result, "float32")
    if result.shape != reference.shape:
        raise ValueError(f"Expected a result of {reference.shape}. Received: {result.shape}")
    difference = result - reference
    error = ops.sqrt(ops.sum(difference * difference) / ops.sum(reference * reference))
    return float(error) if math.isfinite(float(error)) else None


def count_parts(spec: ConvSpec, choice: LoweringChoice, pass_name: str) -> int:
    """Of how many convolutions, or taps, the program of a pass is made."""
    lowering = choice.for_pass(pass_name)
    if isinstance(lowering, Diagonal):
        return len(lowering.blocks(spec))
    return math.prod(spec.kernel_size) if isinstance(lowering, Shifted) else 1


def repeats_and_sets(
    spec: ConvSpec, limit: float, compiled: bool, parts: int = 1
) -> tuple[int, int]:
    """How often one timed call runs the operation on how many sets of arguments.

    Args:
        spec: the convolution.
        limit: seconds below which an operation cannot get.
        compiled: whether a compiler makes the program.
        parts: of the operation, as `count_parts` has it.

    Raises:
        ValueError: if one operation has more parts than `--max_parts`.
    """
    least_bytes = spec.least_bytes() or 1
    sets = min(_MAX_SETS, max(1, math.ceil(ROTATE_MB.value * 2**20 / least_bytes)))
    on_cpu = bench_common.device_kind() == "cpu"
    if REPEATS.value == 0 or (REPEATS.value is None and on_cpu):
        return 0, sets
    backend = keras.backend.backend()
    if backend != "torch":
        # The program has every set's operation in it.
        if parts > MAX_PARTS.value:
            raise ValueError(f"skipped: {parts} parts, more than --max_parts={MAX_PARTS.value}")
        sets = min(sets, MAX_PARTS.value // parts)
    if REPEATS.value is not None:
        return REPEATS.value, sets
    repeats = max(20, math.ceil(2e-3 / (sets * limit)))
    if backend == "torch":
        repeats = max(1, min(repeats, _MAX_LAUNCHES // (sets * parts)))
    elif backend == "tensorflow" and not compiled:
        # Every operation is a part of the graph, and all results are kept.
        operations = min(
            _MAX_GRAPH_OPERATIONS,
            max(1, _MAX_RESULT_BYTES // least_bytes),
            MAX_PARTS.value // parts,
        )
        sets = min(sets, operations)
        repeats = operations // sets
    return repeats, sets


def stay_past_caches(spec: ConvSpec, sets: int) -> bool:
    """Whether so many sets take as much memory as `--rotate_mb` asks for."""
    return 0 < ROTATE_MB.value * 2**20 <= sets * (spec.least_bytes() or 0)


# Measuring


def measure(
    group: Group,
    lowerings: Sequence[str],
    ceilings: bench_device.Ceilings,
    budget_seconds: float | None,
) -> list[Row]:
    """A row for each lowering; whatever fails, the others go on."""
    spec = group.spec
    limit, bound = ceilings.limit(spec.flops(), spec.least_bytes(), "float32")
    if bench_common.why_no_precision(group.precision) is None:
        limit, bound = ceilings.limit(spec.flops(), spec.least_bytes(), group.precision)
    blank = functools.partial(
        Row,
        shape=group.shape.name,
        used_by=dict(group.shape.uses),
        batch=spec.batch,
        height=spec.height,
        width=spec.width,
        channels=spec.input_channels,
        kernel="x".join(map(str, spec.kernel_size)),
        stride="x".join(map(str, spec.strides)),
        padding=spec.padding,
        pass_name=group.pass_name,
        precision=group.precision,
        layout=group.layout,
        compiled=group.compiled,
        flops=spec.flops(),
        least_bytes=spec.least_bytes(),
        limit=limit,
        bound=bound,
    )
    refusal = why_not_group(group)
    if refusal is None and budget_seconds == 0:
        refusal = "no time left"
    if refusal is not None:
        return [blank(lowering=lowering, error=refusal) for lowering in lowerings]
    errors = {
        lowering: "refused: " + "; ".join(reasons)
        for lowering in lowerings
        if (reasons := why_not(spec, read_lowering(lowering)))
    }
    try:
        with bench_common.precision_mode(group.precision):
            measured = _measure(
                group, [x for x in lowerings if x not in errors], limit, budget_seconds
            )
    except Exception as error:  # No memory for the arguments, say.
        failed = summarize_error(error)
        return [blank(lowering=name, error=errors.get(name, failed)) for name in lowerings]
    native = measured.get("native", {}).get("median")
    rows = []
    for lowering in lowerings:
        values = measured.get(lowering, {"error": errors.get(lowering)})
        if values.get("median"):
            median = values["median"]
            values |= {
                "limit_share": limit / median,
                "over_native": None if native is None else median / native,
                "flops_per_second": spec.flops() / median,
                "bytes_per_second": spec.least_bytes() / median,
            }
        rows.append(blank(lowering=lowering, **values))
    return rows


def why_not_group(group: Group) -> str | None:
    """Why nothing of a group can be measured here; None where it can."""
    if group.compiled and keras.backend.backend() == "torch":
        return "Expected jit_compile=false on PyTorch, which compiles nothing here. Received: true"
    return bench_common.why_no_precision(group.precision) or bench_common.why_not_compiled(
        "true" if group.compiled else "false"
    )


def _measure(
    group: Group, lowerings: Sequence[str], limit: float, budget_seconds: float | None
) -> dict[str, dict[str, Any]]:
    """Lowering → the fields of its row that were measured."""
    start = time.monotonic()
    spec = group.spec
    runners, found, turns = {}, {}, {}
    for lowering in lowerings:
        parts = count_parts(spec, read_lowering(lowering), group.pass_name)
        try:
            turns[lowering] = repeats_and_sets(spec, limit, group.compiled, parts)
        except ValueError as error:
            found[lowering] = {"error": str(error)}
    if not turns:
        return found
    sets = draw_arguments(spec, group.pass_name, max(count for _, count in turns.values()))
    for lowering, (repeats, count) in turns.items():
        operation = make_operation(spec, read_lowering(lowering), group.pass_name)
        try:
            runners[lowering] = bench_device.make_runner(
                operation, sets[:count], repeats, group.compiled
            )
        except Exception as error:
            found[lowering] = {"error": summarize_error(error)}
    candidates = dict(runners)
    for repeats, count in {turns[lowering] for lowering in runners}:
        if repeats:
            with contextlib.suppress(Exception):
                candidates[_overhead_name(repeats, count)] = bench_device.make_runner(
                    bench_device.run_nothing, sets[:count], repeats, group.compiled
                )
    if budget_seconds is not None:
        # Drawing the arguments, and recording graphs, is part of it.
        budget_seconds = max(budget_seconds - (time.monotonic() - start), 1e-3)
    timings = time_interleaved(
        {name: runner.call for name, runner in candidates.items()},
        rounds=ROUNDS.value,
        warmup=1,
        budget_seconds=budget_seconds,
    )
    reference = None
    with contextlib.suppress(Exception):  # Then `relative_error` stays empty.
        reference = reference_result(group, sets[0])
    tolerance = bench_common.PRECISIONS[group.precision].tolerance
    for lowering, runner in runners.items():
        timing = timings[lowering]
        if timing.error is not None:
            found[lowering] = {
                "error": summarize_error(timing.error),
                "first_seconds": timing.first_seconds,
            }
            continue
        operations = runner.operations
        overhead = timings.get(_overhead_name(*turns[lowering]), Timings()).median
        fields = {
            "median": timing.median / operations,
            "p10": timing.p10 / operations,
            "p90": timing.p90 / operations,
            "count": timing.count,
            "first_seconds": timing.first_seconds,
            "operations": operations,
            "sets": turns[lowering][1],
            "past_caches": stay_past_caches(spec, turns[lowering][1]),
            "overhead": None if overhead is None else overhead / operations,
            "timed_as": runner.timed_as,
        }
        if reference is not None:
            try:
                error = relative_error(runner.result(), reference)
                fields |= {
                    "relative_error": error,
                    # A result that is not finite agrees with nothing.
                    "agrees": error is not None and error <= tolerance,
                }
            except Exception as error:
                fields = {"error": summarize_error(error)}
        found[lowering] = fields
    return found


def _overhead_name(repeats: int, sets: int) -> str:
    """The candidate that is the loop of so many operations without them."""
    return f"(nothing, {repeats} times {sets})"


def read_lowering(text: str) -> LoweringChoice:
    """The choice that a lowering of the command line means."""
    passes = text.split("/")
    return parse(text if len(passes) == 1 else dict(zip(PASSES, passes, strict=True)))


# What is shown


def make_table(rows: Sequence[Row], ceilings: bench_device.Ceilings) -> Table:
    rates = ", ".join(
        f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in ceilings.flops_per_second.items()
    )
    table = Table(
        title=f"{keras.backend.backend()} on {bench_common.device_kind()}, batch "
        f"{BATCH_SIZE.value}; copies {ceilings.bytes_per_second / 1e9:,.1f} GB/s, "
        f"matrix products {rates}",
        caption="ms for one operation; limit share: 1 is the roofline, * where the data may stay "
        "in a cache; error: to native in float32",
    )
    for column in ("shape", "pass", "conditions", "lowering"):
        table.add_column(column, overflow="fold")
    for column in ("ms", "p10", "p90", "limit ms", "limit share", "/ native", "first s", "error"):
        table.add_column(column, justify="right")
    group = None
    # What failed as a whole is told below the table.
    some = [
        mine for _, mine in bench_common.grouped(rows, condition) if any(row.median for row in mine)
    ]
    for row in itertools.chain(*some):
        conditions = f"{row.precision} {row.layout[9:]}{' jit' if row.compiled else ''}"
        key = (row.shape, row.pass_name, conditions)
        if group not in (None, key):
            table.add_section()
        group = key
        if row.error:
            table.add_row(*key, row.lowering, "failed")
            continue
        table.add_row(
            *key,
            row.lowering,
            *(f"{1e3 * seconds:.3f}" for seconds in (row.median, row.p10, row.p90, row.limit)),
            f"{row.limit_share:.3f}{'' if row.past_caches else '*'}",
            "" if row.over_native is None else f"{row.over_native:.2f}",
            f"{row.first_seconds:.1f}",
            ("?" if row.relative_error is None else f"{row.relative_error:.0e}")
            + (" WRONG" if row.agrees is False else ""),
        )
    return table


def condition(row: Row) -> tuple:
    """What the lowerings that are compared with each other have in common."""
    return row.shape, row.pass_name, row.precision, row.layout, row.compiled


# The command


def check_flags() -> None:
    bench_common.check_out(OUT.value)
    for holder, accepted in (
        (PASS_NAMES, PASSES),
        (PRECISION, bench_common.PRECISIONS),
        (LAYOUTS, ("channels_last", "channels_first")),
        (JIT_COMPILE, ("auto", "true", "false")),
    ):
        if holder.value is None:
            continue
        unknown = [value for value in holder.value if value not in accepted]
        if unknown or not holder.value:
            raise ValueError(
                f"Expected --{holder.name} to be some of {', '.join(accepted)}. "
                f"Received: {','.join(holder.value)}"
            )
    for lowering in LOWERINGS.value:
        read_lowering(lowering)


def main(_: list[str]) -> None:
    start = time.monotonic()
    try:
        check_flags()
        shapes = bench_shapes.find_shapes(SHAPES.value, BATCH_SIZE.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    precisions = PRECISION.value or [bench_common.default_precision()]
    ceilings = bench_device.measure_ceilings(precisions)
    groups = [
        Group(shape, pass_name, precision, layout, compiled)
        # Shapes inside: where the budget runs out, the last conditions are missing.
        for precision, layout, compiled, shape, pass_name in itertools.product(
            precisions,
            LAYOUTS.value,
            dict.fromkeys(bench_common.compiled(value) for value in JIT_COMPILE.value),
            shapes,
            PASS_NAMES.value,
        )
    ]
    settings = bench_common.flag_values(flags.FLAGS.get_key_flags_for_module(sys.argv[0]))
    environment = bench_common.environment(settings, ceilings=dataclasses.asdict(ceilings))
    budget = bench_common.Budget(BUDGET.value, len(groups), start)
    rows: list[Row] = []
    for number, group in enumerate(groups, start=1):
        print(
            f"[{number}/{len(groups)}] {group.shape.name} {group.pass_name} {group.precision} "
            f"{group.layout}{' compiled' if group.compiled else ''}",
            file=sys.stderr,
        )
        rows += measure(group, LOWERINGS.value, ceilings, budget.next_share())
        if OUT.value:
            # After each group: what is measured outlives a crash.
            bench_common.write_results(OUT.value, rows, environment)
    bench_common.print_table(make_table(rows, ceilings))
    bench_common.print_errors((f"{row.lowering}, {row.pass_name}", row.error) for row in rows)
    if PICTURES.value:
        bench_roofline.draw_pictures(PICTURES.value, rows, ceilings)


if __name__ == "__main__":
    app.run(main)
