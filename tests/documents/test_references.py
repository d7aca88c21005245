"""Chains of passages, each of which names what the next one tells of."""

from __future__ import annotations

import pytest

from mgam.documents.question_words import matches
from mgam.documents.references import MOST, linked
from mgam.documents.sources import Source

FILLER = "Nothing is said here of that at all. " * 6
CHUNK = 24


def chain(text: str, question: str, *more: str) -> list[str]:
    """The stretches of text that are found, nearest first."""
    sources = [Source("a.txt", text), *(Source(f"{number}.txt", one) for number, one in enumerate(more))]

    class All:
        """Texts one after the other, each from a chunk of its own on; every character is a token."""

        def place(self, first: int, last: int) -> tuple[Source, int, int] | None:
            for source in sources:
                size = -(-len(source.text) // CHUNK) * CHUNK
                if first < size:
                    last = min(last, len(source.text))
                    return (source, first, last) if first < last else None
                first, last = first - size, last - size
            return None

    places = All()
    chunks = sum(-(-len(source.text) // CHUNK) for source in sources)
    words = matches(question, places, sources, chunks, CHUNK)
    found = []
    for number in linked(question, words, places, sources, CHUNK):
        place = places.place(number * CHUNK, (number + 1) * CHUNK)
        assert place is not None
        source, start, end = place
        found.append(source.text[max(0, start - CHUNK) : end + CHUNK])
    return found


def test_a_chain_is_followed_whatever_its_order() -> None:
    links = ["VAR QXF = VAR PLK. ", "VAR ABC = 31415. ", "VAR ZZT = VAR QXF. ", "VAR PLK = VAR ABC. "]
    text = FILLER + FILLER.join(links) + FILLER
    found = chain(text, "Which variables hold the value 31415?")
    for link, place in ((links[3], 0), (links[0], 1), (links[2], 2)):
        assert link.strip() in found[place]


def test_a_chain_leads_to_the_section_whose_heading_it_names() -> None:
    text = f"Lagash\n\n{FILLER}The ruler was Ishmerai. {FILLER}\n\nIshmerai\n\nHe was born in Umma. \n\nUr\n\n{FILLER}"
    assert "born in Umma" in "".join(chain(text, "Where was the ruler born?"))


def test_a_chain_goes_on_in_another_text() -> None:
    found = chain(FILLER + "The key 77 is with Orban. " + FILLER, "Where is key 77?", FILLER + "Orban lives in Pest. ")
    assert "lives in Pest" in found[0]


@pytest.mark.parametrize("question", ["", "What is it?", "nowhere"])
def test_nothing_matches(question: str) -> None:
    assert chain(FILLER, question) == []
    assert chain("", question) == []


def test_words_that_stand_in_many_places_lead_nowhere() -> None:
    text = FILLER + "The key 77 is with Orban. " + (FILLER + "Orban sings. ") * 12
    assert chain(text, "Where is key 77?") == []


def test_a_part_of_a_word_is_no_link() -> None:
    text = FILLER + "The key 77 is with Or. " + FILLER + "Orban sings, or so. " + FILLER
    assert chain(text, "Where is key 77?") == []


def test_a_long_chain_ends() -> None:
    names = [f"N{number}X" for number in range(30)]
    text = FILLER + FILLER.join(f"{one} = {two}. " for one, two in zip(names[1:], names[:-1], strict=True)) + FILLER
    assert len(chain(text, "What is N0X?")) <= MOST
