"""The policy that is shipped for the default model: whole, small, found by name, and read by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import mgam
from documents.tiny import make_plain_model
from mgam.documents.asking import ask
from mgam.documents.sources import Source
from mgam.errors import SettingError
from mgam.evaluation.splits import split_of
from mgam.integrations.loading import load
from mgam.policies.files import FittedPolicy, resolve

FOLDER = Path(mgam.__file__).parent / "adapters" / "default"
LOOKUP = FOLDER.parent / "lookup"


def test_it_is_found_by_name_and_whole() -> None:
    assert resolve("default") == FOLDER
    fitted = FittedPolicy.load(FOLDER)
    assert len(fitted.layers) == 30
    assert all(bool(((one.content >= 0) & (one.content <= 1)).all()) for one in fitted.layers.values())
    assert all(bool((one.importance > 0).all()) for one in fitted.layers.values())
    assert torch.cat([one.importance for one in fitted.layers.values()]).mean() == pytest.approx(1.0, abs=1e-2)
    assert fitted.mark(0.9) > fitted.mark(0.95) > 0


def test_it_holds_numbers_and_says_how_it_was_made() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"policy.json", "policy.safetensors"}
    assert {path.name for path in LOOKUP.rglob("*")} == {"lora", "adapter_config.json", "adapter_model.safetensors"}
    assert sum(path.stat().st_size for path in FOLDER.parent.rglob("*")) < 15_000_000
    with safe_open(FOLDER / "policy.safetensors", "pt") as file:
        assert len(list(file.keys())) == 10 * 30
    notes = FittedPolicy.load(FOLDER).notes
    assert notes["steps"] > 100
    assert notes["fitting"]["tokens"] == 8192
    assert all(split_of(*name.split("/", 1)) == "train" for name in notes["data"])
    assert "/tmp" not in (FOLDER / "policy.json").read_text(encoding="utf-8")


def test_other_models_are_refused() -> None:
    with pytest.raises(SettingError, match="does not fit: it has 30 layers"):
        mgam.apply(make_plain_model(), policy="default")


@pytest.mark.slow
def test_the_default_model_reads_by_it() -> None:
    """Within the budget nothing is left out, so logits are dense ones; beyond it they differ and are numbers."""
    loaded = load(None, device="cpu")
    model: Any = loaded.model
    ids = torch.tensor(loaded.tokenizer("The old man and the sea. " * 120)["input_ids"])[None, :700]
    with torch.no_grad():
        plain = model(ids).logits
        mgam.apply(model, policy="default", dense_until=64, window=64, budget=1024)
        torch.testing.assert_close(model(ids).logits, plain, atol=2e-3, rtol=1e-3)
        mgam.remove(model)
        mgam.apply(model, policy="default", dense_until=64, window=64, budget=128, recall=0.9)
        read = model(ids).logits
    assert bool(torch.isfinite(read).all())
    assert (read - plain).abs().max() > 1e-3


@pytest.mark.slow
def test_the_default_model_looks_things_up_with_the_shipped_adapters() -> None:
    """A number between sentences, which the model without them does not tell at this wording."""
    loaded = load(None, device="cpu")
    model: Any = loaded.model
    mgam.apply(model, adapter="lookup", dense_until=64, window=64, budget=256)
    hay = "The wind went round to the north, and nobody said a word for an hour. " * 60
    text = f"{hay}The seal on the ninth ledger is 58213. {hay}"
    answer = ask(model, loaded.tokenizer, [Source("text", text)], "Which number is the seal on the ninth ledger?")
    assert "58213" in answer.answer
