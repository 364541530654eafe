"""Chooses by measured times; runs nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Generic, TypeVar

from diagconv_tf.lowerings import LoweringLike, parse
from diagconv_tf.measurements import Measured, Ratio, ratios_to_stock
from diagconv_tf.spec import PASSES, STOCK

#: A first step (or compilation) that takes up to this many times stock's is not counted.
MOST_FIRST_STEPS = 3.0

#: A longer compilation must be paid back within this many steps.
PAY_BACK_STEPS = 1000

#: A gain of less than this share of stock's time is not worth a rewritten model.
LEAST_GAIN = 0.02

_Name = TypeVar("_Name")


@dataclasses.dataclass(frozen=True)
class Choice(Generic[_Name]):
    """A lowering or the name of a variant, and why it was chosen."""

    name: _Name
    reason: str


def choose_variant(steps: Mapping[str, Measured]) -> Choice[str]:
    """The variant of the whole model to train with.

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
        return Choice(name, f"a step takes {_ms(others[name].seconds)}; stock fails: {stock.error}")
    ratios = ratios_to_stock(steps)
    if not ratios:
        return Choice(
            STOCK, f"a step takes {_ms(stock.seconds)}; no other variant was timed beside it"
        )
    costs = {name: _cost(steps[name], stock, ratio.estimate) for name, ratio in ratios.items()}
    objections = {name: _objection(ratios[name], costs[name], stock) for name in ratios}
    winners = [name for name, objection in objections.items() if not objection]
    name = min(winners or ratios, key=lambda name: costs[name])
    best = steps[name]
    text = (
        f"a step takes {_ms(stock.seconds)} stock, {_ms(best.seconds)} {name}: {ratios[name]} of "
        f"stock; the first {stock.first_seconds or 0:.1f} s and {best.first_seconds or 0:.1f} s"
    )
    return Choice(name, text) if winners else Choice(STOCK, f"{text}: {objections[name]}")


def _objection(ratio: Ratio, cost: float, stock: Measured) -> str:
    """Why a variant does not win over stock; empty if it does."""
    if ratio.high >= 1:
        return "it may not be faster"
    if ratio.estimate > 1 - LEAST_GAIN:
        return f"a gain of less than {LEAST_GAIN:.0%}"
    if cost >= stock.seconds:
        return f"not paid back within {PAY_BACK_STEPS} steps"
    return ""


def choose_lowering(
    passes: Mapping[str, Mapping[str, Measured]], native_is_stock: bool
) -> Choice[LoweringLike]:
    """The lowering that the times of one workload speak for.

    It takes the fastest candidate of each pass, without a test: the contest of
    whole training steps decides whether that is faster than stock.

    Args:
        passes: pass → candidate → times; `"stock"` among the candidates.
        native_is_stock: whether the lowering `"native"` runs what stock runs,
            so that it has stock's times.

    Returns:
        The fastest lowering of each pass, as one string where they agree; or
        `"stock"`.
    """
    best: dict[str, str] = {}
    seconds, stock_seconds = 0.0, 0.0
    for pass_name in PASSES:
        stock = passes[pass_name][STOCK]
        costs = {name: _cost(m, stock) for name, m in passes[pass_name].items() if name != STOCK}
        if native_is_stock:
            costs["native"] = _cost(stock, stock)
        best[pass_name] = min(costs, key=lambda name: costs[name], default=STOCK)
        seconds += costs.get(best[pass_name], math.inf)
        stock_seconds += stock.seconds
    choice: LoweringLike = best if len(set(best.values())) > 1 else best[PASSES[0]]
    if seconds == math.inf:
        return Choice(STOCK, "no lowering runs all passes")
    if (choice == "native" and native_is_stock) or seconds >= stock_seconds:
        return Choice(STOCK, f"stock is the fastest: {_ms(stock_seconds)}")
    than = f"stock's {_ms(stock_seconds)}" if stock_seconds < math.inf else "stock, which fails"
    return Choice(choice, f"{parse(choice)}: {_ms(seconds)} against {than}")


def _cost(candidate: Measured, stock: Measured, ratio: float | None = None) -> float:
    """Seconds of a call, with what its compilation has to pay back.

    Where compiling takes more than `MOST_FIRST_STEPS` times as long as it does
    for stock, the difference is divided by `PAY_BACK_STEPS`. So a
    candidate that costs less than stock has paid it back by then.

    Args:
        candidate: its times.
        stock: stock's times.
        ratio: of the paired times, which replaces the ratio of the medians.
    """
    seconds = candidate.seconds if ratio is None else ratio * stock.seconds
    first = candidate.first_seconds or 0.0
    stock_first = (stock.first_seconds or 0.0) if stock.ok else first
    extra = first - stock_first if first > MOST_FIRST_STEPS * stock_first else 0.0
    return seconds + extra / PAY_BACK_STEPS


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"
