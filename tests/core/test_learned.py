"""What the learned policy opens: far facts by content, near text by expectation, and little where little is wanted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mgam.errors import SettingError
from mgam.levels import Levels
from mgam.policies.base import Voters
from mgam.policies.learned import Learned
from mgam.policies.learned_search import SearchWeights, search_masses
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, Piece

LEVELS = Levels((1, 16), 4)
DIM, CHUNKS, WINDOW = 4, 40, 32
NEEDLE = 5
"""The chunk whose keys the query of a hard block asks for."""


def weights(fade: float = 0.0, content: float = 0.5) -> SearchWeights:
    """One KV head; the first dimension is searched, the second is the pull of what is near."""
    query = torch.zeros(1, DIM, 3)
    query[0, 0, 0] = query[0, 1, 2] = 1.0
    key = torch.zeros(1, DIM, 2)
    key[0, 0, 0] = 1.0
    prior = -fade * torch.arange(6.0)[None]
    voice, part = torch.zeros(1, DIM), torch.tensor([content])
    return SearchWeights(
        "test",
        1,
        query,
        torch.zeros(1, 3),
        key,
        torch.zeros(1, 2),
        key.clone(),
        voice,
        torch.zeros(1),
        prior,
        part,
        torch.ones(1),
    )


def pyramid() -> Pyramid:
    """Keys of no content, but for one chunk."""
    keys = torch.zeros(1, 1, CHUNKS * 16, DIM)
    keys[:, :, NEEDLE * 16 + 3 : NEEDLE * 16 + 9, 0] = 4.0
    return Pyramid.of(keys, keys, LEVELS)


def opened(policy: Learned, query: list[float]) -> list[int]:
    """Chunks that a block at the end of the text opens, the sink aside."""
    end = CHUNKS * 16
    blocks = Blocks.of([(0, Piece(end - 8, end, end - 8, end - 8, end, False))])
    asked = torch.tensor(query).view(1, 1, 1, DIM).expand(1, 1, 8, DIM)
    cover = policy.choose(Voters(asked, torch.ones(1, 8, dtype=torch.bool)), blocks, pyramid(), LEVELS)
    return [int(chunk) for chunk in cover.opened[0, 0] if chunk > 0]


HARD, EASY = [2.0, 0.0, 0.0, 0.0], [0.0, 12.0, 0.0, 0.0]


def test_a_far_fact_is_opened_however_strong_distance_is() -> None:
    """A sharp hit stands out; where distance is always weighed, near chunks take every place."""
    steep = weights(fade=6.0)
    assert NEEDLE in opened(Learned(steep, 128, WINDOW, content=0.5), HARD)
    assert NEEDLE not in opened(Learned(steep, 128, WINDOW, content=0.0), HARD)


def test_a_head_has_the_part_that_was_fitted_unless_one_is_given() -> None:
    mine, none = Learned(weights(6.0, content=0.5), 128, WINDOW), Learned(weights(6.0, content=0.0), 128, WINDOW)
    assert opened(mine, HARD) == opened(replace(none, content=0.5), HARD)
    assert opened(none, HARD) == opened(replace(mine, content=0.0), HARD) == list(range(29, 37))


@pytest.mark.parametrize(("votes", "heard"), [(8, True), (32, True), (128, False)])
def test_small_blocks_are_heard_in_full(votes: int, heard: bool) -> None:
    """The last voter asks for the needle, and none sounds as if it cared: of a large block the first few are heard."""
    end = CHUNKS * 16
    blocks = Blocks.of([(0, Piece(end - votes, end, end - votes, end - votes, end, False))])
    asked = torch.tensor(EASY).expand(1, 1, votes, DIM).clone()
    asked[..., -1, :] = torch.tensor([3.0, -6.0, 0.0, 0.0])
    policy = Learned(weights(), 16, WINDOW, content=1.0)
    for padded in (votes, 2 * votes):
        queries = torch.nn.functional.pad(asked, (0, 0, 0, padded - votes))
        live = torch.arange(padded)[None] < votes
        cover = policy.choose(Voters(queries, live), blocks, pyramid(), LEVELS)
        assert (NEEDLE in cover.opened[0, 0].tolist()) is heard


def test_questions_are_heard_in_full_beside_texts_that_are_not() -> None:
    """The last voter of a large and of a small block asks for the needle: searched together, the small one finds it."""
    end = CHUNKS * 16
    pieces = [Piece(end - votes, end, end - votes, end - votes, end, False) for votes in (128, 8, 128)]
    blocks = Blocks.of([(0, piece) for piece in pieces])
    asked = torch.tensor(EASY).expand(3, 1, 128, DIM).clone()
    for place, votes in enumerate((128, 8, 128)):
        asked[place, :, votes - 1] = torch.tensor([3.0, -6.0, 0.0, 0.0])
    policy, live = Learned(weights(), 16, WINDOW, content=1.0), torch.arange(128) < blocks.voting[:, None]
    voters = Voters(asked, live)
    found = policy.choose(voters, blocks, pyramid(), LEVELS).opened
    assert [NEEDLE in opened.tolist() for opened in found[:, 0]] == [False, True, False]
    together = policy.shares(voters, blocks, pyramid(), LEVELS, CHUNKS)
    for place in range(3):
        part = slice(place, place + 1)
        alone = policy.shares(voters[part], blocks[part], pyramid(), LEVELS, CHUNKS)
        for ours, theirs in zip(alone, together, strict=True):
            torch.testing.assert_close(ours[0], theirs[place])


@pytest.mark.parametrize("content", [0.25, 0.5, 0.75])
def test_both_lists_get_their_part(content: float) -> None:
    """Of eight chunks, those first by each list: as many as its part, however far the other's values stand apart."""
    policy = Learned(weights(), 128, WINDOW, content=content)
    shares, found = torch.zeros(1, 1, 40), torch.zeros(1, 1, 40)
    shares[..., 20:30], found[..., 5:15] = torch.linspace(1e-3, 1e-4, 10), torch.linspace(0.5, 0.4, 10)
    chosen = policy.open(shares, found, torch.ones(1, 1, 40, dtype=torch.bool), 8)[0, 0].nonzero().flatten().tolist()
    part = round(8 * content)
    assert chosen == [*range(5, 5 + part), *range(20, 28 - part)]


