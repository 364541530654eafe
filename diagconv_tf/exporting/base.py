"""What every export format answers."""

from __future__ import annotations

import abc
import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from diagconv_tf.exporting.sample_inputs import SampleInputs

#: Runs an exported file, and returns its outputs with the names that it gives them.
Runner = Callable[[SampleInputs], list[tuple[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A package that must be importable.

    Attributes:
        module: the name that is imported.
        install: what `pip install` must be given.
    """

    module: str
    install: str

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


class Format(abc.ABC):
    """One export format under the Keras backend of this process.

    Attributes:
        name: as `keras.Model.export` calls it.
        suffix: of its files; empty for a folder.
        depthwise_op: its name for the depthwise convolution.
        counts_one_channel: whether its depthwise convolution of a single channel
            differs from an ordinary convolution.
    """

    name: str
    suffix: str
    depthwise_op: str
    counts_one_channel: bool = True

    @abc.abstractmethod
    def requirements(self) -> list[Requirement]:
        """The packages that write and check the format.

        Raises:
            ValueError: if this backend, or this Keras, cannot write it.
        """

    @abc.abstractmethod
    def write(self, model: keras.Model, path: str, options: dict[str, Any]) -> None:
        """Exports; `options` are for `keras.Model.export`."""

    @abc.abstractmethod
    def count_depthwise(self, path: str) -> int | None:
        """How many `depthwise_op` the graph runs; None where it does not tell."""

    @abc.abstractmethod
    def load(self, path: str) -> tuple[Runner, str]:
        """A function that runs the file, and the name and version of the runtime."""

    @property
    def has_dynamic_batch(self) -> bool:
        """Whether files take any number of examples."""
        return True


def can_only_elsewhere(format_name: str, why: str) -> ValueError:
    """An error that sends the user to the TensorFlow backend."""
    return ValueError(
        f"Expected a backend that can write format='{format_name}'. Received: the "
        f"{keras.backend.backend()} backend, where {why}. Save the model as a .keras file and "
        "export it in a process with KERAS_BACKEND=tensorflow"
    )


def keras_version() -> tuple[int, int]:
    major, minor = keras.__version__.split(".")[:2]
    return int(major), int(minor)


def with_version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"
