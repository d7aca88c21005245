"""Adapters alone: trained inside the window, and read with where `adapter` names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mgam
from documents.tiny import make_plain_model, make_tokenizer, text
from mgam.errors import SettingError
from mgam.training.adapting import Adapting, Lookups, Pupil, adopt, fit_adapter, with_adapters
from mgam.training.lookups import LookupMaker

from .conftest import Killed

DIALS: dict[str, Any] = {
    "lengths": (2560,), "steps": 6, "batch": 1, "questions": 2, "rank": 2, "stretch": 64, "rate": 5e-3, "save_every": 2,
}  # fmt: skip


def train(prose: str, folder: Path, start: str | None = None, alike: float = 0.3, **dials: Any) -> Any:
    model = make_plain_model(window=2560)
    maker = LookupMaker(make_tokenizer(), [prose], quotes=0.3, alike=alike)
    fit_adapter(model, maker, folder, Adapting(**{**DIALS, **dials}), start=start, say=lambda line: None)
    return model


@pytest.fixture(scope="module")
def trained(prose: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("adapter")
    return folder, train(prose, folder)


def test_the_folder_reads_as_the_trained_model_and_leaves_no_trace(trained: tuple[Path, Any]) -> None:
    folder, tuned = trained
    ids = torch.tensor(make_tokenizer()(text(600, seed=4))["input_ids"])[None]
    dials: dict[str, Any] = {"window": 64, "levels": (1, 16, 64), "block": 64, "dense_until": 128, "budget": 128}
    with torch.no_grad():
        plain = make_plain_model(window=2560)(ids).logits
        expected = mgam.apply(tuned, **dials)(ids).logits
        fresh = make_plain_model(window=2560)
        found = mgam.apply(fresh, adapter=str(folder), **dials)(ids).logits
        assert torch.equal(mgam.remove(fresh)(ids).logits, plain)
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_it_learns_answers(prose: str, tmp_path: Path) -> None:
    train(prose, tmp_path, alike=0.0, steps=30, questions=4)
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [row["answers"] for row in map(json.loads, lines) if "answers" in row]
    assert answers[-1] < answers[0]


def test_texts_that_are_read_together_have_the_loss_that_they_have_alone(prose: str) -> None:
    maker = LookupMaker(make_tokenizer(), [prose])
    pupil = Pupil(with_adapters(make_plain_model(window=2560), 2), Adapting(**DIALS))
    lookups = [maker.make(number, tokens, 2) for number, tokens in ((0, 2560), (1, 1800), (2, 2300))]
    assert len({len(one.ids) for one in lookups}) == 3
    with torch.no_grad():
        together = pupil(lookups)[0]
        alone = torch.stack([pupil([one])[0] for one in lookups]).mean()
    torch.testing.assert_close(together, alone)


def test_a_step_has_texts_of_one_length_and_as_many_as_make_its_tokens(prose: str) -> None:
    dials = Adapting(**{**DIALS, "lengths": (2048, 4096), "batch": 2, "steps": 8})
    lookups = Lookups(LookupMaker(make_tokenizer(), [prose], alike=0.5), dials)
    steps = [[lookups[number] for number in (first, first + 1)] for first in range(0, len(lookups), 2)]
    lengths = {len(items[0]): max(len(one.ids) for item in items for one in item) for items in steps}
    assert set(lengths) == {1, 2}
    assert lengths[2] <= 2048 < lengths[1] <= 4096
    assert all(len(one) == len(two) for one, two in steps)
    texts = [tuple(one.ids.tolist()) for items in steps for item in items for one in item]
    assert len(set(texts)) == len(texts)


def test_training_goes_on_from_adapters(prose: str, trained: tuple[Path, Any], tmp_path: Path) -> None:
    """Without a step's worth of change they are what they were; of another rank or model they are refused."""
    train(prose, tmp_path / "same", start=str(trained[0]), steps=1, rate=1e-12)
    name = "lora/adapter_model.safetensors"
    before, after = load_file(trained[0] / name), load_file(tmp_path / "same" / name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[one], after[one]) for one in before)
    train(prose, tmp_path / "fresh", steps=1, rate=1e-12)
    fresh = load_file(tmp_path / "fresh" / name)
    assert not all(torch.equal(before[one], fresh[one]) for one in before)
    with pytest.raises(SettingError, match="are of rank 2"):
        train(prose, tmp_path / "rank", start=str(trained[0]), rank=3)
    with pytest.raises(SettingError, match="of another model"):
        adopt(with_adapters(_wider(), 2), str(trained[0]), 2)
    with pytest.raises(SettingError, match="holds a fit of another start"):
        train(prose, trained[0], start=str(trained[0]))


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    prose: str, trained: tuple[Path, Any], tmp_path: Path, killed_at: Killed
) -> None:
    with killed_at(5):
        train(prose, tmp_path)
    train(prose, tmp_path)
    name = "lora/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (trained[0] / name).read_bytes()


def test_what_cannot_be_is_refused(prose: str, trained: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="trained for 2560 tokens"):
        train(prose, tmp_path / "longer", lengths=(4096,))
    with pytest.raises(SettingError, match="holds a fit of another dials"):
        train(prose, trained[0], steps=7)
    with pytest.raises(SettingError, match="holds no adapters"):
        mgam.apply(make_plain_model(window=2560), adapter=str(tmp_path))
    with pytest.raises(SettingError, match="of another model"):
        mgam.apply(_wider(), adapter=str(trained[0]))


def _wider() -> Any:
    model = make_plain_model(window=2560)
    model.model.layers[1].self_attn.q_proj = torch.nn.Linear(32, 48, bias=False)
    return model
