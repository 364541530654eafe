"""The phases of a training: first the classifier alone, then all, where that is asked for."""

from __future__ import annotations

import dataclasses

import keras

from recipes.config import Config
from recipes.finetuning import freeze_backbone, unfreeze


@dataclasses.dataclass(frozen=True)
class Phase:
    """Epochs in which the same weights are trained, with one optimizer.

    Attributes:
        first_epoch: the number of epochs before it.
        end_epoch: the number of epochs up to its end.
        suffix: of its folder of checkpoints: optimizers of different phases
            have different variables.
        frozen: whether the classifier alone is trained; None leaves all layers
            as they are.
    """

    first_epoch: int
    end_epoch: int
    suffix: str = ""
    frozen: bool | None = None

    def prepare(self, model: keras.Model) -> None:
        """Sets which weights are trained; `model` has to be compiled after that."""
        if self.frozen is not None:
            (freeze_backbone if self.frozen else unfreeze)(model)


def phases_of(config: Config) -> tuple[Phase, ...]:
    """The phases of a training, in order."""
    if config.freeze == "none":
        return (Phase(0, config.epochs),)
    if config.unfreeze_after is None:
        return (Phase(0, config.epochs, frozen=True),)
    return (
        Phase(0, config.unfreeze_after, frozen=True),
        Phase(config.unfreeze_after, config.epochs, "-unfrozen", frozen=False),
    )


def set_steps_done(optimizer: keras.Optimizer, steps: int) -> None:
    """Lets a new optimizer's learning rate go on after so many batches."""
    # A `LossScaleOptimizer`, and one that rounds, wrap the one that counts. With gradient
    # accumulation, `iterations` is computed from the variable, which counts batches.
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    optimizer.variables[0].assign(steps)
