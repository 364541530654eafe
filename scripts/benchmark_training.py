r"""Times whole training steps: models x variants, interleaved in one process.

Each variant is the same keras.applications model with the same weights; only
the way in which its convolutions with groups run differs:

- `default`: Keras's own layers, compiled as Keras does by itself here, whatever
  `--jit_compile` says (TensorFlow on CPUs: without XLA). It is what users have, and
  what every row is compared with. Where `stock` is the same, it stands for it;
- `stock`: Keras's own layers, compiled as the other variants;
- `floor`: every such convolution replaced by its centre tap (same strides and
  padding, one multiplication), so that what a variant takes above the floor is
  what its depthwise convolutions cost. It does not compute the same;
- `tuned`: the plan in the file that `--plan` names;
- anything else: a lowering, e.g. `diagonal:32`, or one per pass, written
  `shifted/shifted/diagonal:32` (forward/input gradient/kernel gradient).

Depthwise, separable (Xception) and grouped convolutions (ConvNeXt) count. The
first training step, which compiles, is timed apart; then the variants of a
model, precision, batch size and way of compiling take turns, and medians are
compared. Data is random and already on the device. A sample is
`--steps_per_sample` steps one after another, as `fit` runs them: the host is
ahead of the device, which is waited for at the end. A variant that fails is a
row with its error, and the others go on.

`--precision=default` leaves the framework's switches for float32 alone: it is
what training with Keras means unless something is switched, and what is
measured on GPUs where nothing else is asked for. There it lets TF32 into
convolutions, and on TensorFlow and JAX into matrix products; `float32` lets it
in nowhere, `tf32` everywhere.

All models come in the first precision, way of compiling and batch size, then in
the next.

Example (2 CPU cores, 5 minutes):

    KERAS_BACKEND=jax python scripts/benchmark_training.py --models=MobileNet,MobileNetV2

A GPU, meant to end within 10 minutes (not measured yet): the budget does not end
first steps, which on JAX and TensorFlow compile for most of the time.

    KERAS_BACKEND=… python scripts/benchmark_training.py --models=MobileNet,MobileNetV2 \
        --size=224 --batch_size=64 --variants=stock,floor,shifted,diagonal:32 \
        --budget_seconds=240 --out=training.json --pictures=training
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import bench_common
import bench_device
import bench_variants
import keras
import numpy as np
from absl import app, flags
from keras import ops
from rich.table import Table

from diagconv_tf import Plan, inspect_model, rewrite
from diagconv_tf.spec import STOCK
from diagconv_tf.text import summarize_error
from diagconv_tf.timing import Timings, time_interleaved
from diagconv_tf.tuning.contest import TrainingSteps

MODELS = flags.DEFINE_list("models", ["MobileNet", "MobileNetV2"], "keras.applications models.")
VARIANTS = flags.DEFINE_list(
    "variants",
    ["default", "stock", "floor", "native", "diagonal:32", "shifted"],
    "What to compare.",
)
PLAN = flags.DEFINE_string(
    "plan",
    None,
    "Plan file of the variant 'tuned'. {model}, {precision} and {batch_size} in the name stand "
    "for those of each group.",
)
SIZE = flags.DEFINE_integer("size", 96, "Height and width of the images, in pixels.", 32)
BATCH_SIZE = flags.DEFINE_list("batch_size", ["16"], "Images a step; one number or several.")
PRECISION = flags.DEFINE_list(
    "precision",
    None,
    f"Some of {', '.join(bench_common.PRECISIONS)}; the last two are Keras's mixed policies. "
    "None: float32 on a CPU, elsewhere default.",
)
JIT_COMPILE = flags.DEFINE_list(
    "jit_compile", ["auto"], "true, false or auto, as in Keras; one or several."
)
ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed samples of each variant.", 1)
STEPS = flags.DEFINE_integer(
    "steps_per_sample", None, "Steps in a sample. None: 1 on a CPU, elsewhere 10.", 1
)
BUDGET = flags.DEFINE_float(
    "budget_seconds", None, "For the whole run; first steps are always finished."
)
OUT = flags.DEFINE_string("out", None, "File to write: .json or .csv.")
PICTURES = flags.DEFINE_string("pictures", None, "Folder for pictures.")

#: Classes of the classifier: ImageNet's.
_CLASSES = 1000

#: The variant that is what users have.
DEFAULT = "default"


@dataclasses.dataclass(frozen=True)
class Group:
    """What the variants that are timed in turn have in common."""

    model: str
    precision: str
    batch_size: int
    jit_compile: str

    @property
    def compiled(self) -> bool:
        return bench_common.compiled(self.jit_compile)

    @property
    def is_default(self) -> bool:
        """Whether it is compiled as Keras does by itself here."""
        return self.compiled == bench_common.compiled("auto")

    def jit_compile_of(self, variant: str) -> str:
        return "auto" if variant == DEFAULT else self.jit_compile


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant of one model. Times are in seconds for one step.

    `scripts/results/README.md` says what each column means.
    """

    model: str
    size: int
    batch_size: int
    precision: str
    jit_compile: str
    compiled: bool
    variant: str
    layers: int = 0
    rewritten: int = 0
    first_step: float | None = None
    median: float | None = None
    p10: float | None = None
    p90: float | None = None
    count: int = 0
    steps_per_sample: int = 0
    images_per_second: float | None = None
    over_default: float | None = None
    over_stock: float | None = None
    above_floor_over_stock: float | None = None
    peak_memory: int | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    error: str | None = None


