"""What searches are fitted to: the flat search's finds, by hand; and that a rare sharp hit is learned."""

from __future__ import annotations

import pytest
import torch

from mgam.training import network
from mgam.training.network import LayerSearch, Lesson, far_logits, flat_search, joined, lesson_loss

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


def test_the_flat_search_by_hand() -> None:
    """The best key of a chunk for each query head; softmax over far chunks but the sink; mean over the group."""
    one = lesson()
    found = flat_search(one)
    for block in range(BLOCKS):
        for head in range(HEADS):
            for vote in range(VOTES):
                shares = torch.zeros(CHUNKS)
                for query in range(head * GROUP, (head + 1) * GROUP):
                    logits = one.search[head] @ one.queries[block, query, vote] * DIM**-0.5  # (S, C)
                    far = slice(1, int(one.visible[block]))
                    shares[far] += torch.softmax(logits.amax(0)[far], 0) / GROUP
                torch.testing.assert_close(found[block, head, vote], shares)


def test_several_layers_are_as_each_alone() -> None:
    parts = [lesson(1), lesson(2)]
    both = flat_search(joined(parts))
    torch.testing.assert_close(both, torch.cat([flat_search(part) for part in parts], 1))


def _right(steps: int) -> float:
    """Share of unseen queries whose chunk leads without distance, after some steps."""
    torch.manual_seed(0)
    net = LayerSearch(HEADS, GROUP, DIM, DIM + 1, GROUP, 5)
    start = lesson(0, sharp=3.0)
    net.measure(start.queries[0].repeat(1, 8, 1), start.search.flatten(1, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-2)
    for step in range(steps):
        loss, parts = lesson_loss(net.weights("test"), lesson(step, sharp=3.0))
        assert set(parts) == {"query", "block", "voice", "content"}
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    unseen = lesson(1000, sharp=3.0)
    with torch.no_grad():
        logits, _ = far_logits(net.weights("test"), unseen.queries, unseen.search, unseen.visible)
    leads = torch.softmax(logits[..., 1:], -1).mean(2).argmax(-1)
    return float((leads == flat_search(unseen)[..., 1:].argmax(-1)).float().mean())


def test_a_sharp_hit_is_learned_though_full_attention_never_looks_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _right(150)
    monkeypatch.setattr(network, "CONTENT", 0.0)
    assert found > _right(150) + 0.25
    assert found > 0.5
