"""`export`: Keras's own export, written safely and checked."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import pathlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from diagconv_tf import class_swap, distribution, files, keras_internals
from diagconv_tf.copying import copy_model
from diagconv_tf.exporting.base import Format
from diagconv_tf.exporting.comparing import Reference
from diagconv_tf.exporting.litert import LiteRT
from diagconv_tf.exporting.native import native_convolutions
from diagconv_tf.exporting.onnx import Onnx
from diagconv_tf.exporting.report import ExportError, ExportReport
from diagconv_tf.exporting.saved_model import SavedModel
from diagconv_tf.model_tree import check_built, walk_layers
from diagconv_tf.preserving import preserved_state
from diagconv_tf.rules import DEFAULT_RULES, Rule
from diagconv_tf.text import summarize_error

FORMATS: tuple[Format, ...] = (SavedModel(), LiteRT(), Onnx())


def export(
    model: keras.Model,
    path: str | os.PathLike,
    format: str = "tf_saved_model",
    native: bool = True,
    *,
    overwrite: bool = False,
    sample: Any = None,
    tolerance: float | None = None,
    rules: Sequence[Rule] = DEFAULT_RULES,
    **options: Any,
) -> ExportReport:
    """Exports a model for inference elsewhere, and checks the result.

    `keras.Model.export` writes the file, under another name next to `path`. Its
    outputs are compared with the model's, for one example and for several, and its
    depthwise convolutions are counted. Only then it takes its place: an export that
    fails or is interrupted leaves what was there.

    | format | TensorFlow | JAX | PyTorch |
    |---|---|---|---|
    | `"tf_saved_model"`, a folder, endpoint `serve` | yes | yes, as one compiled op: \
its depthwise convolutions are not counted; TensorFlow must be installed | no |
    | `"litert"`, `.tflite` | yes | no | with the litert-torch package, for one example at a time; \
sizes of images must be known |
    | `"onnx"`, `.onnx` | yes | with the jax2onnx package; sizes of images must be known | yes, \
