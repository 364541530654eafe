"""What an export found, and the error where it found something wrong."""

from __future__ import annotations

import dataclasses
import json


class ExportError(RuntimeError):
    """The model could not be exported, or the exported file is not right."""


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
        tolerance: the largest relative difference that was allowed.
        batch_sizes: those of the inputs that were compared.
        runtime: what ran the exported file.
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
    tolerance: float
    batch_sizes: tuple[int, ...]
    runtime: str

    def to_json(self) -> str:
        """A JSON object on one line, with the fields of this class."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    def __str__(self) -> str:
        found = "not counted" if self.depthwise_found is None else self.depthwise_found
        sizes = " and ".join(map(str, self.batch_sizes))
        return (
            f"{self.path}: {self.format}, {self.file_bytes:,} bytes, {self.depthwise_op}: {found} "
            f"for {self.depthwise_calls} depthwise convolutions of the model; largest difference "
            f"{self.max_difference:.2g}, {self.max_relative_difference:.2g} of the outputs' scale "
            f"(tolerance {self.tolerance:.2g}), at batch size {sizes} in {self.runtime}"
        )
