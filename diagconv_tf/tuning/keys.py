"""Cache keys: all that a measured time depends on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from diagconv_tf import backends
from diagconv_tf.environment import Conditions
from diagconv_tf.inspection import Inspection
from diagconv_tf.layers import LoweredLayer
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.spec import STOCK
from diagconv_tf.tuning.cache import fingerprint
from diagconv_tf.tuning.problems import Problem

#: Settings from outside that change what runs, and how fast.
_ENVIRONMENT = (
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_XLA_FLAGS",
    "XLA_FLAGS",
)


def of_problem(problem: Problem, name: str, conditions: Conditions) -> dict[str, Any]:
    """The key of one problem's times: stock's, or those of all lowerings."""
    key: dict[str, Any] = {"what": "problem", "spec": dataclasses.asdict(problem.spec)}
    if name == STOCK:
        key["stock_op"] = problem.stock_op
    return {**key, **_where(conditions)}


def of_training_step(
    model: keras.Model,
    inspection: Inspection,
    data: Any,
    conditions: Conditions,
    variants: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The key of the whole model's times: its structure, how it is trained, variants."""
    optimizer = getattr(model, "optimizer", None) if model.compiled else None
    return {
        "what": "model",
        # Without the number that Keras gives the second of its kind.
        "name": re.sub(r"_\d+$", "", model.name),
        "structure": fingerprint(_structure(model, inspection)),
        "data": _shapes(data),
        "batch_size": inspection.batch_size,
        "precision": model.dtype_policy.name,
        "optimizer": type(optimizer).__name__ if optimizer is not None else None,
        "loss": fingerprint(_plain(model.loss)) if model.compiled else None,
        "variants": {name: fingerprint(_plain(variant)) for name, variant in variants.items()},
        **_where(conditions),
    }


def _where(conditions: Conditions) -> dict[str, Any]:
    # What is measured is a share of a batch: whether there are others does not matter.
    fields = {k: v for k, v in dataclasses.asdict(conditions).items() if k != "num_replicas"}
    return _plain(
        {
            "conditions": fields,
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "environment": {n: os.environ[n] for n in _ENVIRONMENT if n in os.environ},
            "code": _code(),
        }
    )


@functools.cache
def _code() -> str:
    """A hash of the lowerings as they are written: another version, other times."""
    folder = pathlib.Path(backends.__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("lowerings/*.py"), *folder.glob("backends/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _structure(model: keras.Model, inspection: Inspection) -> list[Any]:
    """Layers, without names, which Keras counts up, and without lowerings."""
    layers = []
    for place in walk_layers(model):
        layer = place.layer
        ours = isinstance(layer, LoweredLayer)
        layers.append(
            [
                type(layer).__mro__[2 if ours else 0].__name__,
                {} if isinstance(layer, keras.Model) else _config(layer),
                [list(variable.shape) for variable in layer.weights],
                layer.trainable,
            ]
        )
    specs = [[dataclasses.asdict(spec) for spec in row.specs] for row in inspection.rows]
    return _plain([layers, specs, inspection.total_flops])


def _config(layer: keras.layers.Layer) -> dict[str, Any]:
    try:
        config = layer.get_config()
    except Exception:  # A user's own; its weights tell some of it.
        return {}
    return {k: v for k, v in config.items() if k not in ("name", "lowering")}


def _shapes(data: Any) -> Any:
    if data is None:
        return None
    return [
        [list(np.shape(value)), str(getattr(value, "dtype", type(value).__name__))]
        for value in keras.tree.flatten(data)
    ]


def _plain(value: Any) -> Any:
    """In JSON's types; of other objects, the class's name (an address would differ)."""

    def name_of(value: Any) -> str:
        own = getattr(value, "__name__", None) or getattr(value, "name", None)
        return f"{type(value).__name__} {own}" if isinstance(own, str) else type(value).__name__

    return json.loads(json.dumps(value, default=name_of, sort_keys=True, skipkeys=True))
