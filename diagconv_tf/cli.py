"""The commands of `diagconv`: the package's functions on model files.

`diagconv_cli` reads the command line, and calls `run`. Results go to standard
output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator

import keras
from rich.console import Console

from diagconv_cli.arguments import PROGRAM, one_line
from diagconv_tf import __version__, files, model_files
from diagconv_tf.environment import Conditions
from diagconv_tf.exporting import ExportError, export
from diagconv_tf.inspection import inspect_as_built, inspect_model
from diagconv_tf.keras_internals import MissingNameError
from diagconv_tf.lowerings import ACCEPTED, why_not
from diagconv_tf.plan import Plan
from diagconv_tf.rewriting import restore, rewrite
from diagconv_tf.spec import STOCK, ConvSpec
from diagconv_tf.tuning import tune
from diagconv_tf.tuning.cache import Cache, CacheEntry

_JIT_COMPILE: dict[str, bool | str] = {"auto": "auto", "true": True, "false": False}


def run(options: argparse.Namespace) -> int:
    """Runs one command.

    Args:
        options: what `diagconv_cli` has read from the command line.

    Returns:
        The exit code: 0, or 1 where the command fails.
    """
    _set_up_messages()
    try:
        return _COMMANDS[options.command](options)
    except (ValueError, ImportError, OSError, ExportError, MissingNameError) as error:
        print(f"{PROGRAM}: {one_line(error)}", file=sys.stderr)
        return 1


def _inspect(options: argparse.Namespace) -> int:
    inspection = inspect_model(_load(options), options.batch_size)
    print(inspection.to_json() if options.json else inspection)
    return 0


def _rewrite(options: argparse.Namespace) -> int:
    model_files.check_model_output(options.output, options.overwrite)
    lowering = Plan.load(options.plan) if options.plan else options.lowering
    model = _load(options)
    change = functools.partial(
        rewrite, model, include=options.include, exclude=options.exclude, in_place=True
    )
    if lowering is None:
        change()  # With the default of `rewrite`.
    else:
        change(lowering=lowering)
    _save(model, options)
    return 0


def _restore(options: argparse.Namespace) -> int:
    model_files.check_model_output(options.output, options.overwrite)
    _save(restore(_load(options), in_place=True), options)
    return 0


def _export(options: argparse.Namespace) -> int:
    model = _load(options)
    with _working(f"exporting {options.output}"):
        report = export(
            model,
            options.output,
            options.format,
            native=not options.as_is,
            overwrite=options.overwrite,
        )
    print(report.to_json() if options.json else report)
    return 0


def _tune(options: argparse.Namespace) -> int:
    files.check_output(options.out, options.overwrite)
    plan = tune(
        _load(options),
        options.batch_size,
        jit_compile=_JIT_COMPILE[options.jit_compile],
        budget_seconds=options.budget_seconds,
        cache_dir=options.cache_dir,
        refresh=options.refresh,
        per_layer=options.per_layer,
    )
    plan.save(options.out, options.overwrite)
    print(plan.to_json() if options.json else plan)
    return 0


def _cache(options: argparse.Namespace) -> int:
    cache = Cache(options.cache_dir)
    if options.clear:
        removed = cache.clear()
        content = {"folder": str(cache.folder), "removed": removed}
        print(json.dumps(content) if options.json else f"{cache.folder}: {removed} removed")
        return 0
    entries = list(cache.entries())
    if options.json:
        content = {"folder": str(cache.folder), "entries": [e.to_dict() for e in entries]}
        print(json.dumps(content, indent=2))
        return 0
    print(f"{cache.folder}: {len(entries)} entries")
    for entry in entries:
        print(_describe(entry))
    return 0


def _describe(entry: CacheEntry) -> str:
    where = entry.key.get("conditions", {})
    compiled = "compiled" if where.get("compiled") else "not compiled"
    spec = entry.key.get("spec")
    if spec is None:
        what = f"training steps of {entry.key.get('name')}, batch of {entry.key.get('batch_size')}"
    else:
        kernel = "×".join(map(str, spec["kernel_size"]))
        sizes = "×".join(str(spec[name]) for name in ("batch", "height", "width", "groups"))
        what = f"{kernel} on {sizes}, {spec['compute_dtype']}"
    return (
        f"{what}; {where.get('backend')}, {compiled}, {where.get('device_kind')}: "
        f"{len(entry.measured)} times"
    )


def _info(options: argparse.Namespace) -> int:
    conditions = Conditions.current()
    example = ConvSpec(32, 56, 56, 128, padding="same")
    lowerings = {
        name: why_not(example, name)
        for name in ("native", "diagonal:32", "diagonal_grouped:32", "dense", "shifted", "fused")
    }
    if options.json:
        content = {
            "diagconv_tf": __version__,
            **dataclasses.asdict(conditions),
            "lowerings": lowerings,
        }
        print(json.dumps(content, indent=2))
        return 0
    print(f"diagconv_tf {__version__}")
    for package, version in conditions.versions:
        print(f"{package} {version}")
    print(f"backend {conditions.backend} on {conditions.device_kind} ({conditions.device_name})")
    for name, reasons in lowerings.items():
        print(f"lowering {name}: {'no: ' + '; '.join(reasons) if reasons else 'works here'}")
    print(f"`lowering` may be {ACCEPTED}")
    return 0


def _load(options: argparse.Namespace) -> keras.Model:
    custom_objects = None
    if options.custom_objects:
        custom_objects = model_files.custom_objects_of(options.custom_objects)
    with _working(f"reading {options.input}"):
        return model_files.load_model(
            options.input, allow_unsafe=options.allow_unsafe, custom_objects=custom_objects
        )


def _save(model: keras.Model, options: argparse.Namespace) -> None:
    with _working(f"writing {options.output}"):
        model_files.save_model(model, options.output, options.overwrite)
    rows = inspect_as_built(model).rows
    ours = sum(row.lowering != STOCK for row in rows)
    print(f"{options.output}: {ours} of {len(rows)} convolutions with groups are rewritten")


def _set_up_messages() -> None:
    """Sends the package's log messages to standard error, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{PROGRAM}: %(message)s"))
    logger = logging.getLogger("absl")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


@contextlib.contextmanager
def _working(what: str) -> Iterator[None]:
    """Shows on a terminal which long work is under way."""
    with Console(stderr=True).status(what):
        yield


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "inspect": _inspect,
    "rewrite": _rewrite,
    "tune": _tune,
    "cache": _cache,
    "restore": _restore,
    "export": _export,
    "info": _info,
}
