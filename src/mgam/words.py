"""Words of messages."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """A number of things: `1 text`, `2 texts`, `1,200 texts`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
