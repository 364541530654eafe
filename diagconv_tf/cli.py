"""The `diagconv` command: the package's functions on model files.

Results go to standard output, and everything else to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import keras
from rich.console import Console

from diagconv_tf import __version__, files, model_files
from diagconv_tf.environment import Conditions
from diagconv_tf.exporting import ExportError, export
from diagconv_tf.inspection import inspect_as_built, inspect_model
from diagconv_tf.lowerings import ACCEPTED, DEFAULT_LOWERING, parse, why_not
from diagconv_tf.plan import Plan
from diagconv_tf.rewriting import restore, rewrite
from diagconv_tf.spec import STOCK, ConvSpec
from diagconv_tf.tuning import tune
from diagconv_tf.tuning.cache import ENVIRONMENT_VARIABLE, Cache, CacheEntry

_PROGRAM = "diagconv"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: without the program's name; None means `sys.argv`.

    Returns:
        The exit code: 0, or 1 where what was asked for cannot be done. Wrong
        usage exits with 2.
    """
    options = _parser().parse_args(arguments)
    _set_up_messages()
    # So that what was half written is taken away, as after Ctrl-C.
    with contextlib.suppress(ValueError):  # Not the main thread.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return options.run(options)
    except (ValueError, ImportError, OSError, ExportError) as error:
        print(f"{_PROGRAM}: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, description="Faster training of depthwise convolutions in Keras."
    )
    parser.add_argument("--version", action="version", version=f"diagconv_tf {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = _add_command(
        commands,
        "inspect",
        _inspect,
        "list a model's convolutions with groups: cost, lowering, why not",
        ["inspect model.keras", "inspect model.keras --batch_size=64 --json"],
    )
    _add_input(command)
    command.add_argument(
        "--batch_size", type=_whole_number, metavar="N", help="images, for costs (default: one)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")

    command = _add_command(
        commands,
        "rewrite",
        _rewrite,
        "write a model whose convolutions compute with another lowering",
        [
            "rewrite model.keras fast.keras",
            "rewrite model.keras fast.keras --lowering=shifted --exclude='block_1_*'",
            "rewrite model.keras fast.keras --plan=plan.json --overwrite",
        ],
    )
    _add_input(command)
    _add_output(command, "a .keras or .h5 file")
    choice = command.add_mutually_exclusive_group()
    choice.add_argument(
        "--lowering",
        type=_lowering,
        default=DEFAULT_LOWERING,
        help="how the layers compute, as for their `lowering`; a dict as JSON "
        "(default: %(default)s)",
    )
    choice.add_argument("--plan", metavar="FILE", help="a plan file with a choice per layer")
    for name, words in (("include", "rewrite only"), ("exclude", "leave alone")):
        command.add_argument(
            f"--{name}",
            action="append",
            metavar="PATTERN",
            help=f"{words} layers of this path or glob; may be repeated",
        )

    command = _add_command(
        commands,
        "tune",
        _tune,
        "measure which lowering trains each layer fastest, and write it as a plan",
        [
            "tune model.keras --batch_size=64 --out=plan.json",
            "tune model.keras --batch_size=64 --out=plan.json --jit_compile=true "
            "--budget_seconds=300",
            "rewrite model.keras fast.keras --plan=plan.json",
        ],
    )
    _add_input(command)
    command.add_argument(
        "--batch_size", type=_whole_number, required=True, metavar="N", help="images in a batch"
    )
    command.add_argument("--out", required=True, metavar="PLAN", help="a file for the plan (JSON)")
    command.add_argument("--overwrite", action="store_true", help="replace PLAN if it exists")
    command.add_argument(
        "--jit_compile",
        choices=("auto", "true", "false"),
        default="auto",
        help="whether training will be compiled; auto: as the model was (default: %(default)s)",
    )
    command.add_argument(
        "--budget_seconds",
        type=_seconds,
        metavar="S",
        help="measure for about so long (default: as long as it takes)",
    )
    _add_cache_folder(command)
    command.add_argument(
        "--refresh", action="store_true", help="measure again what the cache knows"
    )
    command.add_argument(
        "--per_layer",
        action="store_true",
        help="also measure each distinct convolution alone (takes minutes)",
    )
    command.add_argument("--json", action="store_true", help="print the plan as JSON")

    command = _add_command(
        commands,
        "cache",
        _cache,
        "list or remove the measurements that `tune` has kept",
        ["cache --list", "cache --list --json", "cache --clear"],
    )
    action = command.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="print what is there")
    action.add_argument("--clear", action="store_true", help="remove all of it")
    _add_cache_folder(command)
    command.add_argument("--json", action="store_true", help="print JSON")

    command = _add_command(
        commands,
        "restore",
        _restore,
        "write a rewritten model with Keras's own layers again",
        ["restore fast.keras stock.keras"],
    )
    _add_input(command)
    _add_output(command, "a .keras or .h5 file")

    command = _add_command(
        commands,
        "export",
        _export,
        "write a SavedModel, LiteRT or ONNX file, and compare it with the model",
        [
            "export fast.keras saved_model_folder",
            "export fast.keras model.tflite --format=litert",
            "export fast.keras model.onnx --format=onnx --json",
        ],
    )
    _add_input(command)
    _add_output(command, "a folder (SavedModel), a .tflite or an .onnx file")
    command.add_argument(
        "--format",
        choices=("tf_saved_model", "litert", "onnx"),
        default="tf_saved_model",
        help="(default: %(default)s)",
    )
    command.add_argument(
        "--as_is",
        action="store_true",
        help="export the lowerings as they are, not the runtime's own convolutions",
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")

    command = _add_command(
        commands,
        "info",
        _info,
        "print versions, device and lowerings",
        ["info", "info --json"],
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int],
    description: str,
    examples: Sequence[str],
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=description,
        description=f"{description[0].upper()}{description[1:]}.",
        epilog="\n".join(["examples:", *(f"  {_PROGRAM} {example}" for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_input(command: argparse.ArgumentParser) -> None:
    command.add_argument("input", metavar="IN", help="a .keras or .h5 file")
    command.add_argument(
        "--custom_objects",
        metavar="MODULE",
        help="a Python module with the classes and functions that the model needs",
    )
    command.add_argument(
        "--allow_unsafe",
        action="store_true",
        help="run Python code that the file holds (Lambda layers): for files you trust",
    )


def _add_output(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("output", metavar="OUT", help=what)
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _add_cache_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cache_dir",
        metavar="FOLDER",
        help=f"where measurements are kept (default: {ENVIRONMENT_VARIABLE}, else the user's "
        "cache folder)",
    )


def _inspect(options: argparse.Namespace) -> int:
    inspection = inspect_model(_load(options), options.batch_size)
    print(inspection.to_json() if options.json else inspection)
    return 0


def _rewrite(options: argparse.Namespace) -> int:
    model_files.check_model_output(options.output, options.overwrite)
    lowering = Plan.load(options.plan) if options.plan else options.lowering
    model = _load(options)
    rewrite(model, lowering, include=options.include, exclude=options.exclude, in_place=True)
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
        jit_compile={"auto": "auto", "true": True, "false": False}[options.jit_compile],
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
        for name in ("native", "diagonal:32", "diagonal_grouped:32", "dense", "shifted")
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
    """Messages of the package on standard error, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{_PROGRAM}: %(message)s"))
    logger = logging.getLogger("absl")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


@contextlib.contextmanager
def _working(what: str) -> Iterator[None]:
    """Shows on a terminal that long work goes on."""
    with Console(stderr=True).status(what):
        yield


def _lowering(text: str) -> str | dict[str, str]:
    try:
        lowering = json.loads(text) if text.startswith("{") else text
        parse(lowering)
    except ValueError as error:
        raise argparse.ArgumentTypeError(_one_line(error)) from error
    return lowering


def _whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1. Received: {text}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0. Received: {text}")
    return seconds


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