# One variant


class Trainer:
    """A compiled model and what its training steps need."""

    def __init__(self, group: Group, variant: str, x: Any, y: Any):
        # The same weights, whatever was made before.
        bench_common.seed(0)
        self.model = make_model(group.model)
        self.layers, self.rewritten = set_variant(self.model, variant, group)
        wanted = group.jit_compile_of(variant)
        jit_compile = {"auto": "auto", "true": True, "false": False}[wanted]
        self.model.compile(
            keras.optimizers.SGD(1e-3, momentum=0.9),
            "sparse_categorical_crossentropy",
            jit_compile=jit_compile,
        )
        self._batch = (x, y)
        self._steps = TrainingSteps(self.model, x, y)
        self._last: Any = None
        self.first_loss: float | None = None
        self.peak_memory: int | None = None

    def sample(self, steps: int) -> Any:
        """Trains for `steps` steps; returns what is to be waited for."""
        if self.first_loss is None:
            return self._first_step()
        for _ in range(steps):
            self._last, state = self._steps.run()
        return self._last, state

    def _first_step(self) -> None:
        loss, memory = bench_device.peak_memory(lambda: self.model.train_on_batch(*self._batch))
        self.first_loss = float(loss)
        if keras.backend.backend() == "jax":
            # Its peak is since the start, so that a later step adds nothing.
            self.peak_memory = memory

    def measure_memory(self, steps: int) -> None:
        if keras.backend.backend() != "jax":
            _, self.peak_memory = bench_device.peak_memory(lambda: self.sample(steps))

    @property
    def last_loss(self) -> float | None:
        """The mean of the losses since the first step, as Keras's metric has it."""
        return None if self._last is None else float(self._last["loss"])


def make_model(name: str) -> keras.Model:
    shape = (SIZE.value, SIZE.value, 3)
    return getattr(keras.applications, name)(weights=None, input_shape=shape, classes=_CLASSES)


def set_variant(model: keras.Model, variant: str, group: Group) -> tuple[int, int]:
    """Makes the model's convolutions with groups compute as `variant` says.

    Returns:
        How many there are, and how many of them are not Keras's own now.

    Raises:
        ValueError: if there are none, or all stay as they were and no plan
            says so.
    """
    if variant == "tuned":
        name = (PLAN.value or "").format(
            model=group.model, precision=group.precision, batch_size=group.batch_size
        )
        rewrite(model, Plan.load(name), in_place=True)
    elif variant not in (DEFAULT, STOCK):
        rewrite(model, bench_variants.read_variant(variant), in_place=True)
    rows = inspect_model(model).rows
    rewritten = sum(row.lowering != STOCK for row in rows)
    if not rows or (variant not in (DEFAULT, STOCK, "tuned") and not rewritten):
        raise ValueError(
            f"Expected convolutions with groups that {variant} can compute. Received: "
            f"{group.model} with {len(rows)}, of which none can be rewritten so"
        )
    return len(rows), rewritten


# Measuring


