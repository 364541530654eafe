"""What a run leaves behind.

    runs/NAME/
      config.json      the settings
      metrics.jsonl    one JSON object a line, as the training goes: "event" is
                       "step" (mean loss since the line before) or "epoch"
      checkpoints/     a folder for each variant, to go on with --resume
      results/         a file for each variant that is trained to the end
      plans/           what --lowering=tune chose, and measured
      report.md        tables and picture, to be read
      report.json      the numbers of the table
      curves.png       loss curves and step times
      bits.png         accuracy against bits, where variants have few
      kept.png         accuracy against the elements of gradients that are kept
      step_times.json  those times: all variants and Keras's default, in turn
      model.keras      the last variant, trained, in stock layers; not compiled.
                       Of a low-bit one, the deployed model; of a simplified
                       one, the model without the removed units
      low_bit.keras    of a low-bit one, the model with its float weights, to
                       be trained on
      class_names.json the names of its outputs, in their order
      saved_model/     the same for serving (TensorFlow only)
      tensorboard/     events, a folder for each variant (TensorFlow only)
      profile/         with --profile, a folder for each variant

`metrics.jsonl` and the events grow where they are, so that a run can be
watched. All else is written under another name and renamed when complete.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table

import diagconv_tf
from diagconv_tf import Conditions, files
from recipes.accuracy_picture import BITS, KEPT, bits_text, draw_accuracies
from recipes.comparing import KERAS_DEFAULT, ComparedSteps
from recipes.config import BUILT_IN, Config
from recipes.curves import draw_curves
from recipes.results import VariantResult
from recipes.simplifying import Simplified
from recipes.step_times import STEPS, Comparison, StepTimes
from recipes.treatments import FLOAT

# In the first steps only rounding tells two exact variants apart; later every
# training, also one repeated in another order of summation, goes its own way.
# Each of these steps has a line of its own in `metrics.jsonl`.
EARLY_STEPS = 20

_WHY_LOSSES_PART = (
    "Exact lowerings compute the same function with other roundings; training multiplies these "
    "differences from step to step, as it does those of another order of summation, so the loss "
    "curves part while the results stay alike."
)


@dataclasses.dataclass(frozen=True)
class RunReport:
    """The results of a run; `variants[0]` is what the others are compared with.

    Args:
        config: The experiment.
        folder: Where the files are.
        environment: Backend, versions and machine.
        variants: In the order of training.
        restored_accuracy: On the test images, of the last variant in stock
            layers, in [0, 1].
        exported: What the export found, in a sentence; empty without one.
        skipped_files: Images that were left out because they cannot be decoded.
        steps: The step times of all variants and of Keras's default, in turn.
        head: What became of the classifier of a model from a file; else empty.
        warnings: What did not go as it should, in sentences without full stop.
        simplified: Variant → what it has without the hidden units that it lost.
    """

    config: Config
    folder: pathlib.Path
    environment: dict[str, str]
    variants: tuple[VariantResult, ...]
    restored_accuracy: float | None = None
    exported: str = ""
    skipped_files: tuple[str, ...] = ()
    steps: ComparedSteps = ComparedSteps(default="")  # noqa: RUF009 - frozen.
    head: str = ""
    warnings: tuple[str, ...] = ()
    simplified: Mapping[str, Simplified] = dataclasses.field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One per variant: the numbers of the table, times in seconds; None where unknown."""
        first = self.variants[0]
        rows = []
        if KERAS_DEFAULT in self.steps.times:
            rows.append({"variant": KERAS_DEFAULT, **self._times(KERAS_DEFAULT)})
        for variant in self.variants:
            # What a treatment changes is no difference of rounding.
            differences = np.array([]) if self.is_treated else variant.loss_differences(first)
            simplified = self.simplified.get(variant.name)
            rows.append(
                {
                    "variant": variant.name,
                    **self._times(variant.name),
                    "first_step_seconds": variant.steps.first_step_seconds,
                    "test_accuracy": _known(variant.test_accuracy),
                    "test_top5_accuracy": variant.test_top5_accuracy,
                    "loss_difference": _largest(differences),
                    "early_loss_difference": _largest(differences[:EARLY_STEPS]),
                    "choice": variant.choice,
                    "bits": list(variant.bits),
                    "kept": variant.kept,
                    "simplified": simplified and dataclasses.asdict(simplified),
                    "in_training": dataclasses.asdict(variant.steps),
                }
            )
        return rows

    @property
    def is_treated(self) -> bool:
        """Whether a treatment changed what a variant computes: no losses are compared then."""
        return any(variant.is_treated for variant in self.variants)

    @property
    def has_bits(self) -> bool:
        """Whether a variant computes with few bits."""
        return any(variant.bits != FLOAT for variant in self.variants)

    @property
    def has_kept(self) -> bool:
        """Whether a variant keeps some elements of gradients only."""
        return any(variant.kept is not None for variant in self.variants)

    def _times(self, name: str) -> dict[str, float | None]:
        times = self.steps.times.get(name)
        default = self.steps.times.get(self.steps.default)
        if times is None or default is None:
            return {}
        ratio, median = times.compared_with(default), times.percentile(50)
        return {
            "step_median_seconds": median,
            "step_p10_seconds": times.percentile(10),
            "step_p90_seconds": times.percentile(90),
            "images_per_second": self.config.batch_size / median if median else None,
            "of_default": ratio.median,
            "of_default_lowest": ratio.lowest,
            "of_default_highest": ratio.highest,
            "input_wait": times.input_wait,
        }

    def write(self) -> None:
        """Writes `report.json`, `report.md` and the pictures."""
        content = {
            "environment": self.environment,
            "variants": self.rows(),
            "default": self.steps.default,
            "restored_accuracy": self.restored_accuracy,
            "exported": self.exported,
            "head": self.head,
            "warnings": list(self.all_warnings()),
            "skipped_files": list(self.skipped_files),
        }
        files.write_text(self.folder / "report.json", json.dumps(content, indent=2))
        files.write_aside(
            self.folder / "curves.png",
            lambda path: draw_curves(self.picture_title(), self._drawn(), path),
        )
        pictures = (("bits", BITS, self.has_bits), ("kept", KEPT, self.has_kept))
        for name, scale, is_drawn in pictures:
            if is_drawn:
                files.write_aside(
                    self.folder / f"{name}.png",
                    functools.partial(draw_accuracies, self.picture_title(), self.variants, scale),
                )
        files.write_text(self.folder / "report.md", self.to_markdown())

    def _drawn(self) -> tuple[VariantResult, ...]:
        """The variants, with the step times of the table in place of those of the training."""
        return tuple(
            dataclasses.replace(
                variant,
                step_seconds=self.steps.times.get(variant.name, StepTimes(())).samples
                or variant.step_seconds,
            )
            for variant in self.variants
        )

    def all_warnings(self) -> tuple[str, ...]:
        """What did not go as it should."""
        return (*self.warnings, self.steps.error) if self.steps.error else self.warnings

    def picture_title(self) -> str:
        """The title of `curves.png`."""
        config = self.config
        width = f" (width {config.width_multiplier:g})" if config.model in BUILT_IN else ""
        return (
            f"{config.name}: {config.model}{width} on {config.dataset}, "
            f"batch {config.batch_size}, {self.environment['backend']}"
        )

    def headings(self) -> list[str]:
        """Of the table's columns."""
        top5 = ["top-5"] if self._has_top5 else []
        compared = [f"loss difference, first {EARLY_STEPS} steps", "loss difference, all steps"]
        if self.is_treated:
            compared = ["bits (W, A, G)"] if self.has_bits else []
        return [
            "variant",
            "median step (p10–p90)",
            "of Keras's default",
            "images/s",
            "first step",
            "waits for input",
            "test accuracy",
            *top5,
            *compared,
        ]

    @property
    def _has_top5(self) -> bool:
        return any(variant.test_top5_accuracy is not None for variant in self.variants)

    def cells(self) -> list[list[str]]:
        """The table as text, a list for each variant."""
        first = self.variants[0].name
        return [
            [
                row["variant"],
                _step_text(row),
                _ratio_text(row),
                _text(row.get("images_per_second"), "{:.0f}"),
                _text(row.get("first_step_seconds"), "{:.1f} s"),
                _text(row.get("input_wait"), "{:.0f} %", factor=1e2),
                _text(row.get("test_accuracy"), "{:.2f} %", factor=1e2),
                *(
                    [_text(row.get("test_top5_accuracy"), "{:.2f} %", factor=1e2)]
                    if self._has_top5
                    else []
                ),
                *self._compared(row, row["variant"] == first),
            ]
            for row in self.rows()
        ]

    def _compared(self, row: dict[str, Any], is_first: bool) -> list[str]:
        if self.is_treated:
            return [bits_text(row.get("bits", FLOAT))] if self.has_bits else []
        keys = ("early_loss_difference", "loss_difference")
        return [_text(None if is_first else row.get(key), "{:.2g}") for key in keys]

    def print(self, console: rich.console.Console | None = None) -> None:
        """Prints the table. Where the output is no terminal it is not cut off."""
        if console is None:
            console = rich.console.Console()
            if not console.is_terminal:
                console = rich.console.Console(width=160)
        table = rich.table.Table(
            title=f"{self.config.name}: {self.config.model} on {self.config.dataset}",
            caption=", ".join(self.environment.values()),
            box=rich.box.SIMPLE_HEAD,
        )
        for number, heading in enumerate(self.headings()):
            heading = heading.replace("difference, ", "difference,\n")
            table.add_column(heading, justify="right" if number else "left")
        for cells in self.cells():
            table.add_row(*cells)
        console.print(table)
        for line in [*self.choices(), *self.simplifications(), *self.all_warnings()]:
            console.print(line, soft_wrap=True, markup=False, highlight=False)

    def choices(self) -> list[str]:
        """A line for each variant that chose for itself."""
        return [f"`{v.name}` chose: {v.choice}" for v in self.variants if v.choice]

    def simplifications(self) -> list[str]:
        """A line for each variant that could lose hidden units."""
        return [f"`{name}`: {simplified}." for name, simplified in self.simplified.items()]

    def notes(self) -> list[str]:
        """Sentences on what the numbers mean, and where the model came from."""
        notes = []
        if self.steps.times:
            default = self.steps.default
            is_row = default == KERAS_DEFAULT
            turns = max(len(times.turns) for times in self.steps.times.values())
            notes.append(
                f"Step times: after the training, all variants took turns, {turns} of {STEPS} "
                "steps each, on a batch that was there already. "
                + (
                    f"1.00 is {default}: its own layers, and its own choice of compiler."
                    if is_row
                    else f"1.00 is `{default}`, which is Keras's default here, compiler included."
                )
                + " Behind a ratio are the lowest and the highest of the turns. What a step takes "
                "longer on the input pipeline, in the same turns, is the wait for input."
            )
        if len(self.variants) > 1 and not self.is_treated:
            notes.append(_WHY_LOSSES_PART)
        if self.head:
            notes.append(f"Classifier: {self.head}.")
        return notes

    def precision(self) -> str:
        """The dtype policy of the layers; those of a file have their own."""
        return self.config.dtype_policy if self.config.model in BUILT_IN else "the file's dtypes"

    def to_markdown(self) -> str:
        """The text of `report.md`."""
        config = self.config
        lines = [
            f"# {config.name}",
            "",
            f"{config.model} on {config.dataset}, {config.image_size} pixels, batch "
            f"{config.batch_size}, {config.epochs} epochs, {self.precision()}; "
            f"{', '.join(self.environment.values())}.",
            "",
            _markdown_row(self.headings()),
            _markdown_row(["---"] + ["---:"] * (len(self.headings()) - 1)),
            *map(_markdown_row, self.cells()),
            "",
            "![Loss curves and step times](curves.png)",
            "",
            *self.about_treatments(),
        ]
        said = [*self.choices(), *self.simplifications()]
        lines += [line for text in said for line in (text, "")]
        lines += [line for text in self.notes() for line in (text, "")]
        if self.restored_accuracy is not None:
            lines += [
                f"{self.ending()}, {self.variants[-1].name} has a test accuracy of "
                f"{100 * self.restored_accuracy:.2f} %: `model.keras`.",
                "",
            ]
        if self.exported:
            lines += [f"Exported: {self.exported}.", ""]
        if self.skipped_files:
            lines += [
                f"Files left out because they cannot be decoded: {len(self.skipped_files)}; "
                "`report.json` names them.",
                "",
            ]
        for warning in self.all_warnings():
            lines += [f"**Warning:** {warning}.", ""]
        changed = [
            f"- `{field.name}`: {getattr(config, field.name)!r}"
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != field.default
        ]
        return "\n".join([*lines, "Settings other than the defaults:", "", *changed])

    def ending(self) -> str:
        """What was done with the last variant's model."""
        simplified = self.simplified.get(self.variants[-1].name)
        if simplified is not None and simplified.layers:
            return "In stock layers, without the removed units"
        if self.variants[-1].bits == FLOAT:
            return "In stock layers again"
        return "With the weights that it multiplies"

    def about_treatments(self) -> list[str]:
        """Lines on what treatments do, where there are any."""
        if not self.is_treated:
            return []
        lines = [
            "Treatments change what is computed, in the model or its gradients: their losses are "
            "not those of the first variant with other rounding.",
            "",
        ]
        if self.has_bits:
            lines += [
                "Bits are of weights, activations and gradients; 32 is float.",
                "",
                "![Accuracy against bits](bits.png)",
                "",
            ]
        if self.has_kept:
            lines += ["![Accuracy against kept elements of gradients](kept.png)", ""]
        return lines


