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
from absl import logging

from diagconv_tf import class_swap, distribution, files, keras_internals
from diagconv_tf.copying import copy_model
from diagconv_tf.exporting.base import Format
from diagconv_tf.exporting.comparing import Reference
from diagconv_tf.exporting.integer import Program, plan_integers
from diagconv_tf.exporting.integer.checking import (
    EXAMPLES,
    STEPS,
    IntegerReference,
    share_within,
    with_rounded_biases,
)
from diagconv_tf.exporting.keras_run import KerasRun
from diagconv_tf.exporting.litert import LiteRT
from diagconv_tf.exporting.native import float_operands, native_convolutions
from diagconv_tf.exporting.onnx import Onnx
from diagconv_tf.exporting.report import ExportError, ExportReport, IntegerReport
from diagconv_tf.exporting.saved_model import SavedModel
from diagconv_tf.exporting.tensors import Leaf
from diagconv_tf.model_tree import check_built, walk_layers
from diagconv_tf.preserving import preserved_state
from diagconv_tf.rules import DEFAULT_RULES, Rule
from diagconv_tf.text import summarize_error
from diagconv_tf.timing import time_interleaved

#: Calls of each file that are timed, and in how many seconds at most.
_TIMED_ROUNDS = 50
_TIMED_SECONDS = 1.0

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
    integers: bool | None = None,
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

    Of what `deploy` returns, LiteRT and ONNX files multiply 8-bit integers (docs/exporting.md,
    "Integer files"); only TensorFlow writes the former. They are compared in another way:
    rounding to a neighbouring integer is no error, and there are always some.

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
            quantised by `options` need more. For integers: by how many steps outputs
            may differ, of which 255 span them; 99 % must not differ more. The default
            is 1.
        integers: whether layers multiply integers. None means those of a deployed model
            in LiteRT and ONNX files; True refuses models without such layers; False
            writes floats, with the rounding of inputs as operations of their own.
        rules: those that `rewrite` was given.
        **options: for `keras.Model.export`, such as `opset_version` for ONNX
            or `optimizations` for LiteRT.

    Returns:
        An `ExportReport`.

    Raises:
        ValueError: if an argument is not as described, the backend cannot write
            the format, or a variable is sharded among processes. With integers, if a
            kernel has 8 bits, or the model has no graph.
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
    program = _plan(model, file_format, integers)

    def write_checked(source: keras.Model) -> ExportReport:
        # One for all threads: writers and checks use switches of the whole process.
        with class_swap.lock:
            return _write_checked(
                source,
                target,
                file_format,
                native,
                sample,
                tolerance,
                # A copy, on one device, has steps of its own.
                program=program if source is model else _plan(source, file_format, integers),
                rules=rules,
                options=options,
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
    program: Program | None,
    rules: Sequence[Rule],
    options: dict[str, Any],
) -> ExportReport:
    """`export` of a model on one device to a path that has been checked."""
    is_dynamic = file_format.has_dynamic_batch
    wanted = None
    if program is None:
        reference = Reference.of(model, sample, is_dynamic, rules)
        tolerance = reference.tolerance if tolerance is None else tolerance
    else:
        tolerance = STEPS if tolerance is None else tolerance
        run = KerasRun(model)
        given, run.weights = run.weights, with_rounded_biases(program, run)
        reference = Reference.of(
            model, sample, is_dynamic, rules, run=run, examples=EXAMPLES, draws=0
        )
        wanted = IntegerReference.of(run, given, reference, tolerance)
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
                _write(file_format, _called_for_inference(model), written, options, program)
            found = _count_depthwise(file_format, written, calls if native else 0)
            runtime, outputs = _run(file_format, written, reference)
            difference = reference.difference(outputs)
            integers = None
            if program is not None and wanted is not None:
                shares = _check_integers(file_format, reference.matched(outputs), wanted)
                with native_convolutions(model, rules) if native else contextlib.nullcontext():
                    integers = dataclasses.replace(
                        _compared_with_float(
                            file_format, written, program, reference, options, rules
                        ),
                        share_within=shares[0],
                        share_of_given=shares[1],
                        steps=tolerance,
                    )
            # Not `>`: NaN must not pass.
            elif not difference.relative <= tolerance:
                raise ExportError(
                    f"Expected the exported {file_format.name} to differ from Keras by at most "
                    f"{tolerance:.2g} of the outputs' scale. Received: {difference.relative:.2g} "
                    f"({difference.absolute:.2g} absolute) in {runtime}"
                )
        size = _size(written)
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
        tolerance=tolerance if integers is None else None,
        batch_sizes=tuple(inputs.batch_size for inputs in reference.inputs),
        runtime=runtime,
        integers=integers,
    )


