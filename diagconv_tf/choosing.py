"""What measured times speak for: decisions without a clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from diagconv_tf.inspection import STOCK
from diagconv_tf.lowerings import LoweringLike
from diagconv_tf.measurements import Measured, total
from diagconv_tf.spec import PASSES

#: A first step (or compilation) may take so many times stock's without further ado.
MOST_FIRST_STEPS = 3.0

#: What takes longer to compile must have paid it back after so many steps.
PAY_BACK_STEPS = 1000

#: Differences below this share of stock's time are ties, whatever the spread.
LEAST_GAIN = 0.02


@dataclasses.dataclass(frozen=True)
class Choice:
    """A lowering or the name of a variant, and why it was chosen."""

    name: LoweringLike
    reason: str


def cost(candidate: Measured, stock: Measured | None) -> float:
    """Seconds of a call, with what its compilation has to pay back.

    Where compiling takes more than `MOST_FIRST_STEPS` times as long as it does
    for stock, the difference is spread over `PAY_BACK_STEPS` calls. So whatever
    is cheaper than stock has paid back by then.
    """
    first = candidate.first_seconds or 0.0
    least = (stock.first_seconds or 0.0) if stock is not None and stock.ok else first
    extra = first - least if first > MOST_FIRST_STEPS * least else 0.0
    return candidate.median + extra / PAY_BACK_STEPS


def choose_lowering(passes: Mapping[str, Mapping[str, Measured]], native_is_stock: bool) -> Choice:
    """The lowering that the times of one problem speak for.

    Args:
        passes: pass → candidate → times; `"stock"` among the candidates.
        native_is_stock: whether the lowering `"native"` runs what stock runs,
            so that it has stock's times.

    Returns:
        The fastest lowering of each pass, as one string where they agree; or
        `"stock"`, where these are not faster by more than the spread of both.
    """
    stock = [passes[pass_name].get(STOCK, Measured()) for pass_name in PASSES]
    best: dict[str, str] = {}
    costs = 0.0
    chosen = []
    for pass_name, baseline in zip(PASSES, stock, strict=True):
        candidates = {
            "native" if name == STOCK else name: measured
            for name, measured in passes[pass_name].items()
            if measured.ok and (name != STOCK or native_is_stock)
        }
        if not candidates:
            return Choice(STOCK, f"no lowering ran the {pass_name.replace('_', ' ')}")
        name = min(candidates, key=lambda name: cost(candidates[name], baseline))
        best[pass_name] = name
        chosen.append(candidates[name])
        costs += cost(candidates[name], baseline)
    names = set(best.values())
    choice: LoweringLike = names.pop() if len(names) == 1 else best
    time, spread = total(chosen)
    text = "/".join(dict.fromkeys(best.values())) if isinstance(choice, str) else _slashed(best)
    if not all(measured.ok for measured in stock):
        return Choice(choice, f"{text}: {_ms(time)}; stock fails")
    if choice == "native" and native_is_stock:
        return Choice(STOCK, f"stock's own op is the fastest: {_ms(time)}")
    stock_time, stock_spread = total(stock)
    gain = stock_time - costs
    if gain <= max(LEAST_GAIN * stock_time, (spread**2 + stock_spread**2) ** 0.5):
        return Choice(
            STOCK,
            f"stock: {_ms(stock_time)}; the best, {text}, takes {_ms(time)}, which is not faster "
            "by more than the spread and its compilation",
        )
    return Choice(choice, f"{text}: {_ms(time)} against stock's {_ms(stock_time)}")


def choose_variant(steps: Mapping[str, Measured]) -> Choice:
    """The variant of the whole model to train with.

    Args:
        steps: variant → times of its training step; `"stock"` is among them.

    Returns:
        The fastest, or `"stock"` where none is faster by more than the spread
        of both and pays back the compilation of its first step.
    """
    stock = steps[STOCK]
    others = {name: step for name, step in steps.items() if name != STOCK and step.ok}
    if not others:
        failed = [f"{name}: {step.error}" for name, step in steps.items() if not step.ok]
        if failed:
            return Choice(STOCK, f"what else was tried failed ({'; '.join(failed)})")
        return Choice(STOCK, f"{_ms(stock.median)} a step; alone, no layer is faster otherwise")
    if not stock.ok:
        name = min(others, key=lambda name: others[name].median)
        return Choice(name, f"stock fails ({stock.error}); {name}: {_ms(others[name].median)}")
    name = min(others, key=lambda name: cost(others[name], stock))
    best = others[name]
    times = f"a step takes {_ms(stock.median)} stock, {_ms(best.median)} {name}"
    first = f"the first {stock.first_seconds:.1f} s and {best.first_seconds:.1f} s"
    _, spread = total([stock, best])
    if stock.median - best.median <= max(LEAST_GAIN * stock.median, spread):
        return Choice(STOCK, f"{times}, which is not faster by more than the spread")
    if cost(best, stock) >= stock.median:
        return Choice(STOCK, f"{times}, {first}: not paid back within {PAY_BACK_STEPS} steps")
    return Choice(name, f"{times} ({best.median / stock.median:.2f} of stock); {first}")


def _slashed(best: Mapping[str, str]) -> str:
    return "/".join(best[pass_name] for pass_name in PASSES)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"
