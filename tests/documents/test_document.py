"""A digest gives what one pass gives, however it was made and however little memory it may use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mgam.documents import building, tiers
from mgam.documents import document as opening
from mgam.documents.document import Document
from mgam.documents.pool import Pool
from mgam.documents.sources import Source
from mgam.documents.store.layout import Shape
from mgam.documents.tokens import Frame, encode
from mgam.errors import DigestError, DocumentError, MemoryBudgetError, SettingError
from mgam.integrations.transformers import PyramidCache
from mgam.integrations.transformers.apply import apply, remove
from mgam.levels import Levels
from mgam.schedule import Schedule, Span

from . import tiny
from .conftest import Make
from .tiny import contents, source

HEAD = 76  # tokens before the first text, and after no text


class Stopped(Exception):
    """Raised in place of a kill."""


def one_pass(model: Any, document: Document, asked: list[int], new: int) -> tuple[torch.Tensor, list[int]]:
    """Logits of a question and tokens after it, read in one pass over text and question with a cache in memory."""
    settings, count = document.manifest.settings, len(document.tokens)
    schedule = Schedule.reading(
        count, len(asked), block=settings.block, question_block=settings.question_block, lookahead=settings.lookahead
    )
    ids = torch.tensor([[*document.tokens.ids.tolist(), *asked]])
    with torch.no_grad():
        logits = model(ids, past_key_values=PyramidCache(model, [schedule]), use_cache=True).logits[0, count:]
        produced = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=PyramidCache(model, [schedule]),
            max_new_tokens=new, do_sample=False, pad_token_id=0,
        )  # fmt: skip
    return logits, produced[0, ids.shape[1] :].tolist()


def test_each_document_is_asked_by_its_own_settings(
    model: Any, tokenizer: Any, digest: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest(source(1000), model=tiny.make_model(budget=16), name="other.mgam")
    document = digest(source(1000))
    told = Frame.of(tokenizer).question(tokenizer, "Who?")

    def answered() -> tuple[str, dict[str, float], dict[str, Any]]:
        answer = document.ask("Who keeps the light?", max_new_tokens=8)
        return answer.answer, answer.entries_per_level, answer.settings

    def read() -> torch.Tensor:
        cache, count = document.start(len(told)), len(document.tokens)
        places = torch.arange(count, count + len(told))[None]
        with torch.no_grad():
            return model(torch.tensor([told]), position_ids=places, past_key_values=cache, use_cache=True).logits

    def neutral() -> torch.Tensor:
        document._neutral = None
        return document.neutral()

    wanted, logits, shares = answered(), read(), neutral()
    talk = document.chat()
    said = [talk.say(question, max_new_tokens=4).answer for question in ("who?", "where?")]
    talk = document.chat()
    assert talk.say("who?", max_new_tokens=4).answer == said[0]
    other = Document.open(tmp_path / "other.mgam", model, tokenizer)
    less = other.ask("Who keeps the light?", max_new_tokens=8)
    assert less.entries_per_level != wanted[1]
    assert talk.say("where?", max_new_tokens=4).answer == said[1]
    for change in (
        lambda: Document.open(tmp_path / "other.mgam", model, tokenizer),
        lambda: apply(model, "streaming-llm", window=16),
        lambda: remove(model),
    ):
        change()
        assert answered() == wanted
        change()
        assert torch.equal(read(), logits)
        change()
        assert torch.equal(neutral(), shares)
    assert other.ask("Who keeps the light?", max_new_tokens=8).entries_per_level == less.entries_per_level
    answered()
    monkeypatch.setattr(opening, "apply", lambda *given, **more: pytest.fail("applied twice"))
    assert answered() == wanted


def test_one_file_is_one_text_and_there_are_two_tiers(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(source(300).text, encoding="utf-8")
    document = Document.digest(model, tokenizer, str(tmp_path / "text.txt"), tmp_path / "book.mgam", **tiny.GRID)
    assert len(document.sources) == 1
    with pytest.raises(SettingError, match="tier='ram' must be 'disk' or 'host'"):
        Document.open(tmp_path / "book.mgam", model, tokenizer, tier="ram")


@pytest.mark.parametrize("settings", [{}, {"method": "streaming-llm"}])
def test_an_opened_model_goes_on_digesting(
    tokenizer: Any, digest: Make, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Where dense reading ends was left to the model when it was digested, and is told when it is opened."""
    dials = {"window": 32, "budget": 64, "levels": (1, 16, 64), "block": 32, "question_block": 8, **settings}
    made = digest(source(300), model=apply(tiny.make_plain_model(), **dials))
    model = tiny.make_plain_model()
    document = Document.open(made.path, model, tokenizer)
    monkeypatch.setattr(opening, "apply", lambda *given, **more: pytest.fail("applied twice"))
    assert document.ask("Who?", max_new_tokens=3).answer == made.ask("Who?", max_new_tokens=3).answer
    assert len(digest(source(300, 1), model=model, append=True).manifest.texts) == 2