def benchmark(group: Group, budget_seconds: float | None) -> list[Row]:
    """A row for each variant, in their order; whatever fails, the others go on."""
    blank = functools.partial(
        Row,
        model=group.model,
        size=SIZE.value,
        batch_size=group.batch_size,
        precision=group.precision,
        jit_compile=group.jit_compile,
        compiled=group.compiled,
    )
    refusal = bench_common.why_no_precision(group.precision)
    refusal = refusal or bench_common.why_not_compiled(group.jit_compile)
    if refusal is None and budget_seconds == 0:
        refusal = "no time left"
    if refusal is not None:
        return [blank(variant=variant, error=refusal) for variant in variants_of(group)]
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(bench_common.PRECISIONS[group.precision].policy)
    try:
        with bench_common.precision_mode(group.precision):
            return _benchmark(group, blank, budget_seconds)
    except Exception as error:  # No memory for the images, say.
        failed = summarize_error(error)
        return [blank(variant=variant, error=failed) for variant in variants_of(group)]
    finally:
        keras.config.set_dtype_policy(policy)


def variants_of(group: Group) -> list[str]:
    """The variants to train: `default` only where `stock` is not the same."""
    same = group.is_default and STOCK in VARIANTS.value
    return [variant for variant in VARIANTS.value if not (same and variant == DEFAULT)]


def _benchmark(group: Group, blank: Callable[..., Row], budget_seconds: float | None) -> list[Row]:
    start = time.monotonic()
    steps = STEPS.value or (1 if bench_common.device_kind() == "cpu" else 10)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(group.batch_size, SIZE.value, SIZE.value, 3))
    x = ops.convert_to_tensor(images.astype("float32"))
    y = ops.convert_to_tensor(rng.integers(0, _CLASSES, group.batch_size))
    trainers: dict[str, Trainer] = {}
    errors: dict[str, str] = {}
    variants = variants_of(group)
    for variant in variants:
        try:
            trainers[variant] = Trainer(group, variant, x, y)
        except Exception as error:
            errors[variant] = summarize_error(error)
    if budget_seconds is not None:
        # Making the models is part of it.
        budget_seconds = max(budget_seconds - (time.monotonic() - start), 1e-3)
    timings = time_interleaved(
        {v: functools.partial(trainer.sample, steps) for v, trainer in trainers.items()},
        rounds=ROUNDS.value,
        warmup=2,
        budget_seconds=budget_seconds,
    )
    medians = {
        variant: timing.median / steps for variant, timing in timings.items() if timing.count
    }
    stock, floor = medians.get(STOCK), medians.get("floor")
    default = stock if group.is_default and stock else medians.get(DEFAULT)
    rows = []
    for variant in variants:
        trainer, timing = trainers.get(variant), timings.get(variant, Timings())
        if timing.error is not None:
            errors[variant] = summarize_error(timing.error)
        if variant in errors:
            rows.append(blank(variant=variant, error=errors[variant]))
            continue
        with contextlib.suppress(Exception):  # Then `peak_memory` stays empty.
            trainer.measure_memory(steps)
        median = medians[variant]
        rows.append(
            blank(
                variant=variant,
                layers=trainer.layers,
                rewritten=trainer.rewritten,
                first_step=timing.first_seconds,
                median=median,
                p10=timing.p10 / steps,
                p90=timing.p90 / steps,
                count=timing.count,
                steps_per_sample=steps,
                images_per_second=group.batch_size / median,
                over_default=None if default is None else median / default,
                over_stock=None if stock is None else median / stock,
                above_floor_over_stock=_above_floor_over_stock(median, floor, stock),
                peak_memory=trainer.peak_memory,
                first_loss=_finite(trainer.first_loss),
                last_loss=_finite(trainer.last_loss),
            )
        )
    return rows


def _above_floor_over_stock(
    median: float, floor: float | None, stock: float | None
) -> float | None:
    """What the depthwise convolutions cost, over what they cost in stock."""
    if stock is None or floor is None or stock <= floor:
        return None
    return (median - floor) / (stock - floor)


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and np.isfinite(value) else None


# What is shown


