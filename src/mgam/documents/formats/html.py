"""HTML as a browser shows it: words and lines, without marks, scripts and styles."""

from __future__ import annotations

import re
import warnings
from typing import Any

from bs4 import BeautifulSoup, XMLParsedAsHTMLWarning
from bs4.dammit import EncodingDetector
from bs4.element import NavigableString, PreformattedString, Tag

from mgam.documents.decoding import decode

_UNSEEN = {"script", "style", "template", "noscript", "iframe", "object", "svg", "math"}
_PARAGRAPHS = {
    "address", "article", "aside", "blockquote", "dl", "fieldset", "figure", "footer", "form", "h1", "h2", "h3", "h4",
    "h5", "h6", "header", "hr", "main", "nav", "ol", "p", "pre", "section", "table", "title", "ul",
}  # fmt: skip
_LINES = {"br", "dd", "div", "dt", "figcaption", "li", "tr", "option"}
_CELLS = {"td", "th"}
_BLANKS = re.compile(r"[ \t\r\n\f]+")


def extract(data: bytes, name: str) -> str:
    """The text of an HTML page, in the encoding that it declares, else UTF-8.

    Raises:
        DocumentError: as `decode` does.
    """
    declared = EncodingDetector.find_declared_encoding(data, is_html=True, search_entire_document=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
        page = BeautifulSoup(decode(data, name, declared=declared), "html.parser")
    return _Page().text(page)


class _Page:
    """Collects the words of a page; the walk is a list of things to do, so that no nesting is too deep."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.broken = 2
        """Line ends that the text so far ends with; 2 where nothing stands yet."""

    def text(self, page: Tag) -> str:
        """All words in the order in which they stand."""
        todo: list[Any] = [page]
        exact = 0
        while todo:
            node = todo.pop()
            if isinstance(node, tuple):
                self._break(node[0])
                exact -= node[0] == "pre"
            elif isinstance(node, Tag):
                if node.name in _UNSEEN:
                    continue
                self._break(node.name)
                if node.name in _CELLS and not self.broken:
                    self.parts.append("\t")
                exact += node.name == "pre"
                todo.append((node.name,))
                todo.extend(reversed(node.contents))
            elif isinstance(node, NavigableString) and not isinstance(node, PreformattedString):
                self._say(str(node) if exact else _BLANKS.sub(" ", str(node)), bool(exact))
        return "".join(self.parts).strip() + "\n"

    def _break(self, name: str) -> None:
        wanted = 2 if name in _PARAGRAPHS else 1 if name in _LINES else 0
        if wanted > self.broken:
            self.parts.append("\n" * (wanted - self.broken))
            self.broken = wanted

    def _say(self, words: str, exact: bool) -> None:
        if not exact and (self.broken or self.parts[-1].endswith((" ", "\t"))):
            words = words.lstrip(" ")
        if words:
            self.parts.append(words)
            self.broken = len(words) - len(words.rstrip("\n")) if exact else 0
