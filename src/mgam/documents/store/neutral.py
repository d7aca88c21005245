"""What a question that asks for nothing attends to, kept beside a digest, so that no asker has to wait for it.

It is made of the digest and can be made again: where the file is missing, damaged or of another state of the digest, it
counts for nothing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgam.documents.store import files
from mgam.documents.store.manifest import Manifest
from mgam.errors import DigestError

NAME = "neutral.json"
BYTES_PER_CHUNK = 64
"""Room for the number of a chunk and its share."""


def write(folder: Path, manifest: Manifest, question_budget: int, shares: Tensor) -> None:
    """Keeps the shares of attention (C,) of chunks, which questions of this budget are set against.

    Raises:
        DigestError: the disk is full, the folder may not be written.
    """
    chunks = shares.nonzero()[:, 0].tolist()
    told = {"of": _state(manifest), "question_budget": question_budget, "chunks": chunks}
    told["shares"] = shares[chunks].tolist()
    files.write_small(folder, NAME, json.dumps({**told, "sha256": _sum(told)}).encode())


def read(folder: Path, manifest: Manifest, question_budget: int, chunks: int) -> Tensor | None:
    """The shares (C,) that were kept of this digest for questions of this budget; None where none were."""
    try:
        told = _whole(folder, manifest)
        if told["question_budget"] != question_budget:
            return None
        found = torch.zeros(chunks, dtype=torch.float64)
        found[told["chunks"]] = torch.tensor(told["shares"], dtype=torch.float64)
    except (DigestError, LookupError, TypeError, ValueError, RuntimeError):
        return None
    return found


def fault(folder: Path, manifest: Manifest) -> str | None:
    """What is wrong with the file; None where it is whole, or not there."""
    if not (folder / NAME).exists() and not (folder / NAME).is_symlink():
        return None
    try:
        _whole(folder, manifest)
    except DigestError as error:
        return str(error)
    return None


def forget(folder: Path) -> None:
    """Removes the file: the digest is about to change."""
    (folder / NAME).unlink(missing_ok=True)


def _whole(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What the file says.

    Raises:
        DigestError: it is missing, damaged, or of another state of the digest.
    """
    most = (manifest.tokens // manifest.shape.levels.chunk + 64) * BYTES_PER_CHUNK
    try:
        told: dict[str, Any] = json.loads(files.read_small(folder, NAME, most))
        if told.pop("sha256") == _sum(told) and told["of"] == _state(manifest):
            return told
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise DigestError(f"{folder / NAME} is damaged or of another digest; delete it: it can be done without")


def _state(manifest: Manifest) -> str:
    return hashlib.sha256(manifest.dump()).hexdigest()


def _sum(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
