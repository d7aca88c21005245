"""InfiniRetri: what is carried on, and that nothing is lost or read too long."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mgam
from mgam.documents import infiniretri, prompt
from mgam.documents.infiniretri import Sentence, keep, parts, retrieve, scores, sentences
from mgam.documents.sources import Source
from mgam.errors import DocumentError, SettingError
from mgam.evaluation.adapters import ModelReader
from mgam.evaluation.reader import DoesNotFitError
from mgam.methods.infiniretri import Retrieval

TEXT = "".join(f"The number of box {n} is {n * 37 % 101}. " for n in range(40))
ENDLESS = {
    "rows": "".join(f"row {n} value {n * 37 % 101}\n" for n in range(300)),
    "one line": "".join(f"row {n} value {n * 37 % 101}, " for n in range(300)),
    "no blank": "".join(f"{n * 37 % 101}," for n in range(1500)),
}


class Letters:
    """A tokenizer of single letters."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 128 for letter in text]}


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_enough_carries_everything(model: Any) -> None:
    found = retrieve(model, Letters(), TEXT, "What is in box 7?", Retrieval(200, 10**6, 1, 10**6))
    left = found.sentences
    assert [one for item in left for one in item.ids] == Letters()(TEXT)["input_ids"]
    assert left == sentences(TEXT, Letters(), 200)


def test_calls_are_short_and_order_is_kept(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    before = model.config._attn_implementation
    found = retrieve(model, Letters(), TEXT, "box 7?", Retrieval(200, 20, 3, 90))
    left = found.sentences
    assert found.queries == sum(lengths)
    assert found.entries == sum(length * (length + 1) // 2 for length in lengths)
    assert max(lengths) <= 200 + 90 + 8 + 1
    assert [item.start for item in left] == sorted({item.start for item in left})
    assert sum(len(item.ids) for item in left) <= 90
    assert model.config._attn_implementation == before


def test_rows_are_those_of_eager_attention(model: Any) -> None:
    ids = Letters()(TEXT[:50])["input_ids"]
    with infiniretri._rows(model) as attend:
        rows = attend(ids, 6)
    model.set_attn_implementation("eager")
    whole = model(torch.tensor([ids]), output_attentions=True).attentions[-1][0].sum(0)
    torch.testing.assert_close(rows, whole[-6:], atol=1e-5, rtol=0)


def test_a_planted_sentence_survives() -> None:
    context = [Sentence((1,) * 5, 10 * n, 10 * n + 5) for n in range(6)]
    score = torch.zeros(30)
    score[12], score[27] = 5, 3
    assert keep(context, score, Retrieval(topk=2)) == {2: 5.0, 5: 3.0}
    assert keep(context, score, Retrieval(topk=2, budget=7)) == {2: 5.0}


def test_phrases() -> None:
    rows, weight = torch.rand(4, 20), torch.rand(4)
    torch.testing.assert_close(scores(rows, weight, 1), (weight[:, None] * rows).sum(0))
    rows[:, :5] = rows[:, -5:] = 0
    torch.testing.assert_close(scores(rows, weight, 4).sum(), 4 * (weight[:, None] * rows).sum())


def test_nothing_is_lost_when_a_text_is_cut() -> None:
    cut = parts(sentences("no end " * 50 + "Short. Shorter! ", Letters(), 64), 64)
    assert all(sum(len(item.ids) for item in part) <= 64 for part in cut)
    assert sum(len(item.ids) for part in cut for item in part) == len("no end " * 50 + "Short. Shorter! ")


def split(text: str, most: int = 10**6) -> list[str]:
    return [text[item.start : item.end] for item in sentences(text, Letters(), most)]


@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize("most", [1, 7, 150])
def test_pieces_have_places_of_their_own(text: str, most: int) -> None:
    items = sentences(text, Letters(), most)
    assert all(item.ids == tuple(Letters()(text[item.start : item.end])["input_ids"]) for item in items)
    assert max(len(item.ids) for item in items) <= most
    assert all(before.end <= after.start for before, after in pairwise(items))
    assert "".join("".join(split(text, most)).split()) == "".join(text.split())


def test_pieces_end_at_blanks_where_there_are_any() -> None:
    assert all(piece[-1].isspace() for piece in split(ENDLESS["one line"], 64))


def test_marks_end_sentences_in_each_script() -> None:
    assert split("It is 3.14 or so. Is it so? Yes! It is.") == ["It is 3.14 or so. ", "Is it so? ", "Yes! ", "It is."]
    assert split("他走了。真的吗？真的！「好。」她说。") == ["他走了。", "真的吗？", "真的！", "「好。」", "她说。"]
    assert split("今日は。 明日は。\n昨日") == ["今日は。 ", "明日は。\n", "昨日"]
    assert split("A heading\n\nAnd a text") == ["A heading\n\n", "And a text"]


def test_abbreviations_end_no_sentence() -> None:
    said = split("Dr. Smith met Mr. J. Doe. He left the house.")
    assert said == ["Dr. Smith met Mr. J. Doe. ", "He left the house."]
    assert split("It was opened! Dr. Smith stood there.") == ["It was opened! ", "Dr. Smith stood there."]
    assert split("It is here. So what? Nothing.") == ["It is here. So what? ", "Nothing."]
    assert split("a = 1.\nb = 2.\n") == ["a = 1.\n", "b = 2.\n"]


def test_lines_of_a_long_stretch_are_sentences() -> None:
    assert split(ENDLESS["rows"]) == ENDLESS["rows"].splitlines(keepends=True)
    assert split(ENDLESS["rows"].replace("\n", "\r\n")) == [row + "\r\n" for row in ENDLESS["rows"].splitlines()]
    assert split("A line that\nis wrapped.") == ["A line that\nis wrapped."]


def test_white_space_alone_is_not_carried_on() -> None:
    assert split("one" + " " * 1000 + "two", 50)[0].strip() == "one"
    assert all(piece.strip() for piece in split("one" + " " * 1000 + "two", 50))


def test_refused(model: Any) -> None:
    with pytest.raises(DocumentError, match="empty"):
        retrieve(model, Letters(), TEXT, "  ")
    with pytest.raises(SettingError, match="phrase=0"):
        Retrieval(phrase=0)

    class Bytes(Letters):
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [one % 128 for one in text.encode()]}

    with pytest.raises(SettingError, match="'他' alone has 3 tokens"):
        retrieve(model, Bytes(), "他走。", "box 7?", Retrieval(200, 20, 3, 2))


class Tokenizer(Letters):
    """The same with places, and ways back."""

    chat_template = None
    pad_token_id = eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True, return_offsets_mapping: bool = False) -> Any:
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": ids, "offset_mapping": [(place, place + 1) for place in range(len(ids))]}

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return "".join(chr(int(one)) for one in ids)


