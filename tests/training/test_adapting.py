"""Adapters alone: trained inside the window, in crowds as of longer texts, and read with where `adapter` names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attend

import mgam
from documents.tiny import make_plain_model, make_tokenizer, text
from mgam.errors import SettingError
from mgam.training import adapting
from mgam.training.adapting import SINK, Adapting, crowded, crowding, fit_adapter, with_adapters
from mgam.training.lookups import Asked, LookupMaker

DIALS: dict[str, Any] = {
    "lengths": (2560,), "steps": 6, "batch": 1, "questions": 2, "rank": 2, "stretch": 64, "rate": 5e-3, "save_every": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "prose.txt"
    path.write_text(text(30_000).replace(" .", ".").replace("\n", " "), encoding="utf-8")
    return str(path)


def train(prose: str, folder: Path, **dials: Any) -> Any:
    model = make_plain_model(window=2560)
    maker = LookupMaker(make_tokenizer(), [prose], quotes=0.3)
    fit_adapter(model, maker, folder, Adapting(**{**DIALS, **dials}), say=lambda line: None)
    return model


@pytest.fixture(scope="module")
def trained(prose: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("adapter")
    return folder, train(prose, folder)


def test_a_crowd_is_the_text_said_so_many_times() -> None:
    """A question's row with the crowd's scores, against keys and values that are there three times."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 200, 8).unbind()
    asked = Asked((150, 170), (170, 180), (90, 95), ((100, 102),))
    mask = crowded(200, 140, (asked,), 3, torch.float32, query.device)
    assert mask is not None
    assert crowded(200, 140, (asked,), 1, torch.float32, query.device) is None
    found = attend(query[:, :, 140:], key, value, attn_mask=mask)[0, 0]
    plain = attend(query, key, value, is_causal=True)[0, 0, 140:]
    torch.testing.assert_close(found[:10], plain[:10])
    torch.testing.assert_close(found[40:], plain[40:])
    evidence = {*range(90, 95), *range(100, 102)}
    times = [3 if SINK <= place < 140 and place not in evidence else 1 for place in range(161)]
    many = torch.repeat_interleave(torch.arange(161), torch.tensor(times))
    expected = attend(query[:, :, 160:161], key[:, :, many], value[:, :, many])[0, 0, 0]
    torch.testing.assert_close(found[20], expected)


def test_a_crowd_of_one_is_the_model_as_it_is() -> None:
    """A model that attends in two parts, with nothing added, against itself; and with something added it differs."""
    model = with_adapters(make_plain_model(window=2560), 2)
    ids = torch.tensor(make_tokenizer()(text(300))["input_ids"])[None, :200]
    asked = (Asked((150, 170), (170, 180), (90, 95)),)
    decoder = model.get_base_model().get_decoder()
    plain = decoder(input_ids=ids).last_hidden_state
    with crowding(model, crowded(200, 140, asked, 8, torch.float32, ids.device)):
        crowd = decoder(input_ids=ids).last_hidden_state
    with crowding(model, crowded(200, 140, (), 8, torch.float32, ids.device)):
        torch.testing.assert_close(decoder(input_ids=ids).last_hidden_state, plain)
    torch.testing.assert_close(crowd[:, :150], plain[:, :150])
    assert (crowd[:, 150:180] - plain[:, 150:180]).abs().max() > 1e-2
    assert torch.equal(decoder(input_ids=ids).last_hidden_state, plain)


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


def test_it_learns_answers_and_stays_what_it_was(prose: str, tmp_path: Path) -> None:
    """Answers become likelier; a heavy weight on what the model was keeps it nearer to that."""
    ends = {}
    for keep in (0.0, 30.0):
        train(prose, tmp_path / str(keep), steps=40, keep=keep, questions=4)
        lines = (tmp_path / str(keep) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        ends[keep] = [adapting.json.loads(line) for line in lines if "answers" in line]
    assert ends[0.0][-1]["answers"] < ends[0.0][0]["answers"]
    assert ends[30.0][-1]["moved"] < 0.5 * ends[0.0][-1]["moved"]


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    prose: str, trained: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    make = LookupMaker.make

    def stopping(self: LookupMaker, number: int, tokens: int, questions: int) -> Any:
        if number == 5:
            raise Stopped
        return make(self, number, tokens, questions)

    monkeypatch.setattr(adapting.LookupMaker, "make", stopping)
    with pytest.raises(Stopped):
        train(prose, tmp_path)
    monkeypatch.undo()
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
