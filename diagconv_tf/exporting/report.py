"""What an export found, and the error where it found something wrong."""

from __future__ import annotations

import dataclasses
import json

from diagconv_tf.exporting.integer import IntegerPlan


class ExportError(RuntimeError):
    """The model could not be exported, or the exported file is not right."""


@dataclasses.dataclass(frozen=True)
class IntegerReport:
    """What a file of integers is, beside a file of floats; `str()` is one line.

    The file of floats is of the same model with stock layers, which round nothing.

    Attributes:
        plan: which layers multiply integers, and why others do not; prints as a table.
        operations: how many convolutions and matrix products of integers the runtime runs.
        share_within: share of the outputs' numbers that are within `steps` of those of the
            model with biases rounded as in the file (`exporting/integer/checking.py`).
        share_of_given: the same with the model as it was given.
        steps: the largest difference that counts as right, in steps: 1/255 of the span of
            an output, zero included, over the inputs that were compared.
        float_file_bytes: size of the file of floats.
        seconds: median time for one example, in the process that exported.
        float_seconds: the same of the file of floats, timed in turn.
    """

    plan: IntegerPlan
    operations: int
    share_within: float
    share_of_given: float
    steps: float
    float_file_bytes: int
    seconds: float
    float_seconds: float

    def __str__(self) -> str:
        left = self.plan.left_float
        of = len(self.plan.layers)
        return (
            f"{self.operations} integer operations for {of - len(left)} of {of} low-bit layers; "
            f"{self.share_within:.1%} of the outputs within {self.steps:g} of 255 steps of the "
            f"model with rounded biases, {self.share_of_given:.1%} of the model as given; float "
            f"file {self.float_file_bytes:,} bytes; one example {1e3 * self.seconds:.3g} ms, float "
            f"{1e3 * self.float_seconds:.3g} ms (in one process, interleaved, median)"
            + (f"; float: {self.plan.reasons_text}" if left else "")
        )


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """An exported file and how it compares with its model; `str()` is one line.

    Attributes:
        path: the file or folder.
        format: "tf_saved_model", "litert" or "onnx".
        backend: the Keras backend that exported.
        native: whether the framework's own convolutions were exported.
        file_bytes: size; of a folder, all its files together.
        depthwise_op: what the format calls the depthwise convolution.
        depthwise_calls: how many depthwise convolutions the model runs in one
            call: a shared layer counts once for each use.
        depthwise_found: how many `depthwise_op` the exported graph runs. None
            where the format does not tell: with JAX, a SavedModel holds the
            compiler's program, an `XlaCallModule`, instead of a graph of ops.
        max_difference: largest absolute difference from Keras's outputs.
        max_relative_difference: the same, divided by the largest output.
        tolerance: the largest relative difference that was allowed; None for a file of
            integers, for which `integers.steps` counts.
        batch_sizes: those of the inputs that were compared.
        runtime: what ran the exported file.
        integers: more of a file of integers; None for others.
    """

    path: str
    format: str
    backend: str
    native: bool
    file_bytes: int
    depthwise_op: str
    depthwise_calls: int
    depthwise_found: int | None
    max_difference: float
    max_relative_difference: float
    tolerance: float | None
    batch_sizes: tuple[int, ...]
    runtime: str
    integers: IntegerReport | None = None

    def to_json(self) -> str:
        """A JSON object on one line, with the fields of this class."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    def __str__(self) -> str:
        found = "not counted" if self.depthwise_found is None else self.depthwise_found
        allowed = "" if self.tolerance is None else f" (tolerance {self.tolerance:.2g})"
        sizes = " and ".join(map(str, self.batch_sizes))
        return (
            f"{self.path}: {self.format}, {self.file_bytes:,} bytes, {self.depthwise_op}: {found} "
            f"for {self.depthwise_calls} depthwise convolutions of the model; largest difference "
            f"{self.max_difference:.2g}, {self.max_relative_difference:.2g} of the outputs' scale"
            f"{allowed}, at batch size {sizes} in {self.runtime}"
            + (f"; {self.integers}" if self.integers else "")
        )
