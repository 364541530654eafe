"""A plan as tables for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from diagconv_tf.inspection import STOCK
from diagconv_tf.lowerings import LoweringLike
from diagconv_tf.measurements import Measured, ProblemMeasurements
from diagconv_tf.spec import PASSES

if TYPE_CHECKING:
    from diagconv_tf.plan import Plan


def render(plan: Plan) -> Group:
    """The tables, for rich."""
    parts: list[Any] = [Text(line) for line in _head(plan)]
    if plan.steps:
        parts.append(_steps_table(plan))
    parts.append(_lowerings_table(plan))
    return Group(*parts)


def _head(plan: Plan) -> Iterator[str]:
    where = plan.conditions
    compiled = {True: "compiled", False: "not compiled", None: "compiled or not"}[where.compiled]
    batch = f", batch of {plan.batch_size}" if plan.batch_size else ""
    if where.replicas > 1:
        batch += f", {where.replicas} replicas"
    yield (
        f"Plan for {where.backend}, {compiled}, on {where.device_kind} ({where.device_name}){batch}"
    )
    if plan.reason:
        yield plan.reason


def _steps_table(plan: Plan) -> Table:
    table = Table(title="Training steps of the whole model", title_justify="left")
    table.add_column("variant")
    for name in ("step ms", "p10", "p90", "of stock", "steps", "first step s"):
        table.add_column(name, justify="right")
    stock = plan.steps.get(STOCK, Measured())
    for name, step in plan.steps.items():
        if not step.ok:
            table.add_row(name, f"failed: {step.error}")
            continue
        ratio = f"{step.median / stock.median:.2f}" if stock.ok else ""
        first = "" if step.first_seconds is None else f"{step.first_seconds:.1f}"
        times = (_ms(step.median), _ms(step.p10), _ms(step.p90))
        table.add_row(name, *times, ratio, str(step.count), first)
    return table


def _lowerings_table(plan: Plan) -> Table:
    table = Table(title="Lowerings", title_justify="left")
    for name in ("layer", "input", "kernel", "lowering"):
        table.add_column(name, overflow="fold")
    for name in ("stock ms", "best ms"):
        table.add_column(name, justify="right")
    table.add_column("alone", overflow="fold")
    measured = {(problem.spec, problem.layers): problem for problem in plan.problems}
    shown = {problem.spec for problem in plan.problems}
    for (spec, layers), problem in measured.items():
        name = layers[0] + (f" (+{len(layers) - 1})" if len(layers) > 1 else "")
        lowering = plan.overrides.get(layers[0], plan.lowerings.get(spec, ""))
        stock, best = _times(problem)
        table.add_row(
            name,
            spec.size_text,
            spec.window_text,
            _text(lowering),
            stock,
            best,
            _text(problem.choice),
        )
    for spec, lowering in plan.lowerings.items():
        if spec not in shown:
            table.add_row("", spec.size_text, spec.window_text, _text(lowering), "", "", "")
    known = {path for problem in plan.problems for path in problem.layers}
    for path, lowering in plan.overrides.items():
        if path not in known:
            table.add_row(path, "", "", _text(lowering), "", "", "")
    return table


def _times(problem: ProblemMeasurements) -> tuple[str, str]:
    """Milliseconds of the three passes: stock's, and the best of each summed."""
    stock = [problem.passes.get(name, {}).get(STOCK, Measured()) for name in PASSES]
    best = [
        min((m.median for m in problem.passes.get(name, {}).values() if m.ok), default=None)
        for name in PASSES
    ]
    return (
        _ms(sum(m.median for m in stock)) if all(m.ok for m in stock) else "?",
        "?" if None in best else _ms(sum(best)),
    )


def _text(lowering: LoweringLike) -> str:
    return lowering if isinstance(lowering, str) else "/".join(lowering[name] for name in PASSES)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"
