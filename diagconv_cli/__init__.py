"""The `diagconv` command line, read before Keras or its backend is imported.

`import diagconv_tf` registers the layers with Keras and so imports Keras's
backend, which takes seconds. The console script therefore starts in a package
of its own, which needs the standard library only. It answers `--help`,
`--version` and wrong usage, and imports the commands (`diagconv_tf.cli`) to
run one.

`python -m diagconv_cli` runs the same command. There is no `python -m
diagconv_tf`: Python imports a package before it runs its `__main__`.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Sequence

from diagconv_cli.arguments import PROGRAM, check_input, one_line, parser
from diagconv_cli.quiet import silence_tensorflow_log


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: without the program's name; None means `sys.argv`.

    Returns:
        The exit code: 0, or 1 where the command fails. Wrong usage exits with 2.
    """
    options = parser().parse_args(arguments)
    # Ctrl-C and SIGTERM both unwind, so that half-written files are removed.
    with contextlib.suppress(ValueError):  # Not the main thread.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check_input(options)
        silence_tensorflow_log()
        from diagconv_tf import cli

        return cli.run(options)
    # Imports raise what Keras says of a missing or misspelt backend.
    except (ImportError, ValueError) as error:
        message = one_line(error)
    except KeyboardInterrupt:
        message = "interrupted"
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return 1
