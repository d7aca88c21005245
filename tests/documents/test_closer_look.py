"""A closer look: lines of a short text, chosen by attention to all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mgam
from mgam.documents import asking, closer_look, second_look
from mgam.documents.closer_look import closer
from mgam.documents.evidence import Evidence
from mgam.documents.prompt import build
from mgam.documents.second_look import best_first, best_together
from mgam.documents.sources import Source
from mgam.record import Record

from . import tiny

DIALS: dict[str, Any] = {"budget": 64, "window": 64, "block": 32, "levels": (1, 16, 64), "dense_until": 1024}


def everything(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("positions", ["granular", "absolute"])
def test_reading_in_full_is_dense_reading(positions: str, tokenizer: Any) -> None:
    model = tiny.make_plain_model(window=2048)
    ids = torch.tensor([build(tokenizer, [tiny.source(700)], "Who?").ids])
    want = everything(model, ids)
    mgam.apply(model, **{**DIALS, "dense_until": 0}, positions=positions)
    applied = model._mgam_applied
    before, coarse = applied.reading, everything(model, ids)
    assert not torch.allclose(coarse, want, atol=1e-3)
    with applied.in_full(16):
        assert torch.allclose(everything(model, ids), want, atol=1e-4)
    assert applied.reading is before
    assert torch.equal(everything(model, ids), coarse)


def test_an_error_on_the_way_leaves_the_model_as_it_was(tokenizer: Any) -> None:
    model = tiny.make_plain_model(window=2048)
    mgam.apply(model, **DIALS)
    applied = model._mgam_applied
    before = applied.reading
    with pytest.raises(KeyboardInterrupt), applied.in_full(16):
        raise KeyboardInterrupt
    assert applied.reading is before
    assert applied.reading_for(0, 0.25).levels.sizes == (1, 16, 64)


def test_what_is_left_are_lines_of_the_text_in_their_order(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closer_look, "WIDTHS", (256, 128))
    model = tiny.make_plain_model(window=4096)
    mgam.apply(model, **DIALS)
    text = "\n".join(f"line {number:03d} of it." for number in range(90))
    short = build(tokenizer, [Source("a.txt", text)], "Who?")
    close = closer(model, tokenizer, short, 8, lambda prompt, cache: (prompt, cache.get_seq_length()))
    assert close is not None
    assert close.whole == (short, short.document)
    assert len(close.lines) == len(closer_look.WIDTHS)
    before: set[str] = set(text.split("\n"))
    for some, tokens in zip(close.lines, closer_look.WIDTHS, strict=True):
        left = [line for line in some.sources[0].text.split("\n") if line]
        assert left == sorted(left)
        assert set(left) <= before
        assert tokens / 2 <= len("\n".join(left)) <= tokens + 64
        before = set(left)
    assert close.record.queries >= short.document


@pytest.mark.parametrize("tokens", [100, 2 * closer_look.WIDTHS[0] - 80, 1100])
def test_a_text_that_is_short_already_or_too_long_is_left_as_it_is(tokens: int, tokenizer: Any) -> None:
    model = tiny.make_plain_model(window=1024)
    short = build(tokenizer, [tiny.source(tokens)], "Who?")
    assert closer(model, tokenizer, short, 8, lambda *given: given) is None
    mgam.apply(model, **{**DIALS, "dense_until": 512})
    assert closer(model, tokenizer, short, 8, lambda *given: given) is None


def test_a_narrow_window_does_not_keep_from_reading_in_full(tokenizer: Any) -> None:
    model = tiny.make_plain_model(window=2048)
    mgam.apply(model, **{**DIALS, "window": 16, "block": 16, "question_block": 16})
    ids = torch.tensor([build(tokenizer, [tiny.source(700)], "Who?").ids])
    with model._mgam_applied.in_full(16):
        close = everything(model, ids)
    mgam.remove(model)
    assert torch.allclose(close, everything(model, ids), atol=1e-3)


@pytest.mark.parametrize("surest", [0, 1, 2])
def test_the_surest_answer_counts(surest: int, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all passages, of some lines, or of fewer: each as a text of its own would be answered."""
    monkeypatch.setattr(second_look, "DISTINCT", 0.0)
    monkeypatch.setattr(closer_look, "WIDTHS", (256, 64))
    model = tiny.make_plain_model(window=8192)
    read: list[Any] = []
    sure = [0.2] * 3
    sure[surest] = 0.9
    monkeypatch.setattr(asking, "build", lambda *given: read.append(given[1]) or build(*given))
    monkeypatch.setattr(asking, "confidence", lambda *given: sure.pop(0) if sure else 0.5)
    mgam.apply(model, **DIALS, reread=640)
    whole = tiny.source(3000)
    told: list[str] = []
    answer = asking.ask(model, tokenizer, [whole], "Who?", max_new_tokens=6, on_text=told.append)
    assert not sure
    assert answer.confidence == 0.9
    assert answer.found
    assert told == [answer.answer]
    sources = read[-3 + surest]
    assert answer.evidence
    for one in answer.evidence:
        assert whole.text[one.start : one.end] == one.text
        assert one.text.strip() in sources[0].text
    mgam.apply(model, **DIALS)
    alone = asking.ask(model, tokenizer, sources, "Who?", max_new_tokens=6)
    assert answer.answer == alone.answer
    assert answer.tokens["answered from"] == alone.tokens["document"] <= answer.tokens["read again"]
    assert answer.tokens["answer"] == alone.tokens["answer"]
    assert answer.entries_per_level["1"] > 0
    assert 0 < answer.seconds["to the first token"] <= answer.seconds["answering"]


