r"""Gathers the results of recipe runs that differ in their seed, and prints their means.

    for seed in 0 1 2; do
        python -m recipes.train --config=digits_lowbit --seed=$seed --name=digits_lowbit_$seed
    done
    python scripts/collect_runs.py --runs=runs/digits_lowbit_0,runs/digits_lowbit_1,… \
        --out=digits_lowbit.json

The rows of `--out` have a test accuracy of each seed, their mean, and the difference from the
first variant's mean in points. Of runs with --simplify they also have what each seed has left.
The file has the settings of the runs, too.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import bench_common
import numpy as np
from absl import app, flags
from rich.table import Table

from diagconv_tf import files

RUNS = flags.DEFINE_list("runs", None, "Folders of runs.", required=True)
OUT = flags.DEFINE_string("out", None, "File to write, .json.")

#: Settings in which the runs may differ.
_OF_A_RUN = (
    *("name", "seed", "output_dir", "overwrite", "resume"),
    *("data_dir", "download", "log_every", "checkpoint_epochs", "profile"),
)


def read_runs(folders: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings that all runs have, and a row for each variant.

    Raises:
        ValueError: if a run is not finished, or the runs differ in more than their seed.
    """
    settings, reports = [], []
    for folder in folders:
        try:
            settings.append(json.loads(pathlib.Path(folder, "config.json").read_text()))
            reports.append(json.loads(pathlib.Path(folder, "report.json").read_text()))
        except OSError as error:
            raise ValueError(f"Expected the folder of a finished run. Received: {error}") from error
    shared = [{k: v for k, v in each.items() if k not in _OF_A_RUN} for each in settings]
    seeds = [each["seed"] for each in settings]
    if any(each != shared[0] for each in shared) or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"Expected runs that differ in their seed, and in nothing else. Received: {folders}"
        )
    rows: list[dict[str, Any]] = []
    # Keras's default may have a row of its own, of step times alone.
    trained = [[v for v in report["variants"] if "test_accuracy" in v] for report in reports]
    for variants in zip(*trained, strict=True):
        accuracies = [round(100 * variant["test_accuracy"], 2) for variant in variants]
        rows.append(
            {
                "variant": variants[0]["variant"],
                "bits": variants[0].get("bits"),
                "test_accuracies": accuracies,
                "mean": round(float(np.mean(accuracies)), 2),
                "over_first": None,
            }
        )
        if any(variant.get("simplified") for variant in variants):
            rows[-1]["simplified"] = [variant.get("simplified") for variant in variants]
    for row in rows[1:]:
        row["over_first"] = round(row["mean"] - rows[0]["mean"], 2)
    environments = [report["environment"] for report in reports]
    return {"seeds": seeds, "settings": shared[0], "environments": environments}, rows


def make_table(seeds: list[int], rows: list[dict[str, Any]]) -> Table:
    table = Table(title="test accuracy in %", title_justify="left")
    table.add_column("variant")
    for heading in ("bits (W, A, G)", *(f"seed {seed}" for seed in seeds), "mean", "points"):
        table.add_column(heading, justify="right")
    for row in rows:
        bits = ", ".join("–" if n is None else str(n) for n in row["bits"] or ())
        numbers = [f"{accuracy:.2f}" for accuracy in (*row["test_accuracies"], row["mean"])]
        difference = "" if row["over_first"] is None else f"{row['over_first']:+.2f}"
        table.add_row(row["variant"], bits, *numbers, difference)
    return table


def main(_: list[str]) -> None:
    try:
        facts, rows = read_runs(RUNS.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    bench_common.print_table(make_table(facts["seeds"], rows))
    if OUT.value:
        environment = {**bench_common.environment({"runs": RUNS.value}), **facts}
        content = {"environment": environment, "rows": rows}
        files.write_text(pathlib.Path(OUT.value), json.dumps(content, indent=1))


if __name__ == "__main__":
    app.run(main)
