"""`export`: Keras's own export, written safely and checked."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
import warnings
from typing import Any

import keras

from diagconv_tf import distribution, files
from diagconv_tf.copying import copy_model
from diagconv_tf.exporting import comparing
from diagconv_tf.exporting.base import Format
from diagconv_tf.exporting.litert import LiteRT
from diagconv_tf.exporting.native import counted_depthwise_calls, native_convolutions
from diagconv_tf.exporting.onnx import Onnx
from diagconv_tf.exporting.report import ExportError, ExportReport
from diagconv_tf.exporting.saved_model import SavedModel
from diagconv_tf.model_tree import check_built
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
    **options: Any,
) -> ExportReport:
    """Exports a model for inference elsewhere, and checks the result.

    The file is made by `keras.Model.export`, under another name next to
    `path`. Its outputs are compared with the model's, for one example and for
    several, and its depthwise convolutions are counted. Only then it takes its
    place: an export that fails or is interrupted leaves what was there.

    | format | TensorFlow | JAX | PyTorch |
    |---|---|---|---|
    | `"tf_saved_model"`, a folder, endpoint `serve` | yes | yes, as one compiled op: \
its depthwise convolutions are not counted; TensorFlow must be installed | no |
    | `"litert"`, `.tflite` | yes | no | with the litert-torch package, for one example at a time; \
sizes of images must be known |
    | `"onnx"`, `.onnx` | yes | with the jax2onnx package; sizes of images must be known | yes, \
