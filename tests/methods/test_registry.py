"""The registry: what each name is, and what is said where it cannot serve."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mgam
from mgam import methods, nn
from mgam.errors import SettingError
from mgam.evaluation.session import _methods

SIXTEEN = (
    "longheads", "dga", "cca", "sliding", "strided", "dilated", "blockwise", "longformer", "bigbird", "linformer",
    "reformer", "performer", "streaming-llm", "quest", "snapkv", "h2o", "moba", "nsa", "infini-retri",
)  # fmt: skip
TRAINED = ("linformer", "reformer", "performer", "nsa", "cca", "dga")


@pytest.fixture
def model() -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_all_sixteen_are_there_with_what_they_declare() -> None:
    assert set(SIXTEEN) <= set(methods.names())
    for name in methods.names():
        declared = json.loads(json.dumps(methods.get(name).declared()))
        assert declared["name"] == name
        assert declared["paper"]
        assert declared["state"]
        assert not declared["module"] or issubclass(getattr(nn, declared["module"]), nn.SelfAttention)
        assert declared["form"] == "module" or declared["phase"] != "training"


@pytest.mark.parametrize("name", TRAINED)
def test_modules_declare_what_their_classes_do(name: str) -> None:
    declared = methods.get(name)
    kind = getattr(nn, declared.module)
    assert (declared.causal != "none") == kind.CAUSAL
    assert ("leak" in declared.causal) == bool(kind.LEAK)


@pytest.mark.parametrize("name", TRAINED)
def test_what_must_be_trained_says_so_and_names_what_serves(model: Any, name: str) -> None:
    with pytest.raises(SettingError, match=r"needs .*train_with.*longheads.*streaming-llm"):
        mgam.apply(model, name)
    with pytest.raises(SettingError, match="train_with"):
        _methods([name], None)
    assert not hasattr(model, "_mgam_applied")


def test_names_and_dials_are_checked_before_a_model_is_loaded() -> None:
    with pytest.raises(SettingError, match="unknown method 'quset'; did you mean quest"):
        _methods(["quset"], None)
    with pytest.raises(SettingError, match="budget=1 must be"):
        _methods(["mgam:budget=1"], None)
    with pytest.raises(SettingError, match=r"works with positions granular, not 'absolute'; these do: .*quest"):
        _methods(["longheads:positions=absolute"], None)
    with pytest.raises(SettingError, match=r"unknown method 'zzz'; choose .*bigbird, "):
        methods.get("zzz")
    with pytest.raises(SettingError, match=r"recall, every: method 'quest' has no such search; .*choose mgam"):
        methods.get("quest").settings(recall=0.5, every=2)
    with pytest.raises(SettingError, match=r"question_budget: method 'h2o' has no such search"):
        methods.get("h2o").settings(question_budget=2048)
    with pytest.raises(SettingError, match=r"question_budget=8 must be a whole number of tokens, at least one chunk"):
        methods.get("mgam").settings(question_budget=8)
    with pytest.raises(SettingError, match="'moba' drops what it does not open: leave rest at 'drop'"):
        methods.get("moba").settings(rest="summaries")
    with pytest.raises(SettingError, match="'dense' reads no summaries, so mass has no part in it"):
        methods.get("dense").settings(mass=1.0)
    with pytest.raises(SettingError, match="phrase=0 must be 1 or more"):
        _methods(["infini-retri:phrase=0"], None)
    assert _methods(["infini-retri", "blockwise"], 256) == ["dense", "infini-retri", "blockwise"]
    with pytest.raises(SettingError, match="unknown method 'infini-retro'; did you mean infini-retri"):
        methods.get("infini-retro")


def test_local_kinds_serve_a_model(model: Any) -> None:
    ids = torch.randint(0, 64, (1, 700), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids).logits
        for name in ("blockwise", "longformer", "bigbird"):
            mgam.apply(model, name, window=128, dense_until=0)
            few = model(ids).logits
            assert not torch.allclose(few, whole, atol=1e-4)
            torch.testing.assert_close(few[:, :64], whole[:, :64], atol=1e-4, rtol=1e-4)
            mgam.apply(model, name, window=4096, dense_until=0, positions="absolute")
            torch.testing.assert_close(model(ids).logits, whole, atol=1e-3, rtol=1e-3)
            mgam.remove(model)
