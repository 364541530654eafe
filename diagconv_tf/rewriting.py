"""rewrite and restore: layers change class, in a model or in a copy of it."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
from absl import logging

from diagconv_tf import class_swap, keras_internals
from diagconv_tf.auto import AUTO, Choice, choose, parse_or_auto
from diagconv_tf.class_swap import LayerState
from diagconv_tf.copying import copy_model
from diagconv_tf.distribution import batch_axis, replicas_of, strategy_of
from diagconv_tf.environment import Conditions
from diagconv_tf.inspection import (
    ConvolutionRow,
    Inspection,
    inspect_as_built,
    inspect_model,
    not_in_files,
)
from diagconv_tf.layers import LoweredLayer, kernel_channels_axis
from diagconv_tf.lowbit.layers import OperandLayer
from diagconv_tf.lowbit.operands import Operands
from diagconv_tf.lowerings import LoweringChoice, LoweringLike, parse, why_not, why_not_sharded
from diagconv_tf.model_tree import PlacedLayer, check_built, select_paths, walk_layers
from diagconv_tf.plan import Plan
from diagconv_tf.rules import DEFAULT_RULES, OPERANDS, Rule, find_family
from diagconv_tf.spec import STOCK
from diagconv_tf.treatment import Candidate, Treated, Treatment

#: Layer paths or globs, or a function of a row of the inspection.
Selection = str | Sequence[str] | Callable[[ConvolutionRow], bool]

#: Attributes that `rewrite` sets on a model whose lowerings hold under some conditions.
_VALIDITY = "_diagconv_validity"
_MAKE_TRAIN_FUNCTION = "make_train_function"


@dataclasses.dataclass(frozen=True)
class _Validity:
    """Under which conditions a model's lowerings were chosen.

    Attributes:
        conditions: these conditions.
        reported: differences from them that a warning has named already.
    """

    conditions: Conditions
    reported: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of one convolution.

    Attributes:
        row: the layer.
        lowering: what it will compute with; None leaves the layer as it is, and
            `"stock"` makes it Keras's own.
        reasons: why it is left as it is; of a choice of `"auto"`, its reason.
    """

    row: ConvolutionRow
    lowering: LoweringChoice | str | None
    reasons: tuple[str, ...] = ()


def rewrite(
    model: keras.Model,
    lowering: LoweringLike | Plan | Treatment = AUTO,
    *,
    rules: Sequence[Rule] = DEFAULT_RULES,
    include: Selection | None = None,
    exclude: Selection | None = None,
    in_place: bool = False,
) -> keras.Model:
    """Makes a model's convolutions with groups compute with another lowering, or its layers
    low-bit.

    Weights, names, variable paths, compile and optimizer state stay; what the
    model computes does too, up to rounding. Layers that cannot be rewritten
    stay as they are, and one log message lists them with the reasons.

    The choices of `"auto"` and of a plan hold under the conditions that they were
    made for: compile the model first. When the training of the returned model
    starts under other conditions, one warning says which.

    A treatment such as `LowBit(weights=1, activations=2, gradients=6)` changes what the
    model computes, in training and after it; a warning says how. Weights stay the float
    ones that the optimizer updates. Layers keep their lowerings, and with a lowering they
    keep their operands. Quantized gradients give layers new state: treat a model between
    two calls of `fit`, not inside one.

    Args:
        model: a built Keras model.
        lowering: as a layer's `lowering`; a `Plan`; a treatment; or `"auto"`: for
            each layer what `choose` knows to be fastest, and stock where it knows
            nothing.
        rules: which layer classes become which.
        include: layer paths, globs (`*` matches `/` too) or a function of a
            `ConvolutionRow`; None means all. A path that names a container
            means all that is in it. A treatment has its own.
        exclude: the same, for layers to leave as they are.
        in_place: True changes `model` itself, without a second set of weights,
            whatever its kind; when it fails, or is interrupted, `model` is as it
            was before. False makes a faithful copy.

    Returns:
        `model` with `in_place=True`, else the copy.

    Raises:
        ValueError: if `model` is not a built Keras model; if `lowering` is not
            known; if a path or glob matches no convolution, or a plan none;
            if a treatment fits no layer, or needs a graph that the model has
            not; or if no faithful copy of the model can be made.
    """
    check_built(model)
    if isinstance(lowering, Treatment):
        if include is not None or exclude is not None:
            raise ValueError(
                "Expected `include` and `exclude` in the treatment: LowBit(..., include=...). "
                "Received: them as arguments of `rewrite`"
            )
        return _treat(model, lowering, rules, in_place)
    choice = lowering if isinstance(lowering, Plan) else parse_or_auto(lowering)
    with class_swap.lock:
        # Only what chooses by the sizes of images needs to know them.
        by_size = isinstance(choice, Plan) or callable(include) or callable(exclude)
        inspection = (inspect_model if by_size else inspect_as_built)(model, rules=rules)
        rows = _select(inspection, include, exclude)
        validity = None
        if isinstance(choice, Plan):
            decisions = [_decide(row, choice.lowering_for) for row in rows]
            validity = _Validity(choice.conditions, _check_plan(choice, model, decisions))
        elif isinstance(choice, str):
            compiled = _is_compiled(model)
            if compiled is None:
                compiled = keras_internals.resolve_jit_compile(model)
            validity = _Validity(_conditions(model, compiled))
            decisions = [_decide_auto(row, validity.conditions) for row in rows]
        else:
            decisions = [_decide(row, lambda _: choice) for row in rows]
        level, summary = _summary(model, inspection, decisions)
        target = _apply(model, decisions, rules, in_place)
        # Of a part of the model a lowering says nothing about the other layers.
        if validity is not None or len(rows) == len(inspection.rows):
            _watch(target, validity if rows else None)
    logging.log(level, "%s", summary)
    return target


