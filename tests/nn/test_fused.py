"""Kernels for training with a cover against the module in plain torch: scores, covers, outputs, all gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mgam.nn import LearnedGranularAttention
from mgam.nn.base import Seen
from mgam.positions import Rotary, rotate
from triton_cases import DEVICE, needs_triton

pytestmark = needs_triton

SMALL: dict[str, Any] = {
    "levels": (1, 16, 64), "search": 4, "window": 64, "budget": 48, "middle": 1, "block": 32, "every": 8, "dims": 16,
}  # fmt: skip
WIDTH, HEADS = 64, 4
LOOSE = 2e-6 if DEVICE == "cpu" else 2e-2
"""Of the largest number: products are float32 in the interpreter, bfloat16 on a device."""


def make(**changes: Any) -> LearnedGranularAttention:
    torch.manual_seed(0)
    module = LearnedGranularAttention(WIDTH, HEADS, **{**SMALL, **changes})
    if module.scores is not None:
        with torch.no_grad():
            module.scores.prior.normal_()
            module.scores.ask.weight.mul_(3)
    return module.to(DEVICE)


def text(tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def half() -> AbstractContextManager[Any]:
    return nullcontext() if DEVICE == "cpu" else torch.autocast("cuda", torch.bfloat16)


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp_min(1.0))


CASES: list[tuple[int, dict[str, Any]]] = [
    (200, {"causal": False}),
    (321, {"causal": True}),
    (33, {"causal": False}),
    (16, {"causal": True}),
    (260, {"causal": False, "kv_heads": 2, "share": 0.7}),
    (300, {"causal": True, "kv_heads": 2, "levels": (1, 16, 32, 64), "share": None}),
    (300, {"causal": False, "levels": (1, 16)}),
    (300, {"causal": False, "rest": "drop", "kv_heads": 1}),
    (270, {"causal": False, "policy": "scored", "mass": 0.0}),
    (270, {"causal": True, "policy": "fixed"}),
    (270, {"causal": False, "policy": "random"}),
]


@pytest.mark.parametrize(("tokens", "changes"), CASES)
def test_outputs_and_gradients(tokens: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With one cover, the kernels put out and learn what plain torch does; poisoned memory changes nothing.

    In half precision both are held against plain torch in float32: the kernels may be off by twice as much.
    """
    module, states, weight = make(**changes), text(tokens), text(tokens, seed=5)
    found: list[dict[str, Tensor]] = []
    module.seen_covers = []
    for kernels, precision in ((True, half()), (False, half()), (False, nullcontext())):
        module.kernels = kernels
        module.zero_grad()
        given = states.clone().requires_grad_()
        with precision:
            assert module.served(given) or not kernels
            out = module(given)
        (out * weight).sum().backward()
        grads = {name: part.grad for name, part in module.named_parameters()}
        found.append({"out": out.detach(), "states": given.grad, **grads})  # type: ignore[dict-item]
        part, chosen = module.seen_covers[0]
        monkeypatch.setattr(module, "choose", lambda *args, chosen=chosen: chosen)
    assert len(part.start) == -(-tokens // module.block)
    fused, plain, exact = found
    for name, wanted in exact.items():
        assert apart(fused[name], wanted) < max(LOOSE, 2 * apart(plain[name], wanted)), name


@pytest.mark.parametrize(("tokens", "changes"), [case for case in CASES if "policy" not in case[1]])
def test_scores_and_covers(tokens: int, changes: dict[str, Any]) -> None:
    """Scores are those of the policy; the cover of given scores is the same, to the last entry."""
    from mgam.nn.fused.attend import Lists, Searched, choose, judged

    module, states = make(**changes), text(tokens)
    plan, heads = module.plan(tokens), module.kv_heads
    assert module.scores is not None
    with torch.no_grad(), half():
        q, new = module._project(states, 0)
        seen = Seen(states, q, new["k"], new["v"], new)
        part = module.part(0, plan.blocks, tokens, states.device)
        score, near = module.judge(part, module.pyramid(seen)[2], seen)
        searched = Searched(*module.scores.searched(states, plan.chunks, plan.levels, module.every))
        told, pull = judged(plan, searched, heads, 0, plan.blocks)
    assert near is not None
    _, free = module.chooser.free(part, plan.chunks)
    assert not free.any() or apart(told[:, :, free], score[:, :, free]) < LOOSE
    assert apart(pull, near) < LOOSE
    shape = (2, heads, plan.blocks)
    lists = Lists(*(torch.full((*shape, size), -7, dtype=torch.int32, device=DEVICE) for size in
                    (plan.most + 2, plan.room, 3)))  # fmt: skip
    half_way = plan.blocks // 2
    for begin, stop in ((0, half_way), (half_way, plan.blocks)):
        if stop > begin:
            choose(plan, lists, told[:, :, begin:stop].contiguous(), pull[:, :, begin:stop].contiguous(), begin)
    wanted = module.chooser(part, told.masked_fill(~free, 0.0), pull)
    found = lists.chosen(plan)
    assert torch.equal(found.opened, wanted.opened)
    assert len(found.read) == len(wanted.read)
    for got, want in zip(found.read, wanted.read, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("causal", [False, True])
def test_a_module_may_read_otherwise_than_it_was_made(causal: bool) -> None:
    """Nothing but window and first chunk; another policy with the weights of a learned one."""
    module, states = make(causal=causal), text(170)[:1]
    ways: list[tuple[str, dict[str, Any]]] = [
        ("learned", {"budget": 0, "rest": "drop"}), ("learned", {"budget": 0}), ("random", {}), ("fixed", {}),
    ]  # fmt: skip
    for policy, changes in ways:
        chooser, scores = module.chooser, module.scores
        module.chooser, module.policy = replace(chooser, **changes), policy
        module.scores = scores if policy == "learned" else None
        outs = []
        for kernels in (True, False):
            module.kernels, module.seen_covers = kernels, []
            with torch.no_grad(), half():
                assert module.served(states)
                outs.append(module(states))
            opened = max(int((cover.opened >= 0).sum(-1).max()) for _, cover in module.seen_covers)
            assert opened == module.chooser.budget // 16
        assert apart(*outs) < LOOSE
        module.chooser, module.scores = chooser, scores


def test_of_equal_scores_the_first_are_opened() -> None:
    from mgam.nn.fused.attend import covers

    module = make(policy="fixed", causal=False)
    plan = module.plan(320)
    score = torch.zeros(1, HEADS, plan.blocks, plan.chunks, device=DEVICE)
    part = module.part(0, plan.blocks, 320, score.device)
    found = covers(plan, None, score, 1, HEADS).chosen(plan)
    assert torch.equal(found.opened, module.chooser(part, score, None).opened)


@pytest.mark.parametrize(
    "changes",
    [
        {"levels": (1, 8, 64)},
        {"levels": (1, 16, 48)},
        {"dims": 12},
        {"every": 3},
        {"block": 256, "window": 256},
    ],
)
def test_what_kernels_do_not_serve_is_read_without(changes: dict[str, Any]) -> None:
    module = make(**changes)
    with half():
        assert not module.served(text(100))
        assert torch.isfinite(module(text(100))).all()


@pytest.mark.parametrize(("dim", "half"), [(64, 16), (32, 16), (16, 4)])
def test_rotation_and_its_gradient(dim: int, half: int) -> None:
    """One pass turns as written out; queries may be a view of a projection."""
    from mgam.nn.fused.rotary import Rotation, serves

    rotary = Rotary.plain(2 * half, 256)
    cos, sin = rotary.table(torch.device(DEVICE), torch.float32, 256)
    drawn = torch.randn(2, 2, 77, 3 * dim, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    states = [part.unflatten(2, (3, dim)).transpose(1, 2) for part in drawn]
    assert serves(states[0], half)
    found = []
    for turn in (Rotation.apply, rotate):
        given = states[0].clone().requires_grad_()
        out = turn(given, cos[5:82], sin[5:82])
        (out * states[1]).sum().backward()
        found.append((out.detach(), given.grad))
    for got, want in zip(*found, strict=True):
        assert want is not None
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_what_is_kept_serves_every_mode() -> None:
    """Training after a first text of this length that was read under `torch.inference_mode`."""
    from mgam.nn.fused import attend

    module, states = make(), text(150)
    attend._BIASES.clear()
    with torch.inference_mode(), half():
        module(states)
    assert attend._BIASES
    assert not any(bias.is_inference() for bias in attend._BIASES.values())
    with half():
        module(states).sum().backward()
