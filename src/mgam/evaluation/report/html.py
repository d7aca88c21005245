"""Small pieces of HTML that every section is made of."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mgam.evaluation.report.charts import colours


def section(title: str, note: str, *body: str) -> str:
    """A heading, a line that says how to read it, and what is shown."""
    said = f'<p class="faint">{escape(note)}</p>' if note else ""
    return f"<h2>{escape(title)}</h2>{said}{''.join(body)}"


def key(method: str, methods: Sequence[str]) -> str:
    """The method's name behind a spot of its colour."""
    return f'<span class="key" style="background:{colours(methods)[method]}"></span>{escape(method)}'


def legend(methods: Sequence[str]) -> str:
    """All methods with their colours."""
    return f"<p>{' &nbsp; '.join(key(method, methods) for method in methods)}</p>"


def table(head: Sequence[str], body: Sequence[str], words: Sequence[int] = (0, 1)) -> str:
    """A table; the columns in `words` hold words, which stand on the left."""
    cells = "".join(
        f'<th class="left">{escape(name)}</th>' if number in words else f"<th>{escape(name)}</th>"
        for number, name in enumerate(head)
    )
    return f'<div class="scroll"><table><tr>{cells}</tr>{"".join(body)}</table></div>'