def restore(
    model: keras.Model,
    *,
    rules: Sequence[Rule] = DEFAULT_RULES,
    in_place: bool = False,
) -> keras.Model:
    """Gives a rewritten model its stock layers back: the inverse of `rewrite`.

    Low-bit layers become stock with the float weights that the optimizer updated, to the
    bit; `deploy` gives stock layers with the quantized ones.

    Args:
        model: a built Keras model.
        rules: those that `rewrite` was given.
        in_place: True changes `model` itself, completely or not at all; False
            makes a faithful copy.

    Returns:
        `model` with `in_place=True`, else the copy.

    Raises:
        ValueError: if `model` is not a built Keras model; if it holds a layer
            of ours whose class no rule names; or if no faithful copy of the
            model can be made.
    """
    check_built(model)
    with class_swap.lock:
        for place in walk_layers(model):
            known = find_family(type(place.layer), rules) is not None
            if not known and isinstance(place.layer, LoweredLayer | OperandLayer):
                raise ValueError(
                    f"Expected a rule for the class {type(place.layer).__name__} of layer "
                    f"'{place.path}'. Received: none; pass `rules=` as for `rewrite`"
                )
        target = model if in_place else copy_model(model)
        states = [
            LayerState.of(place.layer).with_lowering(family, STOCK).with_operands(family, None)
            for place in walk_layers(target)
            if (family := find_family(type(place.layer), rules)) is not None
        ]
        class_swap.swap(target, states)
        _watch(target, None)
        return target


def preview(
    model: keras.Model, treatment: Treatment, *, rules: Sequence[Rule] = DEFAULT_RULES
) -> Treated:
    """What `rewrite(model, treatment)` would do with each layer, as a table; changes nothing.

    Args:
        model: a built Keras model.
        treatment: such as `LowBit(1, 2, 6)`.
        rules: which layer classes become which.

    Raises:
        ValueError: if `model` is not a built Keras model, or the treatment does not fit
            it.
    """
    check_built(model)
    with class_swap.lock:
        return treatment.decide(model, _candidates(walk_layers(model), rules))


def _candidates(places: Iterable[PlacedLayer], rules: Sequence[Rule]) -> list[Candidate]:
    """The layers of which a rule says that they can hold operands."""
    candidates = []
    for place in places:
        family = find_family(type(place.layer), rules)
        if family is None or not family.holds(OPERANDS):
            continue
        reasons = family.why_not(place.layer, OPERANDS)
        if not place.layer.built:
            reasons = [*reasons, "not built: the model never calls it"]
        if "call" in vars(place.layer):
            reasons = [*reasons, "its `call` was replaced on the object"]
        candidates.append(Candidate(place, tuple(reasons), family.held_operands))
    return candidates


def _treat(
    model: keras.Model, treatment: Treatment, rules: Sequence[Rule], in_place: bool
) -> keras.Model:
    with class_swap.lock:
        places = walk_layers(model)
        treated = treatment.decide(model, _candidates(places, rules))
        wanted = {layer.path: layer.operands for layer in treated.layers if layer.operands}
        if not wanted:
            raise ValueError(
                f"Expected a treatment for the model '{model.name}'. Received: {treatment}, which "
                f"fits none of its {len(treated.layers)} {treatment.kinds[0]}"
            )
        lost = not_in_files([place for place in places if place.path in wanted])
        target = model if in_place else copy_model(model)
        strategy = strategy_of(target)
        # The variables of new sources of noise belong to the strategy of the model.
        with contextlib.nullcontext() if strategy is None else strategy.scope():
            states = [
                _treated_state(place.layer, wanted[place.path], rules)
                for place in walk_layers(target)
                if place.path in wanted
            ]
        class_swap.swap(target, states)
    logging.warning("%s", _treatment_summary(treated, lost))
    return target


