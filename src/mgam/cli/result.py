"""What follows the answer: the evidence, what was read at which level, time and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mgam.documents.asking import Answer
    from mgam.documents.evidence import Evidence

EXCERPT = 240  # characters


def show(answer: Answer, console: Console | None = None) -> None:
    """Print everything that belongs to `answer` but the answer itself."""
    console = console or Console(highlight=False)
    console.print()
    if answer.found is False:
        console.print(_doubt(answer))
        console.print()
    console.print(_evidence(answer.evidence) if answer.evidence else _no_evidence(answer))
    facts = Table.grid(padding=(0, 2))
    if answer.confidence is not None:
        facts.add_row("found", f"{'yes' if answer.found else 'no'}, confidence {answer.confidence:.2f}")
    facts.add_row("tokens", _listed({name: f"{count:,}" for name, count in answer.tokens.items()}))
    facts.add_row("entries", _entries(answer.entries_per_level))
    if adapter := answer.settings.get("adapter"):
        facts.add_row("adapters", f"{adapter} (the model as it is: --adapter none)")
    facts.add_row("time", _listed({name: f"{seconds:,.1f} s" for name, seconds in answer.seconds.items()}))
    facts.add_row("memory", f"{answer.peak_memory_bytes / 2**30:.2f} GiB at the peak of the process")
    console.print()
    console.print(facts)


def _doubt(answer: Answer) -> Text:
    from mgam.documents.confidence import threshold

    again = "read again" in answer.tokens
    return Text(
        f"Perhaps not found in the text: the confidence is {answer.confidence:.2f}, and answers that stand in a text "
        f"mostly have {threshold(again)} or more ({'after a second look' if again else 'measured on short texts'})."
    )


def _evidence(passages: list[Evidence]) -> Table:
    table = Table(title="What the answer rests on", title_justify="left", show_lines=True)
    table.add_column("share", justify="right")
    table.add_column("where", overflow="fold")
    table.add_column("text", ratio=1)
    for passage in passages:
        place = Text(f"{passage.file}\n{passage.start:,} to {passage.end:,}")
        table.add_row(f"{passage.share:.0%}", place, Text(_excerpt(passage.text)))
    return table


def _no_evidence(answer: Answer) -> Text:
    coarse = sum(count for size, count in answer.entries_per_level.items() if size != "1")
    if not coarse:
        return Text("The text is short enough to be read in full: nothing was chosen from it.")
    return Text("No passage stood out as evidence.")


def _entries(per_level: dict[str, float]) -> str:
    """`per_level` is keyed by tokens for each entry."""
    names = {size: "tokens" if size == "1" else f"summaries of {size} tokens" for size in per_level}
    read = _listed({names[size]: f"{count:,.0f}" for size, count in per_level.items()})
    return f"{read} (average of all queries)" if read else "not counted"


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXCERPT else line[:EXCERPT].rsplit(" ", 1)[0] + " …"


def _listed(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
