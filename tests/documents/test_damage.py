"""Damaged digests are refused or stopped with a clear error; never a crash, never a wrong answer."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mgam.documents.document import Document
from mgam.documents.store.store import Store
from mgam.errors import DigestError

from . import tiny
from .damage import QUESTION, Scene

TRIALS = 300


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "eight bits"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Scene:
    folder = tmp_path_factory.mktemp("scene")
    return make_scene(folder, tokenizer, request.param)


def make_scene(folder: Path, tokenizer: Any, eight_bits: bool = False) -> Scene:
    model = tiny.make_model()
    whole, foreign = folder / "whole.mgam", folder / "foreign.mgam"
    with_answer = Document.digest(model, tokenizer, [tiny.source(400)], whole, eight_bits=eight_bits, **tiny.GRID)
    answer = with_answer.ask(QUESTION, max_new_tokens=3).answer
    Document.digest(tiny.make_model(1), tokenizer, [tiny.source(400, 1)], foreign, eight_bits=eight_bits, **tiny.GRID)
    return Scene(model, tokenizer, whole, foreign, answer)


@pytest.mark.parametrize("part", range(6))
def test_damaged_digests(scene: Scene, tmp_path: Path, part: int) -> None:
    outcomes = [scene.trial(tmp_path / "it.mgam", seed) for seed in range(part * TRIALS // 6, (part + 1) * TRIALS // 6)]
    assert sum(outcome.startswith("refused") for outcome in outcomes) > len(outcomes) // 2


def test_a_damaged_page_stops_the_answer_and_is_named(scene: Scene, tmp_path: Path) -> None:
    document = Document.open(scene.whole, scene.model, scene.tokenizer, room=64)
    document.ask(QUESTION, max_new_tokens=3)
    layer, head, chunk = 0, 0, 0  # the sink is always read
    layout = document.manifest.layout(document.manifest.segments[0])
    offset = layout.page(layer, chunk, head)

    shutil.copytree(scene.whole, tmp_path / "it.mgam")
    file = tmp_path / "it.mgam" / document.manifest.segments[0].file
    data = bytearray(file.read_bytes())
    data[offset + 7] ^= 16
    file.write_bytes(data)
    damaged = Document.open(tmp_path / "it.mgam", scene.model, scene.tokenizer, room=64)
    with pytest.raises(DigestError, match=rf"segment-000000\.safetensors is damaged between byte {offset:,}") as caught:
        damaged.ask(QUESTION, max_new_tokens=3)
    assert "layer 0, KV head 0, chunk 0" in str(caught.value)
    file.write_bytes(scene.whole.joinpath(file.name).read_bytes())
    assert damaged.ask(QUESTION, max_new_tokens=3).answer == scene.answer  # and the next question is answered


def test_many_pages_at_once_are_those_read_one_by_one_and_checked(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(scene.whole, tmp_path / "it.mgam")
    before = set(threading.enumerate())
    store = Store.open(tmp_path / "it.mgam")
    shape = store.manifest.shape
    with store.residents(torch.device("cpu")) as parts:
        list(parts)
    chunks = store.manifest.done // shape.levels.chunk
    rng = np.random.default_rng(0)
    head, chunk = rng.integers(0, shape.heads, 300), rng.integers(0, chunks, 300)
    together, alone = (torch.zeros(300, shape.page_bytes, dtype=torch.uint8) for _ in range(2))
    store.read_pages(1, head, chunk, together)
    for row in range(300):
        store.read_pages(1, head[row : row + 1], chunk[row : row + 1], alone[row : row + 1])
    assert torch.equal(together, alone)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)  # as on systems that cannot be told what comes next
    untold = torch.zeros_like(together)
    store.read_pages(1, head, chunk, untold)
    assert torch.equal(together, untold)
    store.read_pages(1, head[:0], chunk[:0], untold[:0])
    per_segment = store.manifest.grid // shape.levels.chunk
    last = (chunks - 1) // per_segment
    file = store.path(last)
    offset = store.manifest.layout(store.manifest.segments[last]).page(1, (chunks - 1) % per_segment, 0)
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)
    fresh = Store.open(tmp_path / "it.mgam")
    with fresh.residents(torch.device("cpu")) as parts:
        list(parts)
    head[150], chunk[150] = 0, chunks - 1
    with pytest.raises(DigestError, match=rf"damaged between byte {offset:,} .*KV head 0, chunk {chunks - 1}\b"):
        fresh.read_pages(1, head, chunk, together)
    assert set(threading.enumerate()) - before
    store.close()
    fresh.close()
    assert not set(threading.enumerate()) - before


def test_an_older_and_a_newer_format_say_so(scene: Scene, tmp_path: Path) -> None:

    for version, said in ((2, "older mgam"), (4, "newer mgam")):
        folder = tmp_path / f"{version}.mgam"
        shutil.copytree(scene.whole, folder)
        body = json.loads((folder / "manifest.json").read_bytes())
        (folder / "manifest.json").write_text(json.dumps({**body, "version": version}))
        with pytest.raises(DigestError, match=said):
            Document.open(folder, scene.model, scene.tokenizer)
