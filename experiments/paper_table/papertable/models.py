"""Five readers that differ in their attention alone, with equal parameters, and MGAM's ablations."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mgam.errors import SettingError
from mgam.nn import FullAttention, LearnedGranularAttention, LongformerAttention, SelfAttention
from mgam.nn.base import TABLE
from mgam.positions import Rotary
from papertable.sample import ASKED, Batch
from papertable.sizes import Size
from papertable.vocabulary import END, SIZE

MODELS = ("bert", "gpt2", "longformer", "mgam-causal", "mgam")
ABLATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one level": {"rest": "drop"},
    "two levels": {"levels": 2},
    "random policy": {"policy": "random"},
    "fixed policy": {"policy": "fixed"},
    "scored policy": {"policy": "scored"},
    "no mass": {"mass": 0.0},
    "no adaptive budget": {"share": None},
}
REMEDIES: dict[str, dict[str, Any]] = {
    "taught policy": {"taught": 1.0, "recompute": True},
    "every query votes": {"every": 1},
    "budget 16": {"budget": 512},
    "policy learns faster": {"policy_rate": 4.0},
}
"""What is tried if MGAM does not lead, in this order."""
FAR: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "longformer": ("longformer", {}),
    **{name: ("mgam", changes) for name, changes in {**ABLATIONS, **REMEDIES}.items()},
}
"""Who is trained on the task whose question stands far from its evidence."""
FULL = ("bert", "gpt2")
DIMS = 64
"""Of a pointer."""


def attention(kind: str, size: Size, recompute: bool = False, **changes: Any) -> SelfAttention:
    """One layer's attention; `recompute`: what is gathered is gathered again in the backward pass.

    Raises:
        SettingError: for a model that is not known.
    """
    if kind in FULL:
        return FullAttention(size.width, size.heads, causal=kind == "gpt2")
    if kind == "longformer":
        return LongformerAttention(
            size.width, size.heads, causal=False, window=size.window, global_tokens=1 + ASKED, recompute=recompute
        )
    if kind not in MODELS:
        raise SettingError(f"model {kind!r} is unknown; choose one of {', '.join(MODELS)}")
    options = {**size.granular, "recompute": recompute, **changes}
    if changes.get("levels") == 2:
        options["levels"] = size.granular["levels"][:2]
    return LearnedGranularAttention(size.width, size.heads, causal=kind == "mgam-causal", **options)


def kernels(kind: str, device: str) -> AbstractContextManager[None]:
    """Attention kernels on a GPU: the fastest there are for full attention, one that takes any shape for the others."""
    if not device.startswith("cuda"):
        return nullcontext()
    fast = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    if kind in FULL:
        return sdpa_kernel(fast, set_priority=True)
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])


class Layer(nn.Module):
    """Attention and a feed-forward part, each normed before and added."""

    def __init__(self, made: SelfAttention, width: int, inner: int) -> None:
        super().__init__()
        self.attention = made
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False))

    def forward(self, states: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        states = states + self.attention(self.before(states))
        return states + self.feed(self.between(states))


class Reader(nn.Module):
    """Reads a sample and points from its last token to units and to the answer.

    Every kind has the parameters of full attention with a feed-forward part four times as wide, within a row of it.
    `taught`: weight of what a policy learns besides, from the attention that regions were given. `policy_rate`: how
    many times the learning rate of all else that of policies is.
    """

    def __init__(
        self,
        kind: str,
        size: Size,
        *,
        recompute: bool = False,
        taught: float = 0.0,
        policy_rate: float = 1.0,
        **changes: Any,
    ) -> None:
        super().__init__()
        self.taught, self.policy_rate = taught, policy_rate
        self.lesson: Tensor | None = None
        """Of the last pass in training: the mean over layers of what their policies are still to learn."""
        width = size.width
        self.embed = nn.Embedding(SIZE, width)
        nn.init.normal_(self.embed.weight, std=0.5)
        self.role = nn.Parameter(0.5 * torch.randn(width))
        made = []
        for number in range(size.layers):
            own = {**changes, "seed": number} if kind.startswith("mgam") else {}
            made.append(_matching(attention(kind, size, recompute, **own)))
        wanted = parameters(attention("bert", size)) + 8 * width * width
        inner = round((wanted - parameters(made[0])) / (2 * width))
        self.layers = nn.ModuleList(Layer(one, width, inner) for one in made)
        self.norm = nn.RMSNorm(width)
        self.ask = nn.Linear(width, 3 * DIMS)
        self.told = nn.Linear(width, 3 * (DIMS + 1))

    def groups(self) -> list[dict[str, Any]]:
        """Parameters for an optimizer, with how many times the learning rate they get."""
        if self.policy_rate == 1.0:
            return [{"params": list(self.parameters()), "times": 1.0}]
        policy: list[nn.Parameter] = [one for name, one in self.named_parameters() if ".scores." in name]
        other = [one for name, one in self.named_parameters() if ".scores." not in name]
        return [{"params": other, "times": 1.0}, {"params": policy, "times": self.policy_rate}]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of units (B, M), and of first and last tokens (B, 2, T); -inf where none may be."""
        place = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        frame = (place <= ASKED) | (place >= len(place) - 1 - ASKED)
        asked = frame | ((place >= batch.planted[:, :1]) & (place <= batch.planted[:, 1:]))
        states = self.embed(batch.tokens) + asked[..., None] * self.role
        taught: list[Any] = [layer.attention for layer in self.layers if self.taught and self.training]
        for attention in taught:
            attention.lessons = []
        for layer in self.layers:
            states = layer(states)
        if taught:
            self.lesson = torch.stack([torch.cat(one.lessons, 2).mean() for one in taught]).mean()
            for attention in taught:
                attention.lessons = None
        states = self.norm(states)
        wanted = self.ask(states[:, -1]).unflatten(1, (3, DIMS)).float()
        told = self.told(states).unflatten(2, (3, DIMS + 1)).float()
        logits = torch.einsum("bpd,btpd->bpt", wanted, told[..., :-1]) * DIMS**-0.5 + told[..., -1].transpose(1, 2)
        ended = batch.tokens == END
        units = _units(logits[:, 0], batch.ends).masked_fill(batch.ends < 0, -torch.inf)
        number = (ended.cumsum(1) - ended.long()).clamp_max(units.shape[1] - 1)
        spans = logits[:, 1:] + units.gather(1, number)[:, None]
        return units, spans.masked_fill((asked | ended)[:, None], -torch.inf)


