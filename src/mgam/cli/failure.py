"""The one place that turns an error into what people and programs see: a line and an exit code, no traceback."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from dataclasses import dataclass

import typer

from mgam.errors import MemoryBudgetError, MgamError

DEBUG_VARIABLE = "MGAM_DEBUG"
INTERRUPTED = 130
FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG

# Some releases of typer carry their own copy of click, others use the installed one; BadParameter leads to both.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


@dataclass(frozen=True)
class Failure:
    """What went wrong, in one line, and the exit code that says so to a shell."""

    kind: str
    message: str
    code: int

    def as_json(self) -> str:
        return json.dumps({"error": {"kind": self.kind, "message": self.message}}, ensure_ascii=False)


def report(error: BaseException, *, as_json: bool) -> int:
    """Tell what `error` means, as JSON on standard output or as a line on standard error, and return the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, BrokenPipeError):
        return _leave_broken_pipe()
    failure = describe(error)
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    if as_json:
        print(failure.as_json(), flush=True)
    else:
        print(f"mgam: {failure.message}", file=sys.stderr, flush=True)
    return failure.code


def describe(error: BaseException) -> Failure:
    """Name `error` in words that a person can act on."""
    if isinstance(error, MgamError):
        return Failure(error.kind, _line(str(error)), 2)
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return Failure("Interrupted", "stopped", INTERRUPTED)
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        hint = f"; see: {context.command_path} --help" if context is not None else ""
        return Failure("UsageError", _line(_said(error)).rstrip(".") + hint, 2)
    if isinstance(error, _ClickException):
        return Failure("UsageError", _line(_said(error)), 2)
    if _is_out_of_memory(error):
        return Failure(
            MemoryBudgetError.__name__,
            f"the memory is used up ({_line(str(error))[:200] or 'no more could be had'}); give a shorter text, "
            "choose a smaller model with --model, or halve the need with --dtype bfloat16",
            2,
        )
    if isinstance(error, OSError) and isinstance(error.filename, str | os.PathLike):
        told = error.strerror or type(error).__name__
        return Failure("FileError", f"{error.filename} cannot be read or written ({told}); name another", 2)
    if isinstance(error, OSError) and error.errno in FULL:
        told = f"no room is left where something was to be written ({error.strerror})"
        return Failure("FileError", f"{told}; make room on that disk, or name another place", 2)
    return Failure(
        "InternalError",
        f"a fault of mgam, not of yours: {type(error).__name__}: {_line(str(error))[:400]}; "
        f"set {DEBUG_VARIABLE}=1 to see where it arose, and report that with what `mgam env` prints",
        1,
    )


def _said(error: Exception) -> str:
    format_message = getattr(error, "format_message", None)
    said = str(format_message() if callable(format_message) else error)
    return said.replace(": Value error, ", ": ")  # some releases of typer put it before our own words


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said)


def _line(text: str) -> str:
    return " ".join(text.split())


def _leave_broken_pipe() -> int:
    """The reader of our output left (`mgam ... | head`): be silent, and keep Python from complaining at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
