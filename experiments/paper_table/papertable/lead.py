"""Summarization: which sentences of an article's body carry its lead."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mgam.evaluation.rouge import rouge_n
from mgam.evaluation.texts import split_sentences
from papertable.sample import Piece, Sample, assemble, room
from papertable.shelf import Part, Shelf, part_of, shelve, stretch
from papertable.vocabulary import encode

LONGEST, GOLD = 64, 3
SHORTEST_LEAD, SHORTEST_BODY, FEWEST = 400, 4000, 8
SHARE = (0.3, 0.6)


@dataclass(frozen=True)
class Article:
    """A text and its summary."""

    source: str
    name: str
    title: str
    lead: str
    body: str


def prepare(articles: Iterable[Article], tokenizer: Tokenizer) -> Shelf:
    """Sentences of bodies as units, each with what it has of the lead."""
    units: list[list[int]] = []
    documents: list[dict[str, Any]] = []
    for article in articles:
        sentences = [re.sub(r"\s+", " ", piece) for piece in split_sentences(article.body)]
        first, scores = len(units), []
        for sentence, tokens in zip(sentences, encode(tokenizer, sentences), strict=True):
            pieces = [tokens[at : at + LONGEST] for at in range(0, len(tokens), LONGEST)]
            said = [sentence] if len(pieces) == 1 else [tokenizer.decode(piece) for piece in pieces]
            for text, piece in zip(said, pieces, strict=True):
                units.append(piece)
                scores.append(round(sum(rouge_n(text, article.lead, n).f1 for n in (1, 2)), 6))
        if len(units) - first < FEWEST:
            del units[first:]
            continue
        documents.append(
            {
                "name": article.name,
                "part": part_of(article.source, article.name),
                "first": first,
                "last": len(units),
                "asked": encode(tokenizer, [f" {article.title}"])[0],
                "lead": article.lead,
                "scores": scores,
            }
        )
    return Shelf(*shelve(units), documents)


def draw(shelf: Shelf, part: Part, length: int, rng: np.random.Generator) -> Sample:
    """A run of one article among units of others."""
    documents, space = shelf.of(part), room(length)
    chosen = documents[rng.integers(len(documents))]
    low, high = chosen["first"], chosen["last"]
    begin = int(rng.integers(low, max(low + 1, high - FEWEST)))
    run = [at for at in stretch(shelf, begin, int(space * rng.uniform(*SHARE)), low, high) if at >= begin]
    best = set(sorted(run, key=lambda at: (-chosen["scores"][at - low], at))[:GOLD])
    left = space - sum(shelf.size(at) for at in run)
    before = int(left * rng.random())
    ahead = _others(shelf, documents, chosen, before, rng)
    used = sum(shelf.size(at) for at in ahead)
    order = [*ahead, *run, *_others(shelf, documents, chosen, left - used + LONGEST, rng)]
    pieces = [Piece(shelf.unit(at), at in best) for at in order]
    return assemble("lead", chosen["asked"], pieces, length, chosen["lead"])


def _others(
    shelf: Shelf, documents: list[dict[str, Any]], chosen: dict[str, Any], space: int, rng: np.random.Generator
) -> list[int]:
    """Whole units of other articles that take no more than `space` tokens."""
    found: list[int] = []
    for number in rng.permutation(len(documents)):
        other = documents[number]
        if other is chosen:
            continue
        at = int(rng.integers(other["first"], other["last"]))
        while at < other["last"] and shelf.size(at) <= space:
            found.append(at)
            space -= shelf.size(at)
            at += 1
        if at < other["last"] or space < FEWEST:
            break
    return found
