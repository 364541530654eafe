"""`Plan`: which lowering each convolution of a model gets, as a value and a file."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import keras
from rich.console import Group
from rich.table import Table
from rich.text import Text

from diagconv_tf import files
from diagconv_tf.distribution import replicas_of
from diagconv_tf.environment import Conditions
from diagconv_tf.inspection import ConvolutionRow, inspect_as_built
from diagconv_tf.lowerings import LoweringLike, parse
from diagconv_tf.measurements import Measured, Workload, ratios_to_stock
from diagconv_tf.spec import PASSES, STOCK, ConvSpec
from diagconv_tf.text import as_text, to_readable_json

#: Format 1 has `"problems"` for `"workloads"`, whose passes were measured one by one, medians
#: without the rounds' samples, and conditions without settings; it is read, too.
_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """A lowering, or `"stock"`, for convolutions: by spec, or by layer path.

    Attributes:
        conditions: where the choices were made, and hold.
        lowerings: spec → a layer's `lowering`, or `"stock"`: the layer is
            Keras's own. A spec fits a layer whatever the batch; where a layer
            leaves its height or width open, any fits.
        overrides: layer path → the same; they take precedence over `lowerings`.
        reason: why these choices, in a sentence; empty in plans written by hand.
        batch_size: images in a batch, of all replicas together; one replica's
            part was measured.
        workloads: the distinct workloads and their layers, with what `tune`
            measured of each alone.
        steps: variant of the whole model → times of its training step, all of
            one contest: `"stock"`, a lowering that all layers had, or
            `"per_layer"` (`"plan"` in format 1): each layer had the lowering
            that was fastest for it alone.
        default_steps: where the training step was compiled in another way than
            Keras does by itself: the chosen variant, and `"default"`, Keras's
            own layers compiled as it does → times, in turn.

    Raises:
        ValueError: if a lowering is not known.
    """

    conditions: Conditions
    lowerings: Mapping[ConvSpec, LoweringLike] = dataclasses.field(default_factory=dict)
    overrides: Mapping[str, LoweringLike] = dataclasses.field(default_factory=dict)
    reason: str = ""
    batch_size: int | None = None
    workloads: tuple[Workload, ...] = ()
    steps: Mapping[str, Measured] = dataclasses.field(default_factory=dict)
    default_steps: Mapping[str, Measured] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for lowering in (*self.lowerings.values(), *self.overrides.values()):
            if lowering != STOCK:
                parse(lowering)

    @classmethod
    def of_model(cls, model: keras.Model) -> Plan:
        """What the layers of a model have now, by path: for `rewrite` after loading it.

        Raises:
            ValueError: if `model` is not a built Keras model.
        """
        return cls(
            conditions=Conditions.current(num_replicas=replicas_of(model).num_replicas),
            overrides={row.path: row.lowering for row in inspect_as_built(model).rows},
        )

    def lowering_for(self, row: ConvolutionRow) -> LoweringLike | None:
        """The lowering of a layer; None where the plan does not name it.

        Raises:
            ValueError: if the layer's sizes are open and the plan has several
                choices for it.
        """
        for path in row.paths:
            if path in self.overrides:
                return self.overrides[path]
        if row.main_spec is None:
            return None
        found = [
            lowering for spec, lowering in self.lowerings.items() if _fits(spec, row.main_spec)
        ]
        if any(lowering != found[0] for lowering in found):
            raise ValueError(
                f"the layer's input size is open, and the plan has several lowerings for it: "
                f"{found}"
            )
        return found[0] if found else None

    def to_json(self) -> str:
        """The text that `save` writes."""
        fields: dict[str, Any] = {
            "format": _FORMAT,
            "reason": self.reason,
            "batch_size": self.batch_size,
            "conditions": dataclasses.asdict(self.conditions),
            "lowerings": [
                {"lowering": _plain(lowering), "spec": dataclasses.asdict(spec)}
                for spec, lowering in self.lowerings.items()
            ],
            "overrides": {path: _plain(value) for path, value in self.overrides.items()},
            "steps": {name: step.to_dict() for name, step in self.steps.items()},
            "workloads": [workload.to_dict() for workload in self.workloads],
        }
        if self.default_steps:
            fields["default_steps"] = {n: step.to_dict() for n, step in self.default_steps.items()}
        return to_readable_json(fields)

    def __rich__(self) -> Any:
        return _render(self)

    def __str__(self) -> str:
        return as_text(self)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads what `to_json` returned, also in format 1.

        Raises:
            ValueError: if it is not one; the message says what is wrong.
        """
        try:
            fields = json.loads(text)
            if not isinstance(fields, dict) or fields.get("format") not in (1, _FORMAT):
                raise ValueError(f'expected an object with "format": {_FORMAT}, or 1')
            workloads = fields.get("problems" if fields["format"] == 1 else "workloads", ())
            return cls(
                conditions=Conditions.from_dict(fields["conditions"]),
                lowerings={
                    ConvSpec.from_dict(entry["spec"]): entry["lowering"]
                    for entry in fields["lowerings"]
                },
                overrides=fields["overrides"],
                # Plans written by hand have no measurements.
                reason=fields.get("reason", ""),
                batch_size=fields.get("batch_size"),
                workloads=tuple(map(Workload.from_dict, workloads)),
                **{
                    name: {k: Measured.from_dict(v) for k, v in fields.get(name, {}).items()}
                    for name in ("steps", "default_steps")
                },
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"Expected a plan as `Plan.save` writes it: {error}") from error

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Writes the plan as a JSON file.

        Raises:
            FileExistsError: if `path` exists, unless `overwrite`.
            ValueError: if its folder does not exist.
        """
        files.write_text(files.check_output(path, overwrite), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """The plan in a file.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the file is not a plan; the message says why.
        """
        try:
            return cls.from_json(pathlib.Path(path).read_text())
        except ValueError as error:  # A decoding error is one, too.
            raise ValueError(f"{path}: {error}") from error


def _fits(planned: ConvSpec, spec: ConvSpec) -> bool:
    return (
        planned.replace(
            batch=spec.batch,
            height=planned.height if spec.height is not None else None,
            width=planned.width if spec.width is not None else None,
        )
        == spec
    )


def _plain(lowering: LoweringLike) -> str | dict[str, str]:
    return lowering if isinstance(lowering, str) else dict(lowering)


def _render(plan: Plan) -> Group:
    """The tables, for rich."""
    parts: list[Any] = [Text(line) for line in _head(plan)]
    if plan.steps:
        parts.append(_steps_table(plan))
    parts.append(_lowerings_table(plan))
    return Group(*parts)


def _head(plan: Plan) -> Iterator[str]:
    where = plan.conditions
    compiled = {True: "compiled", False: "not compiled", None: "compiled or not"}[where.compiled]
    batch = f", batch of {plan.batch_size}" if plan.batch_size else ""
    if where.num_replicas > 1:
        batch += f", {where.num_replicas} replicas"
    yield (
        f"Plan for {where.backend}, {compiled}, on {where.device_kind} ({where.device_name}){batch}"
    )
    if plan.reason:
        yield plan.reason


def _steps_table(plan: Plan) -> Table:
    table = Table(
        title="Training steps of the whole model",
        title_justify="left",
        caption="of stock: typical ratio of the times in a round, with its confidence interval",
        caption_justify="left",
    )
    table.add_column("variant")
    for name in ("step ms", "p10", "p90", "of stock", "steps", "first step s"):
        table.add_column(name, justify="right")
    stock = plan.steps.get(STOCK, Measured())
    ratios = ratios_to_stock(plan.steps)
    for name, step in plan.steps.items():
        if not step.ok:
            table.add_row(name, f"failed: {step.error}")
            continue
        ratio = f"{step.seconds / stock.seconds:.2f}" if stock.ok else ""
        ratio = str(ratios.get(name, ratio))
        first = "" if step.first_seconds is None else f"{step.first_seconds:.1f}"
        percentiles = ("?" if p is None else f"{1e3 * p:.4g}" for p in (step.p10, step.p90))
        table.add_row(name, step.ms, *percentiles, ratio, str(step.count), first)
    return table


def _lowerings_table(plan: Plan) -> Table:
    table = Table(title="Lowerings", title_justify="left")
    for name in ("layer", "input", "kernel", "lowering"):
        table.add_column(name, overflow="fold")
    measured = any(workload.times for workload in plan.workloads)
    if measured:  # Each workload alone.
        table.add_column("stock ms", justify="right")
        table.add_column("best ms", justify="right")
        table.add_column("alone", overflow="fold")
    for workload in plan.workloads:
        spec, layers = workload.spec, workload.layers
        name = layers[0] + (f" (+{len(layers) - 1})" if len(layers) > 1 else "")
        lowering = plan.overrides.get(layers[0], plan.lowerings.get(spec, ""))
        cells = [name, spec.size_text, spec.window_text, _text(lowering)]
        if measured:
            best = min(workload.times.values(), key=lambda m: m.seconds, default=Measured())
            stock = workload.times.get(STOCK, Measured())
            cells += [stock.ms, best.ms, _text(workload.choice or "")]
        table.add_row(*cells)
    shown = {workload.spec for workload in plan.workloads}
    for spec, lowering in plan.lowerings.items():
        if spec not in shown:
            table.add_row("", spec.size_text, spec.window_text, _text(lowering))
    known = {path for workload in plan.workloads for path in workload.layers}
    for path, lowering in plan.overrides.items():
        if path not in known:
            table.add_row(path, "", "", _text(lowering))
    return table


def _text(lowering: LoweringLike) -> str:
    return lowering if isinstance(lowering, str) else "/".join(lowering[name] for name in PASSES)
