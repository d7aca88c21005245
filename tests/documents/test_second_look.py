"""A second look: what is chosen, and that the answer is that of the chosen passages alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mgam
from mgam.documents import asking, confidence, second_look
from mgam.documents.document import Document
from mgam.documents.prompt import build
from mgam.documents.rehearsing import ask_once, rehearse
from mgam.documents.second_look import NEUTRAL, passages, preference, shares
from mgam.documents.sources import Source
from mgam.documents.store import neutral, verify
from mgam.errors import SettingError
from mgam.record import Record

from . import tiny
from .conftest import Command, Make

DIALS: dict[str, Any] = {
    "window": 64, "levels": (1, 16, 64), "block": 64, "question_block": 16, "dense_until": 128, "budget": 128,
}  # fmt: skip


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question singles something out, whatever a model of random weights attends to."""
    monkeypatch.setattr(second_look, "DISTINCT", 0.0)


def record(*layers: dict[int, float]) -> Record:
    """What a question attended to: of each layer, the mass of some of 20 chunks."""
    made = Record()
    for number, masses in enumerate(layers):
        made._mass[number] = torch.zeros(2, 20)
        for chunk, mass in masses.items():
            made._mass[number][:, chunk] = mass / 2
    return made


def test_what_any_question_attends_to_is_not_preferred() -> None:
    """Chunk 3 draws every question, chunk 7 this one; what outer layers and the sink get says nothing."""
    empty: dict[int, float] = {}
    asked = record(*[{15: 9.0}] * 3, *[{0: 50.0, 3: 8.0, 7: 1.0, 11: 0.5}] * 2, {15: 9.0})
    neutral = record(*[empty] * 3, *[{0: 50.0, 3: 8.0, 11: 0.5}] * 2, empty)
    score = preference(asked, shares(neutral))
    assert int(score.argmax()) == 7
    assert score[0] == score[15] == 0
    assert preference(record(), shares(neutral)).numel() == preference(neutral, shares(neutral)).numel() == 0


