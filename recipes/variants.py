"""What `--lowering` and `--compare` name: stock, a lowering, `auto`, `tune`, or a plan's file.

And what these are trained with, where it changes what is computed: treatments.py.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

import keras
from absl import logging

from diagconv_tf import Plan, restore, rewrite, tune
from diagconv_tf.auto import parse_or_auto
from diagconv_tf.lowerings import LoweringLike
from recipes import treatments
from recipes.config import Config
from recipes.treatments import Treatment

STOCK = "stock"
TUNE = "tune"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute the depthwise layers of the network, and to train it.

    Attributes:
        name: as it was given.
        lowering: `"stock"`, `"auto"`, `"tune"`, a lowering or a plan.
        treatment: what changes the training; None for nothing.
    """

    name: str
    lowering: LoweringLike | Plan
    treatment: Treatment | None = None

    @classmethod
    def parse(cls, name: str) -> Variant:
        """The variant that an entry of `--compare` means.

        Raises:
            ValueError: if it is no lowering, no file with a plan and no treatment.
        """
        lowering, treatment = treatments.split(name)
        parsed = cls._parse_lowering(lowering)
        if not treatment:
            return parsed
        return cls(name, parsed.lowering, treatments.parse(treatment))

    @classmethod
    def _parse_lowering(cls, name: str) -> Variant:
        if name in (STOCK, TUNE):
            return cls(name, name)
        if name.endswith(".json"):
            try:
                return cls(name, Plan.load(name))
            except FileNotFoundError as error:
                raise ValueError(
                    f"Expected a plan, as `diagconv tune` writes it. Received: {name}, which does "
                    "not exist"
                ) from error
        lowering = _from_json(name) if name.startswith("{") else name
        parse_or_auto(lowering)
        return cls(name, lowering)

    @property
    def file_name(self) -> str:
        """The name without the characters that file systems dislike."""
        # A treatment's numbers have decimal points.
        stem = "" if self.treatment else pathlib.Path(self.name).stem
        return re.sub(r"[^\w.]+", "-", stem or self.name).strip("-")

    @property
    def bits(self) -> tuple[int | None, int, int]:
        """Bits of weights, activations and gradients; 32 is float."""
        return self.treatment.bits if self.treatment else treatments.FLOAT

    @property
    def kept(self) -> float | None:
        """Elements of output gradients that are kept, below 1 their share; None for all."""
        return self.treatment.kept if self.treatment else None

    def simplifies(self, config: Config) -> bool:
        """Whether this variant loses hidden units in its training."""
        can = self.treatment is not None and self.treatment.can_simplify
        return can and config.simplify > 0

    @property
    def keeps_float_weights(self) -> bool:
        """Whether `finish` leaves out weights with which the training could go on."""
        return self.treatment is not None and self.treatment.keeps_float_weights

    def settings(self, config: Config) -> Config:
        """The settings with which this variant is trained."""
        return self.treatment.settings(config) if self.treatment else config

    def wrap(self, optimizer: keras.Optimizer, model: keras.Model) -> keras.Optimizer:
        """The optimizer with which this variant trains `model`, a stock model."""
        return self.treatment.wrap(optimizer, model) if self.treatment else optimizer

    def finish(self, model: keras.Model) -> keras.Model:
        """A copy of the trained `model`, for inference: stock layers wherever they can be."""
        return self.treatment.finish(model) if self.treatment else restore(model)

    def apply(self, model: keras.Model, config: Config) -> Plan | None:
        """Makes `model`, which is stock and compiled, compute in this way.

        Returns:
            The plan that was followed; None where there was none.
        """
        plan = self._rewrite(model, config)
        if self.treatment is not None:
            self.treatment.apply(model)
        return plan

    def _rewrite(self, model: keras.Model, config: Config) -> Plan | None:
        if self.lowering == STOCK:
            return None
        lowering = self.lowering
        if lowering == TUNE:
            # The measurements are cached: a second run does not measure again.
            lowering = tune(model, config.batch_size)
            logging.info("%s", lowering)
        rewrite(model, lowering, in_place=True)
        return lowering if isinstance(lowering, Plan) else None


def _from_json(text: str) -> dict[str, str]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"Expected a lowering per pass to be a JSON object. Received: {text} ({error})"
        ) from error
