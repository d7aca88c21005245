"""The main job, as anybody would run it: ask a question of a long text with the default model, and check the answer.

    python examples/demo.py

Ends with exit code 1 when the answer is wrong.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Question:
    """A question whose answer is known."""

    file: str
    question: str
    expected: str
    """Regular expression that a right answer matches, whatever the case of its letters."""
    passage: str
    """Words of the text that the answer rests on; they occur in it once."""


def questions() -> list[Question]:
    """Those that are shipped with the project; the first is the demo's."""
    return [Question(**row) for row in json.loads((HERE / "questions.json").read_text(encoding="utf-8"))]


def main() -> int:
    """Ask the first question and say whether the answer is right."""
    asked = questions()[0]
    text = (HERE / asked.file).read_text(encoding="utf-8")
    place = text.index(asked.passage) / len(text)
    print(f'$ mgam ask examples/{asked.file} "{asked.question}"\n', flush=True)
    printed = _run([sys.executable, "-m", "mgam", "ask", str(HERE / asked.file), asked.question])
    answer = printed.split("\n\n")[0]  # the facts that follow are set apart by an empty line
    if not re.search(asked.expected, answer, re.IGNORECASE):
        print(
            f"\nWRONG: the answer was to match {asked.expected!r}; it stands {place:.0%} into the text", file=sys.stderr
        )
        return 1
    print(f"\nThe answer is right. What it rests on stands {place:.0%} into the text.")
    return 0


def _run(command: list[str]) -> str:
    """Run `command`, show what it prints as it prints it, and return that; leave when it fails."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdout is not None
    printed = b""
    while piece := process.stdout.read(4096):
        sys.stdout.buffer.write(piece)
        sys.stdout.flush()
        printed += piece
    if code := process.wait():
        sys.exit(code)
    return printed.decode("utf-8", errors="replace")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # mgam itself has said so already
        sys.exit(130)