@pytest.mark.parametrize("length", [5, 128 - HEAD, 128 - HEAD + 1, 300, 1000])
@pytest.mark.parametrize("lookahead", ["block", "none"])
def test_a_question_meets_the_same_logits_as_in_one_pass(
    tokenizer: Any, digest: Make, lookahead: str, length: int
) -> None:
    model = tiny.make_model(lookahead=lookahead)
    document = digest(source(length), model=model)
    asked = Frame.of(tokenizer).question(tokenizer, "Who keeps the light on the island?")
    wanted, tokens = one_pass(model, document, asked, 12)
    for _ in range(2):  # the second question does not see the first
        cache, count = document.start(len(asked)), len(document.tokens)
        with torch.no_grad():
            ids, places = torch.tensor([asked]), torch.arange(count, count + len(asked))[None]
            logits = model(ids, position_ids=places, past_key_values=cache, use_cache=True).logits[0]
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    span = Span(count + len(asked), model._mgam_applied.settings.question_block, lookahead)  # type: ignore[arg-type]
    assert document.continue_from(asked, (span,), max_new_tokens=12) == tokens


def test_questions_may_read_more_than_the_text_was_read_with(model: Any, tokenizer: Any, digest: Make) -> None:
    made = digest(source(1000), model=model)
    asked = Frame.of(tokenizer).question(tokenizer, "Who keeps the light on the island?")
    before = contents(made.path)
    document = Document.open(made.path, model, tokenizer, question_budget=256)
    span = Span(len(document.tokens) + len(asked), 8, "block")
    found = document.continue_from(asked, (span,), max_new_tokens=12)
    wider = tiny.make_model(question_budget=256)
    assert found == one_pass(wider, document, asked, 12)[1] != one_pass(tiny.make_model(), document, asked, 12)[1]
    document.close()
    assert contents(made.path) == before
    longer = digest(source(300, seed=1), model=model, append=True)  # the model reads as it was asked last
    assert len(longer.tokens) > len(document.tokens)


@pytest.mark.parametrize(("window", "wanted"), [(512, 64), (2048, 256), (65536, 4096)])
def test_questions_have_an_eighth_of_the_trained_window(window: int, wanted: int) -> None:
    applied = apply(tiny.make_plain_model(window=window), **tiny.SETTINGS)._mgam_applied
    asking = applied.reading_for(0, 1.0).asking
    assert (64 if asking is None else asking.budget) == applied.question_budget == wanted
    for method, more in (("mgam", {"question_budget": 64}), ("quest", {})):
        plain = tiny.make_plain_model(window=window)
        assert apply(plain, method, **{**tiny.SETTINGS, **more})._mgam_applied.reading_for(0, 1.0).asking is None


@pytest.mark.parametrize("lookahead", ["block", "none"])
def test_bytes_are_equal_through_stopped_and_appended(
    tokenizer: Any, digest: Make, tmp_path: Path, lookahead: str
) -> None:
    model = tiny.make_model(lookahead=lookahead)
    first, second = source(400), source(300, 1)
    digest(first, second, model=model, name="through.mgam")

    def stop(done: int, total: int) -> None:
        if done == 320:
            raise Stopped

    with pytest.raises(Stopped):
        digest(first, second, model=model, name="stopped.mgam", on_progress=stop)
    with pytest.raises(DigestError, match=r"unfinished: 256 of"):
        Document.open(tmp_path / "stopped.mgam", model, tokenizer)
    digest(model=model, name="stopped.mgam")
    digest(first, model=model, name="appended.mgam")
    before = contents(tmp_path / "appended.mgam")
    digest(second, model=model, name="appended.mgam", append=True)
    after = contents(tmp_path / "appended.mgam")
    assert contents(tmp_path / "stopped.mgam") == contents(tmp_path / "through.mgam")
    assert after == contents(tmp_path / "through.mgam")
    whole = [name for name in before if name.startswith("segment") and name.count("-") == 1]
    assert whole
    assert all(before[name] == after[name] for name in whole)
    digest(second, model=model, name="appended.mgam", append=True)  # twice is once
    assert contents(tmp_path / "appended.mgam") == after


