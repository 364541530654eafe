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

from diagconv_tf.exporting.integer import Program
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
        holds_integers: whether layers of its files can multiply 8-bit integers.
    """

    name: str
    suffix: str
    depthwise_op: str
    counts_one_channel: bool = True
    holds_integers: bool = False

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

    def write_integers(self, program: Program, path: str, options: dict[str, Any]) -> None:
        """Writes a model whose planned layers multiply integers; `options` as for `write`.

        Raises:
            ValueError: if this backend cannot.
        """
        raise ValueError(f"Expected a format that holds integers. Received: {self.name}")

    def count_integers(self, path: str) -> int:
        """How many convolutions and matrix products of a file run on 8-bit integers."""
        return 0

    @abc.abstractmethod
    def caller(self, path: str, inputs: SampleInputs) -> Callable[[], Any]:
        """A function that runs the file on `inputs`, and does little else, to be timed."""

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
