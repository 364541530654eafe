"""From what is asked for to a row: one pass, or one variant of a whole training step."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import bench_common
import bench_shapes
import bench_variants
import keras

from diagconv_tf import ConvSpec, inspect_model, rewrite, why_not
from diagconv_tf.spec import PASSES, STOCK
from diagconv_tf.text import summarize_error
from gpu_prediction import bounds, programs
from gpu_prediction.cards import Card
from gpu_prediction.compiler import Compiler
from gpu_prediction.rows import PassRow, StepRow, fill_pass, fill_step

#: The variant that has, for each layer and pass, the candidate with the least time alone.
BEST = "best"


def flops_per_second(card: Card, precision: str) -> float:
    """Peak of convolutions and matrix products in a precision of the benchmarks."""
    known = bench_common.PRECISIONS[precision]
    # None leaves it to JAX, which allows TF32.
    return card.flops_per_second(known.dtype, tf32=known.tf32 is not False)


class Predictor:
    """Compiles for one card, and remembers what it has compiled.

    Args:
        name: the card's, for the rows.
        card: the card.
        compiler: for it.
        candidates: lowerings from which `best` chooses.
    """

    def __init__(self, name: str, card: Card, compiler: Compiler, candidates: Sequence[str]):
        self._name = name
        self._card = card
        self._compiler = compiler
        self._candidates = candidates
        self._passes: dict[Any, PassRow] = {}

    def predict_pass(
        self, spec: ConvSpec, lowering: str, pass_name: str, precision: str
    ) -> PassRow:
        """The row of one pass; whatever fails is its error."""
        key = (spec, lowering, pass_name, precision)
        if key not in self._passes:
            self._passes[key] = self._predict_pass(*key)
        return self._passes[key]

    def _predict_pass(
        self, spec: ConvSpec, lowering: str, pass_name: str, precision: str
    ) -> PassRow:
        row = PassRow(
            card=self._name,
            shape=bench_shapes.shape_name(spec),
            used_by={},
            batch=spec.batch or 0,
            pass_name=pass_name,
            precision=precision,
            layout=spec.data_format,
            lowering=lowering,
            flops=spec.flops() or 0,
            least_bytes=spec.least_bytes() or 0,
        )
        choice = None if lowering == STOCK else bench_variants.read_variant(lowering)
        if choice is not None and (reasons := why_not(spec, choice)):
            return dataclasses.replace(row, error=f"refused: {'; '.join(reasons)}")
        rate = flops_per_second(self._card, precision)
        return self._filled(
            row,
            precision,
            lambda: programs.compile_pass(self._compiler, spec, choice, pass_name, rate),
            fill_pass,
        )

    def predict_step(
        self, model: str, size: int, batch_size: int, precision: str, variant: str
    ) -> StepRow:
        """The row of one variant of a model; whatever fails is its error."""
        row = StepRow(self._name, model, size, batch_size, precision, variant)
        policy = bench_common.PRECISIONS[precision].policy
        rate = flops_per_second(self._card, precision)
        try:
            set_variant = self._set_variant(variant, batch_size, precision)
            step = programs.make_step(model, size, policy, set_variant)
        except Exception as error:
            return dataclasses.replace(row, error=summarize_error(error))
        row = dataclasses.replace(
            row, layers=step.layers, rewritten=step.rewritten, choices=step.choices
        )
        return self._filled(
            row,
            precision,
            lambda: programs.compile_step(self._compiler, step, batch_size, rate),
            fill_step,
        )

    def _filled(
        self,
        row: Any,
        precision: str,
        compile_program: Callable[[], bounds.Program],
        fill: Callable[[Any, bounds.Program], Any],
    ) -> Any:
        try:
            with bench_common.precision_mode(precision):
                program = compile_program()
        except Exception as error:  # Of any kind: the others go on.
            return dataclasses.replace(row, error=summarize_error(error))
        return dataclasses.replace(
            fill(row, program), error=bounds.why_too_large(program, self._card)
        )

    def _set_variant(
        self, variant: str, batch_size: int, precision: str
    ) -> Callable[[keras.Model], Any] | None:
        if variant == STOCK:
            return None
        if variant == BEST:
            return functools.partial(self._set_best, batch_size=batch_size, precision=precision)
        choice = bench_variants.read_variant(variant)
        return lambda model: rewrite(model, choice, in_place=True)

    def _set_best(self, model: keras.Model, batch_size: int, precision: str) -> None:
        """Gives each layer, for each pass, the lowering that takes least time alone."""
        paths: dict[ConvSpec, list[str]] = collections.defaultdict(list)
        for row in inspect_model(model, batch_size).rows:
            if row.eligible and row.main_spec is not None:
                paths[row.main_spec].append(row.path)
        for spec, layers in paths.items():
            best = {name: self._best(spec, name, precision) for name in PASSES}
            rewrite(model, best, include=layers, in_place=True)

    def _best(self, spec: ConvSpec, pass_name: str, precision: str) -> str:
        rows = [
            self.predict_pass(spec, lowering, pass_name, precision)
            for lowering in self._candidates
            if lowering != STOCK and "/" not in lowering  # Neither is of a single pass.
        ]
        known = [row for row in rows if row.error is None]
        if not known:
            raise ValueError(
                f"Expected a lowering that computes {bench_shapes.shape_name(spec)}. "
                f"Received: {'; '.join(str(row.error) for row in rows)}"
            )
        return min(known, key=lambda row: row.least_seconds or 0.0).lowering