with `native=True`; sizes of images must be known |

    A model whose variables are mirrored, or divided among devices, is exported as
    a copy that is on one device; the file knows of no strategy or distribution.
    Of several processes any may call this alone, as long as none of the variables
    is divided among them.

    In half precision SavedModels work, ONNX works for float16 on TensorFlow and
    PyTorch, and LiteRT does not. What does not work raises an `ExportError`.

    Args:
        model: a built Keras model whose `call` takes one argument, which may
            be a list or dict of tensors.
        path: what to write; its folder must exist.
        format: `"tf_saved_model"`, `"litert"` or `"onnx"`.
        native: whether to export the convolutions that the framework has for
            the layers, which the runtimes know best. `Conv2D` layers with one
            input channel a group then use the depthwise op too. The model is
            the same afterwards, but must not be used by another thread in the
            meantime. False exports the lowerings as they are.
        overwrite: whether an existing file, or SavedModel folder, is replaced.
        sample: a batch of inputs to compare on. The default is random numbers:
            normal floats, bytes for uint8, zeros and ones for other integers.
            Needed for models that declare no inputs (subclasses of
            `keras.Model`), take strings, or fail on such numbers.
        tolerance: the largest difference from Keras's outputs, divided by the
            largest output. The default is that of the coarsest precision in
            the model: 1e-9 for float64, 1e-4 for float32, 0.02 for float16,
            0.15 for bfloat16. Files that are quantised need more.
        **options: for `keras.Model.export`, such as `opset_version` for ONNX
            or `optimizations` for LiteRT.

    Returns:
        An `ExportReport`.

    Raises:
        ValueError: if an argument is not as described, the backend cannot write
            the format, or a variable is divided among processes.
        FileExistsError: if `path` exists, unless `overwrite`.
        ImportError: if a package is missing.
        ExportError: if the export fails, the file does not run, its outputs
            differ by more than the tolerance, or, with `native=True`, it has
            fewer depthwise ops than the model.
        OSError: if the folder cannot be written.
    """
    file_format = _find_format(format)
    check_built(model)
    if distribution.is_distributed(model):
        _check_whole(model)
        return distribution.undistributed(
            lambda: export(
                copy_model(model, distributed=False),
                path,
                format,
                native,
                overwrite=overwrite,
                sample=sample,
                tolerance=tolerance,
                **options,
            )
        )
    target = _check_path(path, file_format, overwrite)
    _check_requirements(file_format)
    name = os.path.basename(target)
    with tempfile.TemporaryDirectory(
        prefix=f".{name}.", dir=os.path.dirname(target), ignore_cleanup_errors=True
    ) as folder:
        inputs = comparing.batches(model, sample)
        with counted_depthwise_calls(model) as calls:
            expected = [comparing.run_keras(model, inputs[0])]
        if file_format.has_dynamic_batch:
            expected.append(comparing.run_keras(model, inputs[1]))
        inputs = inputs[: len(expected)]
        if tolerance is None:
            tolerance = comparing.tolerance_of(model, expected[0])
        # Its name is the target's, because some formats write it into the file.
        written = os.path.join(folder, name)
        _write(file_format, model, written, native, options)
        found = _count_depthwise(file_format, written, len(calls), native)
        runtime, differences = _compare(file_format, written, model, inputs, expected)
        worst = max(differences, key=lambda d: d.relative if d.relative == d.relative else 1e999)
        # Not `>`: NaN must not pass.
        if not worst.relative <= tolerance:
            raise ExportError(
                f"Expected the exported {format} to differ from Keras by at most {tolerance:.2g} "
                f"of the outputs' scale. Received: {worst.relative:.2g} ({worst.absolute:.2g} "
                f"absolute) in {runtime}"
            )
        size = _size(written)
        files.replace(pathlib.Path(target), pathlib.Path(written))
    return ExportReport(
        path=os.fspath(path),
        format=format,
        backend=keras.backend.backend(),
        native=native,
        file_bytes=size,
        depthwise_op=file_format.depthwise_op,
        depthwise_calls=len(calls),
        depthwise_found=found,
        max_difference=max(d.absolute for d in differences),
        max_relative_difference=worst.relative,
        tolerance=tolerance,
        batch_sizes=tuple(len(keras.tree.flatten(batch)[0]) for batch in inputs),
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
    suffixes = {f.suffix for f in FORMATS if f.suffix} | {".keras", ".h5"}
    if (file_format.suffix and suffix != file_format.suffix) or (
        not file_format.suffix and suffix in suffixes
    ):
        wanted = f"a file named *{file_format.suffix}" if file_format.suffix else "a folder"
        raise ValueError(
            f"Expected `path` to be {wanted} for format='{file_format.name}'. "
            f"Received: path={os.fspath(path)!r}"
        )
    files.check_output(target, overwrite)
    if not os.path.exists(target):
        return target
    replaceable = (
        os.path.isfile(target)
        if file_format.suffix
        # Not any folder: a wrong path must not cost somebody's data.
        else os.path.isfile(os.path.join(target, "saved_model.pb"))
    )
    if not replaceable:
        kind = "file" if file_format.suffix else "SavedModel folder"
        raise ValueError(
            f"Expected `path` to be a {kind}, to be overwritten with format='{file_format.name}'. "
            f"Received: path={os.fspath(path)!r}, which is something else"
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


def _check_whole(model: keras.Model) -> None:
    divided = distribution.sharded_variables(model)
    if divided:
        raise ValueError(
            "Expected a model of which this process holds all values. Received: variables that "
            f"are divided among processes ({', '.join(divided[:3])}{', …' if divided[3:] else ''});"
            " export it from its weights in a process that holds them all"
        )


def _write(
    file_format: Format, model: keras.Model, path: str, native: bool, options: dict[str, Any]
) -> None:
    with (
        native_convolutions(model) if native else contextlib.nullcontext(),
        warnings.catch_warnings(),
    ):
        # Converters warn of what may go wrong; whether it did is checked.
        warnings.simplefilter("ignore")
        try:
            file_format.write(model, path, options)
        except Exception as error:
            raise ExportError(
                f"Keras could not export the model as {file_format.name} on the "
                f"{keras.backend.backend()} backend: {summarize_error(error, lines=2)}"
            ) from error


def _count_depthwise(file_format: Format, path: str, calls: int, native: bool) -> int | None:
    try:
        found = file_format.count_depthwise(path)
    except Exception as error:
        raise ExportError(
            f"The exported {file_format.name} cannot be read: {summarize_error(error, lines=2)}"
        ) from error
    if native and found is not None and found < calls:
        raise ExportError(
            f"Expected the exported {file_format.name} to run {file_format.depthwise_op} {calls} "
            f"times, once for each depthwise convolution. Received: {found} times; native=False "
            "exports without this check"
        )
    return found


def _compare(
    file_format: Format,
    path: str,
    model: keras.Model,
    inputs: list[Any],
    expected: list[Any],
) -> tuple[str, list[comparing.Difference]]:
    names = comparing.input_names(model)
    try:
        run, runtime = file_format.load(path)
        outputs = [run(batch, names) for batch in inputs]
    except Exception as error:
        raise ExportError(
            f"The exported {file_format.name} does not run: {summarize_error(error, lines=2)}"
        ) from error
    pairs = zip(outputs, expected, strict=True)
    return runtime, [comparing.difference(output, wanted) for output, wanted in pairs]


def _size(path: str) -> int:
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(
        os.path.getsize(os.path.join(folder, file))
        for folder, _, names in os.walk(path)
        for file in names
    )
