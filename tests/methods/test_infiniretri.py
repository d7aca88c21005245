"""InfiniRetri: what is carried on, and that nothing is lost or read too long."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mgam
from mgam.documents import infiniretri
from mgam.documents.infiniretri import Sentence, keep, parts, retrieve, scores, sentences
from mgam.documents.sources import Source
from mgam.errors import DocumentError, SettingError
from mgam.evaluation.adapters import ModelReader
from mgam.evaluation.reader import DoesNotFitError
from mgam.methods.infiniretri import Retrieval

TEXT = "".join(f"The number of box {n} is {n * 37 % 101}. " for n in range(40))


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


def test_refused(model: Any) -> None:
    with pytest.raises(DocumentError, match="empty"):
        retrieve(model, Letters(), TEXT, "  ")
    with pytest.raises(SettingError, match="phrase=0"):
        Retrieval(phrase=0)


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
