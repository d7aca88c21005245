"""The four patterns: one right answer, found by the rule, and the same bytes for a seed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from mgam import methods
from mgam.cli.app import app
from mgam.errors import SettingError
from mgam.evaluation.patterns import PATTERNS, Batch, efficiency_length, first_leak, make_batch
from mgam.evaluation.patterns.tasks import IGNORED, MASK
from mgam.evaluation.patterns.train import SIZES, Training, able, model_for, train_pattern


def look_up(pairs: list[int]) -> dict[int, int]:
    return {key: value for key, value in zip(pairs[::2], pairs[1::2], strict=True) if value != MASK}


def solved(batch: Batch) -> Tensor:
    """Answers by the rule, read from inputs alone."""
    found = torch.full_like(batch.answer, IGNORED)
    for row, target in enumerate(batch.target.tolist()):
        if batch.source is not None:
            table = look_up(batch.source[row].tolist())
            found[row] = torch.tensor([table[token] for token in target])
        elif batch.pattern == "noncausal-self":
            table = look_up(target)
            for place in range(1, len(target), 2):
                if target[place] == MASK:
                    found[row, place] = table[target[place - 1]]
        else:
            pairs = 2 * len(target) // 3
            table = look_up(target[:pairs])
            found[row, pairs:] = torch.tensor([table[token] for token in target[pairs:]])
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [8, 63, 300])
def test_the_rule_finds_every_answer(pattern: str, length: int) -> None:
    batch = make_batch(pattern, 3, length, seed=7)
    assert torch.equal(solved(batch), batch.answer)
    assert (batch.answer != IGNORED).any()
    highest = max(
        int(batch.target.max()), int(batch.answer.max()), 0 if batch.source is None else int(batch.source.max())
    )
    assert highest < batch.vocabulary
    logits = torch.nn.functional.one_hot(batch.answer.clamp_min(0), batch.vocabulary).float()
    assert batch.accuracy(logits) == 1.0
    assert batch.accuracy(torch.zeros_like(logits)) < 0.5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_seed_gives_the_same_batch(pattern: str) -> None:
    first, again, other = (make_batch(pattern, 2, 64, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.target, again.target)
    assert torch.equal(first.answer, again.answer)
    assert not torch.equal(first.target, other.target)


def test_masked_values_stand_before_and_after_their_copies() -> None:
    batch = make_batch("noncausal-self", 8, 256, seed=0)
    masked = (batch.target[:, 1::2] == MASK).float()
    half = masked.shape[1] // 2
    assert 0.3 < masked[:, :half].mean() < 0.7


def test_leaks_are_found() -> None:
    values = torch.randn(2, 12, 4)
    assert first_leak(lambda x: x.cumsum(1), values) is None
    assert first_leak(lambda x: x - x.mean(1, keepdim=True), values) == 0
    assert first_leak(lambda x: torch.cat((x[:, :6], x[:, 6:].flip(1)), 1), values) == 6


def test_efficiency_length_is_the_crossing() -> None:
    lengths = [256, 512, 1024, 2048, 4096, 8192]
    dense = [2e-9 * n * n + 1e-6 * n + 1e-3 for n in lengths]
    method = [6e-6 * n + 2e-3 for n in lengths]
    root = efficiency_length(lengths, dense, method)
    assert root is not None
    assert 2e-9 * root**2 + 1e-6 * root + 1e-3 == pytest.approx(6e-6 * root + 2e-3)
    assert root == pytest.approx(2686, abs=1)
    assert efficiency_length(lengths, dense, [1e-4] * 6) is None
    with pytest.raises(ValueError, match="three"):
        efficiency_length([1, 2], [1, 2], [1, 2])


def test_bad_settings_are_refused() -> None:
    with pytest.raises(SettingError, match="causal-cross"):
        make_batch("causal", 1, 64, 0)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="length"):
        make_batch("causal-self", 1, 2, 0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_method_has_a_small_model_for_its_patterns(pattern: str) -> None:
    how = Training(length=24, width=16, heads=2, layers=1)
    batch = make_batch(pattern, 2, how.length, 0, keys=how.keys)  # type: ignore[arg-type]
    for method in able(pattern):  # type: ignore[arg-type]
        model = model_for(pattern, method, batch.vocabulary, how)  # type: ignore[arg-type]
        logits = model(batch.target) if batch.source is None else model(batch.target, batch.source)
        assert logits.shape == (*batch.target.shape, batch.vocabulary)
        assert torch.isfinite(logits).all()
    assert "dense" in able(pattern)  # type: ignore[arg-type]


def test_all_modules_take_part() -> None:
    assert set(SIZES) == {name for name in methods.names() if methods.get(name).module}
    assert "linformer" not in able("causal-self")
    assert "nsa" not in able("noncausal-self")


def test_a_small_model_learns_and_a_text_it_did_not_see_is_read() -> None:
    how = Training(length=12, width=32, heads=2, rows=32, steps=400, keys=6, rate=4e-3)
    found = train_pattern("causal-self", "dense", how)
    assert found.accuracy is not None
    assert found.accuracy > 0.9
    assert found.steps <= 400
    again = train_pattern("causal-self", "dense", Training(**{**vars(how), "steps": 20}))
    assert again.accuracy is not None
    assert again.accuracy < 0.7


def test_a_method_without_the_form_names_those_that_have_it() -> None:
    found = train_pattern("noncausal-self", "cca", Training(steps=1))
    assert found.accuracy is None
    assert "cca has no form for noncausal-self; these have one: dense" in found.reason
    with pytest.raises(SettingError, match="did you mean linformer"):
        model_for("causal-self", "linforme", 10, Training())
    with pytest.raises(SettingError, match="width=0"):
        Training(width=0)


def test_the_command() -> None:
    words = "patterns --methods dense,cca --patterns causal-self,causal-cross --length 12 --steps 2 --width 16 --json"
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [(row["pattern"], row["method"], row["accuracy"] is None) for row in rows] == [
        ("causal-self", "dense", False), ("causal-self", "cca", False), ("causal-cross", "dense", False),
        ("causal-cross", "cca", True),
    ]  # fmt: skip
    assert isinstance(CliRunner().invoke(app, ["patterns", "--patterns", "causal"]).exception, SettingError)


def test_sizes_of_a_training_reach_the_attention() -> None:
    model = model_for("causal-self", "sliding", 40, Training(length=16, sizes={"window": 5}))
    assert {layer.attention.window for layer in model.layers} == {5}