def _treated_state(
    layer: keras.layers.Layer, operands: Operands, rules: Sequence[Rule]
) -> LayerState:
    family = find_family(type(layer), rules)
    assert family is not None  # Else it were no candidate.
    return LayerState.of(layer).with_operands(family, operands)


def _treatment_summary(treated: Treated, lost: Sequence[str]) -> str:
    """What is logged of a treatment: one line."""
    layers = [layer for layer in treated.layers if layer.operands is not None]
    sentences = [
        f"{treated.model_name}: {treated.treatment} for {len(layers)} of {len(treated.layers)} "
        f"{treated.treatment.kinds[0]}. {treated.treatment.effect}"
    ]
    groups: dict[str, list[str]] = {}
    for layer in treated.layers:
        # Those of layers that are treated name the layer before: `preview` lists them.
        reason = "; ".join(layer.reasons)
        if layer.operands is None:
            groups.setdefault(f"Left as they are ({reason})", []).append(layer.path)
        elif getattr(layer.operands.inputs, "signed", False):
            groups.setdefault("Take signed inputs", []).append(layer.path)
        for change in layer.changes:
            groups.setdefault(f"{change[0].upper()}{change[1:]}", []).append(layer.path)
    sentences += [f"{what}: {', '.join(paths)}." for what, paths in groups.items()]
    if lost:
        sentences.append(
            "Saved files cannot hold the new class of layers that a composite layer or a model "
            f"makes itself ({', '.join(lost)}): save `restore(model)`, and rewrite the loaded one."
        )
    return " ".join(sentences)


