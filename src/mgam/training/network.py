"""What is fitted: the search weights of every layer, in a form that trains well."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mgam.policies.learned_search import SearchWeights, best_logits, distances

TINY = 1e-6
FADE = 0.5
"""Before fitting, a chunk at n times the distance is expected to hold n**-FADE of the mass."""
QUICK = 4.0
"""How much quicker than other numbers the prior of distance is learned."""
TOGETHER = 64
"""KV heads, of any layers, whose losses are worked out at once."""
PARTS = ("query", "query_bias", "voice", "voice_bias", "prior")
MEASURES = ("query_mean", "query_scale", "key_mean", "key_scale", "key", "seek", "content", "importance")
HALF = 0.5
"""Part of a head's budget for what is found whatever the distance, before it is measured."""


@dataclass(frozen=True)
class Lesson:
    """What one layer learns from one text.

    Shapes (N query blocks of V voters each, H KV heads of G query heads): queries (N, H*G, V, D) and search
    (H, S, C, D) before rotation; visible (N,) chunks before each block's window; target (N, H, V, C) share of full
    attention that each voter gives each chunk, mean over the heads of a group, of which chunks from `visible` on are
    near; wanted (N, H, C): the same, summed over all queries that the cover serves; scale (H,) of the logits.
    """

    queries: Tensor
    search: Tensor
    visible: Tensor
    target: Tensor
    wanted: Tensor
    scale: Tensor


class LayerSearch(nn.Module):
    """The search of one layer. Queries and keys are centred and scaled first, so that one learning rate fits all."""

    query_mean: Tensor
    query_scale: Tensor
    key_mean: Tensor
    key_scale: Tensor
    key: Tensor
    seek: Tensor
    content: Tensor
    """Part of each KV head's budget for what is found whatever the distance (H,): measured, not trained."""
    importance: Tensor
    """What a share of each KV head's attention is worth to the model (H,): measured, not trained."""

    def __init__(self, heads: int, group: int, dim: int, width: int, slots: int, reach: int) -> None:
        super().__init__()
        self.heads, self.group, self.dim, self.width, self.slots = heads, group, dim, width, slots
        self.register_buffer("query_mean", torch.zeros(heads, group * dim))
        self.register_buffer("query_scale", torch.ones(heads, group * dim))
        self.register_buffer("key_mean", torch.zeros(heads, dim))
        self.register_buffer("key_scale", torch.ones(heads, dim))
        self.register_buffer("key", torch.randn(heads, dim, width - 1) * dim**-0.5)
        self.register_buffer("seek", torch.zeros(heads, dim, width - 1))
        self.register_buffer("content", torch.full((heads,), HALF))
        self.register_buffer("importance", torch.ones(heads))
        self.query = nn.Parameter(torch.randn(heads, group * dim, slots * width) * (group * dim) ** -0.5)
        self.query_bias = nn.Parameter(torch.zeros(heads, slots * width))
        self.voice = nn.Parameter(torch.zeros(heads, group * dim))
        self.voice_bias = nn.Parameter(torch.zeros(heads))
        fade = -FADE * math.log(2) * torch.arange(reach)
        self.prior = nn.Parameter((fade / QUICK).repeat(heads, 1))

    @torch.no_grad()
    def measure(self, queries: Tensor, keys: Tensor) -> None:
        """Notes how queries (H*G, n, D) and keys (H, m, D) lie, so that both can be centred and scaled."""
        states = self._joined(queries)
        self.query_mean.copy_(states.mean(1))
        self.query_scale.copy_(states.std(1).clamp_min(TINY))
        self.key_mean.copy_(keys.float().mean(1))
        self.key_scale.copy_(keys.float().std(1).clamp_min(TINY))

    @torch.no_grad()
    def begin(self, queries: Tensor, keys: Tensor, scale: float) -> None:
        """Starts at the principal directions of the keys, as the queries weigh them; shapes as in `measure`."""
        self.measure(queries, keys)
        states, search = self._joined(queries), keys.float()
        weight = states.square().mean(1).sqrt().unflatten(1, (self.group, self.dim)).mean(1) * self.key_scale
        weight = weight.clamp_min(TINY * float(weight.max()) + TINY)
        centred = (search - self.key_mean[:, None]) / self.key_scale[:, None] * weight[:, None]
        basis = torch.linalg.eigh(centred.transpose(1, 2) @ centred / search.shape[1]).eigenvectors
        basis = basis[..., -(self.width - 1) :]  # (H, D, r-1)
        self.key.copy_(weight[..., None] * basis)
        turned = (self.key_scale / weight)[..., None] * basis * scale  # query head -> coordinates
        self.seek.copy_(turned)
        self.query.zero_()
        for slot in range(self.slots):
            mine = [head for head in range(self.group) if head % self.slots == slot] or [slot % self.group]
            columns = slice(slot * self.width, (slot + 1) * self.width - 1)
            for head in mine:
                rows = slice(head * self.dim, (head + 1) * self.dim)
                part = turned / len(mine) ** 0.5
                self.query[:, rows, columns] = self.query_scale[:, rows, None] * part
                self.query_bias[:, columns] += (self.query_mean[:, rows, None] * part).sum(1)

    @torch.no_grad()
    def adopt(self, weights: SearchWeights) -> None:
        """Goes on from a search that was fitted before; `measure` comes first."""
        there = weights.on(self.query.device, torch.float32)
        moved = (self.key_mean[..., None] * there.key).sum(1) - there.key_bias  # (H, r-1)
        query, bias = there.query.clone(), there.query_bias.clone()
        for slot in range(self.slots):
            columns, pull = slice(slot * self.width, (slot + 1) * self.width - 1), (slot + 1) * self.width - 1
            query[..., pull] -= (query[..., columns] @ moved[..., None])[..., 0]
            bias[:, pull] -= (bias[:, columns] * moved).sum(-1)
        self.query.copy_(query * self.query_scale[..., None])
        self.query_bias.copy_(bias + (self.query_mean[..., None] * query).sum(1))
        self.key.copy_(there.key * self.key_scale[..., None])
        self.seek.copy_(there.seek)
        self.voice.copy_(there.voice * self.query_scale)
        self.voice_bias.copy_(there.voice_bias + (self.query_mean * there.voice).sum(1))
        self.prior.copy_(there.prior / QUICK)
        self.content.copy_(there.content)
        self.importance.copy_(there.importance)

    def _joined(self, queries: Tensor) -> Tensor:
        """Queries (H*G, n, D) with the heads of a group side by side: (H, n, G*D)."""
        return queries.float().unflatten(0, (self.heads, self.group)).transpose(1, 2).flatten(2)

    def parts(self) -> dict[str, Tensor]:
        """All tensors of the search by name; the first dimension of each counts KV heads."""
        return {name: getattr(self, name) for name in (*PARTS, *MEASURES)}

    def weights(self, name: str, *, short: bool = False) -> SearchWeights:
        """The same search without centring: gradients flow through. `short`: rounded to what half precision holds."""
        return plain(self.parts(), name, self.slots, short=short)


