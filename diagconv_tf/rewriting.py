"""rewrite and restore: layers change class, in a model or in a copy of it."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Sequence

import keras
from absl import logging

from diagconv_tf.class_swap import STEP_KINDS, become, recompile
from diagconv_tf.copying import copy_model
from diagconv_tf.distribution import batch_axis, replicas_of
from diagconv_tf.environment import Conditions
from diagconv_tf.inspection import ConvolutionRow, Inspection, inspect_as_built, inspect_model
from diagconv_tf.layers import kernel_channels_axis
from diagconv_tf.lowerings import (
    DEFAULT_LOWERING,
    LoweringChoice,
    LoweringLike,
    parse,
    why_not,
    why_not_sharded,
)
from diagconv_tf.model_tree import check_built, walk_layers
from diagconv_tf.plan import Plan
from diagconv_tf.rules import DEFAULT_RULES, Rule, find_rule
from diagconv_tf.spec import STOCK

#: Layer paths or globs, or a function of a row of the inspection.
Selection = str | Sequence[str] | Callable[[ConvolutionRow], bool]


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of one convolution.

    Attributes:
        row: the layer.
        lowering: what it will be computed with; None leaves the layer as it
            is, and `"stock"` makes it Keras's own.
        reasons: why it is left as it is.
    """

    row: ConvolutionRow
    lowering: LoweringChoice | str | None
    reasons: tuple[str, ...] = ()


def rewrite(
    model: keras.Model,
    lowering: LoweringLike | Plan = DEFAULT_LOWERING,
    *,
    rules: Sequence[Rule] = DEFAULT_RULES,
    include: Selection | None = None,
    exclude: Selection | None = None,
    in_place: bool = False,
) -> keras.Model:
    """Makes a model's convolutions with groups compute with another lowering.

    Weights, names, variable paths, compile and optimizer state stay; what the
    model computes does too, up to rounding. Layers that cannot be rewritten
    stay as they are, and one log message lists them with the reasons.

    Args:
        model: a built Keras model.
        lowering: as a layer's `lowering`, or a `Plan`.
        rules: which layer classes become which.
        include: layer paths, globs (`*` matches `/` too) or a function of a
            `ConvolutionRow`; None means all. A path that names a container
            means all that is in it.
        exclude: the same, for layers to leave as they are.
        in_place: change `model` itself, without a second set of weights,
            whatever its kind. Otherwise a faithful copy is
            made.

    Returns:
        `model` with `in_place=True`, else the copy.

    Raises:
        ValueError: if `model` is not a built Keras model; if `lowering` is not
            known; if a path or glob matches no convolution, or a plan none;
            or if no faithful copy of the model can be made.
    """
    check_built(model)
    plan = lowering if isinstance(lowering, Plan) else None
    choice = None if plan else parse(lowering)
    # Only what chooses by sizes needs to know them.
    by_size = plan or callable(include) or callable(exclude)
    inspection = (inspect_model if by_size else inspect_as_built)(model, rules=rules)
    selected = _select(inspection, include, exclude)
    decisions = [
        _decide(row, plan.lowering_for if plan else lambda _: choice)
        for row in inspection.rows
        if row.path in selected
    ]
    if plan:
        _check_plan(plan, model, decisions)
    target = _apply(model, decisions, rules, in_place)
    _log_summary(model, inspection, decisions)
    return target


def restore(
    model: keras.Model,
    *,
    rules: Sequence[Rule] = DEFAULT_RULES,
    in_place: bool = False,
) -> keras.Model:
    """Gives a rewritten model its stock layers back: the inverse of `rewrite`.

    Args:
        model: a built Keras model.
        rules: those that `rewrite` was given.
        in_place: change `model` itself; otherwise a faithful copy is made.

    Returns:
        `model` with `in_place=True`, else the copy.

    Raises:
        ValueError: if `model` is not a built Keras model; if it holds a layer
            with a lowering that no rule names; or if no faithful copy of the
            model can be made.
    """
    check_built(model)
    decisions = []
    for row in inspect_as_built(model, rules).rows:
        if row.lowering == STOCK and find_rule(row.layer, rules) is None:
            continue
        if find_rule(row.layer, rules) is None:
            raise ValueError(
                f"Expected a rule for the class {row.class_name} of layer '{row.path}'. Received: "
                "none; pass `rules=` as for `rewrite`"
            )
        decisions.append(Decision(row, STOCK))
    return _apply(model, decisions, rules, in_place)


def _decide(
    row: ConvolutionRow, wanted: Callable[[ConvolutionRow], LoweringLike | None]
) -> Decision:
    if row.reasons:
        return Decision(row, None, row.reasons)
    try:
        lowering = wanted(row)
    except ValueError as error:
        return Decision(row, None, (str(error),))
    if lowering is None:
        return Decision(row, None, ("the plan says nothing of it",))
    if lowering == STOCK:
        return Decision(row, STOCK)
    choice = parse(lowering)
    reasons = dict.fromkeys(reason for spec in row.specs for reason in why_not(spec, choice))
    return Decision(row, None, tuple(reasons)) if reasons else Decision(row, choice)