def make_table(rows: Sequence[Row]) -> Table:
    table = Table(
        title=f"{keras.backend.backend()} on {bench_common.device_kind()}, "
        f"{SIZE.value}x{SIZE.value} pixels",
        caption="ms for one step; default: Keras's layers, and its own choice of compiler; "
        "depthwise: what it takes above the floor, over the same of stock; layers: rewritten of "
        "all with groups; memory: peak of a step",
    )
    for column in ("model", "conditions", "variant"):
        table.add_column(column, overflow="fold")
    for column in (
        "layers",
        "step ms",
        "p10",
        "p90",
        "images/s",
        "/ default",
        "/ stock",
        "depthwise",
        "first step s",
        "memory MB",
        "first loss",
    ):
        table.add_column(column, justify="right")
    group = None
    for row in rows:
        conditions = f"batch {row.batch_size} {row.precision}{' jit' if row.compiled else ''}"
        if group not in (None, (row.model, conditions)):
            table.add_section()
        group = (row.model, conditions)
        if row.error:
            table.add_row(*group, row.variant, "", "failed")
            continue
        table.add_row(
            *group,
            row.variant,
            f"{row.rewritten}/{row.layers}",
            *(f"{1e3 * t:.1f}" for t in (row.median, row.p10, row.p90)),
            f"{row.images_per_second:.1f}",
            "" if row.over_default is None else f"{row.over_default:.3f}",
            "" if row.over_stock is None else f"{row.over_stock:.3f}",
            "" if row.above_floor_over_stock is None else f"{row.above_floor_over_stock:.3f}",
            f"{row.first_step:.1f}",
            "" if row.peak_memory is None else f"{row.peak_memory / 1e6:.0f}",
            "not finite" if row.first_loss is None else f"{row.first_loss:.5f}",
        )
    return table


def draw_pictures(folder: str, rows: Sequence[Row]) -> None:
    """For each precision, batch size and way of compiling, bars for all models."""
    keys = dict.fromkeys((row.precision, row.batch_size, row.compiled) for row in rows)
    for precision, batch_size, compiled in keys:
        some = [
            row
            for row in rows
            if (row.precision, row.batch_size, row.compiled) == (precision, batch_size, compiled)
        ]
        if not any(row.median for row in some):
            continue
        models = list(dict.fromkeys(row.model for row in some))
        series = {
            variant: {
                row.model: (row.median, row.p10, row.p90)
                for row in some
                if row.variant == variant and row.median
            }
            for variant in dict.fromkeys(row.variant for row in some)
        }
        figure = bench_common.new_figure(figsize=(3 + 2.2 * len(models), 4.5))
        axes = figure.subplots()
        bench_common.draw_bars(axes, models, series)
        axes.set_yscale("linear")  # Bars from zero: these are compared by their length.
        axes.set_ylabel("milliseconds a training step")
        how = "compiled" if compiled else "not compiled"
        axes.set_title(
            f"{keras.backend.backend()}, {how}, {precision}, batch {batch_size}, {SIZE.value}x"
            f"{SIZE.value}; median, p10 to p90",
            fontsize="medium",
        )
        axes.legend(fontsize="small")
        suffix = "_compiled" if compiled else ""
        bench_common.save_figure(figure, folder, f"training_{precision}_{batch_size}{suffix}")


# The command


def check_flags() -> None:
    bench_common.check_out(OUT.value)
    for holder, accepted in (
        (PRECISION, bench_common.PRECISIONS),
        (JIT_COMPILE, ("auto", "true", "false")),
    ):
        unknown = [value for value in holder.value or () if value not in accepted]
        if unknown:
            raise ValueError(
                f"Expected --{holder.name} to be some of {', '.join(accepted)}. "
                f"Received: {','.join(holder.value)}"
            )
    unknown = [name for name in MODELS.value if not hasattr(keras.applications, name)]
    if unknown:
        raise ValueError(f"Expected names of keras.applications. Received: --models={unknown}")
    if not all(size.isdigit() and int(size) for size in BATCH_SIZE.value):
        raise ValueError(f"Expected --batch_size >= 1. Received: {','.join(BATCH_SIZE.value)}")
    for variant in VARIANTS.value:
        if variant not in (DEFAULT, STOCK, "tuned"):
            bench_variants.read_variant(variant)
    if ("tuned" in VARIANTS.value) != (PLAN.value is not None):
        raise ValueError(
            "Expected --plan=FILE together with the variant 'tuned'. Received: "
            f"--plan={PLAN.value}, --variants={','.join(VARIANTS.value)}"
        )


def main(_: list[str]) -> None:
    try:
        check_flags()
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    groups = [
        Group(model, precision, int(batch_size), jit_compile)
        # Models inside: where the budget runs out, the last conditions are missing.
        for precision, jit_compile, batch_size, model in itertools.product(
            PRECISION.value or [bench_common.default_precision()],
            JIT_COMPILE.value,
            BATCH_SIZE.value,
            MODELS.value,
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
    bench_common.print_errors((f"{row.variant}, {row.model}", row.error) for row in rows)
    if PICTURES.value:
        draw_pictures(PICTURES.value, rows)


if __name__ == "__main__":
    app.run(main)
