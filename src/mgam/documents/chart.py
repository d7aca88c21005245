"""What was read at which level: recorded while a question is answered, and written as a page for a browser."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mgam.cover import Cover
from mgam.errors import DocumentError
from mgam.record import Record
from mgam.schedule import Blocks

if TYPE_CHECKING:
    from mgam.documents.asking import Answer
    from mgam.documents.prompt import Prompt

SNIPPET = 180
"""Characters of each chunk that the page can show."""
STEPS = 240
"""Points of the curve over the text at most."""


@dataclass
class Chart(Record):
    """A record that also keeps, for the queries that answer, which chunk was read at which level; and all budgets."""

    answering: int = 0
    """Queries that answered, in each layer."""
    reads: dict[int, list[Tensor]] = field(default_factory=dict)
    """Per layer and level: how many answering queries read each chunk, (H, chunks of that level)."""
    budgets: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    """Per layer: where blocks of the text begin (N,), and tokens that they opened between sink and window (N, H)."""
    windows: Tensor | None = None
    """First token of the window of the last query."""

    def count(self, cover: Cover, blocks: Blocks, layer: int = 0) -> None:
        """Counts entries as every record does, and keeps who read what."""
        super().count(cover, blocks, layer)
        assert self.evidence_from is not None
        opened = (cover.opened > 0).sum(-1) * cover.levels.chunk  # all but the sink
        late = (blocks.start >= self.evidence_from) & (cover.begin > 0)  # from 0 on is all of it, in full
        early = (blocks.start < self.evidence_from) & (cover.begin > 0)
        if bool(early.any()):
            self.budgets[layer].append((blocks.start[early].cpu(), opened[early.to(opened.device)].cpu()))
        if not bool(late.any()):
            return
        if layer not in self.reads:
            self.reads[layer] = []
        lists = (cover.opened, *cover.summaries)
        sizes = (cover.levels.chunk, *cover.levels.sizes[1:])
        there = late.to(cover.opened.device)
        weight = blocks.length[late].to(cover.opened.device)
        for level, (index, size) in enumerate(zip(lists, sizes, strict=True)):
            chosen = index[there]  # (n, H, M)
            count = int(blocks.stop.max()) // size + 1
            found = torch.zeros(chosen.shape[1], count, dtype=torch.float32, device=chosen.device)
            for block, queries in zip(chosen, weight, strict=True):
                found.scatter_add_(1, block.clamp_min(0), (block >= 0) * queries.float())
            kept = self.reads[layer]
            if level < len(kept):
                longer = max(kept[level].shape[1], count)
                padded = [
                    torch.nn.functional.pad(one, (0, longer - one.shape[1])) for one in (kept[level], found.cpu())
                ]
                kept[level] = padded[0] + padded[1]
            else:
                kept.append(found.cpu())
        if layer == next(iter(self.reads)):
            self.answering += int(weight.sum())
        self.windows = cover.begin[late][-1]


def write_map(path: Path, chart: Chart, prompt: Prompt, answer: Answer, levels: tuple[int, ...]) -> None:
    """Writes a page that needs nothing else: question, answer, evidence, levels by layer and head, and the budget.

    Raises:
        DocumentError: nothing was chosen, or the page cannot be written.
    """
    if not chart.reads:
        raise DocumentError("the text is short enough to be read in full, so there is no choice to draw")
    data = json.dumps(page_data(chart, prompt, answer, levels), ensure_ascii=False).replace("</", "<\\/")
    page = resources.files("mgam.documents").joinpath("map.html").read_text(encoding="utf-8")
    try:
        path.write_text(page.replace("/*DATA*/null", data, 1), encoding="utf-8")
    except OSError as error:
        raise DocumentError(f"the map cannot be written to {path}: {error}") from error


def page_data(chart: Chart, prompt: Prompt, answer: Answer, levels: tuple[int, ...]) -> dict[str, Any]:
    """All that the page shows, as plain values."""
    chunk = levels[1]
    chunks = -(-prompt.document // chunk)
    layers = sorted(chart.reads)
    heads = chart.reads[layers[0]][0].shape[0]
    fine, level = _grids(chart, levels, layers, chunks)
    mass = torch.zeros(len(layers) * heads, chunks)
    for row, layer in enumerate(layers):
        seen = chart.mass.get(layer)
        if seen is not None:
            width = min(chunks, seen.shape[1])
            mass[row * heads : (row + 1) * heads, :width] = seen[:, :width]
    mass[:, 0] = 0  # the sink is always open and says nothing about the answer
    share = mass / mass.sum(1, keepdim=True).clamp_min(1e-9)
    places = [prompt.place(number * chunk, (number + 1) * chunk) for number in range(chunks)]
    window = prompt.document if chart.windows is None else int(chart.windows)
    return {
        "question": prompt.asked, "answer": answer.answer, "found": answer.found, "confidence": answer.confidence,
        "model": answer.settings.get("model"), "policy": answer.settings.get("policy"),
        "recall": answer.settings.get("recall"), "budget": answer.settings.get("budget"),
        "window_tokens": answer.settings.get("window"), "sizes": list(levels), "tokens": prompt.document,
        "chunk": chunk, "chunks": chunks, "window_from": window // chunk, "layers": layers, "heads": heads,
        "entries": _entries_of_answers(chart, levels, layers, window, prompt),
        "fine": _packed(fine), "level": _packed(level / (len(levels) - 1)), "mass": _packed(share.sqrt()),
        "evidence": [_evidence(one, places) for one in answer.evidence],
        "curve": _curve(chart, layers), "names": [source.name for source in prompt.sources],
        "texts": [
            "" if place is None else place[0].text[place[1] : place[2]].strip()[:SNIPPET] for place in places
        ],
    }  # fmt: skip


def _grids(chart: Chart, levels: tuple[int, ...], layers: list[int], chunks: int) -> tuple[Tensor, Tensor]:
    """(layers*heads, chunks): share of answering queries that read a chunk as tokens; and its mean level, 0 ... top."""
    fine, mean = [], []
    for layer in layers:
        found = []
        for level, counts in enumerate(chart.reads[layer]):
            wide = counts if level == 0 else counts.repeat_interleave(levels[level] // levels[1], 1)
            wide = _wider(wide, chunks)[:, :chunks]
            found.append(wide / max(1, chart.answering))
        rest = (1 - torch.stack(found).sum(0)).clamp_min(0)  # read in the window, token by token
        found[0] = found[0] + rest
        fine.append(found[0])
        mean.append(sum((level * part for level, part in enumerate(found)), torch.zeros_like(rest)))
    return torch.cat(fine).clamp(0, 1), torch.cat(mean)


def _entries_of_answers(
    chart: Chart, levels: tuple[int, ...], layers: list[int], window: int, prompt: Prompt
) -> list[float]:
    """Entries that an answering query read on average at each level; the window counts as tokens."""
    found = [0.0] * len(levels)
    for layer in layers:
        for level, counts in enumerate(chart.reads[layer]):
            size = levels[1] if level == 0 else 1
            found[level] += float(counts.sum()) * size / counts.shape[0] / max(1, chart.answering) / len(layers)
    found[0] += len(prompt.ids) - window
    return [round(value, 1) for value in found]


def _curve(chart: Chart, layers: list[int]) -> dict[str, list[float]]:
    """Tokens opened before the window by blocks along the text: mean over layers and heads, and the tenths of these."""
    by_start: dict[int, list[Tensor]] = defaultdict(list)
    for layer in layers:
        for starts, opened in chart.budgets[layer]:
            for start, count in zip(starts.tolist(), opened, strict=True):
                by_start[start].append(count.float())
    order = sorted(by_start)
    step = max(1, -(-len(order) // STEPS))
    curve: dict[str, list[float]] = {"at": [], "mean": [], "low": [], "high": []}
    for first in range(0, len(order), step):
        values = torch.cat([one for start in order[first : first + step] for one in by_start[start]])
        curve["at"].append(order[first])
        curve["mean"].append(round(float(values.mean()), 1))
        curve["low"].append(round(float(values.quantile(0.1)), 1))
        curve["high"].append(round(float(values.quantile(0.9)), 1))
    return curve


def _evidence(one: Any, places: list[Any]) -> dict[str, Any]:
    inside = [
        number
        for number, place in enumerate(places)
        if place is not None and place[0].name == one.file and place[1] < one.end and place[2] > one.start
    ]
    return {
        "file": one.file, "share": one.share, "text": one.text, "first": min(inside, default=0),
        "last": max(inside, default=0),
    }  # fmt: skip


def _wider(counts: Tensor, chunks: int) -> Tensor:
    return torch.nn.functional.pad(counts, (0, max(0, chunks - counts.shape[1])))


def _packed(values: Tensor) -> str:
    """Numbers from 0 to 1 as bytes, base64."""
    return base64.b64encode(bytes((values.clamp(0, 1) * 255).round().to(torch.uint8).flatten().tolist())).decode()
