"""Models in `.keras` and `.h5` files: read in Keras's safe mode, written aside.

Keras's own errors about files that cannot be read fill many lines and seldom
say what to do; here each is one line that does.
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


class ModelFileError(ValueError):
    """A file cannot be read as a model, or a model cannot be written."""


def load_model(
    path: str | os.PathLike,
    *,
    allow_unsafe: bool = False,
    custom_objects: dict[str, Any] | None = None,
) -> keras.Model:
    """Reads a model from a `.keras` or a legacy `.h5` file.

    Args:
        path: the file.
        allow_unsafe: whether code in the file, such as that of `Lambda`
            layers, may be made and run. Only for files one trusts.
        custom_objects: name → class or function, as for Keras.

    Raises:
        ModelFileError: if there is no model in the file that can be read; the
            message says why, and what to do.
    """
    path = pathlib.Path(path)
    _check_file(path)
    try:
        return _read(path, True, allow_unsafe, custom_objects)
    except Exception as error:
        if path.suffix == ".h5" and _is_about_compile_state(error):
            model = _read(path, False, allow_unsafe, custom_objects)
            logging.warning(
                "%s: read without its compile state (%s): compile the model before training it.",
                path,
                summarize_error(error),
            )
            return model
        raise ModelFileError(f"{path}: {_explain(error)}") from error


def check_model_output(path: str | os.PathLike, overwrite: bool) -> pathlib.Path:
    """`path`, if a model can be written there.

    Raises:
        ModelFileError: if the suffix is no model file's, the folder does not
            exist, or something is there and must not be replaced.
    """
    suffix = pathlib.Path(path).suffix
    if suffix not in SUFFIXES:
        raise ModelFileError(f"Expected a file named *.keras or *.h5. Received: {path}")
    try:
        return files.check_output(path, overwrite, suffix)
    except (FileExistsError, ValueError) as error:
        raise ModelFileError(str(error)) from error


def save_model(model: keras.Model, path: str | os.PathLike, overwrite: bool = False) -> None:
    """Writes a model, with its compile and optimizer state, aside and renames.

    Raises:
        ModelFileError: as `check_model_output`; or if a file cannot hold the
            model, because it has rewritten layers that what holds them makes
            anew as stock layers.
        ModelFileError: also if it cannot be written, as on a full disk; what
            was there is still there.
    """
    path = check_model_output(path, overwrite)
    lost = [
        row.path
        for row in inspect_as_built(model).rows
        if row.lowering != STOCK and not row.survives_saving
    ]
    if lost:
        raise ModelFileError(
            "A file cannot hold rewritten layers that a composite layer or a model makes itself: "
            f"{', '.join(lost)}. Save the restored model, and rewrite it in Python after loading"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            files.write_aside(path, model.save)
    except Exception as error:  # h5py's are of several types.
        raise ModelFileError(f"{path}: cannot be written: {summarize_error(error)}") from error


def custom_objects_of(module_name: str) -> dict[str, Any]:
    """The classes and functions of a module, by name, as custom objects.

    Raises:
        ModelFileError: if the module cannot be imported.
    """
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # Its own code may raise anything.
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
    path: pathlib.Path, compile_it: bool, allow_unsafe: bool, custom_objects: dict[str, Any] | None
) -> keras.Model:
    with warnings.catch_warnings():
        # Its hints are for those who write models, not for those who have one.
        warnings.simplefilter("ignore")
        return keras.models.load_model(
            path,
            custom_objects=custom_objects,
            compile=compile_it,
            safe_mode=not allow_unsafe,
        )


def _is_about_compile_state(error: Exception) -> bool:
    return "is not a KerasSaveable subclass" in str(error)


def _explain(error: Exception) -> str:
    text = str(error)
    unknown = re.search(r"(?:Could not locate \w+|Unknown \w+:?) '([^']+)'", text)
    if unknown:
        return (
            f"the class or function '{unknown[1]}' is not known; name the module that defines it "
            "(--custom_objects=MODULE)"
        )
    if "Lambda" in text and "safe_mode" in text:
        return (
            "it holds a Lambda layer, that is Python code; if you trust the file, allow it "
            "(--allow_unsafe)"
        )
    if "could not be loaded" in text and "0 variables" in text:
        return (
            "Keras cannot read its own file back, as happens when a layer is shared across "
            "nesting levels, or made by a composite layer: make the model in Python and use "
            "`load_weights`"
        )
    if isinstance(error, OSError):
        return f"not an .h5 file, or a truncated one ({summarize_error(error)})"
    return f"Keras cannot read it: {summarize_error(error)}"
