"""What searches begin with and are fitted to."""

from __future__ import annotations

import pytest
import torch

from mgam.training.network import LayerSearch, Lesson, far_logits, lesson_loss

HEADS, GROUP, DIM, CHUNKS, PLACES, BLOCKS, VOTES = 2, 2, 8, 12, 3, 4, 5


def lesson(seed: int = 0, sharp: float = 0.0) -> Lesson:
    """States at random; full attention favours what is near. `sharp`: each query also asks for one key far back."""
    rng = torch.Generator().manual_seed(seed)
    queries = torch.randn(BLOCKS, HEADS * GROUP, VOTES, DIM, generator=rng)
    search = torch.randn(HEADS, PLACES, CHUNKS, DIM, generator=rng)
    visible = torch.tensor([6, 8, 10, 12])
    if sharp:
        spots = torch.randint(1, 6, (BLOCKS, HEADS, VOTES), generator=rng)
        keys = search[torch.arange(HEADS)[None, :, None], 0, spots]  # (N, H, V, D)
        queries = queries + sharp * keys.repeat_interleave(GROUP, 1)
    near = torch.exp(-0.7 * (visible[:, None] - torch.arange(CHUNKS)).clamp_min(0).float())
    target = (0.5 * near / near.sum(-1, keepdim=True))[:, None, None].expand(BLOCKS, HEADS, VOTES, CHUNKS)
    return Lesson(queries, search, visible, target, target.sum(2), torch.full((HEADS,), DIM**-0.5))


def test_content_is_sought_as_whole_queries_and_keys_would_find_it() -> None:
    """With as many dimensions as the keys have, logits are those of the query itself, but for a number a query."""
    one = lesson()
    net = LayerSearch(HEADS, GROUP, DIM, DIM + 1, GROUP, 5)
    net.begin(one.queries[0].repeat(1, 8, 1), one.search.flatten(1, 2), DIM**-0.5)
    weights = net.weights("test")
    asked, keys = weights.look(one.queries), weights.keys(one.search)
    mine = torch.einsum("nhgvr,hscr->nhgvsc", asked[..., :-1], keys[..., :-1])
    own = one.queries.unflatten(1, (HEADS, GROUP)) * DIM**-0.5
    whole = torch.einsum("nhgvd,hscd->nhgvsc", own, one.search)
    apart = mine - whole
    torch.testing.assert_close(apart, apart[..., :1, :1].expand_as(apart), atol=1e-4, rtol=0)
    assert bool((asked[..., -1] < -1000).all())


@pytest.mark.parametrize("short", [False, True])
def test_what_is_sought_does_not_depend_on_the_number_format(short: bool) -> None:
    one = lesson()
    net = LayerSearch(HEADS, GROUP, DIM, 5, GROUP, 5)
    net.begin(one.queries[0].repeat(1, 8, 1), one.search.flatten(1, 2), DIM**-0.5)
    plain, other = net.weights("test"), net.weights("test", short=short)
    logits = [torch.einsum("nhgvr,hscr->nhgvsc", it.look(one.queries), it.keys(one.search)) for it in (plain, other)]
    torch.testing.assert_close(logits[1], logits[0], atol=2e-2, rtol=2e-3)


def test_the_search_adopts_what_it_was() -> None:
    """A search that goes on from fitted weights asks, looks and expects as these do."""
    one = lesson()
    net, other = (LayerSearch(HEADS, GROUP, DIM, 5, GROUP, 5) for _ in range(2))
    net.begin(one.queries[0].repeat(1, 8, 1), one.search.flatten(1, 2), DIM**-0.5)
    before = net.weights("test")
    other.measure(one.queries[1].repeat(1, 8, 1), one.search.flatten(1, 2) + 1)
    other.adopt(before)
    after = other.weights("test")
    assert torch.equal(after.look(one.queries), before.look(one.queries))
    for weights in (before, after):
        logits, pull = far_logits(weights, one.queries, one.search, one.visible)
        shares = torch.softmax(torch.cat((pull, logits), -1), -1)
        if weights is before:
            expected = shares
    torch.testing.assert_close(shares, expected, atol=1e-5, rtol=1e-4)


def test_a_step_lowers_the_loss() -> None:
    torch.manual_seed(0)
    net = LayerSearch(HEADS, GROUP, DIM, 5, GROUP, 5)
    net.begin(lesson().queries[0].repeat(1, 8, 1), lesson().search.flatten(1, 2), DIM**-0.5)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-2)
    losses = []
    for step in range(40):
        loss, parts = lesson_loss(net.weights("test"), lesson(step))
        assert set(parts) == {"query", "block", "voice"}
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(float(loss.mean()))
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
