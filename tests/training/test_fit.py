"""Fitting: it learns, it goes on after a kill, and it says why where it cannot."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mgam
from documents.tiny import make_plain_model, make_tokenizer
from mgam.errors import DocumentError, SettingError
from mgam.levels import Levels
from mgam.policies.files import FittedPolicy, ModelShape
from mgam.policies.learned import Learned
from mgam.record import Record
from mgam.schedule import Schedule
from mgam.training.checkpoints import last_whole
from mgam.training.fit import Fitting, FittingError, fit
from mgam.training.marks import measure_marks
from mgam.training.measure import mass_kept
from mgam.training.network import SearchNetwork
from mgam.training.runs import CHECKPOINTS
from mgam.training.texts import Windows, read_documents

from .tiny import DIALS, READING, document, run

LEVELS = Levels((1, 16, 64), 4)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> FittedPolicy:
    return run(tmp_path_factory.mktemp("fit"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "policy.safetensors")


def test_it_keeps_more_mass_than_chance_and_than_its_beginning(fitted: FittedPolicy) -> None:
    """On text that was not fitted on; nothing keeps more than the oracle."""
    model = make_plain_model(window=512)
    torch.manual_seed(3)
    chance = SearchNetwork(
        {int(layer): shape for layer, shape in fitted.model.layers.items()}, fitted.width, fitted.slots, 6
    ).exported()
    texts = [Windows([document(seed=1)], 512, 6, 5)[number]["input_ids"] for number in range(6)]
    many = {
        "fitted": lambda layer, scale: Learned(fitted.layers[layer], 64, window=32),
        "chance": lambda layer, scale: Learned(chance[layer], 64, window=32),
    }
    kept = mass_kept(model, texts, many, LEVELS, budget=64, window=32, block=32)
    assert kept.mean("chance") < kept.mean("fitted") <= kept.mean("oracle")
    assert kept.mean("fitted") > kept.mean("chance") + 0.1 * (kept.mean("oracle") - kept.mean("chance"))


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model, before = make_plain_model(window=512), make_plain_model(window=512).state_dict()
    fit(model, [document()], tmp_path, Fitting(**{**DIALS, "steps": 3}), say=lambda line: None)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_what_is_saved_is_what_is_loaded(fitted: FittedPolicy) -> None:
    assert fitted.folder is not None
    there = FittedPolicy.load(fitted.folder)
    for layer, one in fitted.layers.items():
        for name in ("query", "query_bias", "key", "key_bias", "voice", "voice_bias", "importance"):
            assert torch.equal(getattr(one, name), getattr(there.layers[layer], name)), name


def test_how_much_heads_matter_is_measured_where_it_is_asked_for(tmp_path: Path) -> None:
    made = run(tmp_path, steps=2, importance=1)
    kept = json.loads((tmp_path / "importance.json").read_text())["layers"]
    found = torch.cat([one.importance for one in FittedPolicy.load(tmp_path).layers.values()])
    assert found.tolist() == pytest.approx([one for layer in kept.values() for one in layer["importance"]], abs=1e-3)
    assert found.mean() == pytest.approx(1.0, abs=1e-2)
    assert found.std() > 0
    assert made.marks


def test_a_policy_of_the_version_before_takes_all_heads_to_matter_alike(fitted: FittedPolicy, tmp_path: Path) -> None:
    assert fitted.folder is not None
    body = json.loads((fitted.folder / "policy.json").read_text())
    (tmp_path / "policy.json").write_text(json.dumps({**body, "version": 3}))
    tensors = {name: part for name, part in weights(fitted.folder).items() if not name.endswith("importance")}
    save_file(tensors, tmp_path / "policy.safetensors")
    there = FittedPolicy.load(tmp_path)
    assert all(bool((one.importance == 1).all()) for one in there.layers.values())
    assert there.marks == fitted.marks
    (tmp_path / "policy.json").write_text(json.dumps({**body, "version": 4, "notes": "without importance"}))
    with pytest.raises(SettingError, match="damaged or of another format"):
        FittedPolicy.load(tmp_path)


def test_marks_say_what_a_share_of_attention_takes(fitted: FittedPolicy) -> None:
    """The more is to be read, the less a chunk must be worth; and a text of the same kind gets about that share."""
    shares, marks = zip(*fitted.marks, strict=True)
    assert list(shares) == sorted(set(shares))
    assert list(marks) == sorted(set(marks), reverse=True)
    wanted = (shares[0] + shares[-1]) / 2
    assert shares[0] < wanted < shares[-1]
    model, texts = (
        make_plain_model(window=512),
        [Windows([document(seed=1)], 512, 4, 5)[n]["input_ids"] for n in range(4)],
    )
    network = SearchNetwork(
        {int(layer): shape for layer, shape in fitted.model.layers.items()}, fitted.width, fitted.slots, 6
    )
    with torch.no_grad():
        for layer, weights in fitted.layers.items():
            network.layer(layer).adopt(weights)
    other = FittedPolicy(fitted.model, 6, 2, 4, {}, measure_marks(model, network, texts, Fitting(**DIALS).sampling))
    assert other.mark(wanted) == pytest.approx(fitted.mark(wanted), rel=0.5)
    costs = []
    for share in (shares[0], wanted, 1.0):
        mgam.apply(model, policy=str(fitted.folder), recall=share, **{**READING, "budget": 256})
        cache, record = mgam.PyramidCache(model), Record()
        cache.watch(record)
        with torch.no_grad():
            model(texts[0][None], past_key_values=cache)
        costs.append(record.entries[0])
        mgam.remove(model)
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]


def test_a_policy_without_marks_is_asked_for_no_share() -> None:
    plain = FittedPolicy(ModelShape("llama", 300, {}, {}), 6, 2, 4, {})
    with pytest.raises(SettingError, match=r"recall=0.9: what it takes was not measured .* fit it again"):
        plain.mark(0.9)
    some = replace(plain, marks=((0.8, 0.02), (0.9, 0.01)))
    assert [some.mark(share) for share in (0.5, 0.8, 0.85, 0.95)] == pytest.approx([0.02, 0.02, 0.015, 0.0])


def test_streamed_reading_is_parallel_reading(fitted: FittedPolicy) -> None:
    """A model that reads by the policy gives the same in one pass and in calls of any size with a cache."""
    model = mgam.apply(make_plain_model(window=512), policy=str(fitted.folder), **READING)
    ids = document(seed=2).ids[None, :300]
    with torch.no_grad():
        whole = model(ids).logits
        cache, parts = mgam.PyramidCache(model, [Schedule.uniform(32)]), []
        for first, last in ((0, 33), (33, 34), (34, 160), (160, 299), (299, 300)):
            parts.append(model(ids[:, first:last], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


def test_a_later_token_changes_nothing_before_it(fitted: FittedPolicy) -> None:
    model = mgam.apply(make_plain_model(window=512), policy=str(fitted.folder), **READING)
    ids = document(seed=2).ids[None, :300]
    other = ids.clone()
    other[:, 201:] = ids[:, 201:].flip(1)
    with torch.no_grad():
        assert torch.equal(model(ids).logits[:, :201], model(other).logits[:, :201])


START = "from training.tiny import run; run({folder!r}, save_every=4)"


def start(folder: Path) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", START.format(folder=str(folder))],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_fit_goes_on_to_the_same_weights(tmp_path: Path, fitted: FittedPolicy) -> None:
    killed = start(tmp_path)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and last_whole(tmp_path / CHECKPOINTS) is None and killed.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "policy.safetensors").exists()
    said: list[str] = []
    fit(make_plain_model(window=512), [document()], tmp_path, Fitting(**{**DIALS, "save_every": 4}), say=said.append)
    assert said[0].startswith("going on from checkpoint-")
    assert fitted.folder is not None
    there, whole = weights(tmp_path), weights(fitted.folder)
    assert all(torch.equal(there[name], whole[name]) for name in whole)


def test_another_run_in_the_folder_is_refused(fitted: FittedPolicy) -> None:
    assert fitted.folder is not None
    with pytest.raises(SettingError, match=r"another dials; give a new folder"):
        run(fitted.folder, steps=41)


def test_nan_stops_says_where_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """One token's embedding is no number; it first comes in step 5."""
    dials = {**DIALS, "steps": 10, "save_every": 2}
    model, long = make_plain_model(window=512), document(60_000)
    windows = Windows([long], 512, 20, 0)
    poison, place = 299, 0
    clean = {int(token) for number in range(8) for token in windows[number]["input_ids"]}
    assert poison not in clean
    starts = [_place(long.ids, windows[number]["input_ids"]) for number in range(9)]
    place = next(p for p in range(starts[8], starts[8] + 512) if all(not s <= p < s + 512 for s in starts[:8]))
    long.ids[place] = poison
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = torch.nan
    with pytest.raises(FittingError, match=r"not a number any more at step 5, in layers \[0, 1\]") as caught:
        fit(model, [long], tmp_path, Fitting(**dials), say=lambda line: None)
    assert "checkpoint-4" in str(caught.value)
    assert "--rate" in str(caught.value)
    kept = last_whole(tmp_path / CHECKPOINTS)
    assert kept is not None
    assert kept.name == "checkpoint-4"
    assert all(torch.isfinite(one).all() for one in load_file(kept / "model.safetensors").values())


