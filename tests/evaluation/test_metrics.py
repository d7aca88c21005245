"""Scores against fixture values that were computed with the official code, and their traps."""

from __future__ import annotations

import pytest

from mgam.evaluation.evidence import evidence_scores
from mgam.evaluation.metrics import (
    exact_match,
    first_number,
    hotpot_f1,
    hotpot_joint,
    list_items,
    longbench_classification,
    longbench_code,
    longbench_numbers,
    normalise,
    number_match,
    set_scores,
    share_found,
    token_f1,
)
from mgam.evaluation.porter import stem_word
from mgam.evaluation.reader import Passage
from mgam.evaluation.rouge import rouge_l, rouge_lsum, rouge_n


@pytest.mark.parametrize(
    ("reply", "gold", "em", "f1", "hotpot"),
    [
        ("The Eiffel Tower, Paris", "Eiffel Tower", 0, 0.8, 0.8),
        ("yes, it is", "yes", 0, 0.5, 0),
        ("U.S.A.", "USA", 1, 1, 1),
        ("state-of-the-art", "state of art", 0, 0, 0),
        ("1,000", "1000", 1, 1, 1),
        ("", "the", 0, 0, 0),
    ],
)
def test_answers_are_compared_as_squad_and_hotpotqa_do(
    reply: str, gold: str, em: float, f1: float, hotpot: float
) -> None:
    assert exact_match(reply, gold) == em
    assert token_f1(reply, gold) == pytest.approx(f1)
    assert hotpot_f1(reply, gold)[0] == pytest.approx(hotpot)


def test_supporting_facts_and_joint_scores_multiply() -> None:
    found = hotpot_joint((0.8, 1.0, 2 / 3), {("A", 0), ("B", 1)}, {("A", 0), ("C", 2)})
    assert found["sp_f1"] == pytest.approx(0.5)
    assert found["joint_f1"] == pytest.approx(2 * 0.5 * (1 / 3) / (0.5 + 1 / 3))
    assert hotpot_joint((1, 1, 1), set(), {("A", 0)})["joint_f1"] == 0


REFERENCE = "The cat sat on the mat .\nA dog barked loudly at cars ."
REPLY = "A dog barks at the cars .\nThe cat was sitting on a mat ."


@pytest.mark.parametrize(("stem", "expected"), [(True, (0.8, 0.2609, 0.4, 0.72)), (False, (0.72, 0.1739, 0.32, 0.64))])
def test_rouge_is_that_of_rouge_score(stem: bool, expected: tuple[float, ...]) -> None:
    found = (
        rouge_n(REPLY, REFERENCE, 1, stem),
        rouge_n(REPLY, REFERENCE, 2, stem),
        rouge_l(REPLY, REFERENCE, stem),
        rouge_lsum(REPLY, REFERENCE, stem),
    )
    assert [one.f1 for one in found] == pytest.approx(expected, abs=5e-5)


def test_rouge_of_nothing_is_nothing() -> None:
    assert rouge_l("", REFERENCE).f1 == rouge_lsum("", REFERENCE).f1 == rouge_n(".", REFERENCE, 1).f1 == 0
    assert rouge_lsum(REPLY.replace("\n", " "), REFERENCE.replace("\n", " "), True).f1 == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("word", "stem"),
    [
        ("barked", "bark"), ("sitting", "sit"), ("relational", "relat"), ("skies", "sky"), ("possibly", "possibl"),
        ("happily", "happili"), ("conditional", "condit"), ("flies", "fli"), ("dies", "die"), ("hopping", "hop"),
    ],
)  # fmt: skip
def test_stems_are_those_of_nltk(word: str, stem: str) -> None:
    assert stem_word(word) == stem


def test_lists_are_read_from_brackets_or_lines() -> None:
    assert list_items('Here: ["a b", "c"]') == ["a b", "c"]
    assert list_items("['a', 'b']") == ["a", "b"]
    assert list_items("1. one\n2. two\n- three") == ["one", "two", "three"]
    assert list_items("one, two and three.") == ["one", "two", "three"]
    assert list_items("") == []


def test_listing_everything_lowers_precision() -> None:
    assert share_found("p q r s", ["p", "q"]) == 1
    found = set_scores(["p", "q", "r", "s"], ["p", "q"])
    assert found["iou"] == 0.5
    assert found["precision"] == 0.5
    assert found["recall"] == 1


def test_numbers() -> None:
    assert first_number("There are 1,204 of them, or 3") == 1204
    assert number_match("twelve", "12") == 0
    assert number_match("12.", "12") == 1
    assert number_match("", "0") == 0


def test_longbench_scores() -> None:
    classes = ["Location", "Location of a city", "Number"]
    assert longbench_classification("Location of a city", "Location of a city", classes) == 1
    assert longbench_classification("Number or Location", "Number", classes) == 0.5
    assert longbench_classification("", "Number", classes) == 0
    assert longbench_numbers("Paragraph 3, not 4", "Paragraph 3") == 0.5
    assert longbench_code("```\n# so:\nreturn a / b\nx", "return a / b") == 1
    assert longbench_code("", "return") == 0


def test_normalising_takes_the_official_order() -> None:
    assert normalise(" The  well-known, A.") == "wellknown"


def test_citing_everything_is_not_right() -> None:
    gold = [(5000, 5060)]
    assert evidence_scores([Passage(4900, 5200)], gold)["evidence_f1"] == 1
    whole = evidence_scores([Passage(0, 60_000)], gold)
    assert whole["evidence_recall"] == 1
    assert whole["evidence_precision"] == pytest.approx(1 / 50)
    assert evidence_scores([], gold)["evidence_f1"] == 0
    half = evidence_scores([Passage(4900, 5200), Passage(0, 100)], gold)
    assert half["evidence_precision"] == 0.5
    assert evidence_scores([Passage(0, 5020)], gold)["evidence_recall"] == 0  # a third of the line is not the line
