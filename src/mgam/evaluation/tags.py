"""Diffusion and scope of a sample: how hard its evidence is to find, and how much of it there is.

The two axes are those of Goldman et al. 2024, "Is it really long context if all you need is retrieval?"
(arXiv 2407.00402). The paper gives no numbers; the scale here is ours and every raw number is reported beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MERGE_GAP = 32  # characters: evidence spans closer than this count as one unit
HIGH_SCOPE_TOKENS, HIGH_SCOPE_SHARE, HIGH_DIFFUSION = 2048, 0.25, 0.5
DISTRACTOR_SHARE = 0.8  # a sentence this close to the best gold one, seen from the question, is a distractor

_WORD = re.compile(r"[a-z0-9]+")
_COMMON = frozenset(
    _WORD.findall(
        "a an the of to in on for and or is are was were be it its this that these those with by as at from which "
        "what who where when how many much do does did has have had not no all each one only give list name answer "
        "text document documents question your there their they"
    )
)


@dataclass(frozen=True)
class Tags:
    """Where a sample lies on the two axes, and the numbers that say so."""

    scope_tokens: int  # tokens of the evidence, overlaps counted once
    scope: float  # the same as a share of the document
    units: int  # stretches of evidence
    spread: float  # from the first to the last piece of evidence, as a share of the document
    obscurity: float  # 1 - best word overlap (F1) of the question with a piece of evidence
    distractors: int  # sentences that look as much like the question as the evidence does, and are not
    hops: int
    diffusion: float  # 0 easy to find, 1 hard
    quadrant: str  # "low-diffusion/low-scope" and so on


def _content_words(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.lower())) - _COMMON


def _overlap(left: frozenset[str], right: frozenset[str]) -> float:
    shared = len(left & right)
    return 2 * shared / (len(left) + len(right)) if shared else 0.0


def _merge(spans: Sequence[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start - merged[-1][1] < gap:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _count_distractors(document: str, question: frozenset[str], spans: list[tuple[int, int]], best: float) -> int:
    if best <= 0:
        return 0
    found, place = 0, 0
    for sentence in re.split(r"(?<=[.!?])\s+|\n", document):
        start = place
        place += len(sentence) + 1
        if any(start < end and first < place for first, end in spans):
            continue
        if _overlap(question, _content_words(sentence)) >= DISTRACTOR_SHARE * best:
            found += 1
    return found


def measure(
    document: str,
    question: str,
    spans: Sequence[tuple[int, int]],
    hops: int,
    count_tokens: Callable[[str], int],
    document_tokens: int,
) -> Tags:
    """Places a sample on both axes from the character spans of its evidence.

    `count_tokens` counts a short text; evidence of more than a quarter of the document is counted by its share of
    characters, which saves a second pass over the whole text.
    """
    units = _merge(spans, MERGE_GAP)
    covered = _merge(spans, 0)
    characters = sum(end - start for start, end in covered)
    share = characters / max(1, len(document))
    tokens = round(share * document_tokens) if share > 0.25 else sum(count_tokens(document[a:b]) for a, b in covered)
    asked = _content_words(question)
    best = max((_overlap(asked, _content_words(document[a:b])) for a, b in units[:200]), default=0.0)
    spread = (units[-1][1] - units[0][0]) / max(1, len(document)) if units else 0.0
    distractors = _count_distractors(document, asked, units, best) if share <= 0.25 else 0
    terms = (
        math.log2(1 + len(units)) / 10,
        spread,
        1 - best,
        math.log2(1 + distractors) / 10,
        (hops - 1) / 4,
    )
    diffusion = sum(min(1.0, max(0.0, term)) for term in terms) / len(terms)
    wide = tokens >= HIGH_SCOPE_TOKENS or share >= HIGH_SCOPE_SHARE
    hard = diffusion >= HIGH_DIFFUSION
    return Tags(
        scope_tokens=tokens,
        scope=round(share, 6),
        units=len(units),
        spread=round(spread, 6),
        obscurity=round(1 - best, 6),
        distractors=distractors,
        hops=hops,
        diffusion=round(diffusion, 6),
        quadrant=f"{'high' if hard else 'low'}-diffusion/{'high' if wide else 'low'}-scope",
    )
