"""Texts of many like facts: what is asked for stands where it is said to, and no wording is one of `mgam eval`."""

from __future__ import annotations

import random
from typing import Any

import pytest

from documents.tiny import make_tokenizer
from mgam.evaluation.almanac import FACTS, Profile
from mgam.evaluation.texts import split_sentences
from mgam.training.alike import NOWHERE, countries, descriptions, invented, told
from mgam.training.lookups import LookupMaker
from mgam.training.things import invent, kinds
from mgam.training.wordings import Pair

SEEDS = range(40)


def profile(number: int) -> Profile:
    """A country that is not there, with a paragraph."""
    rng = random.Random(f"country {number}")
    name = f"Land{number}"

    def said(value: str) -> dict[str, str]:
        return {"text": value}

    record: dict[str, Any] = {
        "Introduction": {
            "Background": said(
                f"{name} lost {rng.randrange(100, 999)} farms when the river Tarn flooded its valleys. Settlers from "
                f"Harbour Bay reached the plains of {name} in {rng.randrange(1500, 1900)} with horses."
            )
        },
        "Geography": {"Map references": said("North"), "Coastline": said(f"{rng.randrange(9000)} km")},
        "People and Society": {"Population": said(f"{rng.randrange(30_000, 90_000_000):,} (July 2015 est.)")},
        "Government": {
            "Country name": {"conventional short form": said(name)},
            "Capital": {"name": said(f"City of {number}")},
        },
        "Energy": {f"Use of {what}": said(f"{rng.randrange(10**6)} kW") for what in ("coal", "gas", "oil")},
    }
    return Profile(str(number), record)


PROFILES = [profile(number) for number in range(12)]


def prose(rng: random.Random, characters: int) -> str:
    """So many characters of no consequence."""
    return ("The wind fell and rain came. " * 200)[:characters]


def made(kind: str, seed: int) -> tuple[str, list[Pair]]:
    """A text and its questions."""
    rng = random.Random(seed)
    if kind == "invented":
        return invented(rng, 6000, 12, prose)
    if kind == "told":
        return told(rng, 12, [sentence for one in PROFILES for sentence in split_sentences(one.long_lines[0][13:])])
    return (countries if kind == "countries" else descriptions)(rng, 6000, 12, PROFILES)


@pytest.mark.parametrize("kind", ["invented", "countries", "descriptions", "told"])
def test_what_is_asked_for_stands_where_it_is_said_to(kind: str) -> None:
    absent = asked = 0
    for seed in SEEDS:
        text, pairs = made(kind, seed)
        assert (text, pairs) == made(kind, seed)
        assert pairs
        assert len(text) > 300
        for pair in pairs:
            asked += 1
            absent += pair.evidence == NOWHERE
            told = text[slice(*pair.evidence)]
            named = "with the number" in pair.question or "of entry" in pair.question
            back = pair.question.startswith(("Which", "For which")) and pair.answer not in told
            assert pair.evidence == NOWHERE or pair.answer in told or (back and pair.answer in text), (pair, told)
            assert "{" not in pair.question + text or named
    assert (0.03 < absent / asked < 0.15) if kind == "invented" else absent == 0


def test_no_two_things_of_a_text_answer_one_question() -> None:
    """Every name is told of once, and an absent one never."""
    for seed in SEEDS:
        rng, taken = random.Random(seed), set[str]()
        names = [invent(rng, rng.choice(kinds()), taken).name for _ in range(60)]
        assert len(set(names)) == 60
        text, pairs = made("invented", seed)
        known: dict[str, str] = {}
        for pair in pairs:
            if pair.evidence != NOWHERE:
                question = pair.question.split("?")[0]
                assert known.setdefault(question, pair.answer) == pair.answer
    text, pairs = made("countries", 3)
    assert sum(one.name in text for one in PROFILES) in (0, len([one for one in PROFILES if f"\n{one.name}" in text]))


def test_there_are_many_like_facts_and_every_form() -> None:
    forms = {"rows": 0, "lines": 0, "sentences": 0}
    for seed in SEEDS:
        text, _ = made("invented", seed)
        forms["rows"] += any(text.count(mark) > 40 for mark in (" | ", "\t"))
        forms["lines"] += text.count("\n") > 30 and (text.count(": ") > 20 or text.count(" = ") > 20)
        forms["sentences"] += text.count(". ") > 40
    assert all(forms.values()), forms


def test_no_wording_is_one_of_the_evaluation() -> None:
    there = {fact.asked.split("{of}")[0] for fact in FACTS} | {"What is the secret", "What are all the secret"}
    wordings = [one for kind in kinds() for field in kind.fields for one in field.asks]
    asked = [pair.question for kind in ("countries", "descriptions", "invented") for pair in made(kind, 1)[1]]
    assert not [one for one in wordings + asked if one.startswith(tuple(there))]


def test_every_lookup_can_be_made(prose: str) -> None:
    """Whole records make a text longer or shorter by leaps."""
    maker = LookupMaker(make_tokenizer(), [prose], alike=1.0)
    for number in range(200):
        assert 1000 < len(maker.make(number, 2560, 4).ids) <= 2560