def environment(compiled: bool | None = None) -> dict[str, str]:
    """Where and when a run was made, for a person to read.

    Args:
        compiled: whether the training step is compiled; None where that is not known.
    """
    found = Conditions.current(compiled)
    settings = dict(found.settings)
    compiler = "torch.compile" if found.backend == "torch" else "XLA"
    known = {True: f"with {compiler}", False: f"without {compiler}"}
    texts = {
        "backend": f"{found.backend} backend",
        "compiler": known.get(found.compiled),
        "device": f"{found.device_kind}: {found.device_name}",
        "cpus": f"{settings['cpus']} CPUs" if "cpus" in settings else None,
        **{package: f"{package} {version}" for package, version in found.versions},
        "python": f"Python {platform.python_version()}",
        "numeric_mode": ", ".join(f"{name} {value}" for name, value in found.numeric_mode),
        "code": f"diagconv_tf {_commit() or diagconv_tf.__version__}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return {name: text for name, text in texts.items() if text}


def _commit() -> str | None:
    """The commit of the recipes' own checkout, and whether files differ from it."""
    root = pathlib.Path(__file__).parent.parent
    if not (root / ".git").exists():  # Installed, perhaps inside another repository.
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return (
            f"commit {git('rev-parse', '--short=12', 'HEAD')}{' with changes' if changed else ''}"
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _largest(values: np.ndarray) -> float | None:
    """Without those that are NaN."""
    known = values[~np.isnan(values)]
    return float(known.max()) if known.size else None


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _text(value: float | None, pattern: str, factor: float = 1.0) -> str:
    return "–" if value is None else pattern.format(value * factor)


def _step_text(row: dict[str, Any]) -> str:
    median = row.get("step_median_seconds")
    if median is None:
        return "–"
    p10, p90 = (_text(row[f"step_{p}_seconds"], "{:.1f}", factor=1e3) for p in ("p10", "p90"))
    return f"{1e3 * median:.1f} ms ({p10}–{p90})"


def _ratio_text(row: dict[str, Any]) -> str:
    if row.get("of_default") is None:
        return "–"
    return str(Comparison(row["of_default"], row["of_default_lowest"], row["of_default_highest"]))