@pytest.mark.parametrize("eight_bits", [False, True])
def test_any_memory_bound_gives_the_same(
    tokenizer: Any, digest: Make, tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch, eight_bits: bool
) -> None:
    monkeypatch.setattr(tiers, "LEAST", 8)
    ample = digest(source(2500), name="ample.mgam", eight_bits=eight_bits)
    floor = floor_of(digest, "floor.mgam")
    bound = digest(source(2500), name="bound.mgam", memory=floor, eight_bits=eight_bits, room=64)
    assert contents(tmp_path / "bound.mgam") == contents(tmp_path / "ample.mgam")
    assert bound.pool.slots < ample.pool.slots
    asked = "What did the captain see north of the storm?"
    tight = Document.open(
        tmp_path / "ample.mgam", model, tokenizer, memory=bound_for(tmp_path, model, tokenizer), room=64
    )
    for one in (bound, tight, Document.open(tmp_path / "ample.mgam", model, tokenizer, tier="host")):
        assert one.ask(asked, max_new_tokens=8).answer == ample.ask(asked, max_new_tokens=8).answer
    assert tight.counts.fetched > ample.counts.fetched


@pytest.mark.parametrize("eight_bits", [False, True])
def test_a_digest_made_in_memory_has_the_same_bytes(
    digest: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eight_bits: bool
) -> None:
    texts = [source(600), source(300, 1)]
    digest(*texts, name="paged.mgam", eight_bits=eight_bits)
    monkeypatch.setattr(building, "_paged", lambda device, memory: False)
    digest(*texts, name="memory.mgam", eight_bits=eight_bits)
    digest(texts[0], name="appended.mgam", eight_bits=eight_bits)
    digest(texts[1], name="appended.mgam", eight_bits=eight_bits, append=True)
    assert contents(tmp_path / "memory.mgam") == contents(tmp_path / "paged.mgam")
    assert contents(tmp_path / "appended.mgam") == contents(tmp_path / "paged.mgam")


def test_a_question_too_long_for_the_memory_harms_no_later_one(
    tokenizer: Any, digest: Make, tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "LEAST", 8)
    digest(source(2500), name="ample.mgam")
    bound = bound_for(tmp_path, model, tokenizer)
    document = Document.open(tmp_path / "ample.mgam", model, tokenizer, memory=bound, room=64)
    before = document.ask("Where is the whale?", max_new_tokens=8)
    with pytest.raises(MemoryBudgetError, match="more are needed at once"):
        document.ask("whale " * 1000, max_new_tokens=4)
    after = document.ask("Where is the whale?", max_new_tokens=8)
    assert (after.answer, after.evidence) == (before.answer, before.evidence)


@pytest.mark.parametrize(
    ("call", "number"), [("pin", 0), ("pin", 1), ("slots_of", 0), ("slots_of", 1), ("slots_of", 5)]
)
def test_a_question_that_is_stopped_anywhere_harms_no_later_one(
    digest: Make, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    document = digest(source(1000))
    before = document.ask("Where is the whale?", max_new_tokens=8)
    calls, real = iter(range(100)), getattr(Pool, call)

    def stop(*given: Any) -> Any:
        if next(calls) == number:
            raise Stopped
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Pool, call, stop)
        with pytest.raises(Stopped):
            document.ask("Where is the whale? " * 4, max_new_tokens=8)
    assert all(layer.columns <= layer.lengths[0] for layer in document.cache.pyramids.values())
    after = document.ask("Where is the whale?", max_new_tokens=8)
    assert (after.answer, after.evidence) == (before.answer, before.evidence)


def floor_of(digest: Make, name: str) -> int:
    with pytest.raises(MemoryBudgetError, match=r"below the floor of [\d.,]+ MiB") as caught:
        digest(source(2500), name=name, memory="1KiB", room=64)
    return floor_in(caught.value)


def bound_for(tmp_path: Path, model: Any, tokenizer: Any) -> int:
    with pytest.raises(MemoryBudgetError, match=r"below the floor") as caught:
        Document.open(tmp_path / "ample.mgam", model, tokenizer, memory=1, room=64)
    return floor_in(caught.value)


def floor_in(error: Exception) -> int:
    return int((float(str(error).partition("floor of ")[2].partition(" MiB")[0]) + 0.05) * 2**20)


def test_a_talk_equals_one_pass_over_all_that_was_said(model: Any, tokenizer: Any, digest: Make) -> None:
    document = digest(source(700))
    frame, settings = Frame.of(tokenizer), document.manifest.settings
    talk = document.chat()
    said = [talk.say(question, max_new_tokens=6) for question in ("who?", "where was it?")]
    other = document.ask("something else", max_new_tokens=3)
    third = talk.say("and why?", max_new_tokens=6)
    count = len(document.tokens)
    first, second = frame.question(tokenizer, "who?"), frame.next_question(tokenizer, "where was it?")
    ids = talk.ids[: len(first)]
    assert ids == first
    answer = talk.ids[len(first) : talk.ids.index(second[0], len(first))] if second else []
    assert talk.ids[len(first) + len(answer) :][: len(second)] == second
    spans = talk.spans
    schedule = Schedule((Span(count, settings.block, settings.lookahead), *spans, Span(None, 1)))
    whole = torch.tensor([[*document.tokens.ids.tolist(), *talk.ids]])
    with torch.no_grad():
        logits = model(whole, past_key_values=PyramidCache(model, [schedule]), use_cache=True).logits[0]
    last = said[0].tokens["answer"]
    assert logits[count + len(first) - 1].argmax() == talk.ids[len(first)] or last == 1
    ends = len(talk.ids) - third.tokens["answer"] - 1
    assert logits[count + ends :].argmax(-1).tolist()[: third.tokens["answer"]] == talk.ids[ends + 1 :] or other
    again = document.chat()
    for question in ("who?", "where was it?", "and why?"):
        final = again.say(question, max_new_tokens=6)
    assert final.answer == third.answer
    assert again.ids == talk.ids


