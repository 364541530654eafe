"""The folder of a run: created, or found again to resume it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
import shutil
from collections.abc import Mapping

from absl import logging

from diagconv_tf import files
from recipes.config import BUILT_IN, Config
from recipes.optimizers import TOP5_ACCURACY

#: Settings that do not decide what is computed, but for rounding: they may differ
#: from the interrupted run's, so that it can go on where there are fewer devices.
_MAY_DIFFER = (
    "data_dir",
    "download",
    "resume",
    "overwrite",
    "output_dir",
    "profile",
    "checkpoint_epochs",
    "log_every",
    "max_steps",
    "distribution",
    "cpu_devices",
)

#: Settings that each of several processes may have for itself.
_OF_A_MACHINE = ("data_dir", "download")


def shared_settings(config: Config) -> str:
    """Those that processes which train together must have in common, as JSON."""
    settings = dataclasses.asdict(config)
    return json.dumps({k: v for k, v in settings.items() if k not in _OF_A_MACHINE})


def open_run_folder(config: Config) -> pathlib.Path:
    """The folder of a run's results, with `config.json` in it.

    It is `output_dir/name`. If that exists, with `resume` the run goes on in
    it, with `overwrite` it is removed, and else the folder is `name-2` and so
    on. That is the name in `config.json`, with which the run can be resumed.

    Raises:
        ValueError: If it cannot be made or written; if what is to be
            overwritten is no folder of results, or has what the run needs; or
            if the run that is to go on has other settings.
    """
    root = pathlib.Path(config.output_dir).expanduser()
    folder = root / config.name
    if config.resume and folder.exists():
        _check_same_settings(folder / "config.json", config)
        return folder
    if config.overwrite and folder.exists():
        # So that a slip in `output_dir` does not remove anything else.
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"Expected --overwrite to replace the results of a run. Received: {folder}, "
                "which has no config.json"
            )
        lost = [path for path in _inputs(config) if _is_inside(path, folder)]
        if lost:
            raise ValueError(
                f"Expected --overwrite of a folder without what the run needs. Received: {folder}, "
                f"with {', '.join(lost)}"
            )
        shutil.rmtree(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(2):
            try:
                folder.mkdir()  # Only one of two runs at the same time succeeds.
                break
            except FileExistsError:
                folder = root / f"{config.name}-{number}"
        config = dataclasses.replace(config, name=folder.name)
        files.write_text(folder / "config.json", config.to_json())
    except OSError as error:
        raise ValueError(
            "Expected `output_dir` to be a folder that can be made and written. "
            f"Received: output_dir={config.output_dir} ({error})"
        ) from error
    return folder


def resume_flags(config: Config, folder: pathlib.Path) -> str:
    """What to add to a command to go on with its run.

    Args:
        config: what the command says.
        folder: of the run.
    """
    return "--resume" if folder.name == config.name else f"--name={folder.name} --resume"


def _inputs(config: Config) -> list[str]:
    """Files and folders that the run reads, as they are given."""
    model = [] if config.model in BUILT_IN else [config.model]
    plans = [name for name in config.variants if name.endswith(".json")]
    folder = config.dataset.removeprefix("folder:")
    images = [folder] if folder != config.dataset else []
    records = [config.data_dir] if config.data_dir else []
    return [*model, *plans, *images, *records]


def _is_inside(path: str, folder: pathlib.Path) -> bool:
    return pathlib.Path(path).expanduser().resolve().is_relative_to(folder.resolve())


@dataclasses.dataclass(frozen=True)
class Progress:
    """What `metrics.jsonl` tells of a variant.

    Attributes:
        losses: step → mean loss of this step and those since the one before.
        test_accuracies: after each epoch; NaN where the file has none.
        test_top5_accuracy: after the last of them; None where it is not known.
    """

    losses: Mapping[int, float] = dataclasses.field(default_factory=dict)
    test_accuracies: tuple[float, ...] = ()
    test_top5_accuracy: float | None = None


def progress_until(path: pathlib.Path, variant: str, steps: int, epochs: int) -> Progress:
    """What `metrics.jsonl` has of a variant's first `steps` steps.

    What it has of later ones is removed: they came after the last checkpoint
    and will be made again. So is the test in the middle of an epoch with which a
    trial of some steps ended.

    Checkpoints are on the disk before the lines are, and where the disk is full
    only lines may be missing. So one that is missing is no error.

    Args:
        path: of `metrics.jsonl`; it need not exist.
        variant: a name.
        steps: those before the checkpoint.
        epochs: those finished before it.
    """
    kept: list[str] = []
    losses: dict[int, float] = {}
    accuracies: dict[int, float] = {}
    top5: dict[int, float | None] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue  # Cut off by a crash.
        if event["variant"] == variant:
            if event.get("step", math.inf) > steps:
                continue
            if event["event"] == "step":
                losses[event["step"]] = event["loss"]
            elif event["epoch"] >= epochs:
                continue
            else:
                accuracies[event["epoch"]] = event["val_accuracy"]
                top5[event["epoch"]] = event.get(f"val_{TOP5_ACCURACY}")
        kept.append(line)
    if len(accuracies) < epochs:
        logging.warning(
            "%s has %d of the %d test accuracies before the checkpoint of %s, and perhaps not all "
            "losses; the report goes without the others",
            *(path, len(accuracies), epochs, variant),
        )
    if kept:
        files.write_text(path, "\n".join(kept))
    else:
        path.unlink(missing_ok=True)
    return Progress(
        losses,
        tuple(accuracies.get(epoch, math.nan) for epoch in range(epochs)),
        top5.get(epochs - 1),
    )


def _check_same_settings(path: pathlib.Path, config: Config) -> None:
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Expected --resume to go on with a run, whose settings are in {path}. "
            f"Received: {error}"
        ) from error
    # A setting that is newer than the run had its default.
    before = {**json.loads(Config().to_json()), **before}
    now = json.loads(config.to_json())
    different = [
        f"{field.name} was {before.get(field.name)!r}, is {now[field.name]!r}"
        for field in dataclasses.fields(Config)
        if field.name not in _MAY_DIFFER and before.get(field.name) != now[field.name]
    ]
    if different:
        raise ValueError(
            f"Expected --resume with the settings of {path}. Received: {'; '.join(different)}"
        )
