"""deploy: a low-bit model for inference, and its kernels as integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from absl import logging
from keras import ops

from diagconv_tf import class_swap
from diagconv_tf.class_swap import LayerState
from diagconv_tf.copying import copy_model
from diagconv_tf.exporting.integer import plan_integers
from diagconv_tf.exporting.integer.checking import rounded_biases
from diagconv_tf.lowbit.bit_layers import BitConv2D, BitDense, bit_layer, fill, why_not_bits
from diagconv_tf.lowbit.graph import layer_facts
from diagconv_tf.lowbit.layers import kernels_of, operands_of
from diagconv_tf.lowbit.operands import FLOAT_BITS, KernelCodes, Operands
from diagconv_tf.model_tree import check_built, walk_layers
from diagconv_tf.rules import DEFAULT_RULES, Rule, find_family
from diagconv_tf.spec import STOCK

#: Where a deployed layer keeps the integers that its kernels were made of.
_CODES = "_kernel_codes"


def deploy(
    model: keras.Model, *, kernels: str = "float", rules: Sequence[Rule] = DEFAULT_RULES
) -> keras.Model:
    """A copy of a low-bit model for inference, whose kernels are the quantized ones.

    It computes what the low-bit model computes. Layers are Keras's own where only kernel
    and gradients were quantized. A layer whose inputs are quantized stays low-bit, with
    float kernel and gradients: nothing in a stock layer rounds its inputs. (`restore` makes
    these stock, too; what the model computes then changes.)

    `kernel_codes` gives the integers. The float weights that the optimizer updates are
    lost: keep `model` in order to train on.

    Args:
        model: a built Keras model with low-bit layers. It is not changed.
        kernels: `"float"`, `"int8"`, or `"bits"`. With `"int8"`, biases (or the betas of batch
            norms) are rounded, too, as files of 8-bit integers hold them: the copy computes
            what the file does that `export` makes of it. Without that, `export` rounds them
            in the file alone. With `"bits"`, dense layers and convolutions whose kernel and inputs
            are both quantized become `BitDense` and `BitConv2D`, which keep and multiply
            packed integers (arXiv 1606.06160, equation 3). The model must be
            functional or sequential, and the copy is not compiled. One log message says
            which low-bit layers stay as they are, and why.
        rules: those that `rewrite` was given.

    Returns:
        The copy.

    Raises:
        ValueError: if `model` is not a built Keras model, has no low-bit layer, or holds one
            whose class no rule names; or if no faithful copy of it can be made. With
            `kernels="int8"`, or `"bits"`, if no layer can multiply such integers, or the model
            has no graph.
    """
    check_built(model)
    if kernels not in ("float", "int8", "bits"):
        raise ValueError(
            f'Expected `kernels` to be "float", "int8" or "bits". Received: {kernels!r}'
        )
    with class_swap.lock:
        _check_low_bit(model)
        if kernels == "bits":
            _check_bits(model)
        target = copy_model(model)
        states = []
        for place in walk_layers(target):
            layer, operands = place.layer, operands_of(place.layer)
            if operands == Operands():
                continue
            family = find_family(type(layer), rules)
            if family is None:
                raise ValueError(
                    f"Expected a rule for the class {type(layer).__name__} of layer "
                    f"'{place.path}'. Received: none; pass `rules=` as for `rewrite`"
                )
            codes = _codes_of(layer)
            # None where only inputs or gradients are quantized.
            for kernel, quantized in zip(kernels_of(layer), codes, strict=False):
                kernel.assign(quantized.values())
            vars(layer)[_CODES] = codes
            state = LayerState.of(layer).with_lowering(family, STOCK)
            states.append(state.with_operands(family, Operands(inputs=operands.inputs)))
        class_swap.swap(target, states)
        if kernels == "int8":
            _round_biases(target)
        return _with_bits(model, target) if kernels == "bits" else target


def _round_biases(model: keras.Model) -> None:
    """Rounds the biases of a deployed model as files of integers hold them."""
    # On grids that layers round to, the formats agree.
    program = plan_integers(model, "onnx")
    if program is None or not program.plan.integer_calls:
        reasons = "" if program is None else f": {program.plan.reasons_text}"
        raise ValueError(
            f"Expected a layer that can multiply 8-bit integers. Received: none in '{model.name}'"
            f"{reasons}"
        )
    values = rounded_biases(program)
    for variable in model.variables:
        if id(variable) in values:
            variable.assign(values[id(variable)])


def _check_bits(model: keras.Model) -> None:
    if layer_facts(model) is None:
        raise ValueError(
            "Expected a functional or sequential model, whose layers can be replaced. "
            f"Received: '{model.name}' of class {type(model).__name__}"
        )
    found = _bit_candidates(model)
    if all(found.values()):
        raise ValueError(
            "Expected a layer that can multiply bits. Received: "
            + "; ".join(f"{path}: {', '.join(reasons)}" for path, reasons in found.items())
        )


def _bit_candidates(model: keras.Model) -> dict[str, list[str]]:
    """Path of each low-bit layer → why it cannot multiply bits."""
    return {
        place.path: why_not_bits(place.layer)
        for place in walk_layers(model)
        if operands_of(place.layer) != Operands()
    }


def _with_bits(model: keras.Model, deployed: keras.Model) -> keras.Model:
    """`deployed`, made anew with layers of bits where `model` allows them."""
    candidates = _bit_candidates(model)
    low_bit = {
        id(theirs.layer): place.layer
        for place, theirs in zip(walk_layers(model), walk_layers(deployed), strict=True)
        if candidates.get(place.path) == []
    }
    made: list[tuple[Any, Any]] = []  # Layers of the copy, and where their weights are.

    def replace(layer: keras.layers.Layer) -> keras.layers.Layer:
        source = low_bit.get(id(layer))
        if source is not None:
            made.append((bit_layer(source), source))
        else:
            made.append((type(layer).from_config(layer.get_config()), layer))
        return made[-1][0]

    deployed.compiled = False  # Else Keras compiles the clone, for which there is nothing to train.
    target = keras.models.clone_model(deployed, clone_function=replace, recursive=True)
    for copy, source in made:
        if isinstance(copy, BitDense | BitConv2D):
            fill(copy, source)
        else:
            copy.set_weights(source.get_weights())
    kept = {path: reasons for path, reasons in candidates.items() if reasons}
    logging.info(
        "%s: %d of %d low-bit layers multiply bits.%s",
        model.name,
        len(low_bit),
        len(candidates),
        "".join(f" {path}: {', '.join(reasons)}." for path, reasons in kept.items()),
    )
    return target


def kernel_codes(model: keras.Model) -> dict[str, tuple[KernelCodes, ...]]:
    """The quantized kernels of a low-bit or deployed model as integers and scales.

    Args:
        model: a built Keras model, low-bit or what `deploy` returned. A file of the latter
            does not hold the integers.

    Returns:
        Layer path → one entry per kernel: two for a separable layer, depthwise first. Layers
        with float kernels are missing.

    Raises:
        ValueError: if `model` is not a built Keras model, or a deployed kernel was changed
            since.
    """
    check_built(model)
    found = {}
    with class_swap.lock:
        for place in walk_layers(model):
            codes = vars(place.layer).get(_CODES) or _codes_of(place.layer)
            if not codes:
                continue
            if _CODES in vars(place.layer):
                for kernel, quantized in zip(kernels_of(place.layer), codes, strict=True):
                    if not np.array_equal(ops.convert_to_numpy(kernel), quantized.values()):
                        raise ValueError(
                            f"Expected the kernel of '{place.path}' as `deploy` made it. "
                            "Received: one that was changed since"
                        )
            found[place.path] = codes
    return found


def _codes_of(layer: keras.layers.Layer) -> tuple[KernelCodes, ...]:
    """Integers of the kernels as the layer multiplies them; none where they stay float."""
    operand = operands_of(layer).kernel
    if operand is None or operand.bits == FLOAT_BITS:
        return ()
    # The layer casts a kernel to its compute dtype, and quantizes it then.
    return tuple(
        operand.codes(ops.cast(ops.convert_to_tensor(kernel), layer.compute_dtype))
        for kernel in kernels_of(layer)
    )


def _check_low_bit(model: keras.Model) -> None:
    if all(operands_of(place.layer) == Operands() for place in walk_layers(model)):
        raise ValueError(
            f"Expected a low-bit model, as `rewrite(model, LowBit(...))` makes it. Received: "
            f"'{model.name}', which has no low-bit layer"
        )
