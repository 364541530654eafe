"""The `diagconv` command."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from diagconv_tf import __version__
from diagconv_tf.lowerings import ACCEPTED
from diagconv_tf.spec import Conditions


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: without the program's name; None means `sys.argv`.

    Returns:
        The exit code: 0, or 1 where what was asked for cannot be done. Wrong
        usage exits with 2.
    """
    parser = argparse.ArgumentParser(
        prog="diagconv", description="Faster training of depthwise convolutions in Keras."
    )
    parser.add_argument("--version", action="version", version=f"diagconv_tf {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)
    info = commands.add_parser(
        "info",
        help="versions, device and lowerings",
        description="Prints what convolutions run on here.",
        epilog="Example: KERAS_BACKEND=jax diagconv info --json",
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    options = parser.parse_args(arguments)
    return options.run(options)


def _info(options: argparse.Namespace) -> int:
    conditions = Conditions.current()
    if options.json:
        print(json.dumps({"diagconv_tf": __version__, **dataclasses.asdict(conditions)}, indent=2))
        return 0
    print(f"diagconv_tf {__version__}")
    for package, version in conditions.versions:
        print(f"{package} {version}")
    print(f"backend {conditions.backend} on {conditions.device_kind} ({conditions.device_name})")
    print(f"lowering: {ACCEPTED}")
    return 0