@pytest.mark.parametrize("content", [0.0, 0.25, 0.5, 1.0])
def test_the_budget_is_spent_whatever_is_weighed(content: float) -> None:
    chosen = opened(Learned(weights(1.0), 128, WINDOW, content=content), HARD)
    assert len(chosen) == len(set(chosen)) == 8


def test_easy_blocks_cost_less() -> None:
    """With a mark a block that looks nearby opens nothing, one that asks for one chunk that, a diffuse one all."""
    policy = Learned(weights(), 128, WINDOW, mark=0.02)
    assert opened(policy, EASY) == []
    assert opened(policy, [3.0, -6.0, 0.0, 0.0]) == [NEEDLE]
    assert len(opened(policy, [0.0, -9.0, 0.0, 0.0])) == 8
    assert len(opened(Learned(weights(), 128, WINDOW), EASY)) == 8


def test_a_mark_asks_for_what_a_head_is_worth() -> None:
    """Half as important a head opens what all heads would open at twice the mark; without a mark all is spent."""
    search = weights()
    half = replace(search, importance=torch.tensor([0.5]))
    for query in (HARD, EASY, [3.0, -6.0, 0.0, 0.0], [0.0, -9.0, 0.0, 0.0]):
        for mark in (0.01, 0.02, 0.04):
            found = opened(Learned(half, 128, WINDOW, mark=mark), query)
            assert found == opened(Learned(search, 128, WINDOW, mark=2 * mark), query)
        assert opened(Learned(half, 128, WINDOW), query) == opened(Learned(search, 128, WINDOW), query)


def test_a_lower_mark_never_opens_less() -> None:
    costs = [
        len(opened(Learned(weights(1.0), 256, WINDOW, mark=part), [0.3, -2.0, 0, 0])) for part in (0.1, 0.03, 0.01)
    ]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]


def test_blocks_searched_together_are_searched_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, uneven ends and any number of blocks at a time."""
    torch.manual_seed(0)
    asked, live = torch.randn(7, 2, 3, 4, 5, dtype=torch.float64), torch.rand(7, 4) < 0.7
    search = torch.randn(2, 2, 4, 20, 5, dtype=torch.float64)
    row, visible = torch.tensor([0, 0, 0, 1, 1, 0, 1]), torch.tensor([3, 9, 20, 1, 20, 12, 7])
    whole = search_masses(asked, live, search, row, visible, 20)
    alone = [search_masses(asked[n : n + 1], live[n : n + 1], search, row[n : n + 1], visible[n : n + 1], 20)
             for n in range(7)]  # fmt: skip
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-12, rtol=0)
    monkeypatch.setattr("mgam.policies.learned_search.ELEMENTS", 1)
    torch.testing.assert_close(search_masses(asked, live, search, row, visible, 20), whole, atol=1e-12, rtol=0)


def test_where_nothing_stands_out_distance_decides() -> None:
    assert opened(Learned(weights(1.0), 128, WINDOW), [0.0, -9.0, 0.0, 0.0]) == list(range(29, 37))


def test_a_weight_beyond_one_is_refused() -> None:
    with pytest.raises(SettingError, match=r"content=1.5 is a part of the budget, from 0"):
        Learned(weights(), content=1.5)


def test_beyond_what_was_fitted_a_doubling_of_the_distance_holds_no_more() -> None:
    """As many chunks again, each half as likely: what is far does not win by its number. Within, the fit decides."""
    search = weights(fade=0.1)
    last = 1 << search.prior.shape[1] - 1
    within = search.by_distance(torch.tensor([[1, 2, 3, last]]))[0, 0]
    assert within.tolist() == pytest.approx([0.0, -0.1, -0.1 * math.log2(3), -0.1 * math.log2(last)])
    held = [
        float(search.by_distance(torch.arange(last << step, last << step + 1)[None]).exp().sum()) for step in range(6)
    ]
    assert held == pytest.approx([held[-1]] * 6, rel=0.02)


def test_what_is_kept_of_weights_serves_every_mode() -> None:
    """A policy that was read, or moved, under `torch.inference_mode` can be read with while a model is trained."""
    from mgam.policies import files
    from mgam.policies.asked import _all_alike

    some, device = weights(), torch.device("cpu")
    files._load.cache_clear()
    _all_alike.cache_clear()
    with torch.inference_mode():
        some.on(device, torch.float64)
        files.FittedPolicy.load(files.resolve("default"))
        _all_alike((1, 2, 3), 0.5, device)
    assert not some.on(device, torch.float64).query.is_inference()
    loaded = files.FittedPolicy.load(files.resolve("default"))
    assert not any(layer.query.is_inference() for layer in loaded.layers.values())
    assert not _all_alike((1, 2, 3), 0.5, device).is_inference()
