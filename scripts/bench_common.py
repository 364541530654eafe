"""What the benchmarks share: precisions, compiling, environment, files, pictures.

Results are a list of rows, each a data class of plain values. A row whose
`error` is not None has no times: what failed or was refused is a result too.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
from rich.console import Console
from rich.table import Table

import diagconv_tf
from diagconv_tf import Conditions, files
from diagconv_tf.environment import cpu_name
from diagconv_tf.tf32 import tf32_allowed

ROOT = pathlib.Path(__file__).resolve().parent.parent

#: What makes another program of the same source.
_VARIABLES = (
    "XLA_FLAGS",
    "TF_XLA_FLAGS",
    "TF_ENABLE_ONEDNN_OPTS",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "JAX_DEFAULT_MATMUL_PRECISION",
)


@dataclasses.dataclass(frozen=True)
class Precision:
    """A precision that the benchmarks know by name.

    Attributes:
        dtype: of the tensors of a convolution.
        policy: Keras's dtype policy for a model.
        tf32: whether float32 products may be rounded to TF32 on the way into
            the matrix units of an NVIDIA GPU. None leaves it to the framework.
        tolerance: of `‖result − reference‖ / ‖reference‖`, above which a
            result is called wrong: some hundred roundings of the dtype.
    """

    dtype: str
    policy: str
    tf32: bool | None
    tolerance: float


#: "default" is float32 as the framework computes it when nothing is asked: on
#: NVIDIA GPUs from Ampere on, TensorFlow and JAX round to TF32 in convolutions
#: and matrix products, PyTorch in convolutions only. "float32" is float32
#: throughout; "tf32" allows TF32 in both, on PyTorch too.
PRECISIONS: Mapping[str, Precision] = {
    "default": Precision("float32", "float32", None, 5e-3),
    "float32": Precision("float32", "float32", False, 1e-4),
    "tf32": Precision("float32", "float32", True, 5e-3),
    "bfloat16": Precision("bfloat16", "mixed_bfloat16", None, 3e-2),
    "float16": Precision("float16", "mixed_float16", None, 5e-3),
}


def device_kind() -> str:
    """`"cpu"`, `"gpu"` or `"tpu"`: where this process computes."""
    return Conditions.current().device_kind


def default_precision() -> str:
    """The precision that is measured where none is asked for."""
    return "float32" if device_kind() == "cpu" else "default"


def why_no_precision(name: str) -> str | None:
    """Why a precision cannot be had here; None where it can."""
    if PRECISIONS[name].tf32 and device_kind() != "gpu":
        return f"Expected an NVIDIA GPU for tf32. Received: {device_kind()}"
    return None


def precision_mode(name: str) -> contextlib.AbstractContextManager[None]:
    """Inside, float32 products are as exact as a precision says; compile inside."""
    allowed = PRECISIONS[name].tf32
    return contextlib.nullcontext() if allowed is None else tf32_allowed(allowed)


def seed(number: int) -> None:
    """Fixes the weights of the layers that are made next.

    Keras draws the seeds of its initializers from Python's generator.
    `keras.utils.set_random_seed` would import TensorFlow on every backend.
    """
    random.seed(number)


def compiled(jit_compile: str) -> bool:
    """Whether `--jit_compile=auto|true|false` means a compiler here.

    `auto` is Keras's choice (`Trainer.compile`): JAX compiles,
    TensorFlow does on a GPU, PyTorch does not.
    """
    if jit_compile != "auto":
        return jit_compile == "true"
    backend = keras.backend.backend()
    return backend == "jax" or (backend == "tensorflow" and device_kind() != "cpu")


def why_not_compiled(jit_compile: str) -> str | None:
    """Why `--jit_compile` cannot be had here; None where it can."""
    if keras.backend.backend() == "jax" and not compiled(jit_compile):
        return "Expected jit_compile=true on JAX, which Keras else runs eagerly. Received: false"
    return None


class Budget:
    """Seconds for the whole run, shared equally by the groups still to come.

    Args:
        seconds: None means no limit.
        groups: how many there are.
        start: when the run began, by `time.monotonic`; None means now.
    """

    def __init__(self, seconds: float | None, groups: int, start: float | None = None):
        start = time.monotonic() if start is None else start
        self._end = None if seconds is None else start + seconds
        self._groups = groups

    def next_share(self) -> float | None:
        """Seconds for the next group: None without limit, 0 when all is spent."""
        groups, self._groups = max(self._groups, 1), self._groups - 1
        if self._end is None:
            return None
        return max(0.0, self._end - time.monotonic()) / groups


def environment(flags: Mapping[str, Any], **measured: Any) -> dict[str, Any]:
    """Where and how the results came about, in JSON's types.

    Args:
        flags: the command's flags, by name.
        **measured: what else belongs to all rows.
    """
    conditions = dataclasses.asdict(Conditions.current())
    del conditions["compiled"]  # Each row has its own.
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(
            [
                f"KERAS_BACKEND={keras.backend.backend()} python",
                f"scripts/{pathlib.Path(sys.argv[0]).name}",
                *sys.argv[1:],
            ]
        ),
        "commit": _commit(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "diagconv_tf": diagconv_tf.__version__,
        **conditions,
        "versions": {name: version for name, version in conditions["versions"]}
        | {"numpy": importlib.metadata.version("numpy")},
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "flags": dict(flags),
        **measured,
    }


def _commit() -> str | None:
    """The checkout's commit, with `+changes` where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def flag_values(flag_holders: Sequence[Any]) -> dict[str, Any]:
    """Names and values of absl flags, without those that only name files."""
    values = {holder.name: holder.value for holder in flag_holders}
    return {name: value for name, value in values.items() if name not in ("out", "pictures")}


