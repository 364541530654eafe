"""Finds the layers of a model at every depth, each with its path."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras

from diagconv_tf import keras_internals


@dataclasses.dataclass(frozen=True)
class PlacedLayer:
    """A layer and its place in a model.

    Attributes:
        layer: the layer itself.
        path: the names of the layers that hold it and its own, joined by `/`,
            without the model's. If a container holds two layers of one name,
            the second is `name#2`.
        other_paths: further paths of a shared layer.
        containers: the layers that hold it on `path`, the model first.
    """

    layer: keras.layers.Layer
    path: str
    other_paths: tuple[str, ...]
    containers: tuple[keras.layers.Layer, ...]


def check_built(model: Any) -> None:
    """Checks that `model` is a built Keras model.

    Raises:
        ValueError: if `model` is no `keras.Model`, or has not been built.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected `model` to be a keras.Model. Received: {model!r} of type "
            f"{type(model).__name__}"
        )
    if not model.built:
        raise ValueError(
            f"Expected a built model. Received: the model '{model.name}', which has no variables "
            "yet. Call it on a batch of inputs once, or `model.build(input_shape)`"
        )


def walk_layers(model: keras.Model) -> list[PlacedLayer]:
    """Returns every layer inside `model` once, containers before their content.

    Finds layers inside wrappers, composite layers and nested models. Leaves
    out the model itself.
    """
    placed: dict[int, PlacedLayer] = {}
    for layer, path, containers in _walk(model, "", (model,)):
        known = placed.get(id(layer))
        if known is None:
            placed[id(layer)] = PlacedLayer(layer, path, (), containers)
        else:
            placed[id(layer)] = dataclasses.replace(known, other_paths=(*known.other_paths, path))
    return list(placed.values())


def _walk(
    container: keras.layers.Layer, prefix: str, containers: tuple[keras.layers.Layer, ...]
) -> Iterator[tuple[keras.layers.Layer, str, tuple[keras.layers.Layer, ...]]]:
    names: dict[str, int] = {}
    for layer in keras_internals.flatten_layers(container, include_self=False, recursive=False):
        names[layer.name] = names.get(layer.name, 0) + 1
        count = names[layer.name]
        path = prefix + (layer.name if count == 1 else f"{layer.name}#{count}")
        yield layer, path, containers
        if layer not in containers:
            yield from _walk(layer, path + "/", (*containers, layer))


def path_matches(path: str, pattern: str) -> bool:
    """Whether a path or glob (`*` matches `/` too) names a layer, or a container of it."""
    parts = path.split("/")
    heads = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any(head == pattern or fnmatch.fnmatchcase(head, pattern) for head in heads)


def select_paths(
    argument: str, patterns: Iterable[str], paths: Sequence[Sequence[str]], kind: str
) -> set[str]:
    """The layers that patterns name, by their first paths.

    Args:
        argument: name of the argument that holds the patterns.
        patterns: paths or globs, as `path_matches` takes them.
        paths: all paths of each layer.
        kind: what the layers are, for the error.

    Raises:
        ValueError: if a pattern names no layer; the message has near paths.
    """
    selected: set[str] = set()
    for pattern in patterns:
        found = {own[0] for own in paths if any(path_matches(path, pattern) for path in own)}
        if not found:
            known = [path for own in paths for path in own]
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or known[:3]
            raise ValueError(
                f"Expected `{argument}` to match a {kind}. Received: '{pattern}', which matches "
                f"none of {len(paths)}" + (f"; near: {', '.join(near)}" if near else "")
            )
        selected |= found
    return selected
