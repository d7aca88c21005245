"""Every model of the table can do everything that the table of the docs says."""

from __future__ import annotations

from pathlib import Path

import pytest

from .features import FEATURES
from .zoo import BY_NAME, NAMES

SLOW = {
    "torch.compile": ("llama", "gemma3", "phi3"),
    "LoRA": ("llama", "gemma2", "phi3", "qwen3-moe"),
    "8-bit weights": ("llama", "gemma2", "phi3"),
    "4-bit weights": ("llama", "gemma3", "qwen3-moe"),
}
"""Features that take seconds are tested on the models that are unlike each other; scripts/models_table.py runs all."""

CELLS = [(name, feature) for name in NAMES for feature in FEATURES if name in SLOW.get(feature, NAMES)]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "feature"), CELLS, ids=lambda part: part.replace(" ", "-").replace(",", ""))
def test_feature(name: str, feature: str) -> None:
    reason = FEATURES[feature](BY_NAME[name])
    if reason is not None:
        pytest.skip(reason)


def test_the_table_of_the_docs_is_whole() -> None:
    """`scripts/models_table.py --write` makes it."""
    lines = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert ["feature", *NAMES] in rows
    for feature in FEATURES:
        [row] = [row for row in rows if row[0] == feature]
        assert len(row) == 1 + len(NAMES)
        assert f"- **{feature}**: {' '.join((FEATURES[feature].__doc__ or '').split())}" in lines
        assert all(cell == "✓" or f"{cell} " in "".join(f"{line[:4]} " for line in lines) for cell in row[1:]), row
