"""What is fitted on: windows of real text, cut by a seed, so that step n is the same whenever it comes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mgam.errors import DocumentError, SettingError
from mgam.evaluation.splits import Split
from mgam.evaluation.texts import KNOWN, TextLibrary


@dataclass(frozen=True)
class Document:
    """One text as tokens."""

    name: str
    ids: Tensor


def read_documents(data: Sequence[str], tokenizer: Any, split: Split = "train") -> list[Document]:
    """Texts as tokens; arguments and errors as `read_texts` has them."""
    found = read_texts(data, split)
    return [Document(name, torch.tensor(tokenizer(text, verbose=False)["input_ids"])) for name, text in found]


def read_texts(
    data: Sequence[str], split: Split = "train", library: TextLibrary | None = None
) -> list[tuple[str, str]]:
    """Names and texts: of files, folders of `.txt` and `.md` files, or sources of `mgam data list` (`split` alone).

    Raises:
        DocumentError: nothing is there, or it is no text.
    """
    library = library or TextLibrary()
    found: list[tuple[str, str]] = []
    for name in data:
        path = Path(name).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md"))
            found += [(str(file), _read(file)) for file in files]
        elif path.is_file():
            found.append((name, _read(path)))
        elif name in KNOWN:
            found += [(f"{name}/{text.name}", text.text) for text in library.texts(name, split)]
        else:
            raise DocumentError(
                f"--data {name} is no file, no folder, and none of the sources {', '.join(KNOWN)}; see mgam data list"
            )
    if not found:
        raise DocumentError(f"--data {' '.join(data)} holds no text (.txt or .md files are read)")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"{path} cannot be read as text: {error}") from error


class Windows(Dataset[dict[str, Tensor]]):
    """`count` windows of `tokens` tokens, each from a place that its number and the seed draw.

    Documents are drawn by their length. One shorter than a window goes on in others.
    """

    def __init__(self, documents: Sequence[Document], tokens: int, count: int, seed: int) -> None:
        total = sum(len(document.ids) for document in documents)
        if total < tokens:
            raise SettingError(
                f"the data has {total} tokens and a window {tokens}; give more text, or shorter windows with --tokens"
            )
        self.documents, self.tokens, self.count, self.seed = list(documents), tokens, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        rng = random.Random(f"{self.seed}/{number}")
        sizes = [len(document.ids) for document in self.documents]
        at = rng.choices(range(len(sizes)), weights=sizes)[0]
        ids = self.documents[at].ids
        start = rng.randrange(max(1, len(ids) - self.tokens + 1))
        parts, have = [ids[start : start + self.tokens]], min(len(ids) - start, self.tokens)
        while have < self.tokens:
            ids = self.documents[at := (at + 1) % len(sizes)].ids
            parts.append(ids[: self.tokens - have])
            have += len(parts[-1])
        return {"input_ids": torch.cat(parts), "number": torch.tensor(self.seed * 1_000_003 + number)}


def fingerprint(documents: Sequence[Document]) -> str:
    """A hash of all tokens: whether a run goes on with the data that it began with."""
    found = hashlib.sha256()
    for document in documents:
        found.update(document.ids.numpy().tobytes())
    return found.hexdigest()[:16]
