"""Times whole training steps: models x variants, interleaved in one process.

Each variant is the same keras.applications model with the same weights; only
the way in which its depthwise convolutions run differs:

- `stock`: Keras's own layers;
- `floor`: every depthwise convolution replaced by its centre tap (same strides
  and padding, one multiplication), so that what a variant takes above the floor
  is what its depthwise convolutions cost. It does not compute the same;
- anything else: a lowering, e.g. `diagonal:32`, or one per pass, written
  `shifted/shifted/diagonal:32` (forward/input gradient/kernel gradient).

The first training step, which compiles, is timed apart; then the variants take
turns, and medians are compared. Data is random and already on the device.

Example (2 CPU cores, 5 minutes):

    KERAS_BACKEND=jax python scripts/benchmark_training.py --models=MobileNet,MobileNetV2
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import platform
from typing import Any

import keras
import numpy as np
from absl import app, flags
from keras import ops
from rich.console import Console
from rich.table import Table

import diagconv_tf
from diagconv_tf import Conditions
from diagconv_tf.timing import Timings, time_interleaved

MODELS = flags.DEFINE_list("models", ["MobileNet", "MobileNetV2"], "keras.applications models.")
VARIANTS = flags.DEFINE_list(
    "variants", ["stock", "floor", "native", "diagonal:32", "shifted"], "What to compare."
)
SIZE = flags.DEFINE_integer("size", 96, "Height and width of the images, in pixels.", 32)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Images a step.", 1)
PRECISION = flags.DEFINE_enum(
    "precision", "float32", ["float32", "mixed_bfloat16", "mixed_float16"], "Keras dtype policy."
)
JIT_COMPILE = flags.DEFINE_enum(
    "jit_compile", "auto", ["auto", "true", "false"], "Whether the step is compiled, as in Keras."
)
ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed steps of each variant.", 2)
BUDGET = flags.DEFINE_float("budget_seconds", None, "Stop the timing of a model after so long.")
OUT = flags.DEFINE_string("out", None, "JSON file to write.")

STOCK_LAYERS = {
    keras.layers.DepthwiseConv2D: diagconv_tf.DiagonalwiseDepthwiseConv2D,
    keras.layers.SeparableConv2D: diagconv_tf.DiagonalwiseSeparableConv2D,
    keras.layers.Conv2D: diagconv_tf.DiagonalwiseConv2D,
}


class _CentreTap:
    """In place of `_convolve`: the centre tap of each depthwise kernel."""

    def _convolve(self, inputs: Any, kernel: Any) -> Any:
        inputs, kernel = ops.convert_to_tensor(inputs), ops.convert_to_tensor(kernel)
        spec = self.spec(tuple(inputs.shape))
        if spec.input_channels_per_group > 1 or spec.output_channels_per_group > 1:
            raise ValueError(f"The floor is defined for plain depthwise layers. Received: {spec}")
        kernel = ops.reshape(kernel, spec.kernel_shape)
        centre = [(k - 1) // 2 for k in spec.kernel_size]
        padding = spec.padding_for((spec.height, spec.width))
        window = [slice(None)] * 4
        for axis in (0, 1):
            first = centre[axis] * spec.dilation_rate[axis] - padding[axis][0]
            last = first + (spec.output_size[axis] - 1) * spec.strides[axis]
            window[spec.spatial_axes[axis]] = slice(first, last + 1, spec.strides[axis])
        shape = [1, 1, 1, 1]
        shape[spec.channel_axis] = spec.output_channels
        return inputs[tuple(window)] * ops.reshape(kernel[centre[0], centre[1], 0], shape)


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant of one model. Times are in seconds."""

    model: str
    variant: str
    first_step: float
    median: float
    p10: float
    p90: float
    count: int
    images_per_second: float
    over_stock: float | None
    first_loss: float
    error: str | None = None


def set_variant(model: keras.Model, variant: str) -> int:
    """Makes the model's grouped convolutions compute as `variant` says.

    Returns:
        How many layers were changed.
    """
    if variant == "stock":
        return 0
    changed = 0
    for layer in model._flatten_layers(include_self=False):
        ours = STOCK_LAYERS.get(type(layer))
        if ours is None or (ours is diagconv_tf.DiagonalwiseConv2D and layer.groups == 1):
            continue
        changed += 1
        if variant == "floor":
            layer.__class__ = type(f"Floor{ours.__name__}", (_CentreTap, ours), {})
            continue
        layer.__class__ = ours
        passes = variant.split("/")
        names = ("forward", "input_gradient", "kernel_gradient")
        layer.lowering = variant if len(passes) == 1 else dict(zip(names, passes, strict=True))
    return changed


