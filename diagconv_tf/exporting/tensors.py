"""Which tensor of an exported file is which of the model's.

Keras, TensorFlow, PyTorch and the runtimes order the tensors of a dict in different
ways: by key as text, by the order of insertion, by nothing at all. So tensors are
matched by name where the file has names, and else by their paths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diagconv_tf.exporting.report import ExportError


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor in a structure of dicts, lists and tuples.

    Attributes:
        path: keys of dicts and indices of lists, from the outside in.
        name: how the signature of a file calls it; None where that is not known.
        value: the tensor.
    """

    path: tuple[Any, ...]
    name: str | None
    value: Any


def leaves(structure: Any) -> list[Leaf]:
    """The tensors of a structure, those of a dict in the order of insertion.

    Names are those that TensorFlow gives to outputs: the keys of a dict, the fields
    of a named tuple, else `output_0`, `output_1`, …. TensorFlow has no signatures
    for deeper structures, and so these have no names.
    """
    names: dict[tuple[Any, ...], str] = {(): "output_0"}
    if isinstance(structure, Mapping):
        names = {(key,): key for key in structure}
    elif isinstance(structure, tuple | list):
        fields = getattr(structure, "_fields", [f"output_{i}" for i in range(len(structure))])
        names = {(i,): field for i, field in enumerate(fields)}
    return [Leaf(path, names.get(path), value) for path, value in _walk(structure, ())]


def match(
    names: Sequence[str], candidates: Sequence[Leaf], *, by_insertion: bool = False
) -> list[Leaf]:
    """For each tensor of a file, the tensor of the model.

    Args:
        names: what the file calls its tensors, in its order.
        candidates: the model's, from `leaves`.
        by_insertion: where the names are not the model's, the order counts. It is
            that of insertion into a dict, or else that of the dict's keys.

    Raises:
        ExportError: if the names are not the model's, and the numbers of tensors differ.
    """
    by_name = {leaf.name: leaf for leaf in candidates}
    if set(names) <= by_name.keys() and len(by_name) == len(candidates):
        return [by_name[name] for name in names]
    if len(names) != len(candidates):
        raise ExportError(f"Expected {len(candidates)} tensors. Received: {', '.join(names)}")
    return list(candidates) if by_insertion else sorted(candidates, key=lambda leaf: leaf.path)


def _walk(structure: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    items: Any
    if isinstance(structure, Mapping):
        items = structure.items()
    elif isinstance(structure, tuple | list):
        items = enumerate(structure)
    else:
        yield path, structure
        return
    for key, value in items:
        yield from _walk(value, (*path, key))