def plain(parts: Mapping[str, Tensor], name: str, slots: int, *, short: bool = False) -> SearchWeights:
    """Search weights of `parts` as `LayerSearch.parts` gives them, without centring and scaling."""
    query = parts["query"] / parts["query_scale"][..., None]
    key = parts["key"] / parts["key_scale"][..., None]
    voice = parts["voice"] / parts["query_scale"]
    bias, seek = parts["query_bias"], parts["seek"]
    if short:  # means are taken off with the rounded numbers, so that rounding moves no logit as a whole
        size = nn.functional.pad(key.norm(dim=1).clamp_min(TINY), (0, 1), value=1.0)
        wide = size.repeat(1, slots)
        query, key, bias = query * wide[:, None], key / size[:, None, :-1], bias * wide
        seek = (seek * size[:, None, :-1]).half().float()
        query, key, voice = query.half().float(), key.half().float(), voice.half().float()
    return SearchWeights(
        name=name,
        slots=slots,
        query=query,
        query_bias=bias - (parts["query_mean"][..., None] * query).sum(1),
        key=key,
        key_bias=(parts["key_mean"][..., None] * key).sum(1),
        seek=seek,
        voice=voice,
        voice_bias=parts["voice_bias"] - (parts["query_mean"] * voice).sum(1),
        prior=parts["prior"] * QUICK,
        content=parts["content"],
        importance=parts["importance"],
    )