def make_model(name: str, variant: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(PRECISION.value)
    shape = (SIZE.value, SIZE.value, 3)
    model = getattr(keras.applications, name)(weights=None, input_shape=shape, classes=1000)
    if set_variant(model, variant) == 0 and variant != "stock":
        raise ValueError(f"Expected a model with grouped convolutions. Received: {name}")
    jit_compile = {"auto": "auto", "true": True, "false": False}[JIT_COMPILE.value]
    model.compile(
        keras.optimizers.SGD(1e-3, momentum=0.9),
        "sparse_categorical_crossentropy",
        jit_compile=jit_compile,
    )
    return model


def benchmark(name: str) -> list[Row]:
    """Rows for one model, in the order of the variants."""
    rng = np.random.default_rng(0)
    x = ops.convert_to_tensor(
        rng.normal(size=(BATCH_SIZE.value, SIZE.value, SIZE.value, 3)).astype("float32")
    )
    y = ops.convert_to_tensor(rng.integers(0, 1000, BATCH_SIZE.value))
    models = {variant: make_model(name, variant) for variant in VARIANTS.value}
    losses: dict[str, list[float]] = {variant: [] for variant in models}

    def step(variant: str) -> Any:
        loss = models[variant].train_on_batch(x, y)
        losses[variant].append(float(loss))
        return loss

    timings = time_interleaved(
        {variant: (lambda v=variant: step(v)) for variant in models},
        rounds=ROUNDS.value,
        warmup=2,
        budget_seconds=BUDGET.value,
    )
    stock = timings.get("stock")
    return [make_row(name, variant, timings[variant], stock, losses[variant]) for variant in models]


def make_row(
    model: str, variant: str, timings: Timings, stock: Timings | None, losses: list[float]
) -> Row:
    if timings.error is not None or not timings.count:
        nan = float("nan")
        error = str(timings.error or "no time left")
        return Row(model, variant, nan, nan, nan, nan, 0, nan, None, nan, error)
    return Row(
        model=model,
        variant=variant,
        first_step=timings.first_seconds,
        median=timings.median,
        p10=timings.p10,
        p90=timings.p90,
        count=timings.count,
        images_per_second=BATCH_SIZE.value / timings.median,
        over_stock=timings.median / stock.median if stock and stock.count else None,
        first_loss=losses[0],
    )


def environment() -> dict[str, Any]:
    conditions = Conditions.current()
    return {
        "date": datetime.date.today().isoformat(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "diagconv_tf": diagconv_tf.__version__,
        **dataclasses.asdict(conditions),
        "flags": {
            flag.name: flag.value
            for flag in flags.FLAGS.get_key_flags_for_module(__import__("sys").modules["__main__"])
            if flag.name != "out"
        },
    }


def print_table(rows: list[Row]) -> None:
    table = Table(
        title=f"{keras.backend.backend()}, {SIZE.value}x{SIZE.value}, "
        f"batch {BATCH_SIZE.value}, {PRECISION.value}, jit_compile={JIT_COMPILE.value}"
    )
    for column in ("model", "variant"):
        table.add_column(column)
    for column in ("step ms", "p10", "p90", "images/s", "/ stock", "first step s", "first loss"):
        table.add_column(column, justify="right")
    for row in rows:
        if row.error:
            table.add_row(row.model, row.variant, row.error.splitlines()[0])
            continue
        table.add_row(
            row.model,
            row.variant,
            *(f"{1e3 * t:.1f}" for t in (row.median, row.p10, row.p90)),
            f"{row.images_per_second:.1f}",
            "" if row.over_stock is None else f"{row.over_stock:.3f}",
            f"{row.first_step:.1f}",
            f"{row.first_loss:.5f}",
        )
    Console(width=None if os.isatty(1) else 160).print(table)


def write_results(path: pathlib.Path, rows: list[Row]) -> None:
    """Writes JSON aside and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), "rows": [dataclasses.asdict(row) for row in rows]}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def main(_: list[str]) -> None:
    unknown = [name for name in MODELS.value if not hasattr(keras.applications, name)]
    if unknown:
        raise app.UsageError(f"Expected names of keras.applications. Received: --models={unknown}")
    rows = []
    for name in MODELS.value:
        rows += benchmark(name)
        if OUT.value:
            write_results(pathlib.Path(OUT.value), rows)
        keras.backend.clear_session(free_memory=True)
    print_table(rows)


if __name__ == "__main__":
    app.run(main)
