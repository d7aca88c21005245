"""Markdown: tables, and what stands in their cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from papertable.figures import Figure

NONE = "not measured"
Results = dict[str, dict[str, Any]]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a head."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: Figure | None) -> str:
    """A figure with its interval."""
    return NONE if value is None else str(value)


def number(value: float | None, digits: int) -> str:
    """A number with so many digits after the point."""
    return NONE if value is None else f"{value:,.{digits}f}"
