"""How one variant of a run was trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from diagconv_tf.step_timer import StepSummary
from recipes.treatments import FLOAT


@dataclasses.dataclass(frozen=True)
class VariantResult:
    """How one variant was trained.

    Args:
        name: Its lowering, `"stock"`, `"tune"` or a plan, and its treatment.
        losses: Training losses: of a step (mean over the batch), or means of
            the steps since the one before.
        test_accuracies: After each epoch, in [0, 1]; NaN where it was lost.
        steps: Times of the steps since the training was last resumed; see
            `StepTimer`.
        step_seconds: Times that count, in the training.
        choice: What `auto`, `tune` or a plan chose, in a sentence; else empty.
        test_top5_accuracy: After the last epoch: how often the right class is
            among the five most probable; None for five classes or fewer.
        loss_steps: The steps of `losses`, from 1; by default each step has one.
        bits: Of weights, activations and gradients; 32 is float, None a grid
            without end.
        is_treated: Whether a treatment changed what is computed.
        kept: Elements of output gradients that are kept, below 1 their share;
            None for all.
    """

    name: str
    losses: tuple[float, ...] = dataclasses.field(repr=False)
    test_accuracies: tuple[float, ...]
    steps: StepSummary
    step_seconds: tuple[float, ...] = dataclasses.field(repr=False)
    choice: str = ""
    test_top5_accuracy: float | None = None
    loss_steps: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    bits: tuple[int | None, ...] = FLOAT
    is_treated: bool = False
    kept: float | None = None

    def __post_init__(self) -> None:
        steps = self.loss_steps or tuple(range(1, len(self.losses) + 1))
        object.__setattr__(self, "loss_steps", steps)

    @property
    def test_accuracy(self) -> float:
        """After the last epoch, in [0, 1]; no epoch is picked."""
        return self.test_accuracies[-1]

    def loss_differences(self, other: VariantResult) -> np.ndarray:
        """Absolute difference of the two losses at each step that both have one of."""
        _, mine, others = np.intersect1d(
            self.loss_steps, other.loss_steps, assume_unique=True, return_indices=True
        )
        return np.abs(np.array(self.losses)[mine] - np.array(other.losses)[others])

    def to_json(self) -> str:
        """The text of a file in `results/`."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> VariantResult:
        """The result of which `text` is the `to_json`."""
        fields: Mapping[str, Any] = json.loads(text)
        # Files of earlier versions have more.
        known = {field.name for field in dataclasses.fields(cls)}
        values = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k in known
        }
        return cls(**{**values, "steps": StepSummary(**fields["steps"])})


@dataclasses.dataclass(frozen=True)
class Trained:
    """A variant at the end of its training.

    Attributes:
        model: compiled, with the averages of its statistics where there are any.
        result: what was measured.
        is_new: whether it was trained by this process, and not before.
    """

    model: keras.Model
    result: VariantResult
    is_new: bool = True
