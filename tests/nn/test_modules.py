"""What every trainable attention module must keep; adding a module means adding a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mgam import nn
from mgam.errors import SettingError
from mgam.nn.base import Seen, SelfAttention

WIDTH, HEADS = 16, 2
SMALL: dict[str, Any] = {
    "levels": (1, 4, 8), "search": 2, "window": 8, "budget": 4, "middle": 1, "block": 4, "every": 2, "dims": 3,
}  # fmt: skip
MODULES: dict[str, tuple[type[SelfAttention], dict[str, Any]]] = {
    "full": (nn.FullAttention, {}),
    "full-grouped": (nn.FullAttention, {"kv_heads": 1}),
    "granular-scored": (
        nn.MultiGranularAttention,
        {"levels": (1, 4, 8), "search": 2, "window": 4, "budget": 4, "block": 4},
    ),
    "granular-fixed": (nn.MultiGranularAttention, {"policy": "fixed", "levels": (1, 4, 8), "window": 4, "budget": 4}),
    "granular-learned": (nn.LearnedGranularAttention, {**SMALL, "kv_heads": 1}),
    "granular-learned-two": (nn.LearnedGranularAttention, {**SMALL, "levels": (1, 4), "share": None}),
    "granular-learned-one": (nn.LearnedGranularAttention, {**SMALL, "rest": "drop"}),
    "granular-by-score": (nn.LearnedGranularAttention, {**SMALL, "policy": "scored", "recompute": True}),
    "granular-by-distance": (nn.LearnedGranularAttention, {**SMALL, "policy": "fixed"}),
    "granular-at-random": (nn.LearnedGranularAttention, {**SMALL, "policy": "random", "mass": 0.0}),
    "sliding": (nn.LocalAttention, {"window": 3, "kv_heads": 1}),
    "strided": (nn.LocalAttention, {"kind": "strided", "window": 3, "stride": 5}),
    "dilated": (nn.LocalAttention, {"kind": "dilated", "window": 3, "stride": 4}),
    "blockwise": (nn.LocalAttention, {"kind": "blockwise", "window": 5, "exchange": 2, "global_tokens": 2}),
    "longformer": (nn.LongformerAttention, {"window": 4, "global_tokens": 3, "kv_heads": 1}),
    "longformer-dilated": (nn.LongformerAttention, {"window": 3, "stride": 3, "global_tokens": 1}),
    "bigbird": (nn.BigBirdAttention, {"block": 4, "random": 2, "kv_heads": 1}),
    "linformer": (nn.LinformerAttention, {"rank": 5, "longest": 40}),
    "performer": (nn.PerformerAttention, {"kv_heads": 1}),
    "reformer": (nn.ReformerAttention, {"bucket": 4, "rounds": 2}),
    "reformer-rotated": (nn.ReformerAttention, {"bucket": 4, "rounds": 2, "hash_rotated": True}),
    "reformer-grouped": (nn.ReformerAttention, {"bucket": 4, "rounds": 2, "kv_heads": 1}),
    "nsa": (nn.NativeSparseAttention, {"length": 4, "stride": 2, "select": 4, "blocks": 3, "window": 5, "kv_heads": 1}),
    "nsa-one": (
        nn.NativeSparseAttention,
        {"length": 4, "stride": 2, "select": 8, "blocks": 3, "window": 5, "fusion": "one"},
    ),
    "moba": (nn.MobaAttention, {"block": 4, "blocks": 3, "kv_heads": 1}),
    "cca": (nn.CoreContextAttention, {"group": 4, "window": 6, "kv_heads": 1}),
    "dga": (nn.DynamicGroupAttention, {"focal": 0.2, "group": 3, "block": 4, "look": 3, "kv_heads": 1}),
}
ALWAYS_FULL: dict[str, dict[str, Any]] = {
    "granular-scored": {"budget": 64},
    "granular-fixed": {"window": 64},
    "granular-learned": {"budget": 64, "share": None},
    "granular-by-distance": {"window": 128},
    "sliding": {"window": 64},
    "strided": {"stride": 1},
    "dilated": {"window": 64, "stride": 1},
    "blockwise": {"window": 64},
    "longformer": {"window": 64},
    "bigbird": {"block": 16, "random": 3},
    "moba": {"blocks": 16},
    "cca": {"group": 1},
    "dga": {"focal": 1.0},
}
"""Settings under which a module reads everything."""


def make(name: str, causal: bool = True, **changes: Any) -> SelfAttention:
    kind, options = MODULES[name]
    torch.manual_seed(0)
    return kind(WIDTH, HEADS, causal=causal, **{**options, **changes}).double()


def text(tokens: int, rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(rows, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


CAUSAL = [name for name, (kind, _) in MODULES.items() if kind.CAUSAL]
SOUND = [name for name in CAUSAL if not MODULES[name][0].LEAK]
EITHER = [(name, way) for name, (kind, _) in MODULES.items() for way in (True, False)
          if (kind.CAUSAL if way else kind.BIDIRECTIONAL)]  # fmt: skip
LEAKY = [
    pytest.param(name, marks=pytest.mark.xfail(reason=MODULES[name][0].LEAK)) for name in CAUSAL if name not in SOUND
]


@pytest.mark.parametrize("name", [*SOUND, *LEAKY])
def test_suffix_leaves_earlier_outputs(name: str) -> None:
    module, states = make(name), text(37)
    out = module(states)
    for place in (1, 8, 22, 36):
        changed = states.clone()
        changed[:, place:] = 3 - 2 * changed[:, place:].flip(1)
        torch.testing.assert_close(module(changed)[:, :place], out[:, :place], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [*SOUND, *LEAKY])
@pytest.mark.parametrize("cuts", [[1] * 37, [5, 17, 1, 14]], ids=["by token", "by part"])
def test_streaming_equals_parallel(name: str, cuts: list[int]) -> None:
    module, states = make(name), text(37)
    outs, state, place = [], None, 0
    for length in cuts:
        out, state = module.step(states[:, place : place + length], state)
        outs.append(out)
        place += length
    torch.testing.assert_close(torch.cat(outs, 1), module(states), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("name", "causal"), EITHER)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 7, 33])
def test_odd_lengths(name: str, causal: bool, tokens: int) -> None:
    out = make(name, causal)(text(tokens))
    assert out.shape == (2, tokens, WIDTH)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(("name", "causal"), EITHER)
def test_padding_does_not_change_neighbours(name: str, causal: bool) -> None:
    module, states = make(name, causal), text(23, rows=3)
    mask = torch.ones(3, 23, dtype=torch.bool)
    mask[0, :9] = mask[1, 17:] = False
    states[~mask] = torch.nan
    out = module(states, mask)
    assert not out[~mask].any()
    for row, live in enumerate(mask):
        torch.testing.assert_close(out[row, live], module(states[row : row + 1, live])[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "causal"), EITHER)
def test_gradients(name: str, causal: bool) -> None:
    module = make(name, causal)
    states = text(13, rows=1).requires_grad_()
    assert torch.autograd.gradcheck(module, (states,), atol=1e-5, fast_mode=True)
    module(text(31)).square().sum().backward()
    assert all(part.grad is not None and torch.isfinite(part.grad).all() for part in module.parameters())


@pytest.mark.parametrize(("name", "causal"), EITHER)
def test_half_precision(name: str, causal: bool) -> None:
    module, states = make(name, causal).bfloat16(), text(31).bfloat16().requires_grad_()
    out = module(states)
    assert out.dtype == torch.bfloat16
    out.square().sum().backward()
    for grad in (states.grad, *(part.grad for part in module.parameters())):
        assert grad is not None
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("name", list(ALWAYS_FULL))
def test_enough_is_full_attention(name: str) -> None:
    for causal in (True, False):
        if not (causal or MODULES[name][0].BIDIRECTIONAL):
            continue
        module = make(name, causal, kv_heads=1, **ALWAYS_FULL[name])
        full = make("full-grouped", causal)
        full.load_state_dict({key: part for key, part in module.state_dict().items() if key in full.state_dict()})
        torch.testing.assert_close(module(text(33)), full(text(33)), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", [name for name in SOUND if "nsa" not in name])
def test_constant_values_come_out(name: str) -> None:
    module = make(name)
    constant = torch.randn(1, module.kv_heads, 1, module.dim, dtype=torch.float64)

    def value(states: Tensor) -> Tensor:
        return constant.expand(len(states), -1, states.shape[1], -1).transpose(1, 2).flatten(2)

    attend: Callable[[Seen], Tensor] = module.attend
    found = []
    module.attend = lambda seen: found.append(attend(seen)) or found[-1]  # type: ignore[method-assign,func-returns-value]
    module.value.forward = value  # type: ignore[method-assign]
    if isinstance(module, nn.LongformerAttention):
        module.global_value.forward = value  # type: ignore[method-assign]
    module(text(21))
    torch.testing.assert_close(found[0], constant.repeat_interleave(HEADS // module.kv_heads, 1).expand_as(found[0]))


PARTITIONS: list[tuple[str, dict[str, Any]]] = [
    *(("cca", {"group": group, "window": window}) for group in (1, 2, 3, 4, 7) for window in (1, 2, 4, 5, 8, 30)),
    *(
        ("dga", {"focal": focal, "group": group, "block": block, "look": look})
        for focal in (0.0, 0.3, 1.0) for group in (1, 3, 5) for block, look in ((1, 1), (4, 3), (40, 2))
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), PARTITIONS)
def test_every_visible_token_counts_exactly_once(name: str, options: dict[str, Any]) -> None:
    """With equal logits and mass, the mean of all values so far comes out if, and only if, the cover is exact."""
    module = make(name, mass=True, kv_heads=1, **options)
    torch.nn.init.zeros_(module.query.weight)  # type: ignore[arg-type]
    if isinstance(module, nn.DynamicGroupAttention):  # pooled by importance, so let all be as important
        module.importance = lambda q, k: k.new_ones(k.shape[:3])  # type: ignore[method-assign]
    found: list[Tensor] = []
    attend: Callable[[Seen], Tensor] = module.attend
    module.attend = lambda seen: found.append(attend(seen)) or found[-1]  # type: ignore[method-assign,func-returns-value]
    for tokens in (1, 6, 29):
        states = text(tokens)
        module(states)
        values = module.split(module.value(states))
        mean = values.cumsum(2) / torch.arange(1, tokens + 1)[:, None]
        torch.testing.assert_close(found[-1], mean.expand_as(found[-1]), atol=1e-9, rtol=0)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(SettingError, match=r"no causal form.*FullAttention.*LocalAttention, LongformerAttention"):
        nn.LinformerAttention(WIDTH, HEADS)
    with pytest.raises(SettingError, match="no bidirectional form"):
        nn.MobaAttention(WIDTH, HEADS, causal=False)
    with pytest.raises(SettingError, match="at most 40"):
        make("linformer", False)(text(41))
    with pytest.raises(SettingError, match="bidirectional and cannot stream"):
        make("full", False).step(text(3))
    with pytest.raises(SettingError, match="has holes"):
        make("full")(text(3), torch.tensor([[1, 0, 1], [1, 1, 1]]))
    with pytest.raises(SettingError, match="stride=3 must divide"):
        nn.NativeSparseAttention(WIDTH, HEADS, stride=3)
    with pytest.raises(SettingError, match="exchange=9"):
        nn.LocalAttention(WIDTH, HEADS, kind="blockwise", window=4, exchange=9)
    for wrong in ({"window": 0}, {"window": 2.5}, {"budget": -1}, {"block": 0}, {"mass": 2}):
        with pytest.raises(SettingError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))} must "):
            nn.MultiGranularAttention(WIDTH, HEADS, **wrong)  # type: ignore[arg-type]


def test_a_long_text_is_hashed_by_few_directions_into_many_buckets() -> None:
    module = nn.ReformerAttention(WIDTH, HEADS, bucket=4)
    q = torch.randn(1, HEADS, 4096, WIDTH // HEADS, generator=torch.Generator().manual_seed(0))
    q[:, :, 2048:] = q[:, :, :2048]
    buckets = module.hashed(q, module.turns[0])
    assert torch.equal(buckets[:, :, 2048:], buckets[:, :, :2048])
    assert 64 < len(buckets.unique()) <= 4096 // 4  # one hash of 32 directions tells 64 apart
    few = module.hashed(q[:, :, :8], module.turns[0][:, :1])  # 8 tokens need no other directions than the first
    assert set(few.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("name", CAUSAL)
def test_states_that_do_not_fit_are_refused(name: str) -> None:
    module, states = make(name), text(5)
    for wrong in (states[..., :-1], states[0], states.long()):
        with pytest.raises(SettingError, match=r"hidden states \(rows, tokens, 16\) are wanted"):
            module(wrong)
        with pytest.raises(SettingError, match=r"hidden states \(rows, tokens, 16\) are wanted"):
            module.step(wrong)
    with pytest.raises(SettingError, match=r"a mask of shape \(2, 4\) was given .*\(2, 5\) is wanted"):
        module(states, torch.ones(2, 4))
    with pytest.raises(SettingError, match="3 rows were given for a state of 2"):
        module.step(text(1, rows=3), module.step(states)[1])


@pytest.mark.parametrize("name", CAUSAL)
def test_in_a_decoder(name: str) -> None:
    model = nn.Decoder(11, WIDTH, lambda: make(name)).double()
    tokens = torch.randint(0, 11, (2, 19), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    assert logits.shape == (2, 19, 11)
    if name in SOUND:
        first, state = model.step(tokens[:, :12])
        rest, _ = model.step(tokens[:, 12:], state)
        torch.testing.assert_close(torch.cat((first, rest), 1), logits, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", [name for name, (kind, _) in MODULES.items() if kind.BIDIRECTIONAL])
def test_in_an_encoder(name: str) -> None:
    model = nn.Encoder(11, WIDTH, lambda: make(name, False)).double()
    assert model(torch.randint(0, 11, (2, 19)), torch.arange(19) < torch.tensor([[19], [7]])).shape == (2, 19, 11)