def test_evidence_is_told_by_its_place_in_the_texts(tokenizer: Any) -> None:
    text = "\n\n".join(f"Part {part}\n" + "\n".join(f"  line {part}{n} of it." for n in range(40)) for part in "abc")
    sources = [Source("a.txt", text), Source("b.txt", text.upper())]
    prompt = build(tokenizer, sources, "Who?")
    score = torch.zeros(len(prompt.ids) // 16)
    score[torch.arange(5, len(score) - 2, 9)] = 1.0
    end = (prompt.document, prompt.document)
    found = second_look.passages(score, prompt, prompt.sources, tokenizer, chunk=16, tokens=500, recent=end, count=50)
    for source in found.sources:
        origin = next(one for one in sources if one.name == source.name)
        for line in source.text.split("\n"):
            if line.strip():
                start = source.text.index(line)
                here = Evidence(source.name, start, start + len(line), line, 0.5)
                back = found.original(here)
                assert back is not None
                assert (back.text, back.share) == (line, 0.5)
                assert origin.text[back.start : back.end] == line
    assert found.original(Evidence("a.txt", 0, 3, "xyz", 0.5)) is None
    assert found.original(Evidence("c.txt", 0, 4, "Part", 0.5)) is None


def test_chunks_come_by_attention_first_then_with_words() -> None:
    score = torch.zeros(40)
    score[:12] = torch.arange(12, 0, -1.0)
    words = torch.zeros(38, dtype=torch.float64)
    words[[30, 8]] = torch.tensor([5.0, 3.0], dtype=torch.float64)
    order = list(best_first(score, words))
    assert order[:6] == list(range(6))
    assert set(order[6:8]) == {30, 8}
    assert sorted(order) == [*range(12), 30]
    assert list(best_first(score, torch.zeros(40))) == list(range(12))
    assert best_together(score, words)[:3] == [8, 30, 0]
    assert list(best_first(torch.zeros(5), torch.zeros(5))) == best_together(torch.zeros(5), torch.zeros(5)) == []
    assert list(best_first(torch.zeros(0), torch.zeros(0))) == []


def test_what_the_best_leads_to_comes_by_turns() -> None:
    score, words = torch.arange(40.0, 0.0, -1.0), torch.zeros(40)
    words[30], words[8] = 3.0, 6.0
    assert list(best_first(score, words, [21, 8, 33]))[:12] == [0, 1, 2, 3, 4, 5, 8, 21, 30, 33, 6, 7]
    best = best_together(score, words)
    assert best_together(score, words, [21, best[0], 33])[:8] == [*best[:5], 21, best[5], best[6]]


def test_the_record_of_reading_in_full_tells_every_chunk(tokenizer: Any) -> None:
    model = tiny.make_plain_model(window=2048)
    mgam.apply(model, **DIALS)
    short = build(tokenizer, [tiny.source(640)], "Who?")
    with model._mgam_applied.in_full(16):
        record = Record(evidence_from=short.document)
        memory = asking.ReadTexts.of(model, short, len(short.ids), record, keep=True, on_progress=None)
        seen = memory.attended(model, short)
    asked = len(short.ids) - short.document
    for mass in seen.mass.values():
        assert mass.shape[1] >= (short.document - 64) // 16 - 1
        # Each query head's attention sums to one, less what the window gets.
        assert 0.3 * 4 * asked < float(mass.sum()) <= 4 * asked * 1.001
