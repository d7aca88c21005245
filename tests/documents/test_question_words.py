"""Headings, and where a question's words stand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from mgam.documents.headings import heading, headings
from mgam.documents.question_words import matches
from mgam.documents.sources import Source

LANDS = """All lands

Chad

Capital: N'Djamena
People: 11 million.

Document 3fa2b1: Niger
Capital: Niamey
Population: 18 million

The rest of this text is prose, which
goes on in the next line. It has no
heading of its own.

"Who is there?" she asked.

End
"""


def titles(text: str) -> list[str]:
    return [text[start:end] for start, end in headings(text)]


def test_headings_are_short_lines_that_no_sentence_is() -> None:
    assert titles(LANDS) == ["All lands", "Chad", "Capital: N'Djamena", "Document 3fa2b1: Niger", "End"]


@pytest.mark.parametrize("text", ["", "\n\n", "no line break", "one sentence.\n\nanother one.\n"])
def test_a_text_may_have_no_heading(text: str) -> None:
    assert titles(text) == []
    assert heading(text, 0) is None


def test_a_place_belongs_to_the_last_heading_before_it() -> None:
    for words, title in (("Niamey", "Document 3fa2b1: Niger"), ("prose", "Document 3fa2b1: Niger")):
        found = heading(LANDS, LANDS.index(words))
        assert found is not None
        assert LANDS[slice(*found)] == title
    found = heading(LANDS, LANDS.index("Document 3fa2b1") + 3)
    assert found is not None
    assert LANDS[slice(*found)] == "Document 3fa2b1: Niger"


@dataclass
class Letters:
    """Places of a text of which every character is a token."""

    source: Source

    def place(self, first: int, last: int) -> tuple[Source, int, int] | None:
        last = min(last, len(self.source.text))
        return (self.source, first, last) if first < last else None


def told(text: str, question: str, chunk: int) -> torch.Tensor:
    source = Source("a.txt", text)
    return matches(question, Letters(source), [source], -(-len(text) // chunk), chunk).score


def test_a_chunk_counts_by_its_own_words_and_by_its_heading() -> None:
    filler = "Nothing is said here of anything at all.\n" * 20
    text = f"Chad\n\n{filler}capital: one\n{filler}\n\nNiger\n\n{filler}capital: two\n{filler}\n\nMali\n\n{filler}"
    score = told(text, "What capital has NIGER?", 16)
    best = int(score.argmax())
    assert "capital: two" in text[best * 16 - 16 : best * 16 + 32]
    of_niger = score[text.index("Niger") // 16 + 1 : text.index("Mali") // 16 - 1]
    others = score[text.index("Mali") // 16 + 1 :]
    assert float(of_niger.min()) > float(others.max())


def test_what_stands_everywhere_counts_nothing() -> None:
    score = told("the sea and the land. " * 40 + "the whale. ", "the whale", 22)
    assert int(score.argmax()) == 40
    assert score[:39].tolist() == [0.0] * 39


@pytest.mark.parametrize(
    ("text", "question"),
    [("The Congreſs sat.", "congress"), ("Die Straße.", "STRASSE STRAßE"), ("İi ıI K k", "i k I K")],
)
def test_letters_that_are_alike_but_for_their_case(text: str, question: str) -> None:
    score = told("Nothing here at all. " * 9 + text, question, 21)
    assert int(score.argmax()) == 9
    assert float(score[9]) > 0


@pytest.mark.parametrize("question", ["", "?!", "nowhere", "a.b (c) [d"])
def test_a_question_may_share_no_word(question: str) -> None:
    assert told("some text of several words. " * 10, question, 16).tolist() == [0.0] * 18
    assert told("", "word", 16).tolist() == []


def test_words_may_be_as_rare_as_they_are_in_a_longer_text() -> None:
    """Among passages about one thing "sail" may be rarer than what they are about."""
    long = Source("a.txt", "So they sail " * 30 + "The whale blew" + "So they sail " * 30)
    short = Source("a.txt", "The whale blew" * 3 + "So they sail ")
    whole = matches("Sail whale", Letters(long), [long], 61, 13)
    alone = matches("Sail whale", Letters(short), [short], 4, 13)
    as_there = matches("Sail whale", Letters(short), [short], 4, 13, whole.rarity)
    assert whole.rarity[0] < whole.rarity[1]
    assert alone.rarity[0] > alone.rarity[1]
    assert alone.score.argmax() == 3
    assert as_there.score.argmin() == 3
    assert torch.equal(as_there.rarity, whole.rarity)


@pytest.mark.parametrize("question", ["What is the capital of Niger? Answer with the answer only.", "capital Niger"])
def test_words_by_which_questions_are_put_count_nothing(question: str) -> None:
    """However rare they are in the text."""
    text = "Capital: Lagos. " * 9 + "Only one answer. " + "Niger capital. " + "Oil of palms... " * 40
    score = told(text, question, 16)
    assert "Niger capital" in text[int(score.argmax()) * 16 :][:31]
    assert float(score[9]) == 0.0
    assert told(text, "What is it?", 16).tolist() == [0.0] * len(score)


def test_a_name_in_capitals_is_no_common_word() -> None:
    text = "Nothing here at all. " * 9 + "The WHO and the US..."
    for question in ("What did the WHO say?", "US"):
        score = told(text, question, 21)
        assert score[:9].tolist() == [0.0] * 9
        assert float(score[9]) > 0
    assert told(text, "Who told us?", 21).tolist() == [0.0] * 10