def _decide(
    row: ConvolutionRow,
    wanted: Callable[[ConvolutionRow], LoweringLike | LoweringChoice | None],
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


def _decide_auto(row: ConvolutionRow, conditions: Conditions) -> Decision:
    chosen = Choice(STOCK, "a layer whose input is not known was not measured", "unknown")
    if row.main_spec is not None:
        is_conv = isinstance(row.layer, keras.layers.Conv2D)
        chosen = choose(row.main_spec, conditions, "conv" if is_conv else "depthwise_conv")
    decision = _decide(row, lambda _: chosen.lowering)
    if decision.lowering is None:
        return decision
    return dataclasses.replace(decision, reasons=(f"{chosen.basis}: {chosen.reason}",))


def _apply(
    model: keras.Model, decisions: Sequence[Decision], rules: Sequence[Rule], in_place: bool
) -> keras.Model:
    """Carries out `decisions` in the model or in a copy, completely or not at all."""
    target = model if in_place else copy_model(model)
    layers = {place.path: place.layer for place in walk_layers(target)}
    pairs = [(layers[d.row.path], d.lowering) for d in decisions if d.lowering is not None]
    states = [
        LayerState.of(layer).with_lowering(family, lowering)
        for layer, lowering in pairs
        # Always one: else the row has a reason.
        if (family := find_family(type(layer), rules)) is not None
    ]
    class_swap.swap(target, states)
    return target


def _is_compiled(model: keras.Model) -> bool | None:
    """Whether a compiler compiles the training step; None before `model.compile`."""
    if not getattr(model, "compiled", False):
        return None
    return bool(model.jit_compile) and not model.run_eagerly


def _conditions(model: keras.Model, compiled: bool | None) -> Conditions:
    return Conditions.current(compiled, replicas_of(model).num_replicas)


def _watch(model: keras.Model, validity: _Validity | None) -> None:
    """Lets a model warn when it is trained under other conditions; None ends that.

    Keras calls the public `make_train_function` whenever training starts. A bound
    method of that name in the model's own attributes runs first, needs no private
    hook, and goes over to copies of the model.
    """
    attributes = vars(model)
    make = attributes.get(_MAKE_TRAIN_FUNCTION)
    watched = getattr(make, "__func__", None) is _make_train_function
    if validity is not None and (watched or make is None):
        attributes[_VALIDITY] = validity
        attributes[_MAKE_TRAIN_FUNCTION] = types.MethodType(_make_train_function, model)
    elif watched:
        del attributes[_VALIDITY], attributes[_MAKE_TRAIN_FUNCTION]


def _make_train_function(model: keras.Model, force: bool = False) -> None:
    # Neither a later epoch or step, nor one that `recompile` forces, starts a training.
    if model.train_function is None and not force:
        validity = vars(model)[_VALIDITY]
        differences = validity.conditions.differences(_conditions(model, _is_compiled(model)))
        if not set(differences) <= set(validity.reported):
            logging.warning(
                "%s: training starts under other conditions than its lowerings were chosen for: "
                "%s. Rewrite it again, after `compile`.",
                model.name,
                "; ".join(differences),
            )
    return type(model).make_train_function(model, force=force)


def _select(
    inspection: Inspection, include: Selection | None, exclude: Selection | None
) -> list[ConvolutionRow]:
    paths = {row.path for row in inspection.rows}
    if include is not None:
        paths = _matching(inspection, "include", include)
    if exclude is not None:
        paths -= _matching(inspection, "exclude", exclude)
    return [row for row in inspection.rows if row.path in paths]


def _matching(inspection: Inspection, argument: str, selection: Selection) -> set[str]:
    if callable(selection):
        return {row.path for row in inspection.rows if selection(row)}
    patterns = [selection] if isinstance(selection, str) else list(selection)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(
                f"Expected `{argument}` to be a layer path, a glob, a list of these, or a "
                f"function. Received: {pattern!r}"
            )
    paths = [row.paths for row in inspection.rows]
    return select_paths(argument, patterns, paths, "convolution with groups")


def _check_plan(plan: Plan, model: keras.Model, decisions: Sequence[Decision]) -> tuple[str, ...]:
    """Warns of conditions that differ from the plan's, and returns what does.

    Raises:
        ValueError: if the plan fits no layer.
    """
    if decisions and all(decision.lowering is None for decision in decisions):
        raise ValueError(
            f"Expected a plan for the model '{model.name}'. Received: a plan that fits none of its "
            f"{len(decisions)} convolutions with groups"
        )
    differences = plan.conditions.differences(_conditions(model, _is_compiled(model)))
    if differences:
        logging.warning("The plan was made under other conditions: %s.", "; ".join(differences))
    return tuple(differences)


def _summary(
    model: keras.Model, inspection: Inspection, decisions: Sequence[Decision]
) -> tuple[int, str]:
    """What is logged of a rewriting: the level, and one line."""
    count = len(inspection.rows)
    lowered = [d for d in decisions if d.lowering not in (None, STOCK)]
    stock = [d for d in decisions if d.lowering == STOCK]
    sentences = [f"{model.name}: {len(lowered)} of {count} convolutions with groups rewritten."]
    if len(decisions) < count:
        sentences.append(f"{count - len(decisions)} were not selected.")
    sentences += [
        f"{len(paths)} compute with {lowering} ({reason})."
        for (lowering, reason), paths in _grouped(
            ((str(d.lowering), reason), d) for d in lowered for reason in d.reasons
        ).items()
    ]
    sentences += [
        f"{len(paths)} are left to Keras" + (f" ({reason})." if reason else ".")
        for reason, paths in _grouped(("; ".join(d.reasons), d) for d in stock).items()
    ]
    left = _grouped(("; ".join(d.reasons), d) for d in decisions if d.lowering is None)
    sentences += [
        f"Left as they are ({reason}): {', '.join(paths)}." for reason, paths in left.items()
    ]
    lost = [d.row.path for d in lowered if not d.row.survives_saving]
    if lost:
        sentences.append(
            "Saved files cannot hold the new class of layers that a composite layer or a model "
            f"makes itself ({', '.join(lost)}): save `restore(model)`, and rewrite the loaded "
            "model with `Plan.of_model(model)`."
        )
    gathering = _gathering(lowered)
    sentences += [
        f"Gather the channels of their inputs, which are sharded among devices ({reason}): "
        f"{', '.join(paths)}."
        for reason, paths in gathering.items()
    ]
    # A plan that says "stock" gives no reasons, and does what was asked for.
    planned = any(not d.reasons for d in stock)
    is_news = left or lost or gathering or not (lowered or planned)
    return (logging.WARNING if is_news else logging.INFO), " ".join(sentences)


def _grouped(pairs: Iterable[tuple[Any, Decision]]) -> dict[Any, list[str]]:
    """Key → paths of the layers that have it."""
    groups: dict[Any, list[str]] = {}
    for key, decision in pairs:
        groups.setdefault(key, []).append(decision.row.path)
    return groups


def _gathering(decisions: Sequence[Decision]) -> dict[str, list[str]]:
    """Reason → paths of layers whose kernel's layout shards channels, but whose lowering cannot.

    Weights that are sharded along the axis of the batch are only stored so.
    """

    def reasons(decision: Decision) -> str:
        axis = kernel_channels_axis(decision.row.layer)
        if axis is None or axis == batch_axis() or decision.lowering is None:
            return ""
        found = [why_not_sharded(s, decision.lowering, axis.size) for s in decision.row.specs]
        return "; ".join(dict.fromkeys(reason for each in found for reason in each))

    groups = _grouped((reasons(decision), decision) for decision in decisions)
    return {reason: paths for reason, paths in groups.items() if reason}
