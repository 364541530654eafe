"""Checkpoints of a training, from which it goes on as if it had not been interrupted.

A checkpoint is one `.npz` file, as NumPy writes them: a zip archive whose
members have checksums. It holds the values of all variables that decide how
the training goes on (weights, moving averages, states of dropout, slots and
counters of the optimizer, in the middle of an epoch the metrics as well), the
position, and a record of the caller.

Keras's own means were not enough. `BackupAndRestore` goes on at the beginning
of an epoch only; it overwrites its one file in place, so that a full disk
destroys it. `model.save_weights` names its groups by the classes of the layers;
it has no checksum, no metrics and not the generator that dropout draws from on
PyTorch; and reading it back, Keras converts other dtypes and warns where the
optimizer is another. `OrbaxCheckpoint` needs Orbax, and with it JAX, on every
backend, and saves variables only: neither those generators nor the position in
an epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import ml_dtypes
import numpy as np
from absl import logging

from diagconv_tf import files

_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})\.npz")
_DAMAGED = ".damaged"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a training stands.

    Attributes:
        step: batches that the model has been trained on.
        epochs: those finished, with validation and all callbacks.
        record: what the caller gave.
        metrics: values of `model.metrics_variables` in an unfinished epoch;
            `()` between epochs, when they start again from 0.
    """

    step: int = 0
    epochs: int = 0
    record: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    metrics: tuple[np.ndarray, ...] = dataclasses.field(default=(), repr=False)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The newest checkpoints of one training, in a folder of their own.

    Args:
        folder: is made with the first checkpoint.
        keep: so many are kept, at least 1. With 2, one is left when the newest
            turns out to be damaged.

    Raises:
        ValueError: if `keep` is less than 1.
    """

    folder: pathlib.Path
    keep: int = 2

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"Expected `keep` to be at least 1. Received: keep={self.keep}")

    def paths(self) -> list[pathlib.Path]:
        """Those that are there, the oldest first."""
        found = {path: _NAME.fullmatch(path.name) for path in self.folder.glob("step-*")}
        return sorted((path for path, name in found.items() if name), key=_step)

    def save(self, snapshot: Snapshot) -> pathlib.Path:
        """Writes a checkpoint and removes the oldest ones.

        Nothing that is there is touched before the new file is complete and on
        the disk.

        Raises:
            OSError: if it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # What a process that was killed while it wrote has left takes space.
        for left in self.folder.glob(".*-step-*.npz"):
            left.unlink(missing_ok=True)
        path = self.folder / f"step-{snapshot.step:08}.npz"
        files.write_aside(path, snapshot.write)
        # Later ones are of a training that went on from an earlier checkpoint
        # than its last: they are no longer on the way from here.
        earlier = [other for other in self.paths() if _step(other) < snapshot.step]
        keep = {path, *earlier[len(earlier) - self.keep + 1 :]}
        for other in (*self.paths(), *self.folder.glob(f"step-*{_DAMAGED}")):
            if other not in keep:
                other.unlink(missing_ok=True)
        return path

    def restore(self, model: keras.Model) -> Checkpoint | None:
        """Gives `model` the state of the newest checkpoint that can be read.

        A damaged one is warned of and put aside, and the one before is used.

        Args:
            model: compiled. Its optimizer is built if that has not been done.
                Layers may be stock or rewritten, whatever they were when the
                checkpoint was written.

        Returns:
            The position, the record and the metrics, which are not yet those
            of the model; `None` if there is no checkpoint.

        Raises:
            ValueError: if the checkpoint is of another model, optimizer or
                backend, which leaves `model` as it was; or if all checkpoints
                are damaged.
            OSError: if one cannot be read.
        """
        paths = self.paths()
        for path in reversed(paths):
            # A read that fails says nothing of the file: it stays as it is.
            file = path.read_bytes()
            try:
                content = _Content.read(file)
            except MemoryError:
                raise
            # Whatever NumPy, zipfile and JSON raise for a broken file.
            except Exception as error:
                logging.warning("%s is damaged (%s); trying the one before", path, error)
                with contextlib.suppress(OSError):
                    path.rename(f"{path}{_DAMAGED}")
            else:
                content.apply(model, path)
                return content.checkpoint
        if paths:
            raise ValueError(
                f"Expected a checkpoint that can be read. Received: {self.folder}, where all are "
                "damaged. Without --resume the training starts from the beginning"
            )
        return None


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold, in memory: later steps do not change it.

    Attributes:
        step: of the checkpoint.
        manifest: JSON; what the arrays are, and all else.
        arrays: the values.
    """

    step: int
    manifest: str = dataclasses.field(repr=False)
    arrays: tuple[np.ndarray, ...] = dataclasses.field(repr=False)

    @classmethod
    def of(cls, model: keras.Model, checkpoint: Checkpoint) -> Snapshot:
        """The state of `model`.

        Args:
            model: compiled; its optimizer has been built.
            checkpoint: the position, the record and the metrics.

        Raises:
            TypeError: if the record is nothing that JSON can hold.
        """
        variables, slots, generators = _variables(model), _slots(model), generator_states()
        manifest = {
            "format": _FORMAT,
            "backend": keras.backend.backend(),
            "keras": keras.__version__,
            "step": checkpoint.step,
            "epochs": checkpoint.epochs,
            "record": checkpoint.record,
            "model": _places(variables, "path"),
            # The paths of these depend on who has built the optimizer.
            "optimizer": _places(slots, "name"),
            "metrics": [str(value.dtype) for value in checkpoint.metrics],
            "generators": len(generators),
        }
        values = (_value(variable) for variable in (*variables, *slots))
        arrays = (*values, *checkpoint.metrics, *generators)
        return cls(checkpoint.step, json.dumps(manifest), tuple(arrays))

    def write(self, path: str) -> None:
        """Writes it all to a file.

        Raises:
            OSError: if that fails.
        """
        text = np.frombuffer(self.manifest.encode(), "uint8")
        arrays = {str(number): array for number, array in enumerate(self.arrays)}
        with open(path, "wb") as file:
            np.savez(file, manifest=text, **arrays)
            file.flush()
            # Or the name could reach the disk before the content does.
            os.fsync(file.fileno())


def metrics_values(model: keras.Model) -> tuple[np.ndarray, ...]:
    """The values of `model.metrics_variables`."""
    return tuple(_value(variable) for variable in model.metrics_variables)


def set_metrics(model: keras.Model, values: Sequence[np.ndarray]) -> None:
    """Gives the built metrics of `model` their values.

    Raises:
        ValueError: if they are others than those that `values` are of.
    """
    variables = model.metrics_variables
    shapes = [tuple(v.shape) for v in variables], [v.shape for v in values]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "Expected the checkpoint to be of a model that was compiled with the same metrics, "
            f"whose variables have the shapes {shapes[0]}. Received: {shapes[1]}"
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def weights_digest(model: keras.Model) -> str:
    """The same text for models whose weights have the same values."""
    digest = hashlib.sha256()
    for weight in model.weights:
        digest.update(_value(weight).tobytes())
    return digest.hexdigest()


def generator_states() -> list[np.ndarray]:
    """Those of PyTorch, from which its dropout draws; elsewhere they are variables."""
    if keras.backend.backend() != "torch":
        return []
    import torch

    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    return [state.numpy() for state in states]


def set_generator_states(states: Sequence[np.ndarray]) -> None:
    """Puts PyTorch's generators back to what `generator_states` gave."""
    if not states:
        return
    import torch

    own, *devices = (torch.from_numpy(state) for state in states)
    torch.set_rng_state(own)
    if torch.cuda.is_available() and len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(devices)


