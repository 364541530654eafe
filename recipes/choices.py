"""Why a variant that chooses for itself, by `auto`, `tune` or a plan, computes as it does."""

from __future__ import annotations

from collections import Counter

import keras

from diagconv_tf import Conditions, Plan
from diagconv_tf.auto import AUTO, choose
from diagconv_tf.inspection import inspect_as_built
from diagconv_tf.spec import STOCK
from recipes.variants import TUNE, Variant


def explain_choice(variant: Variant, model: keras.Model, plan: Plan | None) -> str:
    """What was chosen and why, in a sentence; empty for a variant that leaves no choice.

    Args:
        variant: which made `model` compute in its way.
        model: compiled.
        plan: that it followed; None without one.
    """
    if plan is not None:
        return plan.reason
    if variant.lowering != AUTO:
        return ""
    conditions = Conditions.current(bool(model.jit_compile))
    reasons: Counter[str] = Counter()
    rows = [row for row in inspect_as_built(model).rows if row.main_spec is not None]
    for row in rows:
        op = "conv" if isinstance(row.layer, keras.layers.Conv2D) else "depthwise_conv"
        reasons[str(choose(row.main_spec, conditions, op))] += 1
    return "; ".join(
        f"{reason} for {count} of {len(rows)} layers" for reason, count in reasons.items()
    )


def chose_stock(variant: Variant, model: keras.Model) -> bool:
    """Whether a variant that chooses for itself left all layers to Keras.

    Its program is that of `"stock"` then, to the last instruction.

    Args:
        variant: which made `model` compute in its way.
        model: built.
    """
    if variant.treatment is not None:
        return False
    chooses = variant.lowering in (AUTO, TUNE) or isinstance(variant.lowering, Plan)
    return chooses and all(row.lowering == STOCK for row in inspect_as_built(model).rows)