def check_out(path: str | None) -> None:
    """Refuses a result file of an unknown kind before hours are spent.

    Raises:
        ValueError: if the suffix is neither `.json` nor `.csv`.
    """
    if path and pathlib.Path(path).suffix not in (".json", ".csv"):
        raise ValueError(f"Expected a file name that ends in .json or .csv. Received: {path}")


def write_results(path: str, rows: Sequence[Any], environment: Mapping[str, Any]) -> None:
    """Writes JSON or CSV, as the suffix says, aside, and renames it.

    JSON: `{"environment": …, "rows": […]}`. CSV: the environment is the first
    line, `# ` and JSON, so that `pandas.read_csv(path, skiprows=1)` reads it.
    """
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    dicts = [dataclasses.asdict(row) for row in rows]
    if target.suffix == ".json":
        content = {"environment": environment, "rows": dicts}
        text = json.dumps(content, indent=1, allow_nan=False)
    else:
        stream = io.StringIO()
        stream.write(f"# {json.dumps(environment)}\n")
        writer = csv.DictWriter(stream, list(dicts[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: json.dumps(v) if isinstance(v, dict) else v for k, v in row.items()}
            for row in dicts
        )
        text = stream.getvalue().rstrip("\n")
    files.write_text(target, text)


def measure_groups(
    groups: Sequence[Any],
    benchmark: Callable[[Any, float | None], Sequence[Any]],
    environment: Mapping[str, Any],
    *,
    budget_seconds: float | None,
    out: str | None,
) -> list[Any]:
    """Measures one group after another, and writes what there is after each of them.

    Args:
        groups: data classes that say what is measured together; printed to stderr.
        benchmark: the rows of a group, in so many seconds; None means no limit.
        environment: as `environment` returns it.
        budget_seconds: for all groups; None means no limit.
        out: a file for `write_results`, or None.

    Returns:
        The rows of all groups.
    """
    budget = Budget(budget_seconds, len(groups))
    rows: list[Any] = []
    for group in groups:
        print(*dataclasses.astuple(group), file=sys.stderr)
        rows += benchmark(group, budget.next_share())
        if out:
            # After each group: what is measured outlives a crash.
            write_results(out, rows, environment)
        keras.backend.clear_session(free_memory=True)
    return rows


def grouped(rows: Iterable[Any], key: Any) -> Iterator[tuple[Any, list[Any]]]:
    """`(key, rows)` in the order in which keys first occur."""
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    yield from groups.items()


def print_table(table: Table) -> None:
    """To the terminal, or, where there is none, as wide as it needs to be."""
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def print_errors(errors: Iterable[tuple[str, str | None]]) -> None:
    """Every error once, with how many rows it struck and the first of them."""
    found: dict[str, list[str]] = {}
    for where, error in errors:
        if error is not None:
            found.setdefault(error, []).append(where)
    for error, rows in found.items():
        print(f"failed, {len(rows)} row{'s' * (len(rows) > 1)} ({rows[0]}): {error}")


def new_figure(**arguments: Any) -> Any:
    """A matplotlib figure that needs no display."""
    # Not pyplot: it keeps figures alive, and asks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **arguments)
    FigureCanvasAgg(figure)
    return figure


def draw_bars(
    axes: Any,
    groups: Sequence[str],
    series: Mapping[str, Mapping[str, tuple[float, float, float]]],
) -> None:
    """Bars in milliseconds, on a logarithmic scale, with p10 to p90 on top.

    Args:
        axes: matplotlib's.
        groups: labels along the axis.
        series: name → group → (median, p10, p90) in seconds; a group that is
            missing, because it failed, leaves a gap.
    """
    width = 0.8 / max(len(series), 1)
    for index, (name, bars) in enumerate(series.items()):
        known = [(place, *bars[group]) for place, group in enumerate(groups) if group in bars]
        if not known:
            axes.bar([], [], label=f"{name} (failed)", color=f"C{index}")
            continue
        places, medians, lows, highs = (list(values) for values in zip(*known, strict=True))
        ends = [
            [1e3 * (median - low) for median, low in zip(medians, lows, strict=True)],
            [1e3 * (high - median) for median, high in zip(medians, highs, strict=True)],
        ]
        axes.bar(
            [place - 0.4 + (index + 0.5) * width for place in places],
            [1e3 * median for median in medians],
            width,
            yerr=ends,
            label=name,
            color=f"C{index}",
            error_kw={"elinewidth": 1, "capsize": 1.5},
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds")


def save_figure(figure: Any, folder: str, name: str) -> None:
    """Writes `folder/name.png` aside and renames it."""
    path = pathlib.Path(folder, f"{name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_aside(path, lambda aside: figure.savefig(aside, dpi=130))