def _units(logits: Tensor, ends: Tensor) -> Tensor:
    """Means (B, M) over the tokens of units of logits (B, T)."""
    end = ends.clamp_min(0)
    before = F.pad(end[:, :-1], (1, 0), value=ASKED)
    sums = logits.cumsum(1)
    return (sums.gather(1, end) - sums.gather(1, before)) / (end - before).clamp_min(1)


def _matching(made: SelfAttention) -> SelfAttention:
    """Keys begin as queries do, half of a head is not rotated: equal tokens find one another, however far apart, from
    the first step (see PROTOCOL.md)."""
    made.rotary = Rotary.plain(made.dim // 2, TABLE)
    with torch.no_grad():
        made.query.weight.mul_(3**0.5)  # a projected unit state has unit variance
        made.key.weight.copy_(made.query.weight)
    if isinstance(made, LongformerAttention):
        made.copy_projections()
    return made


def loss_of(units: Tensor, tokens: Tensor, batch: Batch) -> Tensor:
    """Cross entropies of evidence (mean over gold units), first and last token; the latter where there is a span."""
    chance = units.log_softmax(-1).masked_fill(~batch.gold, 0.0)
    evidence = -(chance.sum(-1) / batch.gold.sum(-1)).mean()
    there = batch.span[:, 0] >= 0
    spans = F.cross_entropy(tokens.transpose(1, 2), batch.span.clamp_min(0), reduction="none").sum(-1)
    return evidence + torch.where(there, spans, 0.0).sum() / there.sum().clamp_min(1)


def parameters(module: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(part.numel() for part in module.parameters())
