"""Cache keys: all that a measured time depends on.

A key is a dict in JSON's types. What Keras counts up (names), what changes no time (a
learning rate) and what the contest sets itself (lowerings) is not in it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from diagconv_tf.environment import Conditions
from diagconv_tf.inspection import Inspection
from diagconv_tf.measurements import Workload
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.rules import DEFAULT_RULES
from diagconv_tf.tuning.cache import fingerprint
from diagconv_tf.tuning.candidates import Variant

#: Packages whose versions, which conditions hold, tell their code.
_KNOWN_PACKAGES = ("builtins", "keras", "diagconv_tf", "tensorflow", "torch", "jax")

_STOCK_NAMES = {rule.replacement.__name__: rule.source.__name__ for rule in DEFAULT_RULES}


def of_workload(
    workload: Workload, candidates: list[str], conditions: Conditions
) -> dict[str, Any]:
    """The key of one workload's times, with all candidates that are measured together."""
    fields = {
        "spec": dataclasses.asdict(workload.spec),
        "stock_op": workload.stock_op,
        "candidates": candidates,
        **_where(conditions),
    }
    return {"what": "workload", **_plain(fields)}


def of_contest(
    model: keras.Model,
    inspection: Inspection,
    data: Any,
    conditions: Conditions,
    variants: Mapping[str, Variant],
) -> dict[str, Any] | None:
    """The key of a whole model's times: what it computes, how it is trained, variants.

    The source of the user's classes counts, but not what they call elsewhere.

    Returns:
        The key; None where a class has no source or an object no config, so that
        nothing tells what the times depend on.
    """
    rows = inspection.rows
    try:
        computed = [_structure(model), [dataclasses.asdict(s) for row in rows for s in row.specs]]
        training = _training(model)
    except Exception:  # `get_config` of the user may raise anything.
        return None
    fields = {
        # Without the number that Keras gives the second of its kind.
        "name": re.sub(r"_\d+$", "", model.name),
        "structure": fingerprint(_plain(computed)),
        "training": fingerprint(_plain(training)),
        "data": [[np.shape(v), str(getattr(v, "dtype", ""))] for v in keras.tree.flatten(data)],
        "batch_size": inspection.batch_size,
        "variants": {
            name: fingerprint([variant.get(row.path) for row in rows])
            for name, variant in variants.items()
        },
        **_where(conditions),
    }
    return {"what": "contest", **_plain(fields)}


def of_default(
    contest: Mapping[str, Any] | None, variant: Variant, jit_compile: bool
) -> dict[str, Any] | None:
    """The key of a variant's times beside those of Keras's default.

    Args:
        contest: the key of the contest in which the variant was chosen.
        variant: path → lowering.
        jit_compile: with which Keras compiles by default.
    """
    if contest is None:
        return None
    compared = {"variants": fingerprint(_plain(dict(variant))), "default": jit_compile}
    return {**contest, **compared, "what": "default"}


def _where(conditions: Conditions) -> dict[str, Any]:
    # One replica is measured: whether there are others does not matter.
    where = dataclasses.replace(conditions, num_replicas=1)
    return {"conditions": dataclasses.asdict(where), "code": _code_of_package()}


@functools.cache
def _code_of_package() -> str:
    """A hash of this package's source: lowerings, layers, and what measures them."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _structure(model: keras.Model) -> list[Any]:
    """Layers and, in the configs of functional models, how they are connected."""
    layers = [model, *(place.layer for place in walk_layers(model))]
    operations = [op for layer in layers for op in getattr(layer, "operations", [layer])]
    numbers = {name: f"#{i}" for i, name in enumerate(dict.fromkeys(op.name for op in operations))}
    return [
        [
            _source(layer),
            [list(variable.shape) for variable in layer.weights],
            _stripped(keras.saving.serialize_keras_object(layer), numbers),
        ]
        for layer in layers
    ]


def _training(model: keras.Model) -> list[Any]:
    """What a training step does besides calling the layers."""
    own_step = vars(model).get("train_step")
    if not model.compiled:
        return [_source(own_step)]
    config = model.get_compile_config()
    names = ("optimizer", "loss", "loss_weights", "metrics", "weighted_metrics")
    own = [own_step, model.optimizer, *keras.tree.flatten(model.loss)]
    return [[_source(value) for value in own], [_stripped(config[name], {}) for name in names]]


def _stripped(value: Any, numbers: Mapping[str, str]) -> Any:
    """A config without what changes no time; names of operations become numbers."""
    if isinstance(value, list | tuple):
        return [_stripped(v, numbers) for v in value]
    if not isinstance(value, dict):
        return numbers.get(value, value) if isinstance(value, str) else value
    if "Policy" in str(value.get("class_name")):  # Its name is its dtype.
        return value
    dropped = {"name", "lowering", "module", "registered_name", "compile_config"}
    if not isinstance(value.get("learning_rate"), dict):  # A schedule is computed in the step.
        dropped.add("learning_rate")
    return {
        k: _STOCK_NAMES.get(v, v) if k == "class_name" else _stripped(v, numbers)
        for k, v in value.items()
        if k not in dropped
    }


def _source(value: Any) -> list[str]:
    """The source of a function, or of an object's classes, as far as they are the user's.

    Raises:
        OSError, TypeError: if Python does not know it.
    """
    value = inspect.unwrap(getattr(value, "__func__", value))
    owners = (value,) if inspect.isfunction(value) else type(value).__mro__
    return [
        inspect.getsource(owner)
        for owner in owners
        if owner.__module__.partition(".")[0] not in _KNOWN_PACKAGES
    ]


def _plain(value: Any) -> Any:
    """In JSON's types; of other objects, the class's name (an address would differ)."""
    return json.loads(json.dumps(value, default=lambda v: type(v).__name__, skipkeys=True))
