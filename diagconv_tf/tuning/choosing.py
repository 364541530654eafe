"""Decides by measured times, during a contest and after it; runs nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from diagconv_tf.environment import Conditions
from diagconv_tf.measurements import (
    EARLY_ROUNDS,
    ERROR_RATE,
    Measured,
    Ratio,
    least_rounds,
    paired_ratio,
    ratios_to_stock,
)
from diagconv_tf.spec import STOCK

#: A first step (or compilation) that takes up to this many times stock's is not counted.
MOST_FIRST_STEPS = 3.0

#: A longer compilation must be paid back within this many steps.
PAY_BACK_STEPS = 1000

#: A gain of less than this share of stock's time is not worth a rewritten model.
LEAST_GAIN = 0.02

#: A variant that takes so many times as long as the best is dropped; stock is not.
DROP_ABOVE = 2.0

#: But not before it has run so long: anything may interrupt a short step, and of long ones
#: the interruption is a small part.
DROP_AFTER_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Choice:
    """The name of a variant, or of a workload's candidate, and why it was chosen."""

    name: str
    reason: str


def choose(steps: Mapping[str, Measured]) -> Choice:
    """The variant to train with.

    A variant wins over stock where the whole confidence interval of its paired
    ratio lies below 1 (`ratios_to_stock`: with a probability of at least 99 %
    no variant wins that is not faster), where it gains at least `LEAST_GAIN`,
    and where it pays its compilation back. The fastest of these is chosen.

    Args:
        steps: variant → its times in one contest; `"stock"` is among them.
    """
    stock = steps[STOCK]
    others = {name: step for name, step in steps.items() if name != STOCK and step.ok}
    if not stock.ok:
        if not others:
            return Choice(STOCK, f"no variant runs; stock: {stock.error}")
        name = min(others, key=lambda name: others[name].seconds)
        return Choice(name, f"a step takes {others[name].ms} ms; stock fails: {stock.error}")
    ratios = ratios_to_stock(steps)
    if not ratios:
        return Choice(STOCK, f"a step takes {stock.ms} ms; no other variant was timed beside it")
    costs = {name: _cost(steps[name], stock, ratio) for name, ratio in ratios.items()}
    objections = {name: _objection(ratios[name], costs[name], stock) for name in ratios}
    winners = [name for name, objection in objections.items() if not objection]
    name = min(winners or ratios, key=lambda name: costs[name])
    best = steps[name]
    text = (
        f"a step takes {stock.ms} ms stock, {best.ms} ms {name}: {ratios[name]} of "
        f"stock; the first {stock.first_seconds or 0:.1f} s and {best.first_seconds or 0:.1f} s"
    )
    return Choice(name, text) if winners else Choice(STOCK, f"{text}: {objections[name]}")


def compare_with_default(chosen: Measured, default: Measured, conditions: Conditions) -> str:
    """What Keras's default would take, where the training step is compiled in another way.

    Args:
        chosen: times of the chosen variant.
        default: times of Keras's own layers, compiled as Keras does by itself, in
            the same rounds.
        conditions: of `chosen`.

    Returns:
        A sentence without its full stop; empty where one has no times.
    """
    if not (chosen.ok and default.ok):
        return ""
    compiler = "torch.compile" if conditions.backend == "torch" else "XLA"
    how = f"{'without' if conditions.compiled else 'with'} {compiler}"
    ratio = paired_ratio(default.samples, chosen.samples, ERROR_RATE).estimate
    if ratio > 1 - LEAST_GAIN:
        return f"Keras's default, {how}, takes {ratio:.2f} of this step"
    return (
        f"Keras's default, {how}, takes {ratio:.2f} of this step: compile with "
        f"jit_compile={not conditions.compiled}"
    )


def _objection(ratio: Ratio, cost: float, stock: Measured) -> str:
    """Why a variant does not win over stock; empty if it does."""
    if ratio.high >= 1:
        return "it may not be faster"
    if ratio.estimate > 1 - LEAST_GAIN:
        return f"a gain of less than {LEAST_GAIN:.0%}"
    if cost >= stock.seconds:
        return f"not paid back within {PAY_BACK_STEPS} steps"
    return ""


def _cost(variant: Measured, stock: Measured, ratio: Ratio) -> float:
    """Seconds of a step, with what its compilation has to pay back.

    Where compiling takes more than `MOST_FIRST_STEPS` times as long as it does
    for stock, the difference is divided by `PAY_BACK_STEPS`. So a variant that
    costs less than stock has paid it back by then.
    """
    first, stock_first = variant.first_seconds or 0.0, stock.first_seconds or 0.0
    extra = first - stock_first if first > MOST_FIRST_STEPS * stock_first else 0.0
    return ratio.estimate * stock.seconds + extra / PAY_BACK_STEPS


def next_round(steps: Mapping[str, Measured], seconds: float) -> list[str]:
    """The variants that run in the next round of a contest; none where it ends.

    Variants far from the best are dropped. The contest ends when nobody else is
    left; after the rounds of `EARLY_ROUNDS`, if the choice is clear by then;
    or when its seconds are used up and the signed-rank test can decide.

    Args:
        steps: variant → its times so far, of those that have not failed.
        seconds: how long all rounds may take together.
    """
    rounds = max((step.count for step in steps.values()), default=0)
    fastest = {name: min(step.samples) for name, step in steps.items()}
    most = DROP_ABOVE * min(fastest.values(), default=0.0)
    left = [
        name
        for name, step in steps.items()
        if step.count == rounds
        and (name == STOCK or fastest[name] <= most or sum(step.samples) < DROP_AFTER_SECONDS)
    ]
    if len(left) < 2:
        return []
    if rounds in EARLY_ROUNDS:
        return [] if _is_clear({name: steps[name] for name in left}, len(steps) - 1) else left
    spent = sum(sum(step.samples) for step in steps.values())
    can_decide = rounds >= least_rounds(len(steps) - 1)
    return [] if can_decide and spent >= seconds else left


def _is_clear(steps: Mapping[str, Measured], variants: int) -> bool:
    """Whether the chosen variant is surely as fast as all others, or faster."""
    name = choose(steps).name if STOCK in steps else min(steps, key=lambda n: steps[n].seconds)
    return all(
        paired_ratio(step.samples, steps[name].samples, ERROR_RATE / variants).low > 1 - LEAST_GAIN
        for other, step in steps.items()
        if other != name
    )
