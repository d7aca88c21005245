"""Processes that share a run."""

from __future__ import annotations

import pytest
import torch

from mgam.processes import own_device


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (own_device("auto"), own_device("cuda"), own_device("cpu")) == ("auto", "cuda", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (own_device("auto"), own_device("cuda")) == ("cuda:1", "cuda:1")
    assert (own_device("cuda:0"), own_device("cpu")) == ("cuda:0", "cpu")
