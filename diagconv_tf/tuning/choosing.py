"""What measured times speak for: decisions without a clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from diagconv_tf.lowerings import LoweringLike, why_not
from diagconv_tf.measurements import Measured, ProblemMeasurements, total
from diagconv_tf.spec import PASSES, STOCK
from diagconv_tf.tuning.problems import Problem, similarity

#: A first step (or compilation) may take so many times stock's without further ado.
MOST_FIRST_STEPS = 3.0

#: What takes longer to compile must have paid it back after so many steps.
PAY_BACK_STEPS = 1000

#: A single lowering is tried in the whole model where the times of its layers
#: add up to no more than so many times those of the plan; the best two of them.
PROMISING = 1.5
MOST_UNIFORM = 2

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


def choose_by_similarity(problem: Problem, known: Sequence[ProblemMeasurements]) -> Choice:
    """The choice of the most similar problem that was measured, or stock."""
    near = [
        (similarity(problem.spec, other.spec), index)
        for index, other in enumerate(known)
        if other.stock_op == problem.stock_op
        and (other.choice == STOCK or not why_not(problem.spec, other.choice))
    ]
    distance, index = min(near, default=(float("inf"), -1))
    if distance == float("inf"):
        return Choice(STOCK, "not measured: no time was left, and nothing is similar")
    other = known[index]
    return Choice(
        other.choice, f"not measured: no time was left; as {other.layers[0]}, the most similar"
    )


def promising_lowerings(problems: Sequence[ProblemMeasurements]) -> list[str]:
    """Lowerings that all layers might have, the fastest first."""
    measured = [problem for problem in problems if problem.passes]
    best = sum(len(p.layers) * _sum_of_passes(p, None) for p in measured)
    names = {name for p in measured for passes in p.passes.values() for name in passes}
    totals = {
        name: sum(len(p.layers) * _sum_of_passes(p, name) for p in measured)
        for name in names - {STOCK}
    }
    near = [name for name in totals if totals[name] <= PROMISING * best]
    return sorted(near, key=lambda name: (totals[name], name))[:MOST_UNIFORM]


def _sum_of_passes(problem: ProblemMeasurements, name: str | None) -> float:
    """Seconds of the three passes with one lowering, or with the best of each.

    Where the lowering was not measured, stock stands in for it, as it will.
    """
    seconds = 0.0
    for candidates_of_pass in problem.passes.values():
        times = {n: m.median for n, m in candidates_of_pass.items() if m.ok}
        if name is None:
            seconds += min(times.values(), default=0.0)
        elif name in times:
            seconds += times[name]
        elif name in candidates_of_pass:
            return float("inf")  # It failed.
        else:
            seconds += times.get(STOCK, float("inf"))
    return seconds


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
