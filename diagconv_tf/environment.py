"""Where and how something runs: all that a measured time depends on besides the work.

`Conditions` is the one description of it. Cache keys, plans and reports of benchmarks
hold it whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import pathlib
import platform
import re
from collections.abc import Mapping
from typing import Any

import keras

from diagconv_tf import backends, keras_internals

_CPUINFO = pathlib.Path("/proc/cpuinfo")

#: Linux shows the version of NVIDIA's kernel driver here.
_NVIDIA_DRIVER = pathlib.Path("/proc/driver/nvidia/version")

#: What computes, by Keras backend.
_PACKAGES = {"tensorflow": ("tensorflow",), "jax": ("jax", "jaxlib"), "torch": ("torch",)}

#: Environment variables that change what runs, or how fast.
_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "TF_CUDNN_DETERMINISTIC",
    "TF_CUDNN_USE_AUTOTUNE",
    "TF_DETERMINISTIC_OPS",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_XLA_FLAGS",
    "XLA_FLAGS",
)

#: Attributes of `Conditions` that are tuples of pairs.
_PAIRS = ("versions", "numeric_mode", "settings")


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
        num_replicas: number of parts into which a batch is divided; times are
            those of one replica with its part.
        numeric_mode: `((setting, value), …)` that decide how exactly the
            device computes, such as TensorFloat-32; see `Backend.numeric_mode`.
        settings: `((setting, value), …)` that decide how fast the process
            computes: CPUs it may use, threads, determinism, cuDNN's switches,
            the GPU's driver, and environment variables (only those that are
            set). Empty in plans of format 1, which did not record them.
    """

    backend: str
    device_kind: str
    device_name: str
    compiled: bool | None
    versions: tuple[tuple[str, str], ...]
    num_replicas: int = 1
    numeric_mode: tuple[tuple[str, str], ...] = ()
    settings: tuple[tuple[str, str], ...] = ()

    @classmethod
    def current(cls, compiled: bool | None = None, num_replicas: int = 1) -> Conditions:
        """The conditions of this process, on the device that Keras uses.

        Args:
            compiled: whether the training step is compiled. None means that it
                is not known, except on JAX, which always compiles.
            num_replicas: number of parts into which a batch will be divided;
                see `distribution.replicas_of`.
        """
        backend = keras.backend.backend()
        current = backends.current()
        kind, name = current.default_device()
        return cls(
            backend=backend,
            device_kind=kind,
            device_name=name or cpu_name(),
            compiled=True if compiled is None and backend == "jax" else compiled,
            # Not the metadata of a distribution: tensorflow-cpu and tf-nightly install
            # the module `tensorflow` under another name.
            versions=tuple(
                (package, importlib.import_module(package).__version__)
                for package in ("keras", *_PACKAGES[backend])
            ),
            num_replicas=num_replicas,
            numeric_mode=current.numeric_mode(),
            settings=_settings(backend, kind),
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

    @property
    def allows_tf32(self) -> bool:
        """Whether the device may compute float32 convolutions with TensorFloat-32.

        Where no setting says so, any device but a CPU may.
        """
        mode = dict(self.numeric_mode)
        switch = mode.get("tf32", mode.get("cudnn.tf32", "True"))
        return self.device_kind != "cpu" and switch != "False"

    def differences(self, other: Conditions) -> list[str]:
        """What differs in `other`, in words.

        `compiled` counts only where both know it, a setting only where both
        recorded it.
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
    """The maker's name of the CPU, or the architecture where no name is known."""
    fields: dict[str, str] = {}
    # Linux leaves `platform.processor()` empty, or says the architecture there.
    with contextlib.suppress(OSError):
        for line in _CPUINFO.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    if "model name" in fields:
        return fields["model name"]
    name = platform.processor() or platform.machine()
    if "CPU part" in fields:  # ARM has numbers in place of the name.
        name += f" {fields.get('CPU implementer', '')} {fields['CPU part']}"
    return name


def _settings(backend: str, device_kind: str) -> tuple[tuple[str, str], ...]:
    """What the user, or the machine, has set: see `Conditions.settings`."""
    found: dict[str, Any] = {}
    if hasattr(os, "sched_getaffinity"):
        found["cpus"] = len(os.sched_getaffinity(0))
    if backend == "tensorflow":
        import tensorflow as tf

        found["intra_op_threads"] = tf.config.threading.get_intra_op_parallelism_threads()
        found["inter_op_threads"] = tf.config.threading.get_inter_op_parallelism_threads()
        found["deterministic"] = keras_internals.is_tensorflow_deterministic()
    elif backend == "torch":
        import torch

        found["intra_op_threads"] = torch.get_num_threads()
        found["inter_op_threads"] = torch.get_num_interop_threads()
        found["deterministic"] = torch.are_deterministic_algorithms_enabled()
        if device_kind == "gpu":
            found["cudnn.enabled"] = torch.backends.cudnn.enabled
            found["cudnn.deterministic"] = torch.backends.cudnn.deterministic
    if device_kind == "gpu":
        found["driver"] = _driver_version()
    found |= {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return tuple((name, str(value)) for name, value in found.items())


def _driver_version() -> str:
    """The version of NVIDIA's driver, `"unknown"` where the system does not show it."""
    try:
        text = _NVIDIA_DRIVER.read_text()
    except OSError:
        return "unknown"
    numbers = re.search(r"\d+(\.\d+)+", text)
    return numbers[0] if numbers else "unknown"
