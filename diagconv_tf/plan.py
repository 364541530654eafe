"""`Plan`: which lowering each convolution of a model gets, as a value and a file."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import keras

from diagconv_tf import files, json_text, plan_table, table_text
from diagconv_tf.distribution import replicas_of
from diagconv_tf.inspection import STOCK, ConvolutionRow, inspect_as_built
from diagconv_tf.lowerings import LoweringLike, parse
from diagconv_tf.measurements import Measured, ProblemMeasurements
from diagconv_tf.spec import Conditions, ConvSpec

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """A lowering, or `"stock"`, for convolutions: by problem, or by layer path.

    Attributes:
        conditions: where the choices were made, and hold.
        lowerings: problem → a layer's `lowering`, or `"stock"`: the layer is
            Keras's own. A problem fits a layer whatever the batch; where a
            layer leaves its height or width open, any fits.
        overrides: layer path → the same; they come before `lowerings`.
        reason: why these choices, in a sentence; empty where nobody said.
        batch_size: images in a batch, of all replicas together; measured was
            one replica's share.
        problems: what `tune` measured of each problem.
        steps: variant of the whole model → times of its training step:
            `"stock"`, `"plan"` (the choice of each problem) or a lowering that
            all layers had.

    Raises:
        ValueError: if a lowering is not known.
    """

    conditions: Conditions
    lowerings: Mapping[ConvSpec, LoweringLike] = dataclasses.field(default_factory=dict)
    overrides: Mapping[str, LoweringLike] = dataclasses.field(default_factory=dict)
    reason: str = ""
    batch_size: int | None = None
    problems: tuple[ProblemMeasurements, ...] = ()
    steps: Mapping[str, Measured] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for lowering in (*self.lowerings.values(), *self.overrides.values()):
            if lowering != STOCK:
                parse(lowering)

    @classmethod
    def of_model(cls, model: keras.Model) -> Plan:
        """What a model has now, by layer path: for `rewrite` after loading it.

        Raises:
            ValueError: if `model` is not a built Keras model.
        """
        return cls(
            conditions=Conditions.current(replicas=replicas_of(model).replicas),
            overrides={row.path: row.lowering for row in inspect_as_built(model).rows},
        )

    def lowering_for(self, row: ConvolutionRow) -> LoweringLike | None:
        """The lowering of a layer; None where the plan says nothing of it.

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
            "problems": [problem.to_dict() for problem in self.problems],
        }
        return json_text.dumps(fields)

    def __rich__(self) -> Any:
        return plan_table.render(self)

    def __str__(self) -> str:
        return table_text.as_text(self)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan of which `text` is the `to_json`.

        Raises:
            ValueError: if it is not one; the message says what is wrong.
        """
        try:
            fields = json.loads(text)
            if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
                raise ValueError(f'expected an object with "format": {_FORMAT}')
            return cls(
                conditions=Conditions.from_dict(fields["conditions"]),
                lowerings={
                    ConvSpec.from_dict(entry["spec"]): entry["lowering"]
                    for entry in fields["lowerings"]
                },
                overrides=fields["overrides"],
                # Plans made by hand have no measurements.
                reason=fields.get("reason", ""),
                batch_size=fields.get("batch_size"),
                problems=tuple(map(ProblemMeasurements.from_dict, fields.get("problems", ()))),
                steps={k: Measured.from_dict(v) for k, v in fields.get("steps", {}).items()},
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
        except ValueError as error:  # Of which a decoding error is one.
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
