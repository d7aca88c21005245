"""How well the passages that a reader shows cover what the answer rests on.

The citation scores of L-CiteEval (Tang et al. 2024, arXiv 2410.02115) in the form that it uses for needles: no second
model judges; a passage is right if it holds gold evidence. Readers that show nothing score 0, they are not left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from mgam.evaluation.reader import Passage
from mgam.evaluation.sample import Span

HELD = 0.5  # share of a gold span that the passages must hold for it to count as cited
UNIT = 1200  # characters: a longer passage counts as several, so that citing everything is not right


def evidence_scores(passages: Sequence[Passage], gold: Sequence[Span]) -> dict[str, float]:
    """Precision (passages that hold gold), recall (gold spans held by the passages together) and F1."""
    if not gold:
        return {}
    units = [unit for passage in passages for unit in _units(passage)]
    right = sum(any(_held(span, [unit]) > 0 for span in gold) for unit in units)
    held = sum(_held(span, passages) >= HELD for span in gold)
    precision = right / len(units) if units else 0.0
    recall = held / len(gold)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"evidence_precision": precision, "evidence_recall": recall, "evidence_f1": f1}


def _units(passage: Passage) -> list[Passage]:
    """The passage in equal parts of at most UNIT characters."""
    size = max(0, passage.end - passage.start)
    parts = max(1, -(-size // UNIT))
    edges = [passage.start + size * part // parts for part in range(parts + 1)]
    return [Passage(start, end) for start, end in pairwise(edges)]


def _held(span: Span, passages: Sequence[Passage]) -> float:
    """Share of `span` that the passages cover together."""
    start, end = span
    pieces = sorted((max(start, one.start), min(end, one.end)) for one in passages)
    covered, reached = 0, start
    for first, last in pieces:
        if last > max(first, reached):
            covered += last - max(first, reached)
            reached = last
    return covered / max(1, end - start)
