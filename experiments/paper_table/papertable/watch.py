"""What a model reads while it is tested: entries by level, and how far the evidence is among them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from mgam.nn import FullAttention, LearnedGranularAttention, LongformerAttention
from papertable.sample import Sample, collate


def watched(
    model: nn.Module, samples: Sequence[Sample], device: str
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Logits, and entries that a query reads on average over queries, heads and layers, by level."""
    layers = [layer.attention for layer in model.layers]  # type: ignore[union-attr]
    granular = [layer for layer in layers if isinstance(layer, LearnedGranularAttention)]
    for layer in granular:
        layer.seen_covers = []
    units, spans = model(collate(samples).to(device))
    each = [_entries(layer, samples) for layer in layers if layer not in granular]
    if granular and granular[0].seen_covers:
        each = _granular_entries(granular, samples)
    for layer in granular:
        layer.seen_covers = None
    names = each[0] if each else ()  # none where MGAM reads as full attention does
    return units, spans, {name: statistics.mean(one[name] for one in each if name in one) for name in names}


def _entries(layer: nn.Module, samples: Sequence[Sample]) -> dict[str, float]:
    tokens = len(samples[0].tokens)
    place = np.arange(tokens)
    if isinstance(layer, FullAttention):
        return {"tokens": float((place + 1).mean()) if layer.causal else float(tokens)}
    if isinstance(layer, LongformerAttention):
        low, high = np.maximum(place - layer.window + 1, 0), np.minimum(place + layer.window, tokens)
        own = high - low + np.clip(low, 0, layer.global_tokens)
        own[: layer.global_tokens] = tokens
        return {"tokens": float(own.mean())}
    raise TypeError(f"{type(layer).__name__} does not say what it reads")


def _granular_entries(layers: Sequence[LearnedGranularAttention], samples: Sequence[Sample]) -> list[dict[str, float]]:
    """Of each layer by its covers. What is counted on a device comes back at once: others wait for it too."""
    tokens = len(samples[0].tokens)
    counted = []
    for layer in layers:
        chunk, covers = layer.levels.chunk, layer.seen_covers or []
        numbers = torch.zeros(layer.levels.top + 1, dtype=torch.float64, device=covers[0][1].opened.device)
        for part, cover in covers:
            near = (part.right.clamp_max(tokens) - part.left + chunk * (part.left >= chunk)).double()
            numbers[0] += (near - ((layer.block - 1) / 2 if layer.causal else 0)).sum()
            numbers[0] += (cover.opened >= 0).sum(-1).double().mean((0, 1)).sum() * chunk
            for level, read in enumerate(cover.read, start=1):
                numbers[level] += read.sum(-1).double().mean((0, 1)).sum()
        counted.append(numbers)
    reads = reads_of(layers, samples)
    counts = torch.stack(counted).cpu().tolist()
    found = []
    for layer, own in zip(layers, counts, strict=True):
        blocks = -(-tokens // layer.block)
        entries = [value / blocks for value in own]
        found.append({"tokens": entries[0], **{f"level {at}": value for at, value in enumerate(entries[1:], start=1)}})
    found[0] |= reads
    return found


def reads_of(layers: Sequence[LearnedGranularAttention], samples: Sequence[Sample]) -> dict[str, float]:
    """How far some blocks read evidence as tokens that is outside their windows, on average over such pairs: the share
    of heads, whether any head of any layer does, and the share of chunks that they opened, which chance would find.

    `answer`: the block of <answer> reads the ends of gold units; `question`: the first block does, whose tokens all
    others read; `between`: the blocks of gold units read one another, or those of a planted question.
    """
    layer, tokens = layers[0], len(samples[0].tokens)
    chunk = layer.levels.chunk
    pairs: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for row, sample in enumerate(samples):
        gold = sample.ends[sample.gold].tolist()
        asked = [sample.planted[1]] if sample.planted[0] >= 0 else gold
        ways = [("answer", tokens - 1, one) for one in gold] + [("question", 0, one) for one in gold]
        ways += [("between", one, other) for a in gold for b in asked for one, other in ((a, b), (b, a)) if a != b]
        for name, reader, read in dict.fromkeys(ways):
            start = reader // layer.block * layer.block
            after = start + layer.block + (0 if layer.causal else layer.side)
            if chunk <= read < start - layer.side or (not layer.causal and after <= read):
                pairs[name].append((row, start // layer.block, read // chunk))
    names = [name for name, own in pairs.items() for _ in own]
    if not names:
        return {}
    opened = [torch.cat([cover.opened for _, cover in one.seen_covers or []], 2) for one in layers]
    row, block, wanted = torch.tensor([pair for own in pairs.values() for pair in own], device=opened[0].device).T
    here = torch.stack([one[row, :, block] for one in opened])  # layers, pairs, heads, opened
    read = (here == wanted[:, None, None]).any(-1)
    start = block * layer.block
    free = (start - layer.side).clamp_min(chunk) // chunk - 1
    if not layer.causal:
        free = free + (tokens - start - layer.block - layer.side).clamp_min(0) // chunk
    spent = (here >= 0).sum(-1).double().mean((0, 2)) / free.clamp_min(1)
    figures = torch.stack([read.double().mean((0, 2)), read.any(0).any(-1).double(), spent]).cpu().numpy()
    by_name = np.array(names)
    return {
        f"{name} reads evidence, {figure}": float(values[by_name == name].mean())
        for name in pairs
        for figure, values in zip(("heads", "any head", "chance"), figures, strict=True)
    }
