"""Where and how something runs: all that a measured time depends on besides the work."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import keras

from diagconv_tf import backends

_CPUINFO = pathlib.Path("/proc/cpuinfo")

#: Attributes of `Conditions` that are tuples of pairs.
_PAIRS = ("versions", "numeric_mode")


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Where and how a convolution runs: all that a measured time depends on.

    Attributes:
        backend: `"tensorflow"`, `"jax"` or `"torch"`.
        device_kind: `"cpu"`, `"gpu"` or `"tpu"`.
        device_name: the maker's name of the device.
        compiled: True under a compiler (XLA, torch.compile), False without,
            None where it is not known yet.
        versions: `((package, version), …)` of what computes.
        num_replicas: among how many a batch is divided; times are those of one
            with its share.
        numeric_mode: `((setting, value), …)` of what the process has switched
            for its device, such as TensorFloat-32; see `Backend.numeric_mode`.
    """

    backend: str
    device_kind: str
    device_name: str
    compiled: bool | None
    versions: tuple[tuple[str, str], ...]
    num_replicas: int = 1
    numeric_mode: tuple[tuple[str, str], ...] = ()

    @classmethod
    def current(cls, compiled: bool | None = None, num_replicas: int = 1) -> Conditions:
        """The conditions of this process, on the device Keras would use.

        Args:
            compiled: whether the training step is compiled. Where nobody
                says, JAX compiles; elsewhere it is not known.
            num_replicas: among how many a batch will be divided; see
                `distribution.replicas_of`.
        """
        backend = keras.backend.backend()
        current = backends.current()
        kind, name = current.default_device()
        packages = {"tensorflow": ("tensorflow",), "jax": ("jax", "jaxlib"), "torch": ("torch",)}
        return cls(
            backend=backend,
            device_kind=kind,
            device_name=name or cpu_name(),
            compiled=True if compiled is None and backend == "jax" else compiled,
            versions=tuple(
                (package, importlib.metadata.version(package))
                for package in ("keras", *packages[backend])
            ),
            num_replicas=num_replicas,
            numeric_mode=current.numeric_mode(),
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Conditions:
        """The conditions whose attributes are `fields`, in JSON's types.

        Raises:
            TypeError: if they are not those of conditions.
        """
        pairs = {name: tuple(map(tuple, value)) for name, value in fields.items() if name in _PAIRS}
        renamed = {"num_replicas": fields["replicas"]} if "replicas" in fields else {}
        known = {name: value for name, value in fields.items() if name != "replicas"}
        return cls(**{**known, **renamed, **pairs})

    def differences(self, other: Conditions) -> list[str]:
        """What differs in `other`, in words.

        `compiled`, and the settings of `numeric_mode`, only where both know them.
        """
        found = []
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine == theirs or (field.name == "compiled" and None in (mine, theirs)):
                continue
            if field.name in _PAIRS:
                ours, others = dict(mine), dict(theirs)
                found += [
                    f"{name} {ours.get(name)} → {others.get(name)}"
                    for name in {**ours, **others}
                    if ours.get(name) != others.get(name)
                    and (field.name == "versions" or (name in ours and name in others))
                ]
            else:
                found.append(f"{field.name} {mine} → {theirs}")
        return found


def cpu_name() -> str:
    """The maker's name of the CPU; without one, what tells it from others best."""
    fields: dict[str, str] = {}
    # Linux leaves `platform.processor()` empty, or says the architecture there.
    with contextlib.suppress(OSError):
        for line in _CPUINFO.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    if "model name" in fields:
        return fields["model name"]
    name = platform.processor() or platform.machine()
    if "CPU part" in fields:  # On ARM, numbers in place of the name.
        name += f" {fields.get('CPU implementer', '')} {fields['CPU part']}"
    return name
