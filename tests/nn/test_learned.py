"""Multi-granular attention that is trained from scratch: its cover, its gate, and who may decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mgam.errors import SettingError
from mgam.nn import LearnedGranularAttention, learned

SMALL: dict[str, Any] = {
    "levels": (1, 4, 8, 16), "search": 2, "window": 8, "budget": 8, "middle": 1, "block": 4, "every": 2, "dims": 3,
}  # fmt: skip
WIDTH, HEADS = 16, 2


def make(seed: int = 0, **changes: Any) -> LearnedGranularAttention:
    torch.manual_seed(seed)
    return LearnedGranularAttention(WIDTH, HEADS, **{**SMALL, **changes}).double()


def text(tokens: int, rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(rows, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("policy", ["learned", "scored", "fixed", "random"])
@pytest.mark.parametrize("levels", [(1, 4), (1, 4, 8), (1, 4, 8, 16), (1, 4, 16)])
def test_every_visible_token_counts_exactly_once(causal: bool, policy: str, levels: tuple[int, ...]) -> None:
    """With equal logits and mass, the mean of all visible values comes out if, and only if, the cover is exact."""
    module = make(causal=causal, policy=policy, levels=levels, kv_heads=1)
    torch.nn.init.zeros_(module.query.weight)
    found: list[Tensor] = []
    attend = module.attend
    module.attend = lambda seen: found.append(attend(seen)) or found[-1]  # type: ignore[method-assign,func-returns-value]
    for tokens in (1, 3, 6, 29, 64, 83):
        states = text(tokens)
        module(states)
        values = module.split(module.value(states))
        mean = values.cumsum(2) / torch.arange(1, tokens + 1)[:, None] if causal else values.mean(2, keepdim=True)
        torch.testing.assert_close(found[-1], mean.expand_as(found[-1]), atol=1e-9, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_the_gate_has_the_gradient_of_a_bias(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's gradient is that of the same reading with the scores added to the logits, the cover held fast."""
    module, states, weight = make(causal=causal), text(53), text(53, seed=5)
    module.seen_covers, given = [], []
    monkeypatch.setattr(learned, "_gate", lambda score: given.append(score.detach()) or score - score.detach())
    (module(states) * weight).sum().backward()
    cover = module.seen_covers[0][1]
    monkeypatch.setattr(module, "choose", lambda *args: cover)
    monkeypatch.setattr(learned, "_gate", lambda score: score - next(one for one in given if one.shape == score.shape))
    assert module.scores is not None
    for name, part in module.scores.named_parameters():
        draw = torch.randn(part.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        at, found = part.detach().clone(), []
        with torch.no_grad():
            for sign in (1, -1):
                part.copy_(at + sign * 1e-3 * draw)
                found.append(float((module(states) * weight).sum()))
            part.copy_(at)
        slope = (found[0] - found[1]) / 2e-3
        assert part.grad is not None
        assert abs(slope) > 1e-3, name
        assert slope == pytest.approx(float((part.grad * draw).sum()), rel=2e-3, abs=1e-4), name


def test_gradients_stay_out_of_the_states() -> None:
    """What the policy learns does not pull at what it looks at."""
    module, states = make(), text(40).requires_grad_()
    assert module.scores is not None
    total = torch.stack([part.sum() for part in module.scores.project(states).values()]).sum()
    assert torch.autograd.grad(total, states, allow_unused=True) == (None,)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("levels", [(1, 4), (1, 4, 8, 16)])
def test_the_lesson_is_the_cross_entropy_with_the_attention_given(causal: bool, levels: tuple[int, ...]) -> None:
    """Written out for one block: attention over its entries, summed by what the policy scores as one region."""
    module, states = make(causal=causal, levels=levels, every=1), text(48)
    module.seen_covers, module.lessons = [], []
    out = module(states)
    (lesson,), (part, chosen) = module.lessons, module.seen_covers[0]
    module.lessons = None
    torch.testing.assert_close(module(states), out)  # a lesson changes nothing
    q, new = module._project(states, 0)
    seen = learned.Seen(states, q, new["k"], new["v"], new)
    _, _, search, *upper = module.pyramid(seen)
    score, near = module.judge(part, search, seen)
    block, chunk = 6, 4
    assert near is not None
    for row in range(2):
        for head in range(HEADS):
            said: dict[str, Tensor] = {"near": near[row, head, block]}
            mass: dict[str, Tensor] = {"near": torch.zeros(4, dtype=torch.float64)}
            left, right = int(part.left[block]), int(part.right[block])
            own = range(block * 4, block * 4 + 4)
            asked = q[row, head, own] * module.scale
            for at in range(48):
                whole = new["k"][row, head, at]
                near_by = left <= at < right or at < chunk
                opened = at // chunk in chosen.opened[row, head, block].tolist()
                if not (near_by or opened) or (causal and at >= right):
                    continue
                name = "near" if near_by else f"chunk {at // chunk}"
                if not near_by:
                    said[name] = score[row, head, block, at // chunk]
                weight = (asked @ whole).exp()
                if causal:
                    weight = weight * (torch.tensor(own) >= at)
                mass[name] = mass.get(name, torch.zeros(4, dtype=torch.float64)) + weight
            for level, read in enumerate(chosen.read, start=1):
                ratio = levels[level] // chunk
                for region in read[row, head, block].nonzero().flatten().tolist():
                    key = upper[2 * level - 2][row, head, region, : module.dim]
                    mass[f"{level} {region}"] = (asked @ key).exp() * levels[level]
                    inside = score[row, head, block, region * ratio : (region + 1) * ratio]
                    said[f"{level} {region}"] = inside.logsumexp(-1)
            total = torch.stack(list(mass.values())).sum(0)
            given = {name: (one / total).mean() for name, one in mass.items()}
            every = torch.stack(list(said.values())).logsumexp(0)
            wanted = -sum(given[name] * (said[name] - every) for name in mass)
            torch.testing.assert_close(lesson[row, head, block], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [True, False])
def test_a_lesson_teaches_the_policy_alone(recompute: bool) -> None:
    """Its gradient reaches the policy, and nothing else; following it brings down what is left to learn."""
    module, states = make(recompute=recompute), text(53)
    step = torch.optim.Adam(module.parameters(), 3e-2)
    found = []
    for _ in range(60):
        module.lessons = []
        module(states)
        loss = torch.cat(module.lessons, 2).mean()
        step.zero_grad()
        loss.backward()
        for name, part in module.named_parameters():
            assert (part.grad is not None) == name.startswith("scores."), name
        step.step()
        found.append(float(loss))
    assert found[-1] < found[0] - 0.05


@pytest.mark.slow
def test_the_policy_learns_to_open_what_matters() -> None:
    """One marked chunk decides the output: training opens it where chance rarely does."""
    torch.manual_seed(0)
    module = LearnedGranularAttention(
        WIDTH, 2, levels=(1, 4), search=1, window=4, budget=4, block=4, every=1, dims=4, share=None, rest="summaries",
        rotary=False,
    )  # fmt: skip
    step = torch.optim.Adam(module.parameters(), 1e-2)
    draw = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        states = torch.randn(32, 65, WIDTH, generator=draw) * 0.3
        place = torch.randint(4, 56, (32,), generator=draw)
        states[:, :, 0] = 0
        states[torch.arange(32), place, 0] = 4.0
        return states, place, states[torch.arange(32), place, 8:]

    for _ in range(120):
        states, _, wanted = batch()
        loss = (module(states)[:, -1, 8:] - wanted).square().mean()
        step.zero_grad()
        loss.backward()
        step.step()
    states, place, _ = batch()
    module.seen_covers = []
    module(states)
    opened = module.seen_covers[0][1].opened[:, :, -1, 0]
    assert float((opened == place[:, None] // 4).float().mean()) > 0.8


def test_blocks_that_look_nearby_open_less() -> None:
    module = make(share=0.5)
    assert module.scores is not None
    with torch.no_grad():
        module.scores.ask.bias.view(HEADS, -1)[:, -1] = 50.0
    module.seen_covers = []
    module(text(64))
    assert not (module.seen_covers[0][1].opened >= 0).any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": "best"}, "policy='best' is unknown"),
        ({"rest": "summary"}, "rest='summary' is unknown"),
        ({"block": 6}, "block=6 must be a multiple of the chunk size 4"),
        ({"window": 6}, "window on a side=6"),
        ({"budget": 2}, "budget=2 must be a whole number, 4 or more"),
        ({"share": 0.0}, r"share=0.0 above 0"),
        ({"mass": 2.0}, r"mass=2.0 lies between"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        make(**changes)