def _apply(
    model: keras.Model, decisions: Sequence[Decision], rules: Sequence[Rule], in_place: bool
) -> keras.Model:
    target = model if in_place else copy_model(model)
    layers = {place.path: place.layer for place in walk_layers(target)}
    for decision in decisions:
        if decision.lowering is not None:
            layer = layers[decision.row.path]
            become(layer, find_rule(layer, rules), decision.lowering)
    _renew_compiled_functions(target)
    return target


def _renew_compiled_functions(model: keras.Model) -> None:
    """Lets Keras compile again what it has compiled with the old layers."""
    models = [place.layer for place in walk_layers(model)]
    for candidate in (model, *models):
        for kind in STEP_KINDS:
            if getattr(candidate, f"{kind}_function", None) is not None:
                recompile(candidate, kind)


def _select(
    inspection: Inspection, include: Selection | None, exclude: Selection | None
) -> set[str]:
    paths = {row.path for row in inspection.rows}
    if include is not None:
        paths = _matching(inspection, "include", include)
    if exclude is not None:
        paths -= _matching(inspection, "exclude", exclude)
    return paths


def _matching(inspection: Inspection, argument: str, selection: Selection) -> set[str]:
    if callable(selection):
        return {row.path for row in inspection.rows if selection(row)}
    patterns = [selection] if isinstance(selection, str) else list(selection)
    matched: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(
                f"Expected `{argument}` to be a layer path, a glob, a list of these, or a "
                f"function. Received: {pattern!r}"
            )
        found = {
            row.path
            for row in inspection.rows
            if any(_matches(path, pattern) for path in row.paths)
        }
        if not found:
            known = [path for row in inspection.rows for path in row.paths]
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or known[:3]
            raise ValueError(
                f"Expected `{argument}` to match a convolution with groups. Received: "
                f"'{pattern}', which matches none of {len(inspection.rows)}"
                + (f"; near: {', '.join(near)}" if near else "")
            )
        matched |= found
    return matched


def _matches(path: str, pattern: str) -> bool:
    parts = path.split("/")
    heads = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any(head == pattern or fnmatch.fnmatchcase(head, pattern) for head in heads)


def _check_plan(plan: Plan, model: keras.Model, decisions: Sequence[Decision]) -> None:
    if decisions and all(decision.lowering is None for decision in decisions):
        raise ValueError(
            f"Expected a plan for the model '{model.name}'. Received: a plan that fits none of its "
            f"{len(decisions)} convolutions with groups"
        )
    compiled = model.jit_compile if getattr(model, "compiled", False) else None
    replicas = replicas_of(model).num_replicas
    differences = plan.conditions.differences(Conditions.current(compiled, replicas))
    if differences:
        logging.warning("The plan was made under other conditions: %s.", "; ".join(differences))


def _log_summary(model: keras.Model, inspection: Inspection, decisions: Sequence[Decision]) -> None:
    changed = sum(decision.lowering is not None for decision in decisions)
    left: dict[str, list[str]] = {}
    for decision in decisions:
        if decision.lowering is None:
            left.setdefault("; ".join(decision.reasons), []).append(decision.row.path)
    lines = [
        f"{model.name}: {changed} of {len(inspection.rows)} convolutions with groups rewritten."
    ]
    if len(decisions) < len(inspection.rows):
        lines.append(f"{len(inspection.rows) - len(decisions)} were not selected.")
    lines += [f"Left as they are ({reason}): {', '.join(paths)}." for reason, paths in left.items()]
    lost = [
        decision.row.path
        for decision in decisions
        if decision.lowering not in (None, STOCK) and not decision.row.survives_saving
    ]
    if lost:
        lines.append(
            "Saved files cannot hold the new class of layers that a composite layer or a model "
            f"makes itself ({', '.join(lost)}): save `restore(model)`, and rewrite the loaded "
            "model with `Plan.of_model(model)`."
        )
    gathering = _gathering(decisions)
    lines += [
        f"Gather the channels of their inputs, which are divided among devices ({reason}): "
        f"{', '.join(paths)}."
        for reason, paths in gathering.items()
    ]
    level = logging.WARNING if left or lost or gathering or not changed else logging.INFO
    logging.log(level, " ".join(lines))


def _gathering(decisions: Sequence[Decision]) -> dict[str, list[str]]:
    """Reason → paths of layers whose kernel's layout divides channels, but whose lowering cannot.

    Weights that are divided along the axis of the batch are only stored so.
    """
    batch = batch_axis()
    found: dict[str, list[str]] = {}
    for decision in decisions:
        if decision.lowering in (None, STOCK):
            continue
        axis = kernel_channels_axis(decision.row.layer)
        if axis is None or axis == batch:
            continue
        reasons = dict.fromkeys(
            reason
            for spec in decision.row.specs
            for reason in why_not_sharded(spec, decision.lowering, axis.size)
        )
        if reasons:
            found.setdefault("; ".join(reasons), []).append(decision.row.path)
    return found
