"""Positions: rotation by rank, tables, and refusals of what does not fit the trained window."""

from __future__ import annotations

import pytest
import torch

from mgam.errors import SettingError
from mgam.positions import Positions, Rotary, rotate


def test_rotation_turns_pairs() -> None:
    """Against complex numbers; dimensions that are not rotated pass."""
    states = torch.randn(5, 10, dtype=torch.float64)
    cos, sin = Rotary.plain(6, 32).table(states.device, states.dtype)
    places = torch.tensor([0, 3, 7, 31, 8])
    turned = rotate(states, cos[places], sin[places])
    angles = places[:, None] * 10000.0 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    pairs = torch.complex(states[:, :3], states[:, 3:6]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.cat((pairs.real, pairs.imag, states[:, 6:]), 1))


def test_only_distances_matter() -> None:
    one, other = torch.randn(2, 8, dtype=torch.float64)
    cos, sin = Rotary.plain(8, 500).table(one.device, one.dtype)
    products = [rotate(one, cos[a], sin[a]) @ rotate(other, cos[a + 9], sin[a + 9]) for a in (0, 17, 400)]
    torch.testing.assert_close(products[0], products[1])
    torch.testing.assert_close(products[0], products[2])


def test_tables_are_single_precision_and_scaled_as_given() -> None:
    rotary = Rotary(lambda places: (torch.full((len(places), 4), 1.25), torch.zeros(len(places), 4)), 16)
    cos, _ = rotary.table(torch.device("cpu"), torch.bfloat16)
    assert cos.dtype == torch.float32
    assert cos.shape == (16, 2)
    states = torch.randn(4)
    torch.testing.assert_close(rotate(states, cos[3], torch.zeros(2)), 1.25 * states)


def test_one_table_is_kept_however_long_texts_grow() -> None:
    made = []

    def tables(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(len(places))
        angles = places[:, None].double() * torch.ones(4)
        return angles.cos(), angles.sin()

    rotary = Rotary(tables, 100)
    first, _ = rotary.table(torch.device("cpu"), torch.float32)
    for limit in range(90, 3000):
        cos, _ = rotary.table(torch.device("cpu"), torch.float32, limit)
        assert cos.shape[0] == limit
    assert len(made) == 2
    torch.testing.assert_close(cos[:100], first)


def test_covers_must_fit_the_trained_window() -> None:
    positions = Positions.granular(Rotary.plain(4, 100), window=30)
    positions.check(70, 30)
    with pytest.raises(SettingError, match=r"71 entries .* lower the budget"):
        positions.check(71, 30)
    with pytest.raises(SettingError, match="span 31 tokens"):
        positions.check(70, 31)
    with pytest.raises(SettingError, match="trained for 100"):
        Positions.granular(Rotary.plain(4, 100), window=100)
    Positions().check(10**9, 10**9)


def test_a_window_that_begins_with_the_text_stands_at_true_positions() -> None:
    positions = Positions.granular(Rotary.plain(4, 100), window=30)
    assert positions.base(torch.tensor([0, 8])).tolist() == [0, 70]


@pytest.mark.parametrize("length", [1.0, 1.25])
def test_turns_by_steps_compose(length: float) -> None:
    """A far turn of length one and a near one from the table make the turn to a position, at a million tokens too."""
    plain = Rotary.plain(64, 4096)
    rotary = Rotary(lambda positions: tuple(length * part for part in plain.tables(positions)), 4096)
    assert rotary.compose(torch.device("cpu"))
    far_cos, far_sin = rotary.turns(torch.device("cpu"), 64, (1 << 20) // 64 + 1)
    cos, sin = rotary.table(torch.device("cpu"), torch.float32)
    for place in (3, 4095, 1_000_003):
        whole, left = place // 64, place % 64
        made = cos[left] * far_cos[whole] - sin[left] * far_sin[whole]
        frequencies = 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
        assert (made.double() - length * (place * frequencies).cos()).abs().max() < (1e-3 if place < 5000 else 0.1)
    # What a rotation is for, the angle between neighbours, is exact wherever they stand.
    first, second = (
        torch.complex(
            far_cos[-1] * cos[left] - far_sin[-1] * sin[left], far_sin[-1] * cos[left] + far_cos[-1] * sin[left]
        )
        for left in (5, 60)
    )
    angle = (second / first).angle().double()
    assert (torch.exp(1j * angle) - torch.exp(1j * 55 * frequencies)).abs().max() < 1e-4


def test_tables_without_fixed_frequencies_do_not_compose() -> None:
    def tables(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions.double().sqrt()[:, None].expand(-1, 4)
        return angles.cos(), angles.sin()

    rotary = Rotary(tables, 512)
    assert not rotary.compose(torch.device("cpu"))
    with pytest.raises(SettingError, match="step by step"):
        rotary.turns(torch.device("cpu"), 64, 4)


def test_what_is_kept_serves_every_mode() -> None:
    """Tables that a call under `torch.inference_mode` made can be saved for a backward pass later."""
    rotary, device = Rotary.plain(8, 64), torch.device("cpu")
    with torch.inference_mode():
        rotary.half_table(device, 64)
        rotary.turns(device, 16, 10)
    assert rotary._speed is not None
    kept = [*rotary.table(device, torch.float32), *rotary.half_table(device, 64), *rotary.turns(device, 16, 10)]
    assert not any(table.is_inference() for table in (*kept, rotary._speed[0]))
