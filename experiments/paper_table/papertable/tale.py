"""Narrative: a sentence of a novel or message is asked for by some of its words; the name in it is the answer."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mgam.evaluation.texts import split_sentences
from papertable.sample import NoAnswerError, Piece, Sample, assemble, room
from papertable.shelf import Part, Shelf, around, others, part_of, shelve
from papertable.vocabulary import BLANK, encode

LONGEST, FEWEST_WORDS, MOST_WORDS, NAMES, DROPPED = 64, 8, 40, 4, 0.3
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
NAME = re.compile(r"(?<![.!?\"'“”‘] )(?<=[a-z,;:] )[A-Z][a-z]+(?: [A-Z][a-z]+){0,2}(?![A-Za-z'-])")
"""A run of capitalised words after a word in small letters or a comma: it begins no sentence."""


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


COMMON = _set(
    "I Mr Mrs Miss Ms Dr Sir Lady Lord Captain Colonel General President Mister Madam Oh Ah O The A An And But If "
    "In On It He She They We You This That These Those His Her My Our Your Their What Why How When Where Who Yes "
    "No God Heaven January February March April May June July August September October November December Monday "
    "Tuesday Wednesday Thursday Friday Saturday Sunday Chapter Section Article Congress Government State States "
    "United Senate House Constitution Union Department Secretary Executive Act Treasury Nation American Americans"
)
FUNCTION = _set(
    "a an the of to in on for and or nor but so is are was were be been being am it its this that these those "
    "with by as at from which who whom whose what when where why how he she they we you i him her them us me his "
    "their our your my mine have has had having do does did not no will would shall should can could may might "
    "must there here then than too very all any some such if into upon out up down over under again more most "
    "other only own same s t"
)


def prepare(texts: Iterable[tuple[str, str, str]], tokenizer: Tokenizer) -> Shelf:
    """Sentences of texts (source, name, text) as units, and which of them may be asked for."""
    units: list[list[int]] = []
    documents: list[dict[str, Any]] = []
    for source, name, text in texts:
        first = len(units)
        sentences = [re.sub(r"\s+", " ", piece) for piece in split_sentences(text)]
        names = [_names(sentence) for sentence in sentences]
        cuts = [_cut(sentence, found) for sentence, found in zip(sentences, names, strict=True)]
        tokens = iter(encode(tokenizer, [part for cut in cuts for part in cut]))
        asked, found_in = [], []
        for sentence, found, cut in zip(sentences, names, cuts, strict=True):
            parts = [next(tokens) for _ in cut]
            joined = [token for part in parts for token in part]
            if len(cut) == 3 and len(joined) <= LONGEST:
                asked.append([len(units), found[0], len(parts[0]), len(parts[1]), _words(sentence, found[0])])
            if found:
                found_in.append([len(units), sorted(set(found))])
            units += [joined[at : at + LONGEST] for at in range(0, len(joined), LONGEST)]
        if asked:
            documents.append({"name": name, "part": part_of(source, name), "first": first, "last": len(units),
                              "asked": asked, "names": found_in})  # fmt: skip
        else:
            del units[first:]
    _tokenise_words(documents, tokenizer)
    return Shelf(*shelve(units), documents)


def _names(sentence: str) -> list[str]:
    return [name for name in NAME.findall(sentence) if not COMMON & set(name.split())]


def _cut(sentence: str, names: Sequence[str]) -> tuple[str, ...]:
    """The sentence before its one name, the name, and the rest; or all of it where it cannot be asked for."""
    once = len(names) == 1 and len(re.findall(rf"(?<![A-Za-z]){names[0]}(?![A-Za-z])", sentence)) == 1
    if not once or not FEWEST_WORDS <= len(WORD.findall(sentence)) <= MOST_WORDS:
        return (sentence,)
    at = sentence.index(f" {names[0]}")
    return sentence[:at], f" {names[0]}", sentence[at + 1 + len(names[0]) :]


def _words(sentence: str, name: str) -> list[str]:
    """Words in order without function words, an empty one in place of the name."""
    before, after = sentence.split(f" {name}", 1)
    left, right = ([word for word in WORD.findall(part) if word.lower() not in FUNCTION] for part in (before, after))
    return [*left, "", *right]


def _tokenise_words(documents: list[dict[str, Any]], tokenizer: Tokenizer) -> None:
    """Words of questions as tokens, each word known once."""
    every = sorted({word for document in documents for asked in document["asked"] for word in asked[4] if word})
    known = dict(zip(every, encode(tokenizer, [f" {word}" for word in every]), strict=True)) | {"": [BLANK]}
    for document in documents:
        for asked in document["asked"]:
            asked[4] = [known[word] for word in asked[4]]


def draw(shelf: Shelf, part: Part, length: int, rng: np.random.Generator) -> Sample:
    """A sentence somewhere in a stretch of its text; where the text is shorter, others of the part follow it.

    Raises:
        NoAnswerError: when the part holds no such sentence.
    """
    question, pieces = asked(shelf, part, room(length), rng)
    return assemble("tale", question, pieces, length)


def asked(shelf: Shelf, part: Part, space: int, rng: np.random.Generator) -> tuple[list[int], list[Piece]]:
    """A question, and units that fill `space` tokens, the sentence that is asked for among them.

    Raises:
        NoAnswerError: when the part holds no such sentence.
    """
    documents = shelf.of(part)
    weights = np.array([len(document["asked"]) for document in documents], dtype=float)
    for _ in range(50):
        document = documents[rng.choice(len(documents), p=weights / weights.sum())]
        unit, name, at, size, words = document["asked"][rng.integers(len(document["asked"]))]
        order = around(shelf, document, unit, shelf.size(unit), space, rng)
        if not _fit(document, name, unit, order[0], order[-1]):
            continue
        order += others(shelf, part, document, space - sum(shelf.size(one) for one in order), rng)
        kept = [word for word in words if word == [BLANK] or rng.random() >= DROPPED]
        question = [token for word in kept for token in word]
        span = (at, at + size - 1)
        return question, [Piece(shelf.unit(one), one == unit, span if one == unit else None) for one in order]
    raise NoAnswerError(f"no stretch of {space} tokens of the {part} part holds a sentence that may be asked for")


def _fit(document: dict[str, Any], name: str, unit: int, low: int, high: int) -> bool:
    """Whether the name occurs in another sentence of the stretch, among several names."""
    every = document["names"]
    there = every[bisect_left(every, low, key=itemgetter(0)) : bisect_left(every, high + 1, key=itemgetter(0))]
    different = {one for _, names in there for one in names}
    return len(different) >= NAMES and any(at != unit and name in names for at, names in there)
