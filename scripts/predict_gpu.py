r"""Predicts least times on NVIDIA GPUs, without a GPU, from what XLA compiles for them.

JAX compiles for a card that is only described: what comes out are the kernels that
would be launched there. This reads their bytes, instructions, registers and calls of
cuDNN and cuBLAS, and from them the least time on the card:

- memory: the bytes that each kernel moves, over 0.9 of the card's peak;
- issue: the instructions of XLA's own kernels, over what the card issues at its
  boost clock;
- arithmetic: that of convolutions and matrix products, over the tensor cores' peak.

A kernel takes the longest of the three, and a program the sum over its kernels. **These
are predictions.** How fast cuDNN and cuBLAS are is not known: their rows say what they
take at best. Nothing is tuned on the card, as JAX would there; launches, waits and
latencies are left out, and a cache only counts in that a kernel reads each operand once.
Branches that are not taken count as instructions; a loop turns as often as its loads
need to bring in what is read.

Two kinds of programs, one or both in a run:

- `--shapes`: single passes of convolutions, for all `--lowerings`, `--passes`,
  `--precision` and `--layouts`. Names are those of benchmark_lowerings.py:
  `NAME@SIZE` (then `:KxK`, `:bN`, `:topN`), `HxWxC_kK_sS`, `main` or `all`. For
  models, sums over all their layers follow. A/B/C is a lowering for each pass
  (forward/input gradient/kernel gradient).
- `--models`: whole training steps, as Keras's trainer compiles them on JAX (SGD with
  momentum, cross-entropy), for all `--variants`: `stock`; `floor` (the centre tap of
  each depthwise kernel alone: what the rest of the step takes); a lowering, or A/B/C;
  `best`: for each layer and pass that of `--lowerings` with the least time alone.

It needs `pip install 'diagconv-tf[predict]'`, in an environment of its own where JAX is
used otherwise: the plugin without NVIDIA's libraries makes JAX look for them. Without
ptxas and nvdisasm there are no instructions, registers and spills.

Examples (2 CPU cores; one pass takes 1 to 3 seconds, a step 20 to 60):

    python scripts/predict_gpu.py --shapes=MobileNet@224 --out=predicted.json
    python scripts/predict_gpu.py --models=MobileNet --precision=default,bfloat16 \
        --cards=h100,a100 --out=predicted.json --pictures=predicted
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from gpu_prediction import process

if __name__ == "__main__":
    # First: what follows imports JAX.
    DUMP = process.prepare()

import bench_common
import bench_shapes
import bench_variants
import keras
from absl import app, flags
from gpu_prediction import bounds, report
from gpu_prediction.cards import CARDS, Card, find_card
from gpu_prediction.compiler import Compiler, why_not_here
from gpu_prediction.machine_code import Tools
from gpu_prediction.predictor import BEST, Predictor
from gpu_prediction.rows import PassRow, StepRow

from diagconv_tf import files
from diagconv_tf.spec import PASSES, STOCK
from diagconv_tf.text import summarize_error

CARD_NAMES = flags.DEFINE_list("cards", ["h100"], f"Some of {', '.join(CARDS)}.")
SHAPES = flags.DEFINE_list(
    "shapes",
    None,
    "Single convolutions: models (NAME@SIZE, then :KxK, :bN, :topN), shapes (HxWxC_kK_sS), main "
    "or all. None: three shapes of MobileNet, or none with --models.",
)
LOWERINGS = flags.DEFINE_list(
    "lowerings",
    [STOCK, "native", "shifted", "diagonal_grouped:32"],
    "Lowerings of --shapes, and what `best` chooses from; A/B/C is one for each pass, and stock "
    "what Keras's own layer runs.",
)
PASS_NAMES = flags.DEFINE_list("passes", list(PASSES), f"Some of {', '.join(PASSES)}.")
LAYOUTS = flags.DEFINE_list("layouts", ["channels_last"], "channels_last, channels_first or both.")
MODELS = flags.DEFINE_list("models", [], "keras.applications models for whole training steps.")
VARIANTS = flags.DEFINE_list(
    "variants",
    ["stock", "shifted", "diagonal_grouped:32", "best", "floor"],
    "What to compare in --models.",
)
SIZE = flags.DEFINE_integer("size", 224, "Height and width of the images of --models.", 32)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images.", 1)
PRECISION = flags.DEFINE_list(
    "precision",
    ["default"],
    f"Some of {', '.join(bench_common.PRECISIONS)}; default is float32 with TF32 allowed.",
)
OUT = flags.DEFINE_string("out", None, "File to write: .json.")
PICTURES = flags.DEFINE_string("pictures", None, "Folder for pictures.")

_THREE_SHAPES = ["56x56x128_k3_s1", "57x57x128_k3_s2_valid", "14x14x512_k3_s1"]


# All programs


def predict_passes(predictor: Predictor, shapes: Iterable[bench_shapes.Shape]) -> Iterable[PassRow]:
    conditions = itertools.product(
        PRECISION.value, LAYOUTS.value, shapes, PASS_NAMES.value, LOWERINGS.value
    )
    for precision, layout, shape, pass_name, lowering in conditions:
        spec = shape.spec.replace(
            data_format=layout, compute_dtype=bench_common.PRECISIONS[precision].dtype
        )
        row = predictor.predict_pass(spec, lowering, pass_name, precision)
        yield dataclasses.replace(row, shape=shape.name, used_by=dict(shape.uses))


def predict_steps(predictor: Predictor) -> Iterable[StepRow]:
    for precision, model in itertools.product(PRECISION.value, MODELS.value):
        stock = None
        for variant in VARIANTS.value:
            row = predictor.predict_step(model, SIZE.value, BATCH_SIZE.value, precision, variant)
            if variant == STOCK:
                stock = row.least_seconds
            if stock and row.least_seconds:
                row = dataclasses.replace(row, over_stock=row.least_seconds / stock)
            yield row


def count_layers(shapes: Iterable[bench_shapes.Shape]) -> dict[str, int]:
    """How many depthwise layers each model has that uses one of the shapes."""
    models = dict.fromkeys(model for shape in shapes for model in shape.uses)
    split = {model: model.rpartition("@") for model in models}
    return {
        model: len(bench_shapes.depthwise_specs(name, int(size), BATCH_SIZE.value))
        for model, (name, _, size) in split.items()
    }


class Results:
    """The rows so far, written after each: what is known outlives a crash."""

    def __init__(self, environment: dict[str, Any], layers: dict[str, int]):
        self._environment = environment
        self._layers = layers
        self.passes: list[PassRow] = []
        self.steps: list[StepRow] = []

    @property
    def by_model(self) -> list[report.ModelPass]:
        return report.by_model(self.passes, self._layers)

    def add(self, row: PassRow | StepRow) -> None:
        if isinstance(row, PassRow):
            self.passes.append(row)
            words = (row.card, row.precision, row.shape, row.pass_name, row.lowering)
        else:
            self.steps.append(row)
            words = (row.card, row.precision, row.model, row.variant)
        print(*words, "failed" if row.error else "", file=sys.stderr)
        if OUT.value:
            self._write(pathlib.Path(OUT.value))

    def _write(self, path: pathlib.Path) -> None:
        content = {
            "environment": self._environment,
            "passes": [dataclasses.asdict(row) for row in self.passes],
            "by_model": [dataclasses.asdict(row) for row in self.by_model],
            "steps": [dataclasses.asdict(row) for row in self.steps],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps(content, indent=1, allow_nan=False))


def environment(cards: dict[str, Card], tools: Tools) -> dict[str, Any]:
    """How the predictions came about, in JSON's types."""
    here = bench_common.environment(
        bench_common.flag_values(flags.FLAGS.get_key_flags_for_module(sys.argv[0]))
    )
    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin")
    versions = {name: _version(name) for name in packages} | {
        name: path and _tool_version(path) for name, path in dataclasses.asdict(tools).items()
    }
    kept = ("date", "command", "commit", "python", "diagconv_tf", "flags")
    return {
        "basis": "predicted: compiled and read, not run",
        **{name: here[name] for name in kept},
        "versions": here["versions"] | {k: v for k, v in versions.items() if v},
        "bandwidth_share": bounds.BANDWIDTH_SHARE,
        "heavy_share": bounds.HEAVY_SHARE,
        "cards": {name: dataclasses.asdict(card) for name, card in cards.items()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tool_version(path: str) -> str:
    done = subprocess.run([path, "--version"], capture_output=True, text=True)
    return next((line for line in done.stdout.splitlines() if "release" in line), "unknown")


# The command


def check_flags() -> dict[str, Card]:
    """The cards that are asked for.

    Raises:
        ValueError: if a flag is wrong; it says what is accepted.
    """
    cards = {name.lower(): find_card(name) for name in CARD_NAMES.value}
    if OUT.value and pathlib.Path(OUT.value).suffix != ".json":
        raise ValueError(f"Expected a file name that ends in .json. Received: {OUT.value}")
    for holder, accepted in (
        (PRECISION, bench_common.PRECISIONS),
        (LAYOUTS, ("channels_last", "channels_first")),
        (PASS_NAMES, PASSES),
    ):
        if not set(holder.value) <= set(accepted):
            raise ValueError(
                f"Expected --{holder.name} to be some of {', '.join(accepted)}. "
                f"Received: {','.join(holder.value)}"
            )
    unknown = [name for name in MODELS.value if not callable(getattr(keras.applications, name, 0))]
    if unknown:
        raise ValueError(f"Expected names of keras.applications. Received: --models={unknown}")
    for variant in {*LOWERINGS.value, *VARIANTS.value} - {STOCK, BEST}:
        bench_variants.read_variant(variant)
    return cards


def main(_: list[str]) -> None:
    try:
        cards = check_flags()
        names = SHAPES.value or ([] if MODELS.value else _THREE_SHAPES)
        shapes = bench_shapes.find_shapes(names, BATCH_SIZE.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    if reason := why_not_here():
        sys.exit(reason)
    tools = Tools.find()
    if missing := tools.missing():
        print(missing, file=sys.stderr)
    results = Results(environment(cards, tools), count_layers(shapes))
    for name, card in cards.items():
        try:
            compiler = Compiler(card, DUMP, tools)
        except Exception as error:
            sys.exit(
                f"Expected a plugin that knows {card.name}. Received: {summarize_error(error)}"
            )
        predictor = Predictor(name, card, compiler, LOWERINGS.value)
        for row in itertools.chain(predict_passes(predictor, shapes), predict_steps(predictor)):
            results.add(row)
    if results.passes:
        bench_common.print_table(report.pass_table(results.passes))
    if results.by_model:
        bench_common.print_table(report.model_table(results.by_model))
    if results.steps:
        bench_common.print_table(report.step_table(results.steps))
    bench_common.print_errors(
        (f"{row.lowering}, {row.pass_name}", row.error) for row in results.passes
    )
    bench_common.print_errors((f"{row.variant}, {row.model}", row.error) for row in results.steps)
    if PICTURES.value:
        report.draw_passes(PICTURES.value, results.passes, cards)
        report.draw_steps(PICTURES.value, results.steps, cards)


if __name__ == "__main__":
    app.run(main)
