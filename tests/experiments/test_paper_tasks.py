"""The tasks of the paper's table: what samples are, and that answers stand where they are said to stand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from papertable import published
from papertable.library import TASKS, Library, open_library
from papertable.measure import baselines
from papertable.sample import ASKED, NoAnswerError, Piece, assemble, collate, room
from papertable.score import Choice, choices, first_hop_alone, oracle, score
from papertable.shelf import PARTS, Part, part_of
from papertable.vocabulary import ANSWER, BLANK, END, PAD, TAGS, encode

from mgam.errors import DocumentError
from mgam.evaluation.metrics import token_f1
from mgam.evaluation.published.records import PARSERS, plain
from mgam.evaluation.splits import split_of
from mgam.evaluation.texts import TextLibrary

LENGTHS = (512, 1024)
EACH = [(task, part, length) for task in TASKS for part in PARTS for length in LENGTHS]


@pytest.fixture(scope="module")
def again(library: Library, texts: TextLibrary, root: Path) -> Library:
    """The same library, opened once more."""
    return open_library("packages", texts, root)


@pytest.mark.parametrize(("task", "part", "length"), EACH)
def test_a_sample_is_a_pure_function(library: Library, again: Library, task: str, part: Part, length: int) -> None:
    first = [library.sample(task, part, length, 3, number) for number in range(6)]
    other = again.sample(task, part, length, 3, 5)
    assert np.array_equal(first[5].tokens, other.tokens)
    assert (first[5].span, first[5].gold.tolist()) == (other.span, other.gold.tolist())
    assert len({sample.tokens.tobytes() for sample in first}) == 6
    assert library.sample(task, part, length, 4, 5).tokens.tobytes() != first[5].tokens.tobytes()


@pytest.mark.parametrize(("task", "part", "length"), EACH)
def test_the_form(library: Library, task: str, part: Part, length: int) -> None:
    for number in range(8):
        sample = library.sample(task, part, length, 0, number)
        tokens = sample.tokens
        assert len(tokens) == length
        assert (tokens[0], tokens[-1]) == (TAGS[task], ANSWER)
        assert [one for one in tokens[1 : 1 + ASKED] if one != PAD] == [
            one for one in tokens[-1 - ASKED : -1] if one != PAD
        ]
        assert (tokens[sample.ends] == END).all()
        assert (tokens == END).sum() == len(sample.ends)
        assert sample.ends[0] > 1 + ASKED
        assert sample.ends[-1] < length - ASKED
        assert len(sample.gold) == {"lead": 3, "hop": 2, "tale": 1}[task]


def test_parts_share_no_document(library: Library) -> None:
    for task, shelf in library.shelves.items():
        names = {part: {document["name"] for document in shelf.of(part)} for part in PARTS}
        assert all(names.values()), task
        assert not names["train"] & names["dev"] | names["train"] & names["test"] | names["dev"] & names["test"]
    for number in range(300):
        assert (part_of("novels", str(number)) == "test") == (split_of("novels", str(number)) == "test")


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_made_of_their_own_part(library: Library, task: str) -> None:
    shelf = library.shelves[task]
    units = {
        part: {
            shelf.unit(at).tobytes()
            for document in shelf.of(part)
            for first, last in _stretches(document)
            for at in range(first, last)
        }
        for part in PARTS
    }
    for part in PARTS:
        for number in range(5):
            sample = library.sample(task, part, 512, 1, number)
            seen = {sample.unit(at).tobytes() for at in range(len(sample.ends) - 1)}  # the last may be cut
            assert seen <= units[part]
            others = set[bytes]().union(*(units[one] for one in PARTS if one != part)) - units[part]
            assert not seen & others


def _stretches(document: dict[str, object]) -> list[tuple[int, int]]:
    sections = document.get("sections")
    if isinstance(sections, list):
        return [(section["heading"], section["last"]) for section in sections]
    return [(document["first"], document["last"])]  # type: ignore[list-item]


def test_two_hops_lead_to_the_answer(library: Library, texts: TextLibrary) -> None:
    """Read from the raw profiles: the question's value belongs to one country, and the answer is that country's."""
    records = texts.records("factbook", None)
    for number in range(25):
        sample = library.sample("hop", "test", 1024, 0, number)
        question = library.text(sample.tokens[1 : 1 + ASKED])
        wanted, rest = question.split(" of the country whose ")
        known, value = rest.split(" is ")
        document = library.text(sample.tokens[1 + ASKED : -1 - ASKED])
        owners = [
            name for name, record in records.items()
            if record["Government"]["Country name"]["conventional short form"]["text"] + ":" in document
            and any(_value(inside, known) == value for inside in record.values())
        ]  # fmt: skip
        assert len(owners) == 1
        said = {_value(inside, wanted) for inside in records[owners[0]].values()} - {""}
        assert said == {library.text(sample.tokens[sample.span[0] : sample.span[1] + 1])}
        lines = [library.text(sample.unit(at)) for at in sample.gold]
        assert {line.split(":")[0] for line in lines} == {known, wanted}


def _value(section: dict[str, dict[str, str]], label: str) -> str:
    return str(section.get(label, {}).get("text", "")).split(";")[0]


def test_names_stand_in_their_sentence_and_not_in_the_question(library: Library, texts: TextLibrary) -> None:
    raw = {text.name: text.text for source in ("novels", "speeches") for text in texts.texts(source, None)}
    for number in range(25):
        sample = library.sample("tale", "train", 512, 0, number)
        name = library.text(sample.tokens[sample.span[0] : sample.span[1] + 1])
        sentence = library.text(sample.unit(int(sample.gold[0])))
        question = sample.tokens[1 : 1 + ASKED]
        assert name.istitle()
        assert sentence.split().count(name) == 1
        assert any(sentence in text for text in raw.values())
        assert (question == BLANK).sum() == 1
        words = library.text(question).split()
        assert name not in words
        assert set(words[:-1]) <= set(sentence.split())  # a long question is cut, maybe in a word


def test_gold_sentences_have_more_of_the_lead_than_others_of_their_article(library: Library) -> None:
    from mgam.evaluation.rouge import rouge_n

    shelf = library.shelves["lead"]
    for number in range(5):
        sample = library.sample("lead", "test", 1024, 0, number)
        document = next(one for one in shelf.of("test") if one["lead"] == sample.lead)
        own = {shelf.unit(at).tobytes() for at in range(document["first"], document["last"])}
        worth = {
            at: sum(rouge_n(library.text(sample.unit(at)), sample.lead, n).f1 for n in (1, 2))
            for at in range(len(sample.ends)) if sample.unit(at).tobytes() in own
        }  # fmt: skip
        assert set(sample.gold) <= set(worth)
        assert min(worth[at] for at in sample.gold) >= max(
            (value for at, value in worth.items() if at not in sample.gold), default=0.0
        ) - 1e-6  # fmt: skip


@pytest.mark.parametrize("length", [512, 4096])
def test_a_far_question_stands_once_and_far_from_its_evidence(library: Library, length: int) -> None:
    for number in range(12):
        sample = library.sample("far", "train", length, 0, number)
        again = library.sample("far", "train", length, 0, number)
        assert np.array_equal(sample.tokens, again.tokens)
        assert len(sample.tokens) == length
        first, last = sample.planted
        assert last + 1 in sample.ends
        asked = sample.tokens[first : last + 1].tolist()
        assert asked.count(BLANK) == 1
        assert (sample.tokens == BLANK).sum() == 1
        assert (sample.tokens[1 : 1 + ASKED] == PAD).all()
        assert (sample.tokens[-1 - ASKED : -1] == PAD).all()
        (gold,) = sample.gold
        sentence = sample.unit(gold)
        assert not set(asked) - {BLANK} - set(sentence.tolist())
        begin, end = sample.ends[gold] - len(sentence), sample.ends[gold]
        assert min(abs(begin - last), abs(first - end)) >= min(1024, length // 4) - len(asked) - 1
        batch = collate([sample])
        assert batch.planted.tolist() == [[first, last]]
        oracle_f1 = score(library, sample, oracle(sample))
        assert oracle_f1 == {"accuracy": 1.0, "f1": 1.0}


def test_who_makes_the_first_hop_alone(library: Library) -> None:
    """Against the lines themselves: one of them is right, and all show the label that is asked for."""
    for number in range(8):
        sample = library.sample("hop", "test", 1024, 0, number)
        label = library.text(sample.tokens[1 : 1 + ASKED]).split(" of the country whose ")[0]
        lines = [library.text(sample.unit(at)) for at in range(len(sample.ends))]
        values = [line.split(": ")[1].split(";")[0] for line in lines if line.startswith(f"{label}: ")]
        answer = library.text(sample.tokens[sample.span[0] : sample.span[1] + 1])
        found = first_hop_alone(library, sample)
        assert found["accuracy"] == pytest.approx((1 + 1 / len(values)) / 2)
        assert found["f1"] == pytest.approx(sum(token_f1(one, answer) for one in values) / len(values))
        assert found["accuracy"] < 1


def test_units_cut_at_answers_have_the_tokens_of_whole_ones(library: Library) -> None:
    """What may be asked for is not told by how it is cut."""
    for task in ("hop", "tale"):
        shelf = library.shelves[task]
        for at in range(0, len(shelf.start) - 1, 37):
            unit = shelf.unit(at).tolist()
            text = library.tokenizer.decode(unit)
            assert encode(library.tokenizer, [text])[0] == unit


def test_an_oracle_scores_all_and_silence_nothing(library: Library) -> None:
    found = baselines(library, TASKS, "test", ((512, 6),))
    for task in TASKS:
        cell = found[task]["512"]
        figures = ["accuracy", *(["f1"] if task != "lead" else [])]
        assert [cell[f"oracle {name}"] for name in figures] == [100.0] * len(figures)
        assert [cell[f"silence {name}"] for name in figures] == [0.0] * len(figures)
        assert 0 < cell["chance accuracy"] < 60
    lead = found["lead"]["512"]
    assert lead["oracle rouge1"] > lead["chance rouge1"] > lead["silence rouge1"] == 0


def test_a_model_that_is_sure_is_scored_as_the_oracle(library: Library) -> None:
    """The best pair of first and last token is taken, within one unit."""
    samples = [library.sample(task, "dev", 512, 0, at) for task in ("hop", "tale") for at in range(4)]
    batch = collate(samples)
    units = batch.gold.float()
    tokens = torch.randn(len(samples), 2, 513) * 0.01
    for row, sample in enumerate(samples):
        tokens[row, 0, sample.span[0]] = tokens[row, 1, sample.span[1]] = 5.0
        tokens[row, 1, sample.ends[int(sample.gold[-1])] + 1] = 6.0  # in the next unit: no answer ends there
    for sample, choice in zip(samples, choices(units, tokens, samples), strict=True):
        assert choice.span == sample.span
        assert score(library, sample, choice) == score(library, sample, oracle(sample))
        half = score(library, sample, Choice(sample.gold.tolist()[:1], None))
        assert (half["accuracy"], half["f1"]) == (1 / len(sample.gold), 0.0)
        if sample.task == "hop":  # the answer stands in the last hop's line
            answers = sample.gold[0] == np.searchsorted(sample.ends, sample.span[0])
            assert (half["first hop"], half["last hop"]) == ((0.0, 1.0) if answers else (1.0, 0.0))


def test_documents_without_an_answer_are_refused() -> None:
    unit = np.arange(10, 20, dtype=np.int32)
    with pytest.raises(NoAnswerError, match="does not hold its evidence"):
        assemble("tale", [9], [Piece(unit)], 512)
    cut = [Piece(np.arange(room(512) - 5, dtype=np.int32)), Piece(unit, True, (6, 8))]
    with pytest.raises(NoAnswerError, match="does not hold its evidence"):
        assemble("tale", [9], cut, 512)


def test_published_records_are_brought_into_the_form(texts: TextLibrary, tmp_path: Path) -> None:
    fixtures = Path(__file__).parents[1] / "evaluation" / "fixtures"
    lines = (fixtures / "hotpotqa" / "a.jsonl").read_text().splitlines()
    first, second = (plain(PARSERS["hotpotqa"](json.loads(line))) for line in lines[:2])
    units, gold = published.hotpot_units(first)
    assert [units[at] for at in gold] == [[" She was born in Talmouth."], [" It lies on the river", " Ash", "."]]
    with pytest.raises(NoAnswerError, match="do not hold 'no'"):
        published.hotpot_units(second)
    story = {"id": "s", "answers": ["the old harbour", "Orn."], "story": "It was late. And She went to Orn, at last."}
    assert published.story_units(story) == ([[" It was late."], [" And She went to", " Orn", ", at last."]], [1])
    with pytest.raises(NoAnswerError, match="none of its answers"):
        published.story_units({**story, "answers": ["a swan"]})
    library = open_library("published", texts, tmp_path)
    assert library.refused["hop"] == 1
    part = next(part for part in PARTS if library.shelves["hop"].of(part))
    sample = library.sample("hop", part, 512, 0, 0)
    assert library.text(sample.tokens[sample.span[0] : sample.span[1] + 1]) in ("Ash", "a bridge builder")
    assert score(library, sample, oracle(sample)) == dict.fromkeys(("accuracy", "first hop", "last hop", "f1"), 1.0)


def test_texts_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"'wikipedia' is not on this machine.*mgam data fetch wikipedia"):
        open_library("packages", TextLibrary(tmp_path), tmp_path)
    with pytest.raises(DocumentError, match=r"'cnn_dailymail' is not on this machine"):
        open_library("published", TextLibrary(tmp_path), tmp_path)
