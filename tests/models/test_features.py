"""Every model of the table can do everything that the table of the docs says."""

from __future__ import annotations

import pytest

from .features import FEATURES
from .zoo import BY_NAME, NAMES

SLOW = {"torch.compile": ("llama", "gemma3", "phi3"), "LoRA": ("llama", "gemma2", "phi3", "qwen3-moe")}
"""Features that take seconds are tested on the models that are unlike each other; scripts/models_table.py runs all."""

CELLS = [(name, feature) for name in NAMES for feature in FEATURES if name in SLOW.get(feature, NAMES)]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "feature"), CELLS, ids=lambda part: part.replace(" ", "-").replace(",", ""))
def test_feature(name: str, feature: str) -> None:
    reason = FEATURES[feature](BY_NAME[name])
    if reason is not None:
        pytest.skip(reason)
