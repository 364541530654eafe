"""What `--simplify` does: hidden units that are rarely active go while a model trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras

from diagconv_tf import MeSimp, compact, plan_compaction, restore
from recipes.config import Config


@dataclasses.dataclass(frozen=True)
class Simplified:
    """What a training left of a model, and how well the smaller model does.

    Attributes:
        layers: paths of the layers that lost units.
        units: of each of them, before and after.
        parameters: of the whole model, before and after.
        flops: of one example's forward pass, before and after; None where not known.
        test_accuracy: of the smaller model, in [0, 1].
    """

    layers: tuple[str, ...]
    units: tuple[tuple[int, int], ...]
    parameters: tuple[int, int]
    flops: tuple[int, int] | None
    test_accuracy: float

    def __str__(self) -> str:
        if not self.layers:
            return "no hidden unit was removed"
        units = ", ".join(
            f"{layer} {_change(counts)}"
            for layer, counts in zip(self.layers, self.units, strict=True)
        )
        flops = "" if self.flops is None else f", {_change(self.flops)} FLOPs of a forward pass"
        return (
            f"units: {units}; {_change(self.parameters)} parameters{flops}; the smaller model has "
            f"a test accuracy of {100 * self.test_accuracy:.2f} %"
        )


def _change(numbers: tuple[int, int]) -> str:
    return " → ".join(f"{number:,}" for number in numbers)


def begin_simplification(model: keras.Model, config: Config, steps_per_epoch: int) -> MeSimp:
    """The callback of the training, which has put its counters into `model`.

    They must be there before a checkpoint is restored, which has them, too. `on_train_end`
    takes them away.

    Args:
        model: compiled, with a treatment of minimal effort.
        config: the settings.
        steps_per_epoch: batches.

    Raises:
        ValueError: if `model` has no layer that can lose units; the message says why.
    """
    # A new optimizer begins its schedule of the learning rate again.
    is_constant = config.schedule == "constant" and not config.warmup_fraction
    simplification = MeSimp(config.simplify, renew_optimizer=is_constant)
    simplification.set_model(model)
    simplification.set_params({"steps": steps_per_epoch})
    return simplification


def prunes_after(simplification: MeSimp) -> Callable[[int], bool]:
    """Tells of a number of steps of an epoch whether units may be removed after them."""
    return lambda steps: simplification.due(steps) > simplification.due(steps - 1)


def without_removed_units(model: keras.Model) -> keras.Model:
    """A copy in stock layers, without the units that were removed, if there are any."""
    return compact(model) if plan_compaction(model).removed else restore(model)


def measure_simplified(model: keras.Model, smaller: keras.Model, test: Any) -> Simplified:
    """What is left of a trained model.

    Args:
        model: trained to its end.
        smaller: compiled; of `without_removed_units`.
        test: the test images, as for `evaluate`.
    """
    plan = plan_compaction(model)
    layers = [layer for layer in plan.layers if layer.after < layer.before]
    return Simplified(
        tuple(layer.path for layer in layers),
        tuple((layer.before, layer.after) for layer in layers),
        plan.parameters,
        plan.flops,
        smaller.evaluate(test, return_dict=True, verbose=0)["accuracy"],
    )