def test_a_question_of_the_whole_is_answered_at_first_sight(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_plain_model(window=8192)
    mgam.apply(model, **DIALS, reread=64)
    monkeypatch.setattr(second_look, "DISTINCT", 1e9)
    first = asking.ask(model, tokenizer, [tiny.source(3000)], "Who?", max_new_tokens=6)
    mgam.apply(model, **DIALS)
    assert "read again" not in first.tokens
    plain = asking.ask(model, tokenizer, [tiny.source(3000)], "Who?", max_new_tokens=6)
    assert (first.answer, first.evidence, first.entries_per_level) == (
        plain.answer, plain.evidence, plain.entries_per_level
    )  # fmt: skip


def test_passages_are_whole_sentences_in_the_order_of_the_texts(tokenizer: Any) -> None:
    text = " ".join(f"Sentence number {number:03d} stands here." for number in range(100))
    sources = [Source("a.txt", text), Source("b.txt", text.replace("number", "figure"))]
    prompt = build(tokenizer, sources, "Who?")
    chunk = 16
    first, second = (
        next(n for n in range(len(prompt.ids) // chunk) if holds(prompt, n, chunk, source, words))
        for source, words in ((0, "040"), (1, "060"))
    )
    score = torch.zeros(len(prompt.ids) // chunk)
    score[second], score[first] = 2.0, 1.0
    recent = (prompt.document - 2 * chunk, prompt.document)
    found = passages(score, prompt, prompt.sources, tokenizer, chunk=chunk, tokens=60, recent=recent)
    assert [one.name for one in found.sources] == ["a.txt", "b.txt"]
    assert found.sources[0].text == "Sentence number 040 stands here."
    assert found.sources[1].text.startswith("Sentence figure 060 stands here.\n\n")
    assert found.sources[1].text.endswith("Sentence figure 099 stands here.")
    assert [(one.file, one.text.strip(), one.share) for one in found.best] == [
        ("b.txt", "Sentence figure 060 stands here.", 0.6667),
        ("a.txt", "Sentence number 040 stands here.", 0.3333),
    ]
    for one in found.best:
        source = sources[0] if one.file == "a.txt" else sources[1]
        assert source.text[one.start : one.end] == one.text


def holds(prompt: Any, number: int, chunk: int, source: int, words: str) -> bool:
    """Whether these words stand in a chunk of this source."""
    place = prompt.place(number * chunk, (number + 1) * chunk)
    return place is not None and place[0] is prompt.sources[source] and words in place[0].text[place[1] : place[2]]


def test_the_budget_bounds_what_is_read_again(tokenizer: Any) -> None:
    prompt = build(tokenizer, [tiny.source(4000)], "Who?")
    score = torch.rand(len(prompt.ids) // 16, generator=torch.Generator().manual_seed(0))
    lengths = []
    for tokens in (64, 256, 1024):
        recent = (prompt.document, prompt.document)
        found = passages(score, prompt, prompt.sources, tokenizer, chunk=16, tokens=tokens, recent=recent)
        lengths.append(sum(len(tokenizer(one.text).input_ids) for one in found.sources))
    assert lengths == sorted(lengths)
    assert lengths[-1] < len(prompt.ids) / 2
    assert lengths[0] < 64 + 16 + 2 * 240


@pytest.mark.usefixtures("always")
def test_the_answer_is_that_of_the_passages(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_plain_model(window=8192)
    sources = [Source("a.txt", tiny.text(2500, 1)), Source("b.txt", tiny.text(2000, 2))]
    questions = ["Who?", "And what is this, then?", "Who?"]
    read: list[Any] = []
    monkeypatch.setattr(asking, "build", lambda *given: read.append(given[1]) or build(*given))
    monkeypatch.setattr(asking, "closer", lambda *given: None)
    mgam.apply(model, **DIALS, reread=64)
    answers = list(asking.ask_each(model, tokenizer, sources, questions, max_new_tokens=6))
    assert answers[0].answer == answers[2].answer
    assert answers[0].evidence == answers[2].evidence != answers[1].evidence
    mgam.apply(model, **DIALS)
    for question, answer, short in zip(questions, answers, read[len(questions) :], strict=True):
        assert answer.answer == asking.ask(model, tokenizer, short, question, max_new_tokens=6).answer
        assert answer.tokens["read again"] < answer.tokens["document"] / 4
        assert answer.found is confidence.is_found(answer.confidence, again=True)
        assert answer.evidence
        for one in answer.evidence:
            source = next(source for source in sources if source.name == one.file)
            assert source.text[one.start : one.end] == one.text
    plain = asking.ask(model, tokenizer, sources, "Who?", max_new_tokens=6)
    assert "read again" not in plain.tokens
    assert plain.evidence != answers[0].evidence


def test_what_is_read_densely_is_read_once(tokenizer: Any) -> None:
    model = tiny.make_plain_model(window=8192)
    mgam.apply(model, **{**DIALS, "dense_until": 4096}, reread=64)
    assert "read again" not in asking.ask(model, tokenizer, [tiny.source(3000)], "Who?", max_new_tokens=2).tokens


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("memory", [None, "1MiB"])
def test_a_digest_answers_as_its_texts_do(tokenizer: Any, digest: Make, memory: str | None) -> None:
    source = tiny.source(1500)
    model = tiny.make_model(reread=64)
    expected = list(asking.ask_each(model, tokenizer, [source], ["Who?", "What?"], max_new_tokens=6))
    document = digest(source, model=model, memory=memory)
    for question, one in zip(("Who?", "What?"), expected, strict=True):
        found = document.ask(question, max_new_tokens=6)
        assert (found.answer, found.evidence) == (one.answer, one.evidence)
        assert found.tokens == one.tokens
    talk = document.chat()
    assert talk.say("Who?", max_new_tokens=6).answer == expected[0].answer
    said = talk.say("And then?", max_new_tokens=6)
    assert "read again" not in said.tokens  # what it asks about was said, and need not stand in the texts
    assert document.ask("What?", max_new_tokens=6).answer == expected[1].answer


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("tokens", [30, 1500])  # shorter than the window, and long enough for a second look
def test_a_rehearsal_changes_no_answer(tokenizer: Any, digest: Make, tokens: int) -> None:
    document = digest(tiny.source(tokens), model=tiny.make_model(reread=64))
    expected = document.ask("Who?", max_new_tokens=6)
    rehearse(document, 64)
    ask_once(document, 64)
    found = document.ask("Who?", max_new_tokens=6)
    assert (found.answer, found.evidence, found.tokens) == (expected.answer, expected.evidence, expected.tokens)
    assert found.entries_per_level == expected.entries_per_level


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("harm", ["none", "flipped", "cut", "a link", "gone", "another budget", "of another digest"])
def test_what_any_question_attends_to_is_kept_beside_a_digest(
    tokenizer: Any, digest: Make, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is used where it is whole and of this digest; else it is found again, and the answer is the same."""
    model = tiny.make_model(reread=64)
    document = digest(tiny.source(1500), model=model)
    assert torch.equal(document.neutral(), shares(document.attended(NEUTRAL)))
    expected, file = document.ask("Who?", max_new_tokens=6), document.path / neutral.NAME
    budget = None
    if harm == "flipped":
        file.write_bytes(file.read_bytes().replace(b"shares", b"sharfs"))
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif harm == "a link":
        file.rename(document.path.parent / "aside.json")
        file.symlink_to(document.path.parent / "aside.json")
    elif harm == "gone":
        file.unlink()
    elif harm == "another budget":
        budget = 256
    elif harm == "of another digest":
        other = digest(tiny.source(1500, 1), model=model, name="other.mgam")
        file.write_bytes((other.path / neutral.NAME).read_bytes())
    looked: list[str] = []
    attended = Document.attended
    monkeypatch.setattr(Document, "attended", lambda self, asked: looked.append(asked) or attended(self, asked))
    again = Document.open(document.path, model, tokenizer, question_budget=budget)
    found = again.ask("Who?", max_new_tokens=6)
    assert looked == ["Who?"] + [NEUTRAL] * (harm != "none")
    if harm != "another budget":
        assert (found.answer, found.evidence) == (expected.answer, expected.evidence)
    assert bool(verify(document.path)) == (harm in ("flipped", "cut", "a link", "of another digest"))


def test_what_was_kept_is_forgotten_when_a_text_is_added(tokenizer: Any, digest: Make) -> None:
    model = tiny.make_model(reread=64)
    one, two = tiny.source(900), Source("two.txt", tiny.text(700, 2))
    before = digest(one, model=model).neutral()
    after = digest(one, two, model=model, append=True)
    assert len(after.neutral()) > len(before)
    assert torch.equal(after.neutral(), shares(after.attended(NEUTRAL)))
    assert not verify(after.path)


@pytest.mark.usefixtures("always")
def test_a_digest_may_be_asked_with_another_budget(model: Any, tokenizer: Any, digest: Make) -> None:
    """It changes no byte of a digest, so a digest goes on, and opens, with any."""
    made = digest(tiny.source(900))
    assert "read again" not in made.ask("Who?", max_new_tokens=2).tokens
    document = Document.open(made.path, model, tokenizer, reread=64)
    assert "read again" in document.ask("Who?", max_new_tokens=2).tokens
    again = Document.open(made.path, model, tokenizer, reread=0)
    assert "read again" not in again.ask("Who?", max_new_tokens=2).tokens
    Document.digest(tiny.make_model(reread=64), tokenizer, [tiny.source(900)], made.path, **tiny.GRID).close()


@pytest.mark.parametrize(
    ("reread", "said"),
    [(-1, "at least one chunk"), (8, "at least one chunk"), (2.5, "a whole number"), (True, "a whole number")],
)
def test_numbers_that_cannot_be_are_refused(reread: Any, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        mgam.apply(tiny.make_plain_model(), **DIALS, reread=reread)


def test_a_method_without_search_has_no_second_look() -> None:
    with pytest.raises(SettingError, match="reread"):
        mgam.apply(tiny.make_plain_model(), "sliding", reread=64)


@pytest.mark.usefixtures("always")
def test_the_command_says_what_was_read_again(command: Command, book: str) -> None:
    words = ("ask", book, "Who?", "--reread", "128", "--dense-until", "0", "--max-new-tokens", "2", "--adapter", "none")
    code, out, _ = command(*words)
    assert code == 0
    assert "read again" in out
