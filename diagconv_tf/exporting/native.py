"""A model whose convolutions run natively for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import keras

from diagconv_tf.class_swap import become, instance_attribute, kept_classes
from diagconv_tf.layers import DiagonalwiseConv2D, LoweredLayer
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.rules import DEFAULT_RULES, Rule, find_rule
from diagconv_tf.spec import STOCK


@contextlib.contextmanager
def native_convolutions(
    model: keras.Model, rules: Sequence[Rule] = DEFAULT_RULES
) -> Iterator[None]:
    """Inside, the model computes with the framework's own convolutions.

    The model itself is changed and changed back, not a copy: that needs no
    memory and works for every model. Afterwards each layer has the class and
    lowering that it had, so that functions compiled before remain right. No
    other thread may use the model meanwhile.

    `Conv2D` layers with one input channel per group run TensorFlow's depthwise
    op, which stock Keras does not use for them.
    """
    layers = [place.layer for place in walk_layers(model)]
    with kept_classes(layers):
        for layer in layers:
            rule = find_rule(layer, rules)
            if keras.backend.backend() == "tensorflow" and _is_depthwise_conv2d(layer):
                become(layer, rule, "native")
            elif rule is not None and type(layer) is rule.replacement:
                become(layer, rule, STOCK)
            elif isinstance(layer, LoweredLayer):
                # A subclass of ours, with code of its own.
                layer.lowering = "native"
        yield


@contextlib.contextmanager
def counted_depthwise_calls(
    model: keras.Model, rules: Sequence[Rule] = DEFAULT_RULES
) -> Iterator[list[str]]:
    """Inside, the list grows by a layer's name for every depthwise convolution.

    Layers alone would not tell: a shared one runs more than once, an unused
    one never.
    """
    calls: list[str] = []
    with contextlib.ExitStack() as hooks:
        for placed in walk_layers(model):
            layer = placed.layer
            if find_rule(layer, rules) is not None and (
                not isinstance(layer, keras.layers.Conv2D) or _is_depthwise_conv2d(layer)
            ):
                counted = _counted(layer.call, placed.path, calls)
                hooks.enter_context(instance_attribute(layer, "call", counted))
        yield calls


def _counted(call, name: str, calls: list[str]):
    def counted_call(*args, **kwargs):
        calls.append(name)
        return call(*args, **kwargs)

    return counted_call


def _is_depthwise_conv2d(layer: keras.layers.Layer) -> bool:
    return (
        type(layer) in (keras.layers.Conv2D, DiagonalwiseConv2D)
        and layer.groups > 1
        and layer.built
        and layer.kernel.shape[-2] == 1
    )