def _size(path: str) -> int:
    """Bytes of a file, or of all files in a folder."""
    whole = pathlib.Path(path)
    files_in = [whole] if whole.is_file() else [f for f in whole.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files_in)


def _plan(model: keras.Model, file_format: Format, integers: bool | None) -> Program | None:
    """How a file multiplies integers; None for one of floats."""
    if integers is None and not file_format.holds_integers:
        return None
    if integers is False:
        return None
    if not file_format.holds_integers:
        raise ValueError(
            "Expected format='litert' or format='onnx', which hold integers, for integers=True. "
            f"Received: format='{file_format.name}'"
        )
    program = plan_integers(model, file_format.name)
    if program is not None and program.plan.integer_calls:
        return program
    reasons = "it has none" if program is None else program.plan.reasons_text
    if integers:
        raise ValueError(
            "Expected a model from `deploy`, with layers that can multiply integers. "
            f"Received: '{model.name}': {reasons}"
        )
    if program is not None:
        logging.warning("%s: no layer of the file multiplies integers. %s", model.name, reasons)
    return None


def _check_integers(
    file_format: Format, outputs: list[list[Leaf]], reference: IntegerReference
) -> tuple[float, float]:
    """The shares of numbers near those of the model with rounded biases, and as given."""
    steps, least = reference.steps, reference.least_share
    share = share_within(outputs, reference.wanted, steps)
    if not share >= least:
        raise ExportError(
            f"Expected {least:.1%} of the outputs of the exported {file_format.name} within "
            f"{steps:g} of Keras's, in steps of which 255 span an output. Received: {share:.1%}; "
            "pass more, and real, inputs as `sample`, or a larger `tolerance`"
        )
    return share, share_within(outputs, reference.given, steps)


def _compared_with_float(
    file_format: Format,
    path: str,
    program: Program,
    reference: Reference,
    options: dict[str, Any],
    rules: Sequence[Rule],
) -> IntegerReport:
    """Counts a file's integer operations, and compares it with a file of floats."""
    found, planned = file_format.count_integers(path), program.plan.integer_calls
    if found < planned:
        raise ExportError(
            f"Expected the exported {file_format.name} to run {planned} convolutions and matrix "
            f"products of integers. Received: {found}; integers=False writes floats"
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        floats = os.path.join(folder, os.path.basename(path))
        with float_operands(program.model, rules), _for_inference():
            _write(file_format, program.model, floats, options)
        one = reference.inputs[0]
        timings = time_interleaved(
            {p: file_format.caller(p, one) for p in (path, floats)},
            rounds=_TIMED_ROUNDS,
            warmup=3,
            budget_seconds=_TIMED_SECONDS,
        )
        for timing in timings.values():
            if timing.error is not None:
                raise ExportError(
                    f"The exported {file_format.name} does not run: {timing.error}"
                ) from timing.error
        seconds, float_seconds = (float(t.median or 0.0) for t in timings.values())
        return IntegerReport(
            plan=program.plan,
            operations=found,
            share_within=1.0,
            share_of_given=1.0,
            steps=0.0,
            float_file_bytes=_size(floats),
            seconds=seconds,
            float_seconds=float_seconds,
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


def _write(
    file_format: Format,
    model: keras.Model,
    path: str,
    options: dict[str, Any],
    program: Program | None = None,
) -> None:
    with warnings.catch_warnings():
        # Converters warn of what may go wrong; whether it did is checked.
        warnings.simplefilter("ignore")
        try:
            if program is None:
                file_format.write(model, path, options)
            else:
                file_format.write_integers(program, path, options)
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
