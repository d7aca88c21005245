"""Levels: what divides, and how a refusal says what does not."""

from __future__ import annotations

import pytest

from mgam.errors import SettingError
from mgam.levels import Levels


def test_defaults_work() -> None:
    levels = Levels()
    assert levels.sizes[0] == 1
    assert levels.chunk == levels.sizes[1]
    assert levels.top == len(levels.sizes) - 1
    assert levels.search_per_chunk * levels.search == levels.chunk


def test_ratios_multiply_to_sizes() -> None:
    levels = Levels((1, 2, 6, 24), search=1)
    product = 1
    for level in range(1, levels.top + 1):
        product *= levels.ratio(level)
        assert product == levels.sizes[level]


@pytest.mark.parametrize("sizes", [(), (1,), (2, 4), (64,), (1, 64, 64), (1, 64, 96), (1, 64, 32), (1, 0), (1, -4)])
def test_sizes_that_cannot_work(sizes: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match=r"levels \(") as caught:
        Levels(sizes)
    assert "\n" not in str(caught.value)
    assert "e.g." in str(caught.value)


@pytest.mark.parametrize("search", [0, -4, 3, 128])
def test_search_keys_that_do_not_divide_a_chunk(search: int) -> None:
    with pytest.raises(SettingError, match=str(search)):
        Levels((1, 64), search)