def lesson_loss(weights: SearchWeights, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a lesson by KV head (H,), and its parts."""
    logits, pull = far_logits(weights, lesson.queries, lesson.search, lesson.visible)  # (N, H, s, V, C), (..., 1)
    chunks = lesson.target.shape[-1]
    bias = weights.by_distance(distances(lesson.visible, chunks))  # (N, H, C)
    share = torch.softmax(torch.cat((pull, logits + bias[:, :, None, None]), -1), -1).mean(2)  # (N, H, V, 1 + C)
    far = torch.arange(chunks, device=share.device)[None] < lesson.visible[:, None]
    target = lesson.target * far[:, None, None]
    near = 1 - target.sum(-1, keepdim=True)
    target = torch.cat((near.clamp_min(0), target), -1)
    single = -(target * share.clamp_min(1e-9).log()).sum(-1).mean((0, 2))
    # What is opened serves the whole block: the block's wishes, the sink aside, whatever the voters' share of them.
    found = torch.softmax(torch.cat((pull, logits), -1), -1)[..., 2:].mean(2).sum(2) * bias[..., 1:].exp()
    found = found / found.sum(-1, keepdim=True).clamp_min(1e-9)
    wanted = lesson.wanted[..., 1:] * far[:, None, 1:]
    total = wanted.sum(-1, keepdim=True)
    listed = -(wanted / total.clamp_min(1e-9) * found.clamp_min(1e-9).log()).sum(-1)
    listed = (listed * (total[..., 0] > 1e-6)).mean(0)
    voice = weights.voices(lesson.queries)
    heard = nn.functional.binary_cross_entropy_with_logits(voice, 1 - near[..., 0].clamp(0, 1), reduction="none")
    heard = heard.mean((0, 2))
    parts = {"query": single, "block": listed, "voice": heard}
    return single + listed + heard, {name: part.detach() for name, part in parts.items()}


def far_logits(weights: SearchWeights, queries: Tensor, search: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, H, s, V, C) of chunks, -inf from `visible` on, and of what is near (N, H, s, V, 1).

    Shapes as in `Lesson`.
    """
    asked = weights.ask(queries)  # (N, H, s, V, r)
    count, heads, slots, votes, width = asked.shape
    keys = weights.keys(search)  # (H, S, C, r)
    folded = asked.permute(1, 0, 2, 3, 4).reshape(heads, -1, width)
    logits = best_logits(folded, keys, keys.shape[2]).view(heads, count, slots, votes, -1).transpose(0, 1)
    hidden = torch.arange(keys.shape[2], device=keys.device)[None] >= visible[:, None]
    return logits.masked_fill(hidden[:, None, None, None], -torch.inf), asked[..., -1:]


def joined(lessons: Sequence[Lesson]) -> Lesson:
    """The lessons of several layers from one text as one: their KV heads side by side."""
    return Lesson(
        torch.cat([one.queries for one in lessons], 1),
        torch.cat([one.search for one in lessons]),
        lessons[0].visible,
        torch.cat([one.target for one in lessons], 1),
        torch.cat([one.wanted for one in lessons], 1),
        torch.cat([one.scale for one in lessons]),
    )


class SearchNetwork(nn.Module):
    """The searches of all layers that attend in full."""

    def __init__(self, layers: Mapping[int, tuple[int, int, int]], width: int, slots: int, reach: int) -> None:
        """`layers`: per layer, KV heads, query heads of a group, head dim. `slots` 0: one for each head of a group."""
        super().__init__()
        self.width, self.slots, self.reach = width, slots or max(group for _, group, _ in layers.values()), reach
        self.layers = nn.ModuleDict(
            {str(layer): LayerSearch(*shape, width, self.slots, reach) for layer, shape in layers.items()}
        )

    def layer(self, number: int) -> LayerSearch:
        """The search of one layer."""
        found = self.layers[str(number)]
        assert isinstance(found, LayerSearch)
        return found

    def forward(self, lessons: Mapping[int, Sequence[Lesson]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over lessons and layers, and its parts; `layers` holds the loss of each layer.

        Layers of one shape are worked out together, as if they were more KV heads of one layer.
        """
        by_layer: dict[int, Tensor] = {}
        found: list[dict[str, Tensor]] = []
        for numbers in self._alike(list(lessons)):
            layers = [self.layer(number) for number in numbers]
            parts = {name: torch.cat([one.parts()[name] for one in layers]) for name in (*PARTS, *MEASURES)}
            weights = plain(parts, "fitting", self.slots)
            losses = []
            for several in zip(*(lessons[number] for number in numbers), strict=True):
                loss, more = lesson_loss(weights, joined(several))
                losses.append(loss)
                found.append(more)
            mean = torch.stack(losses).mean(0).view(len(numbers), -1).mean(1)
            by_layer |= dict(zip(numbers, mean.unbind(), strict=True))
        every = torch.stack([by_layer[number] for number in lessons])
        means = {name: torch.cat([one[name] for one in found]).mean() for name in found[0]}
        return every.mean(), {**means, "layers": every.detach()}

    def _alike(self, numbers: Sequence[int]) -> list[list[int]]:
        """Layers of one shape in lists of at most `TOGETHER` KV heads."""
        by_shape: dict[tuple[int, int, int], list[int]] = {}
        for number in numbers:
            layer = self.layer(number)
            by_shape.setdefault((layer.heads, layer.group, layer.dim), []).append(number)
        found = []
        for (heads, _, _), alike in by_shape.items():
            most = max(1, TOGETHER // heads)
            found += [alike[first : first + most] for first in range(0, len(alike), most)]
        return found

    def exported(self) -> dict[int, SearchWeights]:
        """Search weights by layer, apart from training."""
        with torch.no_grad():
            return {int(name): self.layer(int(name)).weights(name, short=True) for name in self.layers}
