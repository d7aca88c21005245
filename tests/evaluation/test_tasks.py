"""What every task promises: solvable by its rule, silence worth nothing, no credit for dumping, right lengths."""

from __future__ import annotations

import json

import pytest

from mgam.errors import SettingError
from mgam.evaluation.reader import Passage, Reading
from mgam.evaluation.registry import all_tasks, find_tasks, groups, parse_lengths
from mgam.evaluation.runner import judge
from mgam.evaluation.sample import TEMPLATE_TOKENS, Request, Sample

from .conftest import Maker
from .solvers import solver_of

TASKS = sorted(all_tasks())
ASKING = [name for name in TASKS if all_tasks()[name].score_losses is None]
FILLED = [name for name in ASKING if "published" not in all_tasks()[name].groups]
RULED = [name for name in FILLED if solver_of(name) is not None]
LENGTHS = (2048, 4096)


def read(make: Maker, sample: Sample, answer: str) -> float:
    task = all_tasks()[sample.task]
    evidence = [Passage(*span) for span in sample.spans] if answer.strip() else []
    return judge(task, sample, Reading(answer, evidence), make.counter)[0].value


def test_every_task_but_summaries_has_a_rule() -> None:
    assert set(FILLED) - set(RULED) == {"wiki_lead"}


@pytest.mark.parametrize("name", RULED)
def test_the_rule_scores_everything(make: Maker, name: str) -> None:
    solver = solver_of(name)
    assert solver is not None
    for index in range(3):
        for length in LENGTHS:
            sample = make(name, length, index=index)
            answer = solver(sample.document, sample.question)
            assert read(make, sample, answer) == 1.0, (sample.question, answer, sample.answers)


@pytest.mark.parametrize("name", ASKING)
def test_gold_scores_everything_and_silence_nothing(make: Maker, name: str) -> None:
    sample = make(name)
    joined = ", ".join(sample.answers) if all_tasks()[name].groups[0] != "published" else sample.answers[0]
    assert make.counter.count(joined) <= sample.max_new_tokens
    assert read(make, sample, joined) == pytest.approx(1.0)
    assert read(make, sample, "") == 0.0
    assert read(make, sample, " \n") == 0.0


@pytest.mark.parametrize("name", FILLED)
def test_dumping_the_text_is_not_right(make: Maker, name: str) -> None:
    scores = []
    for index in range(6):
        sample = make(name, 2048, index=index)
        task = all_tasks()[name]
        scores.append(
            judge(task, sample, Reading(sample.document, [Passage(0, len(sample.document))]), make.counter)[0]
        )
    assert sum(score.value for score in scores) / len(scores) < 0.9
    if any("iou" in score.parts for score in scores):
        assert all(score.parts["iou"] < 1 for score in scores)


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("length", LENGTHS)
def test_prompts_fill_their_length_and_stay_within(make: Maker, name: str, length: int) -> None:
    for index in range(2):
        sample = make(name, length, index=index)
        used = sample.tokens + make.counter.count(sample.question) + sample.max_new_tokens + TEMPLATE_TOKENS
        assert 0.9 * length < used <= length, (used, length)


@pytest.mark.parametrize("name", TASKS)
def test_the_same_request_gives_the_same_bytes(make: Maker, name: str) -> None:
    def whole(sample: Sample) -> str:
        return json.dumps(sample.to_json(), sort_keys=True)

    first, again = make(name), all_tasks()[name].sample(make.request(name))
    assert whole(first) == whole(again)
    assert whole(first) != whole(make(name, index=1))
    assert Sample.from_json(json.loads(whole(first))) == first


@pytest.mark.parametrize("name", FILLED)
def test_gold_stands_where_the_spans_say(make: Maker, name: str) -> None:
    sample = make(name)
    assert sample.spans
    for start, end in sample.spans:
        assert 0 <= start < end <= len(sample.document)
        assert sample.document[start:end].strip() == sample.document[start:end]
    if name.startswith(("needle_", "passkey", "key_value")):
        for (start, end), gold in zip(sample.spans, sample.answers, strict=True):
            assert gold in sample.document[start:end]


@pytest.mark.parametrize("name", [name for name in FILLED if name.startswith(("needle_", "key_value", "threading_"))])
def test_gold_occurs_once(make: Maker, name: str) -> None:
    for index in range(3):
        sample = make(name, index=index)
        for gold in sample.answers:
            assert sample.document.count(gold) == 1


