"""Modules inside transformers' models: as full attention where they read everything, causal, padded, saved, trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)  # fmt: skip

import mgam
from mgam import methods
from mgam.errors import ModelFileError, SettingError, UnsupportedModelError
from mgam.nn import BigBirdAttention, PerformerAttention, ReformerAttention

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
CAUSAL: dict[str, dict[str, Any]] = {
    "dense": {},
    "mgam": {"levels": (1, 4, 16), "search": 2, "window": 8, "budget": 8, "block": 8},
    "sliding": {"window": 8},
    "blockwise": {"kind": "blockwise", "window": 8, "exchange": 3},
    "longformer": {"window": 8, "global_tokens": 2},
    "bigbird": {"block": 8, "random": 1},
    "performer": {},
    "nsa": {"length": 4, "stride": 2, "select": 4, "blocks": 3, "window": 6},
    "moba": {"block": 4, "blocks": 2},
    "cca": {"group": 4, "window": 6},
    "dga": {"focal": 0.2, "group": 3, "block": 4, "look": 3},
}
BOTH = ("dense", "sliding", "longformer", "bigbird", "performer", "reformer", "linformer")
FULL: dict[str, dict[str, Any]] = {
    "dense": {}, "sliding": {"window": 64}, "longformer": {"window": 64}, "cca": {"group": 1}, "dga": {"focal": 1.0},
    "mgam": {"budget": 256, "window": 64},
}  # fmt: skip


def llama(kv_heads: int = 2) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=kv_heads, initializer_range=0.2)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SMALL, initializer_range=0.2)).eval()


def tokens(rows: int = 2, length: int = 37) -> Any:
    return torch.randint(2, 61, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", list(FULL))
@torch.no_grad()
def test_reading_everything_is_the_model_as_it_was(name: str) -> None:
    for model in (llama(), Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2)).eval()):
        whole = model(tokens()).logits
        mgam.train_with(model, name, **FULL[name])
        torch.testing.assert_close(model(tokens()).logits, whole, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("fusion", ["gates", "one"])
@torch.no_grad()
def test_every_branch_of_nsa_begins_with_the_projections_of_the_model(fusion: str) -> None:
    qwen = Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2, initializer_range=0.2)).eval()
    torch.nn.init.normal_(qwen.model.layers[0].self_attn.k_proj.bias)
    for model in (llama(), qwen):
        whole = model(tokens()).logits
        mgam.train_with(model, "nsa", window=64, fusion=fusion)
        assert torch.cosine_similarity(model(tokens()).logits, whole, dim=-1).min() > 0.97


@torch.no_grad()
def test_heads_of_a_group_share_values_in_reformer() -> None:
    model = mgam.train_with(llama(), "reformer", bucket=8)
    module = model.model.layers[0].self_attn.attention
    assert (module.query.out_features, module.value.out_features) == (32, 16)
    assert torch.isfinite(model(tokens()).logits).all()
    assert model.generate(tokens(), max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 39)


def draws(model: Any) -> list[torch.Tensor]:
    """What each layer drew by its seed."""
    found: list[torch.Tensor] = []
    for part in model.modules():
        if isinstance(part, BigBirdAttention):
            found.append(part.plan(0, 40, 40))
        elif isinstance(part, PerformerAttention | ReformerAttention):
            found += part.buffers(recurse=False)
    return found


@pytest.mark.parametrize("name", ["bigbird", "performer", "reformer"])
@pytest.mark.parametrize("make", [llama, bert])
def test_every_layer_has_a_draw_of_its_own(name: str, make: Any, tmp_path: Path) -> None:
    model = mgam.train_with(make(), name, seed=5)
    first, second = draws(model)
    assert not torch.equal(first, second)
    for seed, same in ((5, True), (6, False)):
        again = draws(mgam.train_with(make(), name, seed=seed))
        assert [torch.equal(*pair) for pair in zip((first, second), again, strict=True)] == [same, same]
    model.save_pretrained(tmp_path)
    loaded = mgam.load_trained(tmp_path, AutoModelForMaskedLM if make is bert else AutoModelForCausalLM)
    assert all(torch.equal(*pair) for pair in zip((first, second), draws(loaded), strict=True))


@pytest.mark.parametrize("name", list(CAUSAL))
@torch.no_grad()
def test_generation_streams_what_one_pass_reads(name: str) -> None:
    model = mgam.train_with(llama(), name, **CAUSAL[name])
    ids = tokens()
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :20], past_key_values=cache, use_cache=True).logits
    rest = [model(ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits for place in range(20, 37)]
    torch.testing.assert_close(torch.cat((first, *rest), 1), whole, atol=3e-4, rtol=1e-4)
    said = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    alone = ids
    for _ in range(4):
        alone = torch.cat((alone, model(alone).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(said, alone)


@pytest.mark.parametrize("name", ["dense", "mgam", "performer", "cca", "dga", "nsa"])
@torch.no_grad()
def test_padded_rows_answer_as_single_ones(name: str) -> None:
    model = mgam.train_with(llama(), name, **CAUSAL[name])
    ids, mask = tokens(), torch.ones(2, 37, dtype=torch.long)
    ids[0, :9], mask[0, :9] = 0, 0
    said = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for row, start in ((0, 9), (1, 0)):
        single = model.generate(ids[row : row + 1, start:], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(said[row, start:], single[0])
    beams = model.generate(ids, attention_mask=mask, max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0)
    assert beams.shape == (2, 40)


@pytest.mark.parametrize("name", BOTH)
@torch.no_grad()
def test_encoders_too(name: str) -> None:
    model = bert()
    whole = model(tokens()).logits
    options = {"window": 64} if name in ("sliding", "longformer") else {}
    mgam.train_with(model, name, **options)
    found = model(tokens()).logits
    if name in ("dense", "sliding", "longformer"):
        torch.testing.assert_close(found, whole, atol=2e-4, rtol=1e-4)
    ids, mask = tokens(), torch.ones(2, 37, dtype=torch.long)
    mask[0, 30:] = 0
    padded = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[0, :30], model(ids[:1, :30]).logits[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["dga", "nsa"])
def test_fine_tuned_by_trainer_saved_and_loaded(name: str, tmp_path: Path) -> None:
    ids = tokens(8, 32)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]
    model = mgam.train_with(llama(), name, **CAUSAL[name])
    before = float(model(ids, labels=ids).loss.detach())
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=12, per_device_train_batch_size=8, learning_rate=3e-3, report_to=[],
        save_strategy="no", use_cpu=True, logging_strategy="no", disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    model.eval()
    after = model(ids, labels=ids)
    assert float(after.loss.detach()) < 0.8 * before
    model.save_pretrained(tmp_path / "saved")
    again = mgam.load_trained(tmp_path / "saved")
    assert again.config.mgam_attention["method"] == name
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, after.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sliding", "strided", "dilated", "blockwise"])
def test_local_kinds_are_what_their_names_say(name: str) -> None:
    model = mgam.train_with(llama(), name, window=4)
    assert {layer.self_attn.attention.kind for layer in model.model.layers} == {name}


def test_an_encoder_is_saved_and_loaded(tmp_path: Path) -> None:
    model = mgam.train_with(bert(), "linformer", longest=64)
    model.save_pretrained(tmp_path)
    again = mgam.load_trained(tmp_path, AutoModelForMaskedLM)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no module to train; these have"):
        mgam.train_with(llama(), "quest")
    with pytest.raises(SettingError, match=r"linformer has no causal form, and LlamaForCausalLM is a decoder.*dense"):
        mgam.train_with(llama(), "linformer")
    with pytest.raises(SettingError, match="no bidirectional form"):
        mgam.train_with(bert(), "cca")
    with pytest.raises(SettingError, match="cca has no setting causal, grup; it has group, mass, window"):
        mgam.train_with(llama(), "cca", grup=4, causal=False)
    with pytest.raises(SettingError, match="strided is of kind 'strided'; for kind='dilated' name that method"):
        mgam.train_with(llama(), "strided", kind="dilated")
    with pytest.raises(SettingError, match="focal=2"):
        mgam.train_with(llama(), "dga", focal=2)
    with pytest.raises(SettingError, match="no method was given"):
        mgam.train_with(llama())
    with pytest.raises(UnsupportedModelError, match="q_norm"):
        mgam.train_with(Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)), "cca")
    with pytest.raises(UnsupportedModelError, match="has no attention like"):
        mgam.train_with(GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2)), "cca")
    model = mgam.train_with(llama(), "cca")
    with pytest.raises(UnsupportedModelError, match="several texts in one row"):
        model(tokens(), position_ids=torch.cat((torch.arange(20), torch.arange(17)))[None].expand(2, -1))
    with pytest.raises(UnsupportedModelError, match="modules already"):
        mgam.train_with(model, "cca")
    llama().save_pretrained(tmp_path)
    with pytest.raises(ModelFileError, match="not made by mgam"):
        mgam.load_trained(tmp_path)
    with pytest.raises(ModelFileError, match="holds no config"):
        mgam.load_trained(tmp_path / "nothing")


def test_every_module_can_be_trained_in_a_model() -> None:
    with_modules = {name for name in methods.names() if methods.get(name).module}
    assert with_modules - set(BOTH) <= {*CAUSAL, "strided", "dilated"}
