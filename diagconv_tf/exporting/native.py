"""A model whose convolutions run natively for a while."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from diagconv_tf import class_swap
from diagconv_tf.class_swap import LayerState, instance_attribute, swapped
from diagconv_tf.layers import LoweredLayer
from diagconv_tf.lowerings import parse
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.rules import DEFAULT_RULES, LOWERING, Rule, find_family
from diagconv_tf.spec import STOCK

_NATIVE = parse("native")


@contextlib.contextmanager
def native_convolutions(
    model: keras.Model, rules: Sequence[Rule] = DEFAULT_RULES
) -> Iterator[None]:
    """Inside, the model computes with the framework's own convolutions.

    The model itself is changed and restored, not a copy: that needs no memory and
    works for every model. Functions that were compiled before remain right, and
    other threads may call the model meanwhile.

    `Conv2D` layers with one input channel per group run TensorFlow's depthwise
    op, which stock Keras does not use for them.

    Args:
        model: a built Keras model.
        rules: those that `rewrite` was given. A subclass of ours that no rule
            names keeps its class, since it may have code of its own, and gets the
            lowering `"native"`.
    """
    with swapped(
        [place.layer for place in walk_layers(model)], lambda state: _native_state(state, rules)
    ):
        yield


def _native_state(state: LayerState, rules: Sequence[Rule]) -> LayerState:
    family = find_family(state.layer_class, rules)
    if family is None:
        is_ours = isinstance(state.layer, LoweredLayer)
        return dataclasses.replace(state, lowering=_NATIVE) if is_ours else state
    if (
        keras.backend.backend() == "tensorflow"
        and _is_depthwise_conv2d(state.layer)
        and issubclass(family.class_for({LOWERING}, state.layer_class), LoweredLayer)
    ):
        return state.with_lowering(family, _NATIVE)
    stock = state.with_lowering(family, STOCK)
    # The lowering stays, for calls that have begun in other threads. Low-bit layers read it
    # once, and would follow it.
    return stock if stock.operands else dataclasses.replace(stock, lowering=state.lowering)


@contextlib.contextmanager
def float_operands(model: keras.Model, rules: Sequence[Rule] = DEFAULT_RULES) -> Iterator[None]:
    """Inside, no layer of the model rounds its operands."""

    def change(state: LayerState) -> LayerState:
        family = find_family(state.layer_class, rules)
        return state.with_operands(family, None) if family and state.operands else state

    with swapped([place.layer for place in walk_layers(model)], change):
        yield


@contextlib.contextmanager
def counted_depthwise_calls(
    model: keras.Model, rules: Sequence[Rule] = DEFAULT_RULES
) -> Iterator[list[str]]:
    """Counts the depthwise convolutions that this thread runs inside.

    The layers alone would not tell: a shared one runs more than once, an unused
    one never.

    Args:
        model: a built Keras model.
        rules: those that `rewrite` was given.

    Yields:
        A list that grows by a layer's path with each depthwise convolution.
    """
    calls: list[str] = []
    with class_swap.lock, contextlib.ExitStack() as hooks:
        for placed in walk_layers(model):
            if _runs_depthwise(placed.layer, rules):
                counted = _counted(placed.layer.call, placed.path, calls)
                hooks.enter_context(instance_attribute(placed.layer, "call", counted))
        yield calls


def _counted(call: Callable, path: str, calls: list[str]) -> Callable:
    thread = threading.get_ident()

    def counted_call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            calls.append(path)
        return call(*args, **kwargs)

    return counted_call


def _runs_depthwise(layer: keras.layers.Layer, rules: Sequence[Rule]) -> bool:
    """Whether each call of a layer is known to run one depthwise convolution."""
    if find_family(type(layer), rules) is None and not _has_our_call(type(layer)):
        return False
    depthwise = (keras.layers.DepthwiseConv2D, keras.layers.SeparableConv2D)
    return isinstance(layer, depthwise) or _is_depthwise_conv2d(layer)


def _has_our_call(layer_class: type[keras.layers.Layer]) -> bool:
    """Whether a class is ours or a subclass that does not replace our `call`."""
    if not issubclass(layer_class, LoweredLayer):
        return False
    own = (c for c in layer_class.__mro__ if issubclass(c, LoweredLayer) and "call" in vars(c))
    return all(c.__module__ == LoweredLayer.__module__ for c in own)


def _is_depthwise_conv2d(layer: keras.layers.Layer) -> bool:
    return (
        isinstance(layer, keras.layers.Conv2D)
        and layer.groups > 1
        and layer.built
        and layer.kernel.shape[-2] == 1
    )