def test_word_counts_are_as_specified(make: Maker) -> None:
    for length, often, rarely in ((2048, 6, 1), (8192, 30, 3)):
        sample = make("common_words", length)
        words = [line.split(". ", 1)[1] for line in sample.document.splitlines()]
        counts = {word: words.count(word) for word in set(words)}
        assert {counts[word] for word in sample.answers} == {often}
        assert {count for word, count in counts.items() if word not in sample.answers} == {rarely}
    sample = make("frequent_words", 4096)
    counts = [sample.document.split().count(word) for word in sample.answers]
    entries = len(sample.document.split())
    for rank, count in enumerate(counts, start=2):
        assert count == pytest.approx(entries / 1.645 / rank**2, rel=0.1)


def test_a_thread_is_followed_in_its_direction(make: Maker) -> None:
    for index in range(5):
        assert list(make("threading_forward", index=index).depths) == sorted(
            make("threading_forward", index=index).depths
        )
        backward = list(make("threading_backward", index=index).depths)
        assert backward == sorted(backward, reverse=True)
        record = json.loads(make("threading_many", index=index).document)
        assert sum(value in record for value in record.values()) == 9  # three threads of four records: no other links


def test_statements_stand_in_order(make: Maker) -> None:
    depths = make("variables", 4096).depths
    assert list(depths) == sorted(depths)


@pytest.mark.parametrize("name", ["passkey", "needle_prose", "key_value", "questions"])
def test_depths_are_even_for_any_number_of_trials(make: Maker, name: str) -> None:
    for trials in (10, 40):
        depths = [make(name, 1024, index=index).depths[0] for index in range(trials)]
        for fifth in range(5):
            inside = sum(fifth / 5 <= depth < (fifth + 1) / 5 for depth in depths)
            assert abs(inside - trials / 5) <= 0.1 * trials + 1, (name, trials, depths)
        assert min(depths) < 0.12
        assert max(depths) > 0.88


def test_needles_keep_out_of_both_ends_when_asked(make: Maker) -> None:
    for index in range(12):
        request = Request("needle_noise", 2048, 0, index, make.counter, make.library, keep_out=(128, 512))
        sample = all_tasks()["needle_noise"].sample(request)
        (start, end), document = sample.spans[0], sample.document
        assert make.counter.count(document[:start]) >= 120
        assert make.counter.count(document[end:]) >= 480


def test_hotpot_keeps_its_own_paragraphs_and_adds_others(make: Maker) -> None:
    sample = make("hotpotqa")
    assert sample.document.count("Talmouth\n") <= 1
    assert sample.details["facts"]
    assert len(sample.spans) == len({title for title, _ in sample.details["facts"]})


def test_long_stories_lose_their_middle(make: Maker) -> None:
    sample = make("narrativeqa", 1024)
    assert "LICENCE" not in sample.document
    assert sample.document.startswith("*** START ***")
    assert sample.document.endswith("*** END ***")
    assert sample.tokens <= 1024


def test_loss_is_told_by_position(make: Maker) -> None:
    task, sample = all_tasks()["loss_novels"], make("loss_novels", 4096)
    losses = [1.0] * 1023 + [2.0] * 1024 + [3.0] * 2048
    score = judge(task, sample, Reading("", losses=losses), make.counter)[0]
    assert score.parts == {"0k-1k": 1.0, "1k-2k": 2.0, "2k-4k": 3.0}
    assert 3500 < sample.tokens <= 4096


def test_tags_say_how_hard_a_task_is(make: Maker) -> None:
    single, many = make("needle_noise", 4096).tags, make("threading_many", 4096).tags
    assert single.units == 1
    assert single.distractors == 0
    assert single.hops == 1
    assert many.hops == 4
    assert many.diffusion > single.diffusion
    assert make("needle_keys_uuid", 4096).tags.scope < 0.05
    assert make("common_words", 4096).tags.scope == 1.0
    assert make("common_words", 4096).tags.quadrant.endswith("high-scope")


def test_names_groups_and_lengths_that_are_not_known_name_near_ones() -> None:
    assert len(groups()["ruler"]) == 13
    assert {task.name for task in find_tasks(["ruler", "passkey"])} >= {"passkey", "variables", "questions_hop"}
    with pytest.raises(SettingError, match="needle_prose"):
        find_tasks(["needle_pros"])
    with pytest.raises(SettingError, match="threading"):
        find_tasks(["thread"])
    assert parse_lengths("2k, 4096,128k") == (2048, 4096, 131072)
    for wrong in ("2x", "", "100", "-2k", "2.5k", "99999999k"):
        with pytest.raises(SettingError, match="length"):
            parse_lengths(wrong)


def test_a_length_that_a_task_cannot_have_is_refused_in_words(make: Maker) -> None:
    with pytest.raises(SettingError, match="--lengths"):
        make("needle_values", 256)
    with pytest.raises(SettingError, match="--lengths"):
        make("facts_by_name", 512)
    with pytest.raises(SettingError, match="no TEST document"):
        make("loss_shipped", 1 << 20)