def _place(ids: torch.Tensor, part: torch.Tensor) -> int:
    """Where a window stands in a text."""
    return next(p for p in range(len(ids) - 511) if torch.equal(ids[p : p + 512], part))


def test_a_full_disk_is_told_in_words(tmp_path: Path) -> None:
    """No file may be larger than 8 kB: the first checkpoint cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, before[1]))
    try:
        with pytest.raises(FittingError, match=r"could not be written .* the last whole checkpoint is None. Make room"):
            run(tmp_path, steps=10, save_every=2, width=9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run(tmp_path, steps=10, save_every=2, width=9)
    assert (tmp_path / "policy.safetensors").exists()


def test_what_cannot_be_fitted_is_refused(tmp_path: Path) -> None:
    model = make_plain_model(window=512)
    for dials, said in (
        ({"tokens": 1024}, "beyond the 512 positions that the model was trained for"),
        ({"tokens": 256}, "too short for levels .* at least 352 are wanted"),
        ({"width": 1}, "width=1"),
        ({"width": 99}, "width=99 is more than"),
    ):
        with pytest.raises(SettingError, match=said):
            fit(model, [document()], tmp_path / "one", Fitting(**{**DIALS, **dials}))
    assert not (tmp_path / "one").exists()
    with pytest.raises(SettingError, match="the data has 400 tokens and a window 512"):
        fit(model, [document(400)], tmp_path / "two", Fitting(**DIALS))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SettingError, match="cannot be written"):
        fit(model, [document()], tmp_path / "file" / "three", Fitting(**DIALS))
    with pytest.raises(DocumentError, match="is no file, no folder, and none of the sources"):
        read_documents(["nothing-of-that-name"], make_tokenizer())


def test_without_a_gpu_it_says_how_long_it_will_take(tmp_path: Path) -> None:
    said: list[str] = []
    fit(make_plain_model(window=512), [document()], tmp_path, Fitting(**{**DIALS, "steps": 2}), say=said.append)
    assert sum("no GPU is used: a text takes" in line and "all 2 steps take about" in line for line in said) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_key_value_heads": 4}, "it has 2 layers with 2 KV heads of 2 query heads"),
        ({"vocab_size": 320}, "its model knows 300 tokens, this one 320"),
        ({"initializer_range": 0.2}, "other sizes than those of the model that it was fitted to"),
    ],
)
def test_a_policy_of_another_model_is_refused(fitted: FittedPolicy, change: dict[str, Any], said: str) -> None:
    from transformers import LlamaForCausalLM

    config = make_plain_model(window=512).config
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(SettingError, match=said):
        mgam.apply(LlamaForCausalLM(config), policy=str(fitted.folder), **READING)


def test_damaged_and_missing_policies_are_refused(fitted: FittedPolicy, tmp_path: Path) -> None:
    assert fitted.folder is not None
    for name in ("policy.json", "policy.safetensors"):
        (tmp_path / name).write_bytes((fitted.folder / name).read_bytes())
    raw = (tmp_path / "policy.safetensors").read_bytes()
    (tmp_path / "policy.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(SettingError, match="damaged or of another format"):
        mgam.apply(make_plain_model(window=512), policy=str(tmp_path), **READING)
    with pytest.raises(SettingError, match="there is no policy and no adapter nowhere"):
        mgam.apply(make_plain_model(window=512), policy="nowhere", **READING)
