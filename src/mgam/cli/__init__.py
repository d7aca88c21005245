"""The command `mgam`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mgam.cli.app import app
from mgam.cli.failure import INTERRUPTED, report
from mgam.processes import leave


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run `mgam` with these arguments and return the exit code.

    0: done; 2: the user can mend what went wrong; 130: stopped with Ctrl-C; 1: a fault of mgam itself.
    """
    import typer

    words = list(arguments) or ["--help"]
    try:
        result = typer.main.get_command(app)(words, prog_name="mgam", standalone_mode=False)
        leave()
    except BaseException as error:
        return report(error, as_json="--json" in words)
    if result == INTERRUPTED:  # some releases of typer swallow Ctrl-C and return this
        return report(KeyboardInterrupt(), as_json="--json" in words)
    return result if isinstance(result, int) else 0
