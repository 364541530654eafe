"""Layers change class: the one mechanism of rewriting.

Our layers are subclasses of Keras's with the same variables. So a layer
becomes ours, and stock again, by a change of its class: nothing is copied,
and whatever refers to the layer or its variables (graphs, optimizers,
wrappers, other models) goes on doing so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from diagconv_tf.layers import LoweredLayer
from diagconv_tf.lowerings import LoweringChoice, LoweringLike, parse
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.rules import DEFAULT_RULES, Rule, find_rule
from diagconv_tf.spec import STOCK


@dataclasses.dataclass(frozen=True)
class LayerState:
    """What rewriting changes in a layer.

    Attributes:
        layer: the layer.
        layer_class: its class.
        lowering: the lowering that the layer itself holds; None where that of
            its class holds, or there is none.
    """

    layer: keras.layers.Layer
    layer_class: type[keras.layers.Layer]
    lowering: LoweringChoice | None

    @classmethod
    def of(cls, layer: keras.layers.Layer) -> LayerState:
        """The state in which `layer` is now."""
        return cls(layer, type(layer), vars(layer).get("_lowering"))

    def set(self) -> None:
        """Brings the layer into this state; takes about a microsecond."""
        # Past Keras's bookkeeping of attributes: neither is a variable or a layer.
        object.__setattr__(self.layer, "__class__", self.layer_class)
        if self.lowering is None:
            # A stock layer carries nothing of ours.
            vars(self.layer).pop("_lowering", None)
        else:
            vars(self.layer)["_lowering"] = self.lowering


def become(
    layer: keras.layers.Layer, rule: Rule, lowering: LoweringLike | LoweringChoice
) -> LayerState:
    """Makes `layer` the rule's source (`"stock"`) or its replacement.

    Args:
        layer: a layer of the rule's source or replacement.
        rule: what the layer can be.
        lowering: `"stock"`, or what the replacement computes with. A
            replacement that is no layer of ours has none.

    Returns:
        The new state.

    Raises:
        ValueError: if `lowering` is not known.
    """
    if lowering == STOCK:
        state = LayerState(layer, rule.source, None)
    else:
        choice = parse(lowering)
        lowered = issubclass(rule.replacement, LoweredLayer)
        state = LayerState(layer, rule.replacement, choice if lowered else None)
    state.set()
    return state


@contextlib.contextmanager
def kept_classes(layers: Sequence[keras.layers.Layer]) -> Iterator[None]:
    """Whatever becomes of `layers` inside, they are afterwards what they were.

    Compiled functions are not renewed: those that were compiled before remain
    right, and none must be compiled inside. No other thread may use the layers
    meanwhile.
    """
    states = [LayerState.of(layer) for layer in layers]
    try:
        yield
    finally:
        for state in states:
            state.set()


@contextlib.contextmanager
def stock_classes(model: keras.Model, rules: Sequence[Rule] = DEFAULT_RULES) -> Iterator[None]:
    """Inside, a model's layers are Keras's own: for writing what must look stock."""
    layers = [place.layer for place in walk_layers(model)]
    with kept_classes(layers):
        for layer in layers:
            rule = find_rule(layer, rules)
            if rule is not None and type(layer) is rule.replacement:
                become(layer, rule, STOCK)
        yield


@contextlib.contextmanager
def instance_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `owner` itself has the attribute, before its class; then what it had.

    Nothing that watches attributes (Keras, TensorFlow, PyTorch) hears of it.
    """
    attributes = vars(owner)
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = value
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(before)


#: What `fit`, `evaluate` and `predict` run.
STEP_KINDS = ("train", "test", "predict")


def recompile(model: keras.Model, kind: str) -> None:
    """Makes a model's function anew, to be traced with the layers of now.

    JAX finds what it has compiled by equal functions, and a model's `train_step`
    equals itself: as long as anybody holds the old function (the traceback of an
    interrupted `fit`, say) its program would go on. So Keras gets another step.

    Args:
        model: a model that has, or could make, the function.
        kind: one of `STEP_KINDS`.
    """
    step = getattr(model, f"{kind}_step")

    @functools.wraps(step)
    def another_step(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    with instance_attribute(model, f"{kind}_step", another_step):
        getattr(model, f"make_{kind}_function")(force=True)
