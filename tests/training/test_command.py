"""`mgam fit` as people call it: one process and two, and both with the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mgam
from documents.tiny import make_plain_model, make_tokenizer, text
from mgam.integrations.loading import load
from mgam.integrations.transformers.low_rank import fingerprint
from mgam.policies.files import FittedPolicy

WINDOW = 2048
FIT = ["--tokens", "1920", "--steps", "3", "--batch", "2", "--width", "6", "--check", "0"]
LORA = ["--lora", "--lora-steps", "2", "--lora-batch", "2", "--lora-rank", "2", "--questions", "2", "--lengths", "2560"]
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("command")
    make_plain_model(window=WINDOW).save_pretrained(folder / "tiny")
    make_tokenizer().save_pretrained(folder / "tiny")
    (folder / "prose.txt").write_text(text(30_000).replace(" .", ".").replace("\n", " "), encoding="utf-8")
    said = command(folder, folder / "one", *FIT, *LORA)
    (folder / "said.json").write_text(said, encoding="utf-8")
    return folder


def command(folder: Path, out: Path, *more: str, launch: tuple[str, ...] = ()) -> str:
    """Standard output of `mgam fit`."""
    words = [sys.executable, *launch, "-m", "mgam", "fit", str(folder / "tiny"), "--data", str(folder / "prose.txt")]
    words += ["-o", str(out), "--device", "cpu", "--json", *more]
    place = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False, env=place)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All numbers of a fit by name."""
    return load_file(folder / "policy.safetensors") | load_file(folder / "lora" / "adapter_model.safetensors")


@pytest.mark.slow
def test_the_command_fits_and_trains_and_the_model_reads_by_it(place: Path) -> None:
    said: dict[str, Any] = json.loads((place / "said.json").read_text(encoding="utf-8"))
    assert said["folder"] == str(place / "one")
    assert said["steps_reading"] == 2
    assert (place / "one" / "frozen" / "policy.safetensors").is_file()
    loaded = load(str(place / "tiny"), device="cpu")
    model: Any = loaded.model
    ids = torch.tensor(loaded.tokenizer(text(1800, seed=4))["input_ids"])[None]
    with torch.no_grad():
        plain = model(ids).logits
        mgam.apply(model, policy=str(place / "one"), dense_until=512, budget=128)
        read = model(ids).logits
    assert bool(torch.isfinite(read).all())
    assert (read - plain).abs().max() > 1e-3


@pytest.mark.slow
def test_a_policy_is_fitted_to_the_model_as_it_reads_with_adapters(place: Path, tmp_path: Path) -> None:
    command(place, tmp_path / "with", *FIT, "--adapter", str(place / "one"))
    fitted, bare = (FittedPolicy.load(folder) for folder in (tmp_path / "with", place / "one" / "frozen"))
    assert fitted.notes["adapter"] == fingerprint(place / "one")
    assert "adapter" not in bare.notes
    assert not torch.equal(fitted.layers[0].query, bare.layers[0].query)
    model: Any = load(str(place / "tiny"), device="cpu").model
    mgam.apply(model, policy=str(tmp_path / "with"), adapter=str(place / "one"))


@pytest.mark.slow
def test_two_processes_make_what_one_makes(place: Path) -> None:
    """Each reads half of the texts of a step; the first one alone writes and reports."""
    said = command(place, place / "two", *FIT, *LORA, launch=tuple(LAUNCH))
    assert json.loads(said)["folder"] == str(place / "two")
    one, two = weights(place / "one"), weights(place / "two")
    assert one.keys() == two.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, atol=1e-4, rtol=1e-3, msg=name)
    steps = [json.loads(line)["step"] for line in (place / "two" / "frozen" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_minute_ends_two_processes_at_one_step(place: Path) -> None:
    """A limit of time is one decision: a process that goes on alone would wait for ever."""
    more = ["--tokens", "1920", "--steps", "100000", "--batch", "2", "--width", "6", "--check", "0"]
    said = command(place, place / "minute", *more, "--minutes", "0.1", launch=tuple(LAUNCH))
    assert json.loads(said)["folder"] == str(place / "minute")
    assert (place / "minute" / "policy.safetensors").is_file()


@pytest.mark.slow
def test_bad_input_is_one_sentence(place: Path) -> None:
    words = [sys.executable, "-m", "mgam", "fit", str(place / "tiny"), "--data", str(place / "prose.txt")]
    words += ["-o", str(place / "bad"), "--device", "cpu", "--tokens", "4096"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "beyond the 2048 positions" in " ".join((done.stderr + done.stdout).split())
    assert "Traceback" not in done.stderr
    assert not (place / "bad").exists()