class _Place(NamedTuple):
    """A variable, as far as it has to fit."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {self.shape} {self.dtype}"

    def fits(self, other: _Place) -> bool:
        return _plain(self.name) == _plain(other.name) and self[1:] == other[1:]


@dataclasses.dataclass(frozen=True)
class _Content:
    """What was read from a file."""

    backend: str
    checkpoint: Checkpoint
    model: list[_Place]
    optimizer: list[_Place]
    values: list[np.ndarray]  # Of `model`, then of `optimizer`.
    generators: list[np.ndarray]

    @classmethod
    def read(cls, content: bytes) -> _Content:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            manifest = json.loads(archive["manifest"].tobytes())
            if manifest["format"] != _FORMAT:
                raise ValueError(f"format {manifest['format']}, expected {_FORMAT}")
            model, optimizer = (
                [_Place(name, tuple(shape), dtype) for name, shape, dtype in manifest[kind]]
                for kind in ("model", "optimizer")
            )
            dtypes = [place.dtype for place in (*model, *optimizer)]
            dtypes += manifest["metrics"] + ["uint8"] * manifest["generators"]
            arrays = [_as_used(archive[str(i)], dtype) for i, dtype in enumerate(dtypes)]
        count, metrics = len(model) + len(optimizer), len(manifest["metrics"])
        return cls(
            backend=manifest["backend"],
            checkpoint=Checkpoint(
                step=manifest["step"],
                epochs=manifest["epochs"],
                record=manifest["record"],
                metrics=tuple(arrays[count : count + metrics]),
            ),
            model=model,
            optimizer=optimizer,
            values=arrays[:count],
            generators=arrays[count + metrics :],
        )

    def apply(self, model: keras.Model, path: pathlib.Path) -> None:
        if self.backend != keras.backend.backend():
            raise ValueError(
                f"Expected a checkpoint of the {keras.backend.backend()} backend, whose random "
                f"numbers and rounding are its own. Received: {path}, of {self.backend}"
            )
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        variables, slots = _variables(model), _slots(model)
        _check_fit("model", _places(variables, "path"), self.model, path)
        _check_fit("optimizer", _places(slots, "name"), self.optimizer, path)
        for variable, value in zip((*variables, *slots), self.values, strict=True):
            variable.assign(value)
        set_generator_states(self.generators)


def _check_fit(
    what: str, expected: Sequence[_Place], received: Sequence[_Place], path: pathlib.Path
) -> None:
    for mine, other in itertools.zip_longest(expected, received):
        if mine is None or other is None or not mine.fits(other):
            raise ValueError(
                f"Expected {path} to be of the same {what}, with the variable "
                f"{mine or '(no further one)'}. Received: {other or '(no further one)'}"
            )


def _plain(name: str) -> str:
    """`name` without the numbers that Keras counts up in each process."""
    return re.sub(r"_\d+(?=[/_]|$)", "", name)


def _step(path: pathlib.Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def _variables(model: keras.Model) -> list[keras.Variable]:
    # Unlike `weights` this has the states of seed generators.
    return list({id(variable): variable for variable in model.variables}.values())


def _slots(model: keras.Model) -> list[keras.Variable]:
    """The optimizer's variables; a `LossScaleOptimizer` has those of the one it wraps as well."""
    return list({id(variable): variable for variable in model.optimizer.variables}.values())


def _places(variables: Sequence[keras.Variable], name: str) -> list[_Place]:
    return [
        _Place(getattr(v, name), tuple(v.shape), keras.backend.standardize_dtype(v.dtype))
        for v in variables
    ]


def _value(variable: keras.Variable) -> np.ndarray:
    # A copy: on CPUs the array may be the memory of the variable itself.
    return np.array(keras.ops.convert_to_numpy(variable))


def _as_used(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array`, of which the `.npy` format knows only the bytes where it is bfloat16."""
    if str(array.dtype) == dtype:
        return array
    return np.frombuffer(array.tobytes(), getattr(ml_dtypes, dtype)).reshape(array.shape)
