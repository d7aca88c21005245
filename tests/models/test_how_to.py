"""The Python in the how-tos about models runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from documents.tiny import make_plain_model, make_tokenizer

from .features import batch, texts
from .zoo import BY_NAME, tokens

FOLDER = Path(__file__).parents[2] / "docs" / "how-to"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["ask", "transformers", "batches", "formats", "training"])
def test_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("book.txt", "notes.md"):
        (tmp_path / file).write_text("The captain of the whale ship is in the north. " * 9, encoding="utf-8")
    page = FOLDER / f"{name}.md"
    model = BY_NAME["llama"].make(torch.float32, max_position_embeddings=4096)
    padded, mask = batch(texts(), "left")
    names = {
        "model": model,
        "ids": tokens(1, 50),
        "batch": padded,
        "mask": mask,
        "prompt": tokens(1, 40),
        "questions": [tokens(1, 5, seed=9), tokens(1, 7, seed=10)],
        "folder": str(tmp_path),
    }
    if name in ("ask", "formats"):
        make_plain_model(window=4096).save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
