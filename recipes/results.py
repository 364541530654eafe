"""How one variant of a run was trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from diagconv_tf.step_timer import StepSummary
from recipes.input_wait import wait_share
from recipes.treatments import FLOAT


@dataclasses.dataclass(frozen=True)
class VariantResult:
    """How one variant was trained.

    Args:
        name: Its lowering, `"stock"`, `"tune"` or a plan, and its treatment.
        losses: Training loss of every step (mean over the batch); NaN where it
            was lost.
        test_accuracies: After each epoch, in [0, 1]; likewise.
        steps: Times of the steps since the training was last resumed; see
            `StepTimer`.
        step_seconds: Every time that counts, for the picture.
        without_input_seconds: Median of a step on a batch that is there
            already; None where it was not timed.
        choice: What a plan chose, in a sentence; empty without one.
        bits: Of weights, activations and gradients; 32 is float, None a grid
            without end.
    """

    name: str
    losses: tuple[float, ...] = dataclasses.field(repr=False)
    test_accuracies: tuple[float, ...]
    steps: StepSummary
    step_seconds: tuple[float, ...] = dataclasses.field(repr=False)
    without_input_seconds: float | None = None
    choice: str = ""
    bits: tuple[int | None, ...] = FLOAT

    @property
    def test_accuracy(self) -> float:
        """After the last epoch, in [0, 1]; no epoch is picked."""
        return self.test_accuracies[-1]

    @property
    def input_wait(self) -> float | None:
        """The share of a step that waits for its input, in [0, 1]."""
        return wait_share(self.steps.step_median_seconds, self.without_input_seconds)

    def loss_differences(self, other: VariantResult) -> np.ndarray:
        """Absolute difference of the two losses at each step that both have."""
        steps = min(len(self.losses), len(other.losses))
        return np.abs(np.subtract(self.losses[:steps], other.losses[:steps]))

    def to_json(self) -> str:
        """The text of a file in `results/`."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> VariantResult:
        """The result of which `text` is the `to_json`."""
        fields: Mapping[str, Any] = json.loads(text)
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**{**values, "steps": StepSummary(**fields["steps"])})
