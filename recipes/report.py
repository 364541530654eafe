"""What a run leaves behind.

    runs/NAME/
      config.json      the settings
      metrics.jsonl    one JSON object a line, as the training goes: "event" is
                       "step" (loss of the batch) or "epoch"
      checkpoints/     a folder for each variant, to go on with --resume
      results/         a file for each variant that is trained to the end
      plans/           what --lowering=tune chose, and measured
      report.md        tables and picture, to be read
      report.json      the numbers of the table
      curves.png       loss curves and step times
      bits.png         accuracy against bits, where variants are treatments
      model.keras      the last variant, trained, in stock layers; not compiled.
                       Of a low-bit one, the deployed model
      low_bit.keras    of a low-bit one, the model with its float weights, to
                       be trained on
      saved_model/     the same for serving (TensorFlow only)
      tensorboard/     events, a folder for each variant (TensorFlow only)
      profile/         with --profile, a folder for each variant

`metrics.jsonl` and the events grow where they are, so that a run can be
watched. All else is written under another name and renamed when complete.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import platform
from typing import Any

import keras
import numpy as np
import rich.box
import rich.console
import rich.table

from diagconv_tf import files
from recipes.bits_picture import bits_text, draw_bits
from recipes.config import BUILT_IN, Config
from recipes.curves import draw_curves
from recipes.results import VariantResult
from recipes.treatments import FLOAT

# In the first steps only rounding tells two exact variants apart; later every
# training, also one repeated in another order of summation, goes its own way.
EARLY_STEPS = 20


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
    """

    config: Config
    folder: pathlib.Path
    environment: dict[str, str]
    variants: tuple[VariantResult, ...]
    restored_accuracy: float | None = None
    exported: str = ""
    skipped_files: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """One per variant: the numbers of the table, times in seconds; None where unknown."""
        first = self.variants[0]
        rows = []
        for variant in self.variants:
            # What a treatment changes is no difference of rounding.
            differences = np.array([]) if self.has_bits else variant.loss_differences(first)
            rows.append(
                {
                    "variant": variant.name,
                    **dataclasses.asdict(variant.steps),
                    "input_wait": variant.input_wait,
                    "test_accuracy": _known(variant.test_accuracy),
                    "loss_difference": _largest(differences),
                    "early_loss_difference": _largest(differences[:EARLY_STEPS]),
                    "choice": variant.choice,
                    "bits": list(variant.bits),
                }
            )
        return rows

    @property
    def has_bits(self) -> bool:
        """Whether a treatment changed what a variant computes."""
        return any(variant.bits != FLOAT for variant in self.variants)

    def write(self) -> None:
        """Writes `report.json`, `curves.png`, `report.md`, and perhaps `bits.png`."""
        content = {
            "environment": self.environment,
            "variants": self.rows(),
            "restored_accuracy": self.restored_accuracy,
            "exported": self.exported,
            "skipped_files": list(self.skipped_files),
        }
        files.write_text(self.folder / "report.json", json.dumps(content, indent=2))
        files.write_aside(
            self.folder / "curves.png",
            lambda path: draw_curves(self.picture_title(), self.variants, path),
        )
        if self.has_bits:
            files.write_aside(
                self.folder / "bits.png",
                lambda path: draw_bits(self.picture_title(), self.variants, path),
            )
        files.write_text(self.folder / "report.md", self.to_markdown())

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
        compared = [f"loss difference, first {EARLY_STEPS} steps", "loss difference, all steps"]
        if self.has_bits:
            compared = ["bits (W, A, G)"]
        return [
            "variant",
            "median step",
            "images/s",
            "first step",
            "waits for input",
            "test accuracy",
            *compared,
        ]

    def cells(self) -> list[list[str]]:
        """The table as text, a list for each variant."""
        return [
            [
                row["variant"],
                _text(row["step_median_seconds"], "{:.1f} ms", factor=1e3),
                _text(row["images_per_second"], "{:.0f}"),
                _text(row["first_step_seconds"], "{:.1f} s"),
                _text(row["input_wait"], "{:.0f} %", factor=1e2),
                _text(row["test_accuracy"], "{:.2f} %", factor=1e2),
                *self._compared(row, number == 0),
            ]
            for number, row in enumerate(self.rows())
        ]

    def _compared(self, row: dict[str, Any], is_first: bool) -> list[str]:
        if self.has_bits:
            return [bits_text(row["bits"])]
        keys = ("early_loss_difference", "loss_difference")
        return [_text(None if is_first else row[key], "{:.2g}") for key in keys]

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
            *self.about_bits(),
        ]
        for variant in self.variants:
            if variant.choice:
                lines += [f"`{variant.name}` chose: {variant.choice}", ""]
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
        changed = [
            f"- `{field.name}`: {getattr(config, field.name)!r}"
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != field.default
        ]
        return "\n".join([*lines, "Settings other than the defaults:", "", *changed])

    def ending(self) -> str:
        """What was done with the last variant's model."""
        if self.variants[-1].bits == FLOAT:
            return "In stock layers again"
        return "With the weights that it multiplies"

    def about_bits(self) -> list[str]:
        """Lines on what treatments do, where there are any."""
        if not self.has_bits:
            return []
        return [
            "Treatments change what is computed: their losses are not those of the first variant "
            "with other rounding. Bits are of weights, activations and gradients; 32 is float.",
            "",
            "![Accuracy against bits](bits.png)",
            "",
        ]


def environment() -> dict[str, str]:
    """Backend, versions and machine, for a person to read."""
    return {
        "backend": f"{keras.backend.backend()} backend",
        "keras": f"Keras {keras.__version__}",
        "machine": f"{platform.machine()} with {os.cpu_count()} cores",
        "python": f"Python {platform.python_version()}",
    }


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
