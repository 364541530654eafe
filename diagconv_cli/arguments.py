"""What `diagconv` accepts: its commands, their arguments, and the checks of values."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from typing import Any

PROGRAM = "diagconv"

#: What one lowering may be called; `diagconv_tf.lowerings.parse` has the last word.
_LOWERING = re.compile(r"auto|native|shifted|fused|dense|diagonal|diagonal(_grouped)?:[1-9][0-9]*")
_PASSES = ("forward", "input_gradient", "kernel_gradient")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; `command` of its result names the command."""
    program = argparse.ArgumentParser(
        prog=PROGRAM, description="Faster training of depthwise convolutions in Keras."
    )
    program.add_argument("--version", action=_Version, help="show the version and exit")
    commands = program.add_subparsers(
        title="commands", required=True, metavar="COMMAND", dest="command"
    )

    command = _add_command(
        commands,
        "inspect",
        "list a model's convolutions with groups: FLOPs, lowering, why not",
        ["inspect model.keras", "inspect model.keras --batch_size=64 --json"],
    )
    _add_input(command)
    command.add_argument(
        "--batch_size", type=_whole_number, metavar="N", help="images, for FLOPs (default: one)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")

    command = _add_command(
        commands,
        "rewrite",
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
        help="how the layers compute, as for their `lowering`; one per pass as JSON "
        "(default: that of `diagconv_tf.rewrite`)",
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
        "measure which lowering trains a model fastest, and write it as a plan",
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
        "write a rewritten model with Keras's own layers again",
        ["restore fast.keras stock.keras"],
    )
    _add_input(command)
    _add_output(command, "a .keras or .h5 file")

    command = _add_command(
        commands,
        "export",
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
        commands, "info", "print versions, device and lowerings", ["info", "info --json"]
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    return program


def _add_command(
    commands: argparse._SubParsersAction, name: str, description: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=description,
        description=f"{description[0].upper()}{description[1:]}.",
        epilog="\n".join(["examples:", *(f"  {PROGRAM} {example}" for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


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
        help="where measurements are kept (default: DIAGCONV_CACHE_DIR, else the user's cache "
        "folder)",
    )


class _Version(argparse.Action):
    """Prints the version; looks it up only when asked."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import importlib.metadata

        print(f"diagconv_tf {importlib.metadata.version('diagconv-tf')}")
        parser.exit()


def check_input(options: argparse.Namespace) -> None:
    """Refuses at once what `diagconv_tf.model_files` refuses seconds later.

    Raises:
        ValueError: if the input file is missing or has another suffix.
    """
    path = getattr(options, "input", None)
    if path is None or os.path.isdir(path):  # A folder needs a longer answer.
        return
    if not os.path.exists(path):
        raise ValueError(f"{path}: there is no such file")
    if not path.endswith((".keras", ".h5")):
        raise ValueError(f"Expected a file named *.keras or *.h5. Received: {path}")


def _lowering(text: str) -> str | dict[str, str]:
    lowering = text
    if text.startswith("{"):
        try:
            lowering = json.loads(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"expected a lowering, or one per pass as JSON. Received: {text} ({error})"
            ) from error
    names = [lowering]
    if isinstance(lowering, dict):
        names = list(lowering.values()) if set(lowering) == set(_PASSES) else [None]
    if not all(isinstance(name, str) and _LOWERING.fullmatch(name) for name in names):
        raise argparse.ArgumentTypeError(
            "expected a lowering: auto, native, diagonal:N, diagonal (N = 32), diagonal_grouped:N, "
            "dense, shifted or fused, with N an integer >= 1; or JSON with one for each of "
            f"{', '.join(_PASSES)}. Received: {text}"
        )
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


def one_line(error: BaseException) -> str:
    """The message of an error, or its class where it has none, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
