"""Real text for haystacks and questions: what is shipped, and what `mgam data fetch` has put into the cache."""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from mgam.errors import DocumentError
from mgam.evaluation.paths import texts_folder
from mgam.evaluation.splits import Split, split_of

KNOWN = (
    "shipped", "novels", "speeches", "factbook", "wikipedia", "essays", "hotpotqa", "narrativeqa", "cnn_dailymail",
    "longbench",
)  # fmt: skip
PROSE_ORDER = ("novels", "essays", "speeches", "shipped")
"""Which source a prose haystack takes when none is named: the first that is there."""

_SENTENCE_END = re.compile(r"(?<=[.!?])[ \n]+|\n\n+")


@dataclass(frozen=True)
class Text:
    """One document of a source."""

    source: str
    name: str
    text: str

    @property
    def split(self) -> Split:
        return split_of(self.source, self.name)


@cache
def words() -> tuple[str, ...]:
    """Some eight thousand plain English words, in alphabetical order."""
    return tuple(_shipped("words.txt").split())


def _shipped(name: str) -> str:
    return resources.files("mgam.evaluation").joinpath("data", name).read_text(encoding="utf-8")


class TextLibrary:
    """The sources in one cache directory, plus the shipped excerpt; each is read once, when first asked for."""

    def __init__(self, root: Path | None = None, prose: str | None = None) -> None:
        self.root = root if root is not None else texts_folder()
        self._prose = prose
        self._texts: dict[str, tuple[Text, ...]] = {}
        self._sentences: dict[Text, tuple[str, ...]] = {}

    def has(self, source: str) -> bool:
        return source == "shipped" or (self.root / source / "manifest.json").is_file()

    @cached_property
    def prose_source(self) -> str:
        """The source that prose haystacks are made of."""
        if self._prose is not None:
            self._require(self._prose)
            return self._prose
        return next(source for source in PROSE_ORDER if self.has(source))

    def _require(self, source: str) -> None:
        if source not in KNOWN:
            near = difflib.get_close_matches(source, KNOWN, n=3, cutoff=0.5)
            raise DocumentError(
                f"there is no text source {source!r}; {'did you mean' if near else 'known are'} "
                f"{' or '.join(near) if near else ', '.join(KNOWN)}?"
            )
        if not self.has(source):
            raise DocumentError(
                f"the text source {source!r} is not on this machine (looked in {self.root / source}); run "
                f"`mgam data fetch {source}`; tasks that need no fetched text run without it"
            )

    def manifest(self, source: str) -> dict[str, Any]:
        """What was fetched, from where, and under which licence."""
        self._require(source)
        path = self.root / source / "manifest.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise DocumentError(f"{path} is damaged ({error}); run `mgam data fetch {source} --again`") from error

    def version(self, source: str) -> str:
        """A hash that changes when the source's text does: part of the name of every sample made from it."""
        if source == "shipped":
            return hashlib.sha256(_shipped("moby-dick.txt").encode()).hexdigest()[:12]
        return str(self.manifest(source).get("sha256", "unknown"))[:12]

    def texts(self, source: str, split: Split | None = "test") -> tuple[Text, ...]:
        """The documents of `source` in order of name; `split=None` gives all of them."""
        if source not in self._texts:
            self._texts[source] = self._load(source)
        found = self._texts[source]
        return found if split is None else tuple(text for text in found if text.split == split)

    def for_tasks(self, source: str) -> tuple[Text, ...]:
        """TEST documents; where a source has none, as the shipped excerpt, TUNE ones: for trying, not for figures."""
        return self.texts(source, "test") or self.texts(source, "tune")

    def _load(self, source: str) -> tuple[Text, ...]:
        self._require(source)
        if source == "shipped":
            return (Text("novels", "moby-dick", _shipped("moby-dick.txt")),)
        files = sorted(path for path in (self.root / source).iterdir() if path.name != "manifest.json")
        return tuple(Text(source, path.stem, path.read_text(encoding="utf-8")) for path in files)

    def records(self, source: str, split: Split | None = "test") -> dict[str, dict[str, Any]]:
        """The documents of a source that are JSON objects, by name."""
        return {text.name: json.loads(text.text) for text in self.texts(source, split)}

    def sentences(self, text: Text) -> tuple[str, ...]:
        """Sentences, each with the white space before it, so that they join to running text."""
        if text not in self._sentences:
            self._sentences[text] = tuple(split_sentences(text.text))
        return self._sentences[text]

    def prose(self, rng: random.Random) -> Iterator[str]:
        """Endless running prose: documents of the prose source, from a place drawn by `rng`, then round again."""
        documents = self.for_tasks(self.prose_source)
        first = rng.randrange(len(documents))
        start = rng.randrange(len(self.sentences(documents[first])))
        yield from self.sentences(documents[first])[start:]
        while True:
            first = (first + 1) % len(documents)
            yield from self.sentences(documents[first])


def split_sentences(text: str) -> Iterator[str]:
    """Cuts running text after full stops and at blank lines; each piece keeps a blank or a blank line before it."""
    before, place = "\n\n", 0
    for seam in _SENTENCE_END.finditer(text):
        piece = text[place : seam.start()].replace("\n", " ").strip()
        if piece:
            yield before + piece
            before = " "
        if "\n\n" in seam.group():
            before = "\n\n"
        place = seam.end()
    rest = text[place:].replace("\n", " ").strip()
    if rest:
        yield before + rest