def test_generate_goes_on_from_the_texts(model: Any, tokenizer: Any, digest: Make) -> None:
    document = digest(source(300))
    asked = encode(tokenizer, "The whale")
    _, tokens = one_pass(model, document, asked, 9)
    assert document.generate("The whale", max_new_tokens=9) == tokenizer.decode(tokens, skip_special_tokens=True)
    with pytest.raises(DocumentError, match="nothing to go on from"):
        document.generate("")


def test_evidence_names_file_and_characters(digest: Make) -> None:
    texts = [source(500), source(400, 1)]
    answer = digest(*texts).ask("who?", max_new_tokens=4)
    assert answer.evidence
    for passage in answer.evidence:
        there = next(text for text in texts if text.name == passage.file)
        assert there.text[passage.start : passage.end] == passage.text


def test_offsets_count_characters_not_bytes(digest: Make) -> None:
    text = "Grüße aus Köln — 北京 — naïve café. " * 12
    document = digest(Source("umlaut", text))
    inside = document.tokens.texts == 0
    ends = document.tokens.offsets[inside]
    assert ends[:, 1].max() == len(text.rstrip())
    assert (ends[:, 0] <= ends[:, 1]).all()


def test_segments_are_plain_safetensors(digest: Make, tmp_path: Path) -> None:
    document = digest(source(400))
    for part in document.manifest.segments:
        with safe_open(tmp_path / "book.mgam" / part.file, "pt") as file:
            assert file.get_tensor("ids").tolist() == document.tokens.ids[part.first :][: part.tokens].tolist()
            assert file.get_tensor("layers.0.pages").shape[0] == part.tokens // 16


def test_disk_bytes_are_as_stated_and_halved_by_eight_bits(digest: Make, tmp_path: Path) -> None:
    sizes = {}
    for name, eight in (("raw.mgam", False), ("small.mgam", True)):
        document = digest(source(5000), name=name, eight_bits=eight)
        bytes_ = sum(len(data) for file, data in contents(tmp_path / name).items() if file.startswith("segment"))
        assert bytes_ / len(document.tokens) == pytest.approx(document.manifest.shape.disk_bytes_per_token, rel=0.25)
        sizes[eight] = document.manifest.shape.page_bytes_per_token
    assert sizes[True] < sizes[False] / 2
    default = {bits: Shape(30, 9, 3, 64, "bfloat16", Levels(), 0, bits).disk_bytes_per_token for bits in (16, 8)}
    assert default[8] < 0.52 * default[16]


def test_rounded_summaries_and_search_keys_are_near_what_they_stand_for(
    model: Any, tokenizer: Any, digest: Make
) -> None:
    """Half a step from the exact ones, but for what the rounded tokens before them changed: so of the first segment."""
    exact, rounded = (digest(source(1000), name=f"{bits}.mgam", eight_bits=bits == 8) for bits in (16, 8))
    for number, layer in exact.cache.pyramids.items():
        small = rounded.cache.pyramids[number].pyramid
        pairs = [*zip(layer.pyramid.keys[1:], small.keys[1:], strict=True)]
        pairs += [*zip(layer.pyramid.values[1:], small.values[1:], strict=True), (layer.pyramid.search, small.search)]
        for level, (plain, found) in enumerate(pairs):
            chunks = slice(0, 2) if level % 2 and level < 4 else slice(0, 8)  # of the segment's 128 tokens
            own, near = plain[..., chunks, :].float(), found[..., chunks, :].float()
            step = own.abs().amax(tuple(range(2, own.dim() - 1)), keepdim=True) / 127
            assert bool(((own - near).abs() <= 0.55 * step + 2**-8 * own.abs()).all())
            assert not torch.equal(own, near)


def test_a_method_without_search_digests_too(tokenizer: Any, digest: Make) -> None:
    model = tiny.make_model(method="streaming-llm", window=32)
    document = digest(source(500), model=model)
    asked = Frame.of(tokenizer).question(tokenizer, "who?")
    _, tokens = one_pass(model, document, asked, 5)
    span = Span(len(document.tokens) + len(asked), 8, document.manifest.settings.lookahead)
    assert document.continue_from(asked, (span,), max_new_tokens=5) == tokens