with `native=True`; sizes of images must be known |

    A model whose variables are mirrored or sharded is exported as a copy on one
    device; the file knows of no strategy or distribution. Of several processes any
    may call this alone, as long as no variable is sharded among them.

    In half precision SavedModels work, ONNX works for float16 on TensorFlow and
    PyTorch, and LiteRT does not. What does not work raises an `ExportError`.

    One export of a process runs at a time; further threads that export or rewrite
    wait. Other threads may call the model meanwhile. While TensorFlow writes ONNX,
    `tf.function`s of other threads run eagerly.

    Args:
        model: a built Keras model whose `call` takes one argument, which may
            be a list or dict of tensors.
        path: what to write; its folder must exist.
        format: `"tf_saved_model"`, `"litert"` or `"onnx"`.
        native: whether to export the convolutions that the framework has for
            the layers, which the runtimes know best. `Conv2D` layers with one
            input channel a group then use the depthwise op too. False exports
            the lowerings as they are.
        overwrite: whether an existing file, or SavedModel folder, is replaced.
        sample: a batch of inputs to compare on. The default is random numbers:
            normal floats, bytes for uint8, zeros and ones for other integers.
            Needed for models that declare no inputs (subclasses of
            `keras.Model`), take strings, or fail on such numbers.
        tolerance: the largest difference from Keras's outputs, relative to the
            scale of its channel (`exporting/comparing.py` defines it). The default
            is that of the coarsest precision in the model: 1e-12 for float64, 1e-4
            for float32, 0.02 for float16, 0.15 for bfloat16. Files that are
            quantised need more.
        rules: those that `rewrite` was given.
        **options: for `keras.Model.export`, such as `opset_version` for ONNX
            or `optimizations` for LiteRT.

    Returns:
        An `ExportReport`.

    Raises:
        ValueError: if an argument is not as described, the backend cannot write
            the format, or a variable is sharded among processes.
        FileExistsError: if `path` exists, unless `overwrite`.
        ImportError: if a package is missing.
        ExportError: if the export fails, the file does not run, its outputs
            differ by more than the tolerance, or, with `native=True`, it has
            fewer depthwise ops than the model.
        OSError: if the folder cannot be written.
    """
    file_format = _find_format(format)
    check_built(model)
    target = _check_path(path, file_format, overwrite)
    _check_requirements(file_format)

    def write_checked(model: keras.Model) -> ExportReport:
        # One for all threads: writers and checks use switches of the whole process.
        with class_swap.lock:
            return _write_checked(
                model, target, file_format, native, sample, tolerance, rules=rules, options=options
            )

    if not distribution.is_distributed(model):
        report = write_checked(model)
    else:
        _check_holds_all(model)
        report = distribution.undistributed(
            lambda: write_checked(copy_model(model, distributed=False))
        )
    return dataclasses.replace(report, path=os.fspath(path))


def _write_checked(
    model: keras.Model,
    target: str,
    file_format: Format,
    native: bool,
    sample: Any,
    tolerance: float | None,
    *,
    rules: Sequence[Rule],
    options: dict[str, Any],
) -> ExportReport:
    """`export` of a model on one device to a path that has been checked."""
    reference = Reference.of(model, sample, file_format.has_dynamic_batch, rules)
    tolerance = reference.tolerance if tolerance is None else tolerance
    calls = len(reference.depthwise_channels)
    if not file_format.counts_one_channel:
        calls -= reference.depthwise_channels.count(1)
    folder, name = os.path.split(target)
    with tempfile.TemporaryDirectory(
        prefix=f".{name}.", dir=folder, ignore_cleanup_errors=True
    ) as aside:
        # Its name is the target's, because some formats write it into the file.
        written = os.path.join(aside, name)
        with _active_layers_named(model):
            with (
                native_convolutions(model, rules) if native else contextlib.nullcontext(),
                _for_inference(),
            ):
                _write(file_format, _called_for_inference(model), written, options)
            found = _count_depthwise(file_format, written, calls if native else 0)
            runtime, outputs = _run(file_format, written, reference)
            difference = reference.difference(outputs)
            # Not `>`: NaN must not pass.
            if not difference.relative <= tolerance:
                raise ExportError(
                    f"Expected the exported {file_format.name} to differ from Keras by at most "
                    f"{tolerance:.2g} of the outputs' scale. Received: {difference.relative:.2g} "
                    f"({difference.absolute:.2g} absolute) in {runtime}"
                )
        size = sum(file.stat().st_size for file in pathlib.Path(aside).rglob("*") if file.is_file())
        files.replace(target, written)
    return ExportReport(
        path=target,
        format=file_format.name,
        backend=keras.backend.backend(),
        native=native,
        file_bytes=size,
        depthwise_op=file_format.depthwise_op,
        depthwise_calls=calls,
        depthwise_found=found,
        max_difference=difference.absolute,
        max_relative_difference=difference.relative,
        tolerance=tolerance,
        batch_sizes=tuple(inputs.batch_size for inputs in reference.inputs),
        runtime=runtime,
    )


def _find_format(name: str) -> Format:
    for file_format in FORMATS:
        if file_format.name == name:
            return file_format
    accepted = ", ".join(f"'{file_format.name}'" for file_format in FORMATS)
    raise ValueError(f"Expected `format` to be one of {accepted}. Received: format={name!r}")


def _check_path(path: str | os.PathLike, file_format: Format, overwrite: bool) -> str:
    """The path to write to: of a link, what it points to."""
    target = os.path.realpath(path)
    suffix = os.path.splitext(target)[1]
    is_file = bool(file_format.suffix)
    not_folders = {f.suffix for f in FORMATS if f.suffix} | {".keras", ".h5"}
    if suffix != file_format.suffix if is_file else suffix in not_folders:
        wanted = f"a file named *{file_format.suffix}" if is_file else "a folder"
        raise ValueError(
            f"Expected `path` to be {wanted} for format='{file_format.name}'. "
            f"Received: path={os.fspath(path)!r}"
        )
    files.check_output(target, overwrite)
    # Not any folder may be replaced: a wrong path must not cost somebody's data.
    replaceable = target if is_file else os.path.join(target, "saved_model.pb")
    if os.path.exists(target) and not os.path.isfile(replaceable):
        raise ValueError(
            f"Expected `path` to be a {'file' if is_file else 'SavedModel folder'}, to be "
            f"overwritten with format='{file_format.name}'. Received: path={os.fspath(path)!r}, "
            "which is something else"
        )
    return target


def _check_requirements(file_format: Format) -> None:
    missing = [r for r in file_format.requirements() if not r.is_installed]
    if missing:
        modules = ", ".join(r.module for r in missing)
        packages = " ".join(dict.fromkeys(r.install for r in missing))
        raise ImportError(
            f"format='{file_format.name}' with the {keras.backend.backend()} backend needs "
            f"{modules}, which is not installed: pip install {packages}"
        )


def _check_holds_all(model: keras.Model) -> None:
    sharded = distribution.sharded_variables(model)
    if sharded:
        raise ValueError(
            "Expected a model of which this process holds all values. Received: variables that "
            f"are sharded among processes ({', '.join(sharded[:3])}{', …' if sharded[3:] else ''});"
            " export it from its weights in a process that holds them all"
        )


def _called_for_inference(model: keras.Model) -> keras.Model:
    """`model`, or one around it that calls it with `training=False`, which Keras's export omits.

    Only functional and sequential models can have one around them.
    """
    if not _active_layers(model) or keras_internals.graph(model) is None:
        return model
    with preserved_state(model):
        outputs = model(model.input, training=False)
        around = keras.Model(model.input, outputs, name=model.name)
        around(model.input)  # Keras exports no model to ONNX that was never called.
    return around


def _active_layers(model: keras.Model) -> list[str]:
    """Paths of layers that act as in training unless they are told otherwise.

    Random layers for augmentation do.
    """
    return [
        placed.path
        for placed in walk_layers(model)
        if (training := inspect.signature(placed.layer.call).parameters.get("training"))
        and training.default is True
    ]


@contextlib.contextmanager
def _active_layers_named(model: keras.Model) -> Iterator[None]:
    """Adds to an `ExportError` the layers that may have caused it by acting as in training."""
    try:
        yield
    except ExportError as error:
        active = _active_layers(model)
        if not active:
            raise
        raise ExportError(
            f"{error}; these layers act as in training unless `training=False` is passed: "
            f"{', '.join(active)}. Export a model without them"
        ) from error


@contextlib.contextmanager
def _for_inference() -> Iterator[None]:
    """Leaves out of TensorFlow's graphs what only gradients need."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    from diagconv_tf.backends.tensorflow import is_for_inference

    token = is_for_inference.set(True)
    try:
        yield
    finally:
        is_for_inference.reset(token)


