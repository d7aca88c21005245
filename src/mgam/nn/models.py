"""A small decoder, encoder and reader of a source, whose attention is any module of this room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from mgam.errors import SettingError
from mgam.nn.base import SelfAttention, State
from mgam.nn.cross import CrossAttention
from mgam.nn.full import FullAttention

Make = Callable[[], SelfAttention]


class Layer(nn.Module):
    """Attention and a feed-forward part, each normed before and added."""

    def __init__(self, attention: SelfAttention, width: int) -> None:
        super().__init__()
        self.attention = attention
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        states = states + self.attention(self.before(states), mask)
        return states + self.feed(self.between(states))

    def step(self, states: Tensor, state: State | None) -> tuple[Tensor, State]:
        """The next tokens."""
        out, state = self.attention.step(self.before(states), state)
        states = states + out
        return states + self.feed(self.between(states)), state


class _Model(nn.Module):
    causal: bool

    def __init__(self, vocabulary: int, width: int, make: Make, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        made = [Layer(make(), width) for _ in range(layers)]
        self.layers: Any = nn.ModuleList(made)
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        for layer in made:
            if layer.attention.causal is not self.causal:
                raise SettingError(f"{type(self).__name__} takes attention with causal={self.causal}")

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocabulary) of tokens (B, T); `mask` is True for tokens and False for padding."""
        states = self.embed(tokens)
        for layer in self.layers:
            states = layer(states, mask)
        return self.head(self.norm(states))


class Decoder(_Model):
    """Predicts the next token.

    Args:
        make: makes the attention of a layer, called once for each.
    """

    causal = True

    def step(self, tokens: Tensor, state: Sequence[State] | None = None) -> tuple[Tensor, list[State]]:
        """Logits of the next tokens (B, L) after those that `state` stands for."""
        states, after = self.embed(tokens), list[State]()
        for number, layer in enumerate(self.layers):
            states, kept = layer.step(states, state[number] if state else None)
            after.append(kept)
        return self.head(self.norm(states)), after


class Encoder(_Model):
    """Sees the whole text at every token."""

    causal = False


class CrossLayer(nn.Module):
    """Full attention to the target itself, then attention to the source, then a feed-forward part."""

    def __init__(self, own: SelfAttention, attention: CrossAttention, width: int) -> None:
        super().__init__()
        self.own, self.attention = own, attention
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, states: Tensor, source: Tensor) -> Tensor:
        """(B, L, width) and the source (B, S, width) -> (B, L, width)."""
        states = states + self.own(self.norms[0](states))
        states = states + self.attention(self.norms[1](states), source)
        return states + self.feed(self.norms[2](states))


class CrossReader(nn.Module):
    """Reads a source with full attention, and lets a target look at it by any module of cross attention.

    Args:
        make: makes the cross attention of a layer.
        causal: whether a target token sees only the target's past.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        heads: int,
        make: Callable[[], CrossAttention],
        *,
        causal: bool,
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.told = nn.ModuleList(Layer(FullAttention(width, heads, causal=False), width) for _ in range(layers))
        own = [FullAttention(width, heads, causal=causal) for _ in range(layers)]
        self.layers = nn.ModuleList(CrossLayer(part, make(), width) for part in own)
        self.between = nn.RMSNorm(width)
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        """Logits (B, T, vocabulary) of target tokens (B, T), from source tokens (B, S)."""
        told = self.embed(source)
        for layer in self.told:
            told = layer(told)
        states, told = self.embed(target), self.between(told)
        for layer in self.layers:
            states = layer(states, told)
        return self.head(self.norm(states))
