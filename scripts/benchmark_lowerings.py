r"""Times single convolutions: shapes x passes x lowerings, against the device's limit.

The limit (roofline) of a pass is the larger of two times: the fewest bytes it
must move (`ConvSpec.least_bytes`) over the bandwidth of a large copy, and its
multiplications and additions (`ConvSpec.flops`) over the rate of a large matrix
product in the same precision. Both ceilings are measured first, on the same
device and in the same process. `limit share` is limit / median: 1 means that
no lowering can be faster.

Shapes (`--shapes`, separated by commas):

- `NAME@SIZE`: the distinct depthwise convolutions of a keras.applications model
  for images of SIZE pixels, e.g. `MobileNetV2@224`; with `:5x5` only those with
  such a kernel, e.g. `EfficientNetB0@224:5x5`. `mobilenet_v1_cifar@32` and
  `mobilenet_v2_cifar@32` are the recipes' networks with the stem for small images;
- `HxWxC_kK_sS`, e.g. `56x56x128_k3_s1`, with `_valid` where nothing is padded:
  the names in the tables;
- `all`: MobileNet and MobileNetV2 at 224, both recipes' at 32, ConvNeXtTiny's
  7x7 and EfficientNetB0's 5x5 at 224.

The lowerings of a shape, pass, precision, layout and way of compiling take
turns. The passes are the lowerings' own. A lowering that fails or is refused
is a row with its error, and so is every combination for which no time is left.
Each result is compared with that of the framework's own op in float32, from the
same rounded arguments. On a GPU one timed call runs the operation many times,
so that starting it does not hide its kernels: how, and what that costs
(`overhead`), is told at the top of bench_device.py.

Example (2 CPU cores, 2 minutes):

    KERAS_BACKEND=jax python scripts/benchmark_lowerings.py --out=/tmp/lowerings.json

An H200 for an hour:

    python scripts/benchmark_lowerings.py --shapes=all --batch_size=64 \
        --precision=float32,tf32,bfloat16,float16 --layouts=channels_last,channels_first \
        --lowerings=native,diagonal:16,diagonal:32,diagonal_grouped:32,dense,shifted \
        --jit_compile=true,false --budget_seconds=3600 --out=h200.csv --pictures=h200
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import bench_common
import bench_device
import bench_roofline
import bench_shapes
import keras
import numpy as np
from absl import app, flags
from keras import ops
from rich.table import Table

from diagconv_tf import ConvSpec, backends, error_text, why_not
from diagconv_tf.lowerings import LoweringChoice, parse
from diagconv_tf.spec import PASSES
from diagconv_tf.timing import Timings, time_interleaved

SHAPES = flags.DEFINE_list(
    "shapes",
    ["56x56x128_k3_s1", "57x57x128_k3_s2_valid", "14x14x512_k3_s1"],
    "Models (NAME@SIZE, NAME@SIZE:KxK), shapes (HxWxC_kK_sS), or all.",
)
LOWERINGS = flags.DEFINE_list(
    "lowerings", ["native", "diagonal:32", "shifted"], "Lowerings; A/B/C is one for each pass."
)
PASS_NAMES = flags.DEFINE_list("passes", list(PASSES), f"Some of {', '.join(PASSES)}.")
PRECISION = flags.DEFINE_list(
    "precision", ["float32"], f"Some of {', '.join(bench_common.PRECISIONS)}."
)
LAYOUTS = flags.DEFINE_list("layouts", ["channels_last"], "channels_last, channels_first or both.")
JIT_COMPILE = flags.DEFINE_list(
    "jit_compile", ["auto"], "true, false, or auto: as Keras would. Only TensorFlow has a choice."
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
BUDGET = flags.DEFINE_float(
    "budget_seconds", None, "For the whole run; a candidate once begun is finished."
)
OUT = flags.DEFINE_string("out", None, "File to write: .json or .csv.")
PICTURES = flags.DEFINE_string("pictures", None, "Folder for pictures.")

_MAX_SETS = 16
_MAX_GRAPH_OPERATIONS = 32
_MAX_RESULT_BYTES = 4 * 2**30
_OVERHEAD = "(nothing)"


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


@dataclasses.dataclass(frozen=True)
class Row:
    """One lowering of one pass. Times are seconds for one operation.

    `scripts/results/README.md` says what each column means.
    """

    shape: str
    used_by: dict[str, int]
    batch: int
    height: int
    width: int
    channels: int
    kernel: str
    stride: str
    padding: str
    pass_name: str
    precision: str
    layout: str
    compiled: bool
    lowering: str
    flops: int
    least_bytes: int
    limit: float
    bound: str
    median: float | None = None
    p10: float | None = None
    p90: float | None = None
    count: int = 0
    first_seconds: float | None = None
    limit_share: float | None = None
    over_native: float | None = None
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    relative_error: float | None = None
    agrees: bool | None = None
    operations: int = 0
    sets: int = 0
    overhead: float | None = None
    timed_as: str = ""
    error: str | None = None


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


def repeats_and_sets(spec: ConvSpec, limit: float, compiled: bool) -> tuple[int, int]:
    """How often one timed call runs the operation on how many sets of arguments."""
    least_bytes = spec.least_bytes() or 1
    sets = min(_MAX_SETS, max(1, math.ceil(ROTATE_MB.value * 2**20 / least_bytes)))
    if REPEATS.value is not None:
        return REPEATS.value, sets
    if bench_common.device_kind() == "cpu":
        return 0, sets
    repeats = max(20, math.ceil(2e-3 / (sets * limit)))
    if keras.backend.backend() == "tensorflow" and not compiled:
        # Every operation is a part of the graph, and all results are kept.
        operations = min(_MAX_GRAPH_OPERATIONS, _MAX_RESULT_BYTES // least_bytes)
        repeats = max(1, operations // sets)
    return repeats, sets


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
        if (reasons := why_not(spec, read_lowering(lowering), group.pass_name))
    }
    try:
        with bench_common.precision_mode(group.precision):
            measured = _measure(
                group, [x for x in lowerings if x not in errors], limit, budget_seconds
            )
    except Exception as error:  # No memory for the arguments, say.
        failed = error_text.summary(error)
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
    return bench_common.why_no_precision(group.precision) or bench_common.why_not_compiled(
        "true" if group.compiled else "false"
    )


def _measure(
    group: Group, lowerings: Sequence[str], limit: float, budget_seconds: float | None
) -> dict[str, dict[str, Any]]:
    """Lowering → the fields of its row that were measured."""
    spec = group.spec
    repeats, count = repeats_and_sets(spec, limit, group.compiled)
    sets = draw_arguments(spec, group.pass_name, count)
    runners, found = {}, {}
    for lowering in lowerings:
        operation = make_operation(spec, read_lowering(lowering), group.pass_name)
        try:
            runners[lowering] = bench_device.make_runner(operation, sets, repeats, group.compiled)
        except Exception as error:
            found[lowering] = {"error": error_text.summary(error)}
    candidates = dict(runners)
    if repeats and runners:
        with contextlib.suppress(Exception):
            candidates[_OVERHEAD] = bench_device.make_runner(
                bench_device.run_nothing, sets, repeats, group.compiled
            )
    timings = time_interleaved(
        {name: runner.call for name, runner in candidates.items()},
        rounds=ROUNDS.value,
        warmup=1,
        budget_seconds=budget_seconds,
    )
    overhead = timings.get(_OVERHEAD, Timings()).median
    reference = None
    with contextlib.suppress(Exception):  # Then `relative_error` stays empty.
        reference = reference_result(group, sets[0])
    tolerance = bench_common.PRECISIONS[group.precision].tolerance
    for lowering, runner in runners.items():
        timing = timings[lowering]
        if timing.error is not None:
            found[lowering] = {
                "error": error_text.summary(timing.error),
                "first_seconds": timing.first_seconds,
            }
            continue
        operations = runner.operations
        fields = {
            "median": timing.median / operations,
            "p10": timing.p10 / operations,
            "p90": timing.p90 / operations,
            "count": timing.count,
            "first_seconds": timing.first_seconds,
            "operations": operations,
            "sets": len(sets),
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
                fields = {"error": error_text.summary(error)}
        found[lowering] = fields
    return found


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
        caption="ms for one operation; limit share: 1 is the roofline; error: to native in float32",
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
            f"{row.limit_share:.3f}",
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
        unknown = [value for value in holder.value if value not in accepted]
        if unknown or not holder.value:
            raise ValueError(
                f"Expected --{holder.name} to be some of {', '.join(accepted)}. "
                f"Received: {','.join(holder.value)}"
            )
    for lowering in LOWERINGS.value:
        read_lowering(lowering)


def main(_: list[str]) -> None:
    try:
        check_flags()
        shapes = bench_shapes.find_shapes(SHAPES.value, BATCH_SIZE.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    ceilings = bench_device.measure_ceilings(PRECISION.value)
    groups = [
        Group(shape, pass_name, precision, layout, compiled)
        for shape, precision, layout, compiled, pass_name in itertools.product(
            shapes,
            PRECISION.value,
            LAYOUTS.value,
            dict.fromkeys(bench_common.compiled(value) for value in JIT_COMPILE.value),
            PASS_NAMES.value,
        )
    ]
    settings = bench_common.flag_values(flags.FLAGS.get_key_flags_for_module(sys.argv[0]))
    environment = bench_common.environment(settings, ceilings=dataclasses.asdict(ceilings))
    budget = bench_common.Budget(BUDGET.value, len(groups))
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
