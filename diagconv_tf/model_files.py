"""Reads models from `.keras` and `.h5` files in Keras's safe mode, and writes them.

Keras's own errors about unreadable files fill many lines and seldom say what
to do; the errors here are one line and do.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pathlib
import re
import warnings
import zipfile
from typing import Any

import keras
from absl import logging

from diagconv_tf import files
from diagconv_tf.inspection import inspect_as_built
from diagconv_tf.spec import STOCK
from diagconv_tf.text import summarize_error

SUFFIXES = (".keras", ".h5")

#: Layers of Keras 3 that take no `groups`. Keras 2 wrote the one that is always 1
#: into their configs, and Keras 3 refuses it.
_WITHOUT_GROUPS = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)


class ModelFileError(ValueError):
    """A file cannot be read as a model, or a model cannot be written."""


def load_model(
    path: str | os.PathLike,
    *,
    allow_unsafe: bool = False,
    custom_objects: dict[str, Any] | None = None,
) -> keras.Model:
    """Reads a model from a `.keras` or a legacy `.h5` file.

    A model whose compile state (optimizer, loss, metrics) cannot be read is
    returned without it, uncompiled, and a warning says so.

    Args:
        path: the file.
        allow_unsafe: whether Python code in the file, such as that of `Lambda`
            layers, may run. Only for files one trusts.
        custom_objects: name → class or function, as for Keras.

    Raises:
        ModelFileError: if Keras cannot read a model from the file; the message
            says why, and what to do.
    """
    path = pathlib.Path(path)
    _check_file(path)
    custom_objects = custom_objects or {}
    try:
        return _read(path, True, allow_unsafe, custom_objects)
    except Exception as error:  # Keras raises whatever its parts raise.
        with_compile_state = error
    try:
        model = _read(path, False, allow_unsafe, custom_objects)
    except Exception as error:
        raise ModelFileError(f"{path}: {_explain(error)}") from error
    # Keras reads the model alone, so the compile state was to blame: an optimizer's
    # argument of old, a loss of the user's own, or whatever comes next.
    logging.warning(
        "%s: read without its compile state (%s): compile the model before training it.",
        path,
        _explain(with_compile_state),
    )
    return model


def check_model_output(path: str | os.PathLike, overwrite: bool) -> pathlib.Path:
    """Returns `path` if a model can be written there.

    Raises:
        ModelFileError: if the suffix is not that of a model file, the folder
            does not exist, or `path` exists and `overwrite` is False.
    """
    suffix = pathlib.Path(path).suffix
    if suffix not in SUFFIXES:
        raise ModelFileError(f"Expected a file named *.keras or *.h5. Received: {path}")
    try:
        return files.check_output(path, overwrite, suffix)
    except (FileExistsError, ValueError) as error:
        raise ModelFileError(str(error)) from error


def save_model(model: keras.Model, path: str | os.PathLike, overwrite: bool = False) -> None:
    """Writes a model with its compile and optimizer state.

    Raises:
        ModelFileError: as `check_model_output`; if the model has rewritten
            layers that their container would recreate as stock layers when the
            file is loaded; or if writing fails, as on a full disk. What was at
            `path` stays then.
    """
    path = check_model_output(path, overwrite)
    lost = [
        row.path
        for row in inspect_as_built(model).rows
        if row.lowering != STOCK and not row.survives_saving
    ]
    if lost:
        raise ModelFileError(
            "A file cannot hold rewritten layers that a composite layer or a model creates itself: "
            f"{', '.join(lost)}. Save the restored model, and rewrite it in Python after loading"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            files.write_aside(path, model.save)
    except Exception as error:  # h5py's are of several types.
        raise ModelFileError(f"{path}: cannot be written: {summarize_error(error)}") from error


def custom_objects_of(module_name: str) -> dict[str, Any]:
    """Returns the classes and functions of a module by name, as Keras's custom objects.

    Raises:
        ModelFileError: if the module cannot be imported.
    """
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # Code of the module may raise anything.
        raise ModelFileError(
            f"Expected a module that can be imported. Received: {module_name} "
            f"({type(error).__name__}: {error})"
        ) from error
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) or inspect.isfunction(value)
    }


def _check_file(path: pathlib.Path) -> None:
    if path.is_dir():
        what = (
            "a SavedModel, which holds a graph and no layers; read the .keras file it was made from"
            if (path / "saved_model.pb").exists()
            else "a folder"
        )
        raise ModelFileError(f"Expected a .keras or .h5 file. Received: {path}, which is {what}")
    if not path.exists():
        raise ModelFileError(f"{path}: there is no such file")
    if path.suffix not in SUFFIXES:
        raise ModelFileError(f"Expected a file named *.keras or *.h5. Received: {path}")
    if path.suffix == ".keras":
        try:
            with zipfile.ZipFile(path) as archive:
                missing = {"config.json", "model.weights.h5"} - set(archive.namelist())
        except zipfile.BadZipFile as error:
            raise ModelFileError(f"{path}: not a .keras file, or a truncated one") from error
        if missing:
            raise ModelFileError(f"{path}: not a .keras file: it holds no {sorted(missing)[0]}")


def _read(
    path: pathlib.Path, compile_it: bool, allow_unsafe: bool, custom_objects: dict[str, Any]
) -> keras.Model:
    try:
        return _load(path, compile_it, allow_unsafe, custom_objects)
    except (TypeError, ValueError) as error:
        if "{'groups': 1}" not in str(error):
            raise
    tolerant = {layer.__name__: _without_groups(layer) for layer in _WITHOUT_GROUPS}
    return _load(path, compile_it, allow_unsafe, {**tolerant, **custom_objects})


def _load(
    path: pathlib.Path, compile_it: bool, allow_unsafe: bool, custom_objects: dict[str, Any]
) -> keras.Model:
    with warnings.catch_warnings():
        # They advise those who write models, not those who have a file.
        warnings.simplefilter("ignore")
        return keras.models.load_model(
            path,
            custom_objects=custom_objects,
            compile=compile_it,
            safe_mode=not allow_unsafe,
        )


def _without_groups(layer: type[keras.layers.Layer]) -> type[keras.layers.Layer]:
    """A class whose config may have `groups: 1`, and which makes instances of `layer`."""

    def from_config(cls: type, config: dict[str, Any]) -> keras.layers.Layer:
        return layer.from_config({key: value for key, value in config.items() if key != "groups"})

    return type(layer.__name__, (layer,), {"from_config": classmethod(from_config)})


def _explain(error: Exception) -> str:
    """Cause and remedy in one line."""
    text = str(error)
    unknown = re.search(
        r"(?:Could not locate \w+|Unknown \w+:?) '([^']+)'|"
        r"Could not interpret \w+ identifier: (\w+)",
        text,
    )
    if unknown:
        return (
            f"the class or function '{unknown[1] or unknown[2]}' is not known; name the module "
            "that defines it (--custom_objects=MODULE)"
        )
    if "safe_mode" in text:
        what = "a Lambda layer, that is Python code" if "Lambda" in text else "Python code"
        return f"it holds {what}; if you trust the file, allow it (--allow_unsafe)"
    if "{'groups': 1}" in text:
        return (
            "Keras 3 refuses the `groups` that Keras 2 wrote into .keras files: save the model "
            "as .h5 with Keras 2"
        )
    if "could not be loaded" in text and "0 variables" in text:
        return (
            "Keras cannot read its own file back, as happens when a layer is shared across "
            "nesting levels, or created by a composite layer: create the model in Python and use "
            "`load_weights`"
        )
    if isinstance(error, OSError):
        return f"not an .h5 file, or a truncated one ({summarize_error(error)})"
    return f"Keras cannot read it: {summarize_error(error)}"
