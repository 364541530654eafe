"""Cache keys: all that a measured time depends on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from diagconv_tf import keras_internals
from diagconv_tf.environment import Conditions
from diagconv_tf.inspection import Inspection
from diagconv_tf.layers import LoweredLayer
from diagconv_tf.model_tree import walk_layers
from diagconv_tf.tuning.cache import fingerprint
from diagconv_tf.tuning.candidates import Variant
from diagconv_tf.tuning.workloads import Workload

#: Packages whose versions tell their code.
_KNOWN_PACKAGES = ("builtins", "keras", "diagconv_tf", "tensorflow", "torch", "jax")


def of_workload(
    workload: Workload, candidates: Sequence[str], conditions: Conditions
) -> dict[str, Any]:
    """The key of one workload's times, with all candidates that are measured together."""
    return {
        "what": "workload",
        "spec": _plain(dataclasses.asdict(workload.spec)),
        "stock_op": workload.stock_op,
        "candidates": list(candidates),
        **_where(conditions),
    }


def of_contest(
    model: keras.Model,
    inspection: Inspection,
    data: Any,
    conditions: Conditions,
    variants: Mapping[str, Variant],
) -> dict[str, Any]:
    """The key of a whole model's times: what it computes, how it is trained, variants.

    The code of the user's classes counts, but not what that code calls elsewhere.
    """
    return {
        "what": "contest",
        # Without the number that Keras gives the second of its kind.
        "name": re.sub(r"_\d+$", "", model.name),
        "structure": fingerprint(_structure(model, inspection)),
        "training": fingerprint(_training(model)),
        "data": _shapes(data),
        "batch_size": inspection.batch_size,
        "precision": model.dtype_policy.name,
        "variants": {name: fingerprint(_plain(variant)) for name, variant in variants.items()},
        **_where(conditions),
    }


def _where(conditions: Conditions) -> dict[str, Any]:
    # One replica is measured: whether there are others does not matter.
    fields = {k: v for k, v in dataclasses.asdict(conditions).items() if k != "num_replicas"}
    return {"conditions": _plain(fields), "code": _code_of_package()}


@functools.cache
def _code_of_package() -> str:
    """A hash of this package's source: lowerings, layers, and what measures them."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _structure(model: keras.Model, inspection: Inspection) -> list[Any]:
    """Layers and how they are connected, without names and lowerings.

    Keras counts names up, and the contest sets the lowerings.
    """
    layers = [
        [
            _stock_name(place.layer),
            _code(type(place.layer)),
            {} if isinstance(place.layer, keras.Model) else _config(place.layer),
            [list(variable.shape) for variable in place.layer.weights],
            place.layer.trainable,
            _graph(place.layer),
        ]
        for place in walk_layers(model)
    ]
    specs = [[dataclasses.asdict(spec) for spec in row.specs] for row in inspection.rows]
    return _plain([layers, _graph(model), specs, inspection.total_flops])


def _training(model: keras.Model) -> list[Any]:
    """What a training step does besides calling the layers."""
    own = [_code(type(model)), _code(vars(model).get("train_step"))]
    if not model.compiled:
        return own
    own += [_code(loss) for loss in keras.tree.flatten(model.loss)]
    try:
        compiled = model.get_compile_config() or {}
    except Exception:  # An object of the user's that cannot be serialised.
        compiled = {"optimizer": type(model.optimizer).__name__, "loss": model.loss}
    names = ("optimizer", "loss", "loss_weights", "metrics", "weighted_metrics")
    return _plain([own, [_without(compiled.get(name), "name", "learning_rate") for name in names]])


def _graph(layer: keras.layers.Layer) -> list[Any]:
    """The connections of a functional model, by the positions of its operations."""
    if not isinstance(layer, keras.Function):
        return []  # The order of a sequential model is that of its layers.
    operations = {id(operation): i for i, operation in enumerate(layer.operations)}
    by_depth = keras_internals.nodes_by_depth(layer)
    nodes = [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]
    numbers = {id(node): i for i, node in enumerate(nodes)}

    def source(tensor: keras.KerasTensor) -> list[int | None]:
        operation, node, output = keras_internals.history(tensor)
        return [numbers.get(id(keras_internals.inbound_nodes(operation)[node])), output]

    return [
        [
            operations.get(id(node.operation)),
            [] if isinstance(node.operation, keras.layers.Layer) else _operation(node),
            [source(tensor) for tensor in node.input_tensors],
        ]
        for node in nodes
    ]


def _operation(node: Any) -> list[Any]:
    """An operation that is no layer, with the values that it was given."""
    values = keras.tree.flatten([node.arguments.args, node.arguments.kwargs])
    given = [None if isinstance(value, keras.KerasTensor) else value for value in values]
    return _plain([type(node.operation).__name__, _config(node.operation), given])


def _stock_name(layer: keras.layers.Layer) -> str:
    """The name of a layer's class; of a layer of ours, that of the stock class."""
    classes = type(layer).__mro__
    return next(c.__name__ for c in classes if not issubclass(c, LoweredLayer))


def _config(operation: keras.Operation) -> dict[str, Any]:
    try:
        config = operation.get_config()
    except Exception:  # A user's own; its weights and its code tell some of it.
        return {}
    return {k: v for k, v in config.items() if k not in ("name", "lowering")}


def _without(value: Any, *names: str) -> Any:
    """A configuration without what changes no time: names, and numbers for a rate."""
    if isinstance(value, dict):
        return {
            k: _without(v, *names)
            for k, v in value.items()
            if k not in names or (k == "learning_rate" and isinstance(v, dict))
        }
    return [_without(v, *names) for v in value] if isinstance(value, list | tuple) else value


def _code(value: Any) -> str | None:
    """A hash of a function's or class's bytecode; None for what is not the user's."""
    if isinstance(value, type):
        classes = [
            c for c in value.__mro__ if c.__module__.partition(".")[0] not in _KNOWN_PACKAGES
        ]
        parts = [part for c in classes for _, part in sorted(vars(c).items())]
    else:
        parts = [getattr(value, "__func__", value)]
    found = [text for part in parts for text in _bytecode(part)]
    return fingerprint(found) if found else None


def _bytecode(value: Any) -> Iterator[str]:
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    code = value if isinstance(value, types.CodeType) else getattr(value, "__code__", None)
    if not isinstance(code, types.CodeType):
        return
    yield f"{code.co_name} {code.co_code.hex()} {code.co_names}"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _bytecode(constant)
        elif isinstance(constant, frozenset):
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)


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
