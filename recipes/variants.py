"""What `--lowering` and `--compare` name: stock, a lowering, `auto`, `tune`, or a plan's file."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

import keras
from absl import logging

from diagconv_tf import Plan, rewrite, tune
from diagconv_tf.auto import parse_or_auto
from diagconv_tf.lowerings import LoweringLike
from recipes.config import Config

STOCK = "stock"
TUNE = "tune"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute the depthwise layers of the network.

    Attributes:
        name: as it was given.
        lowering: `"stock"`, `"auto"`, `"tune"`, a lowering or a plan.
    """

    name: str
    lowering: LoweringLike | Plan

    @classmethod
    def parse(cls, name: str) -> Variant:
        """The variant that `--lowering=name` means.

        Raises:
            ValueError: if it is no lowering, and no file with a plan.
        """
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
        return re.sub(r"[^\w.]+", "-", pathlib.Path(self.name).stem or self.name).strip("-")

    def apply(self, model: keras.Model, config: Config) -> Plan | None:
        """Makes `model`, which is stock and compiled, compute in this way.

        Returns:
            The plan that was followed; None where there was none.
        """
        if self.name == STOCK:
            return None
        lowering = self.lowering
        if self.name == TUNE:
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
