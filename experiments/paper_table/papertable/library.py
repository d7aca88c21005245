"""All tasks' texts, made once and kept in the cache folder; samples are drawn from them."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mgam.evaluation.texts import TextLibrary
from mgam.integrations.cache import cache_folder
from papertable import far, hop, lead, published, tale
from papertable.hop import SOURCE
from papertable.sample import Sample
from papertable.shelf import PARTS, Part, Shelf, part_of
from papertable.vocabulary import SIZE, train_tokenizer

TASKS = ("lead", "hop", "tale")
"""Those of the table."""
SOURCES = ("wikipedia", "factbook", "novels", "speeches")
DRAW: dict[str, Any] = {"lead": lead.draw, "hop": hop.draw, "tale": tale.draw, "far": far.draw}
SHELF = {"far": "tale"}
"""Tasks that are made of the texts of another."""
FORM = 1
"""Goes up when texts are prepared in another way."""


@dataclass
class Library:
    """Shelves by task, and the tokenizer."""

    name: str
    tokenizer: Tokenizer
    shelves: dict[str, Shelf]
    refused: dict[str, int] = field(default_factory=dict)
    """Records by task that were refused, because their documents do not hold what is asked for."""
    data: str = "packages"

    def sample(self, task: str, part: Part, length: int, seed: int, number: int) -> Sample:
        """A pure function of its arguments and the texts.

        Raises:
            NoAnswerError: when the part holds nothing that can be asked for at this length.
        """
        rng = np.random.default_rng([zlib.crc32(task.encode()), PARTS.index(part), length, seed, number])
        if self.data == "published" and task != "lead":
            return published.draw(task, self.shelves[task], part, length, rng)
        return DRAW[task](self.shelves[SHELF.get(task, task)], part, length, rng)

    def offers(self, tasks: Sequence[str]) -> bool:
        """Whether there are texts for these tasks; the published data sets have none for `far`."""
        return self.data == "packages" or not set(tasks) & set(SHELF)

    def text(self, tokens: Any) -> str:
        """What tokens say, without blanks around it."""
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True).strip()


def open_library(data: str = "packages", texts: TextLibrary | None = None, root: Path | None = None) -> Library:
    """The library of `packages` (texts that install from packages) or `published` (data sets), made if need be.

    Raises:
        DocumentError: a text is not on this machine; the message says which, and how it is fetched.
    """
    texts = texts or TextLibrary()
    sources, make = (published.SOURCES, published.shelves) if data == "published" else (SOURCES, _shelves)
    version = hashlib.sha256("/".join([data, str(FORM), *(texts.version(name) for name in sources)]).encode())
    folder = (root or cache_folder() / "paper_table") / version.hexdigest()[:12]
    if not (folder / "done.json").is_file():
        partial = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        shelves, refused = make(texts, partial / "tokenizer.json")
        for name, shelf in shelves.items():
            shelf.save(partial, name)
        (partial / "done.json").write_text(json.dumps({"tasks": list(shelves), "refused": refused}))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    known = json.loads((folder / "done.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    shelves = {name: Shelf.load(folder, name) for name in known["tasks"]}
    return Library(folder.name, tokenizer, shelves, known["refused"], data)


def _shelves(texts: TextLibrary, path: Path) -> tuple[dict[str, Shelf], dict[str, int]]:
    articles = [
        lead.Article("wikipedia", name, record["title"], record["lead"], record["body"])
        for name, record in texts.records("wikipedia", None).items()
        if len(record["lead"]) >= lead.SHORTEST_LEAD and len(record["body"]) >= lead.SHORTEST_BODY
    ]
    countries = texts.records(SOURCE, None)
    stories = [
        (text.source, text.name, text.text) for name in ("novels", "speeches") for text in texts.texts(name, None)
    ]

    def train() -> Iterator[str]:
        for article in articles:
            if part_of(article.source, article.name) == "train":
                yield article.body
        for code, record in countries.items():
            if part_of(SOURCE, code) == "train":
                for title, inside in record.items():
                    yield from (f"\n{title} {label}: {value}" for label, value in hop._leaves(inside, ()))
        for source, name, text in stories:
            if part_of(source, name) == "train":
                yield text

    tokenizer = train_tokenizer(train(), path, SIZE)
    made = {
        "lead": lead.prepare(articles, tokenizer),
        "hop": hop.prepare(countries.items(), tokenizer),
        "tale": tale.prepare(stories, tokenizer),
    }
    every = {"lead": len(texts.texts("wikipedia", None)), "hop": len(countries), "tale": len(stories)}
    return made, {task: every[task] - len(shelf.documents) for task, shelf in made.items()}
