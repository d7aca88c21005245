"""Markdown as a reader sees it: headings, paragraphs, lists, tables and code, without their marks."""

from __future__ import annotations

from collections.abc import Sequence

from markdown_it import MarkdownIt
from markdown_it.token import Token

from mgam.documents.decoding import decode

_LINE_ENDS = {"list_item_close", "tr_close"}
_BLOCK_ENDS = {"heading_close", "paragraph_close", "bullet_list_close", "ordered_list_close", "table_close"}


def extract(data: bytes, name: str) -> str:
    """The text of a Markdown file: CommonMark with tables; HTML in it is left out.

    Raises:
        DocumentError: as `decode` does.
    """
    parts: list[str] = []
    tight = 0
    for token in MarkdownIt("commonmark").enable("table").parse(decode(data, name)):
        tight += token.nesting if token.type in ("bullet_list_open", "ordered_list_open") else 0
        tight -= token.type in ("bullet_list_close", "ordered_list_close")
        if token.type == "inline":
            parts.append(_inline(token.children or ()))
        elif token.type in ("fence", "code_block"):
            parts.append(f"{token.content}\n")
        elif token.type in ("td_close", "th_close"):
            parts.append("\t")
        elif token.type in _LINE_ENDS or (token.type == "paragraph_close" and tight):
            _end_line(parts, 1)
        elif token.type in _BLOCK_ENDS:
            _end_line(parts, 2)
    return "".join(parts).strip("\n") + "\n"


def _inline(tokens: Sequence[Token]) -> str:
    """The words of a line of text; a picture is what stands in its place when it is missing."""
    words = []
    for token in tokens:
        if token.type in ("softbreak", "hardbreak"):
            words.append("\n")
        elif token.type == "image":
            words.append(_inline(token.children or ()))
        elif token.type in ("text", "code_inline"):
            words.append(token.content)
    return "".join(words)


def _end_line(parts: list[str], count: int) -> None:
    """Ends a line, and leaves a blank one where `count` is 2."""
    text = "".join(parts[-2:]).rstrip("\t")
    there = len(text) - len(text.rstrip("\n"))
    if parts and parts[-1] == "\t":
        parts.pop()
    parts.append("\n" * max(0, count - there))
