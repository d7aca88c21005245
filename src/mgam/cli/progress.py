"""What a person sees while a model reads: notes and a bar on standard error, the answer on standard output."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.status import Status
from rich.text import Text

PLAIN_STEPS = 10  # lines in all where standard error is no terminal


class Stage:
    """Shows one run: `say` before it reads, `begin` and `advance` while it reads, `write` as it answers."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._console = Console(stderr=True, highlight=False)
        self._status: Status | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._started = time.perf_counter()
        self._before = 0
        self._next_line = 1
        self._wrote = False
        self._heading: str | None = None

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heading = None
        self.finish()

    def say(self, note: str) -> None:
        """Show a note until the next one."""
        if self._silent:
            return
        if not self._console.is_terminal:
            self._console.print(note, markup=False)
        elif self._status is None:
            self._status = self._console.status(Text(note))
            self._status.start()
        else:
            self._status.update(Text(note))

    def note(self, line: str, *, always: bool = False) -> None:
        """Show a line that stays; `always`: also where nothing else is shown."""
        if self._silent and not always:
            return
        if self._wrote:
            self.finish()
        self._close()
        self._console.print(line, markup=False, soft_wrap=True)

    def head(self, question: str, *, first: bool) -> None:
        """Put a line before the next answer that says what it answers."""
        self._heading = question if first else f"\n{question}"

    def finish(self) -> None:
        """End an answer."""
        if self._heading is not None:
            self.write("")
        self._close()
        if self._wrote:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._wrote = False

    def begin(self, total: int, before: int = 0) -> None:
        """Start the clock of reading about `total` tokens, of which `before` were read earlier."""
        self._close()
        self._started, self._before = time.perf_counter(), before
        if self._silent or not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("reading"), BarColumn(), TextColumn("{task.fields[note]}"), console=self._console
        )
        self._task = self._bar.add_task("reading", total=total, note=f"{total:,} tokens")
        self._bar.start()

    def advance(self, done: int, total: int) -> None:
        """Show that `done` of `total` tokens have been read."""
        if self._silent:
            return
        note = _note(done, total, done - self._before, time.perf_counter() - self._started)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif done * PLAIN_STEPS >= self._next_line * total:
            self._next_line = done * PLAIN_STEPS // max(total, 1) + 1
            self._console.print(f"read {note}", markup=False)

    def write(self, text: str) -> None:
        """Show a further piece of the answer."""
        if self._silent:
            return
        self._close()
        if self._heading is not None:
            sys.stdout.write(f"{self._heading}\n")
            self._heading = None
        sys.stdout.write(text if self._wrote else text.lstrip())
        sys.stdout.flush()
        self._wrote = self._wrote or bool(text.strip())

    def _close(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _note(done: int, total: int, read: int, seconds: float) -> str:
    speed = read / seconds if seconds > 0 else 0.0
    note = f"{done:,} of {total:,} tokens"
    if not speed:
        return note
    note += f", {speed:,.0f} tokens/s"
    if done >= total:
        return note
    left = round((total - done) / speed)
    return f"{note}, {left // 60}:{left % 60:02d} left"
