"""The data sets that the paper names, in the same form: CNN/DailyMail, HotpotQA and NarrativeQA."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mgam.evaluation.texts import TextLibrary, split_sentences
from papertable import lead
from papertable.sample import NoAnswerError, Piece, Sample, assemble, room
from papertable.shelf import Part, Shelf, around, others, part_of, shelve
from papertable.vocabulary import SIZE, encode, train_tokenizer

SOURCES = ("cnn_dailymail", "hotpotqa", "narrativeqa")
LONGEST = 64
Cut = list[str]
"""A unit as one piece of text; or as what stands before the answer, the answer, and the rest."""


def shelves(texts: TextLibrary, path: Path) -> tuple[dict[str, Shelf], dict[str, int]]:
    """Shelves by task, and records refused by task."""
    records = {source: texts.records(source, None) for source in SOURCES}
    tokenizer = train_tokenizer(_train(records), path, SIZE)
    articles = [
        lead.Article("cnn_dailymail", record["id"], "highlights", "\n".join(record["highlights"]), record["article"])
        for record in records["cnn_dailymail"].values()
    ]
    made = {"lead": lead.prepare(articles, tokenizer)}
    made["hop"] = _questions("hotpotqa", records["hotpotqa"], hotpot_units, tokenizer)
    made["tale"] = _questions("narrativeqa", records["narrativeqa"], story_units, tokenizer)
    every = {task: len(records[source]) for task, source in zip(made, SOURCES, strict=True)}
    return made, {task: every[task] - len(shelf.documents) for task, shelf in made.items()}


def _train(records: dict[str, dict[str, dict[str, Any]]]) -> Iterator[str]:
    for source, every in records.items():
        for record in every.values():
            if part_of(source, record["id"]) == "train":
                yield str(record.get("article") or record.get("story") or "")
                yield "\n".join("".join(sentences) for _, sentences in record.get("paragraphs", ()))


def hotpot_units(record: dict[str, Any]) -> tuple[list[Cut], list[int]]:
    """A heading and sentences of each paragraph; the supporting facts are gold, in one of which the answer stands.

    Raises:
        NoAnswerError: for yes and no, and where no supporting fact holds the answer.
    """
    facts = {(title, number) for title, number in record["facts"]}
    units: list[Cut] = []
    gold: list[int] = []
    answered = False
    for title, sentences in record["paragraphs"]:
        units.append([f"\n\n{title}"])
        for number, sentence in enumerate(sentences):
            text = " " + sentence.strip()
            supports = (title, number) in facts
            cut = None if answered or not supports else _around(text, record["answer"])
            answered = answered or cut is not None
            if supports:
                gold.append(len(units))
            units.append(cut or [text])
    if not answered:
        raise NoAnswerError(f"the supporting facts of {record['id']} do not hold {record['answer']!r}")
    return units, gold


def story_units(record: dict[str, Any]) -> tuple[list[Cut], list[int]]:
    """Sentences of a story; the first that holds one of the answers, the shortest answer first, is gold.

    Raises:
        NoAnswerError: where none does.
    """
    sentences = [re.sub(r"\s+", " ", piece) for piece in split_sentences(record["story"])]
    for answer in sorted(record["answers"], key=len):
        for number, sentence in enumerate(sentences):
            cut = _around(sentence, answer.rstrip("."))
            if cut is not None:
                return [cut if at == number else [one] for at, one in enumerate(sentences)], [number]
    raise NoAnswerError(f"the story of {record['id']} holds none of its answers word by word")


def _around(text: str, answer: str) -> Cut | None:
    """The text before an answer that stands there as whole words, the answer with its blank, and the rest."""
    words = re.escape(answer.strip())
    found = re.search(rf" {words}(?![A-Za-z0-9])", text, re.IGNORECASE) if words else None
    return None if found is None else [text[: found.start()], found.group(), text[found.end() :]]


def _questions(source: str, records: dict[str, dict[str, Any]], units_of: Any, tokenizer: Tokenizer) -> Shelf:
    units: list[list[int]] = []
    documents: list[dict[str, Any]] = []
    for record in records.values():
        try:
            cuts, gold = units_of(record)
        except NoAnswerError:
            continue
        first, span, placed = len(units), None, []
        tokens = iter(encode(tokenizer, [part for cut in cuts for part in cut]))
        for number, cut in enumerate(cuts):
            parts = [next(tokens) for _ in cut]
            joined = [token for part in parts for token in part]
            pieces = [joined[at : at + LONGEST] for at in range(0, len(joined), LONGEST)]
            if number in gold:
                at = len(parts[0]) if len(cut) == 3 else 0
                placed.append(len(units) - first + at // LONGEST)
                if len(cut) == 3:
                    begin, end = at % LONGEST, at % LONGEST + len(parts[1]) - 1
                    span = [placed[-1], begin, end] if end < len(pieces[at // LONGEST]) else None
            units += pieces
        if span is None:
            del units[first:]  # the answer is cut by the border of a unit
            continue
        documents.append({"name": record["id"], "part": part_of(source, record["id"]), "first": first,
                          "last": len(units), "gold": placed, "span": span,
                          "asked": encode(tokenizer, [f" {record['question']}"])[0]})  # fmt: skip
    return Shelf(*shelve(units), documents)


def draw(task: str, shelf: Shelf, part: Part, length: int, rng: np.random.Generator) -> Sample:
    """A question over its own units, at most as many as fit around the evidence, among those of other records.

    Raises:
        NoAnswerError: the part has no records, or none whose evidence lies close enough together.
    """
    documents, space = shelf.of(part), room(length)
    for _ in range(50 if documents else 0):
        document = documents[rng.integers(len(documents))]
        gold = [document["first"] + number for number in document["gold"]]
        place, first, last = document["first"] + document["span"][0], document["span"][1], document["span"][2]
        needed = sum(shelf.size(at) for at in range(min(gold), max(gold) + 1))
        if needed > space:
            continue
        order = around(shelf, document, min(gold), needed, space, rng)
        order += others(shelf, part, document, space - sum(shelf.size(at) for at in order), rng)
        pieces = [Piece(shelf.unit(at), at in gold, (first, last) if at == place else None) for at in order]
        return assemble(task, document["asked"], pieces, length)
    raise NoAnswerError(f"the {part} part holds no {task} record whose evidence fits into {length} tokens")