def test_asked_by_name(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [Source("a.txt", TEXT), Source("b.txt", "And this is another text. It has two sentences.")]
    prompts = []
    answer = infiniretri.asking.ask

    def watched(model: Any, tokenizer: Any, given: Any, *args: Any, **more: Any) -> Any:
        prompts.append(given[0].text)
        return answer(model, tokenizer, given, *args, **more)

    monkeypatch.setattr(infiniretri.asking, "ask", watched)
    said = infiniretri.ask(model, Tokenizer(), sources, "box 7?", max_new_tokens=2, retrieval=Retrieval(200, 20, 3, 90))
    assert len(prompts[0]) <= 90
    for one in said.evidence:
        whole = next(source.text for source in sources if source.name == one.file)
        assert one.text == whole[one.start : one.end]
        assert one.text.strip() in prompts[0]
    assert said.settings["method"] == "infini-retri"
    assert said.settings["topk"] == 20
    assert 0 < said.entries_per_level["1"] < 400


@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize(("window", "budget"), [(200, 400), (200, 150), (30, 8)])
def test_a_text_without_full_stops_is_read_within_bounds(model: Any, text: str, window: int, budget: int) -> None:
    lengths = []

    def watch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        past = kwargs.get("past_key_values")
        lengths.append(kwargs["input_ids"].shape[1] + (past.get_seq_length() if past is not None else 0))

    model.get_decoder().register_forward_pre_hook(watch, with_kwargs=True)
    dials, asked = Retrieval(window, 20, 3, budget), "\n\nrow 7?"
    found = retrieve(model, Tokenizer(), text, asked.strip(), dials)
    lengths.clear()
    said = infiniretri.ask(
        model, Tokenizer(), [Source("a.txt", text)], asked.strip(), max_new_tokens=4, evidence_count=99, retrieval=dials
    )
    framed = len(prompt.BEFORE) + budget + len(asked + "\nAnswer:") + 4
    assert max(lengths) <= max(1 + budget + window + len(asked), framed)
    assert 0 < said.tokens["kept"] <= budget
    pieces = {(item.start, item.end) for item in found.sentences}
    assert {(one.start, one.end) for one in said.evidence} == pieces
    assert sum(end - start for start, end in pieces) == said.tokens["kept"]


def test_what_has_more_tokens_side_by_side_goes_worst_first() -> None:
    class Seams(Letters):
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1] * (len(text) + text.count("ab"))}

    items = [Sentence((1,), place, place + 1) for place in range(4)]
    found = infiniretri.Found(items, [0.4, 0.1, 0.3, 0.2], 0, 0)
    left, text, kept = infiniretri._left(found, "abab", Seams(), 4)
    assert (text, kept, left.scores) == ("aab", 4, [0.4, 0.3, 0.2])


def test_the_first_sentence_of_each_text_is_evidence(model: Any) -> None:
    sources = [Source("a.txt", "Here is one text."), Source("b.txt", "And this is another.")]
    said = infiniretri.ask(model, Tokenizer(), sources, "what?", max_new_tokens=2, retrieval=Retrieval())
    assert {one.file: one.text for one in said.evidence} == {source.name: source.text for source in sources}


def test_measured_by_name(model: Any) -> None:
    reader = ModelReader(model, Tokenizer(), "infini-retri:window=200:budget=90:topk=20", name="tiny")
    assert reader.settings["budget"] == 90
    reading = reader.read(TEXT, "box 7?", 2)
    assert reading.evidence
    assert reader.read_batch([TEXT], ["box 7?"], 2)[0].answer == reading.answer
    with pytest.raises(DoesNotFitError, match="no loss"):
        reader.losses(TEXT)
    with pytest.raises(SettingError, match="has no setting levels; it has window"):
        _ = ModelReader(model, Tokenizer(), "infini-retri:levels=1/64", name="tiny").settings
    with pytest.raises(SettingError, match="loop around a model"):
        mgam.apply(model, "infini-retri")
