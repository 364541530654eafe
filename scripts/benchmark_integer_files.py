r"""Compares files of integers with files of floats: size, and time for one image.

A model is one of the recipes, built, its batch norms given statistics, and made low-bit;
or, with `--model`, a file of what `deploy` returned. Built models are not trained: their
sizes and times are those of trained ones, and how near the outputs are is not.

The float file is of the same model with stock layers, which round nothing. Both files are
run in this process, in turn, with the runtime's own defaults: onnxruntime takes all cores,
LiteRT one. `speed` is the float file's median over the integer file's.

Examples (2 CPU cores, a minute each):

    KERAS_BACKEND=tensorflow python scripts/benchmark_integer_files.py --out=files.json
    KERAS_BACKEND=torch python scripts/benchmark_integer_files.py --formats=onnx \
        --model=deployed.keras
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import tempfile
from typing import Any

import bench_common
import keras
import numpy as np
from absl import app, flags
from rich.table import Table

from diagconv_tf import LowBit, deploy, restore, rewrite
from diagconv_tf.exporting import ExportError, export
from diagconv_tf.exporting.exporter import FORMATS as ALL_FORMATS
from diagconv_tf.exporting.sample_inputs import sample_inputs
from diagconv_tf.text import summarize_error
from diagconv_tf.timing import time_interleaved

RECIPES = ("mobilenet_v1", "mobilenet_v2")

MODELS = flags.DEFINE_list("models", list(RECIPES), f"Of {', '.join(RECIPES)}; built.")
MODEL = flags.DEFINE_string("model", None, "A .keras file of a deployed model, in their place.")
SIZES = flags.DEFINE_multi_integer("size", [32, 96], "Height and width of the images.")
WIDTH = flags.DEFINE_float("width", 0.25, "Width multiplier.")
CLASSES = flags.DEFINE_integer("classes", 10, "Classes.", lower_bound=1)
WEIGHTS = flags.DEFINE_integer("weights", 7, "Bits of a weight.", lower_bound=1, upper_bound=7)
ACTIVATIONS = flags.DEFINE_integer("activations", 8, "Bits of an activation.", 1, 8)
LIMIT = flags.DEFINE_float("limit", 6.0, "The largest activation.")
FORMATS = flags.DEFINE_list("formats", ["onnx", "litert"], "Of onnx, litert.")
ROUNDS = flags.DEFINE_integer("rounds", 200, "Times of each file.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "Writes a JSON (or .csv) file of the results.")


@dataclasses.dataclass(frozen=True)
class Row:
    """One model in one format. Times are seconds for one image.

    Attributes:
        model: its name.
        format: of both files.
        layers: of the low-bit ones, how many multiply integers, and of how many.
        integer_bytes: size of the file.
        float_bytes: the same of the float file.
        share_within: share of outputs within a step of the model with rounded biases.
        integer_median: of the file of integers, and p10 and p90.
        float_median: of the file of floats, and p10 and p90.
        error: what failed.
    """

    model: str
    format: str
    layers: str = ""
    integer_bytes: int | None = None
    float_bytes: int | None = None
    share_within: float | None = None
    integer_median: float | None = None
    integer_p10: float | None = None
    integer_p90: float | None = None
    float_median: float | None = None
    float_p10: float | None = None
    float_p90: float | None = None
    error: str | None = None


def built(name: str, size: int) -> keras.Model:
    """A deployed model with statistics of batch norms for random images."""
    sys.path.insert(0, str(bench_common.ROOT))
    from recipes import models

    bench_common.seed(0)
    channels_last = keras.config.image_data_format() == "channels_last"
    shape = (size, size, 3) if channels_last else (3, size, size)
    model = getattr(models, name)(
        shape,
        CLASSES.value,
        width_multiplier=WIDTH.value,
        batch_norm_momentum=0.5,
        name=f"{name}_{size}",
    )
    treatment = LowBit(WEIGHTS.value, ACTIVATIONS.value, limit=LIMIT.value)
    low_bit = rewrite(model, treatment, in_place=True)
    images = np.random.default_rng(0).normal(size=(16, *shape)).astype("float32")
    for _ in range(5):
        low_bit(images, training=True)
    return deploy(low_bit)


def measured(model: keras.Model, format_name: str, is_trained: bool) -> Row:
    file_format = next(f for f in ALL_FORMATS if f.name == format_name)
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f"{kind}{file_format.suffix}") for kind in ("i", "f")]
        # An untrained network magnifies any rounding.
        tolerance = None if is_trained else 255.0
        report = export(model, paths[0], format_name, tolerance=tolerance)
        integers = report.integers
        if integers is None:
            raise ValueError(
                f"Expected a deployed model with layers of integers. Received: {model.name}"
            )
        export(restore(model), paths[1], format_name)
        one, _ = next(sample_inputs(model, None))
        timings = time_interleaved(
            {path: file_format.caller(path, one) for path in paths},
            rounds=ROUNDS.value,
            warmup=10,
        )
        ours, floats = timings.values()
        for timing in (ours, floats):
            if timing.error is not None:
                raise timing.error
        return Row(
            model.name,
            format_name,
            f"{len(integers.plan.layers) - len(integers.plan.left_float)}"
            f" of {len(integers.plan.layers)}",
            report.file_bytes,
            os.path.getsize(paths[1]),
            integers.share_within if is_trained else None,
            ours.median,
            ours.p10,
            ours.p90,
            floats.median,
            floats.p10,
            floats.p90,
        )


def table_of(rows: list[Row]) -> Table:
    table = Table(title="Files of integers and of floats, one image")
    for name in ("model", "format", "layers", "integer kB", "float kB", "share"):
        table.add_column(name, overflow="fold")
    for name in ("integer ms (p10-p90)", "float ms (p10-p90)", "speed"):
        table.add_column(name, justify="right")
    for row in rows:
        if row.error is not None or not row.integer_median or not row.float_median:
            table.add_row(row.model, row.format, "failed")
            continue
        assert row.integer_bytes is not None
        assert row.float_bytes is not None
        table.add_row(
            row.model,
            row.format,
            row.layers,
            f"{row.integer_bytes / 1e3:.0f}",
            f"{row.float_bytes / 1e3:.0f}",
            f"{row.integer_bytes / row.float_bytes:.2f}",
            milliseconds(row.integer_median, row.integer_p10, row.integer_p90),
            milliseconds(row.float_median, row.float_p10, row.float_p90),
            f"{row.float_median / row.integer_median:.2f}",
        )
    return table


def milliseconds(median: float | None, p10: float | None, p90: float | None) -> str:
    return f"{1e3 * (median or 0):.3f} ({1e3 * (p10 or 0):.3f}-{1e3 * (p90 or 0):.3f})"


def models() -> list[tuple[keras.Model, bool]]:
    """The models, each with whether it is trained."""
    if MODEL.value is not None:
        return [(keras.saving.load_model(MODEL.value), True)]
    return [(built(n, size), False) for n, size in itertools.product(MODELS.value, SIZES.value)]


def main(arguments: list[str]) -> int:
    if arguments[1:]:
        raise app.UsageError(f"Expected flags only. Received: {' '.join(arguments[1:])}")
    for holder, accepted in ((MODELS, RECIPES), (FORMATS, ("onnx", "litert"))):
        unknown = sorted(set(holder.value) - set(accepted))
        if unknown:
            raise app.UsageError(
                f"Expected --{holder.name} to be of {', '.join(accepted)}. "
                f"Received: {', '.join(unknown)}"
            )
    bench_common.check_out(OUT.value)
    rows: list[Row] = []
    for model, is_trained in models():
        for format_name in FORMATS.value:
            try:
                rows.append(measured(model, format_name, is_trained))
            except (ExportError, ImportError, ValueError) as error:
                rows.append(Row(model.name, format_name, error=summarize_error(error)))
    bench_common.print_table(table_of(rows))
    bench_common.print_errors((f"{row.model} {row.format}", row.error) for row in rows)
    if OUT.value:
        holders: list[Any] = [MODELS, MODEL, SIZES, WIDTH, CLASSES, WEIGHTS, ACTIVATIONS, LIMIT]
        used = bench_common.flag_values([*holders, FORMATS, ROUNDS])
        bench_common.write_results(OUT.value, rows, bench_common.environment(used))
    return int(all(row.error for row in rows))


if __name__ == "__main__":
    app.run(main)