def _write(file_format: Format, model: keras.Model, path: str, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        # Converters warn of what may go wrong; whether it did is checked.
        warnings.simplefilter("ignore")
        try:
            file_format.write(model, path, options)
        except Exception as error:
            raise ExportError(
                f"Keras could not export the model as {file_format.name} on the "
                f"{keras.backend.backend()} backend: {summarize_error(error, lines=2)}"
            ) from error


def _count_depthwise(file_format: Format, path: str, least: int) -> int | None:
    try:
        found = file_format.count_depthwise(path)
    except Exception as error:
        raise ExportError(
            f"The exported {file_format.name} cannot be read: {summarize_error(error, lines=2)}"
        ) from error
    if found is not None and found < least:
        raise ExportError(
            f"Expected the exported {file_format.name} to run {file_format.depthwise_op} {least} "
            f"times, once for each depthwise convolution. Received: {found} times; native=False "
            "exports without this check"
        )
    return found


def _run(
    file_format: Format, path: str, reference: Reference
) -> tuple[str, list[list[tuple[str, np.ndarray]]]]:
    """The runtime's name, and the file's outputs for each of the inputs."""
    try:
        run, runtime = file_format.load(path)
        return runtime, [run(inputs) for inputs in reference.inputs]
    except Exception as error:
        raise ExportError(
            f"The exported {file_format.name} does not run: {summarize_error(error, lines=2)}"
        ) from error
