"""ROUGE-1, ROUGE-2, ROUGE-L and summary-level ROUGE-L (rougeLsum) as the `rouge-score` package computes them.

Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries". Words are runs of [a-z0-9] in lower case. With
`stem=True` words of more than three letters are stemmed (Porter). rougeL of a multi-sentence
summary is some ten points below rougeLsum, which is what papers on CNN/DailyMail report: say which one a figure is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Rouge:
    """Precision, recall and their harmonic mean."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def tokenise(text: str, stem: bool = False) -> list[str]:
    """Lower-case words of letters and digits."""
    found = _WORD.findall(text.lower())
    if not stem:
        return found
    from mgam.evaluation.porter import stem_word

    return [stem_word(word) if len(word) > 3 else word for word in found]


def rouge_n(reply: str, gold: str, n: int, stem: bool = False) -> Rouge:
    """Overlap of n-grams, counted with multiplicity."""
    left, right = _grams(tokenise(reply, stem), n), _grams(tokenise(gold, stem), n)
    shared = sum((left & right).values())
    return Rouge(shared / max(1, left.total()), shared / max(1, right.total()))


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def rouge_l(reply: str, gold: str, stem: bool = False) -> Rouge:
    """Longest common subsequence of the two texts, each taken as one sequence."""
    left, right = tokenise(reply, stem), tokenise(gold, stem)
    shared = len(_common_places(right, left))
    return Rouge(shared / max(1, len(left)), shared / max(1, len(right)))


def rouge_lsum(reply: str, gold: str, stem: bool = False) -> Rouge:
    """Summary-level ROUGE-L: for each gold line the union of its common subsequences with all lines of the reply."""
    said = [tokenise(line, stem) for line in reply.split("\n") if line.strip()]
    right = [tokenise(line, stem) for line in gold.split("\n") if line.strip()]
    left_said = Counter(word for line in said for word in line)
    left_right = Counter(word for line in right for word in line)
    total_said, total_right = left_said.total(), left_right.total()
    hits = 0
    for line in right:
        places = sorted({place for other in said for place in _common_places(line, other)})
        for place in places:
            word = line[place]
            if left_said[word] > 0 and left_right[word] > 0:
                hits += 1
                left_said[word] -= 1
                left_right[word] -= 1
    return Rouge(hits / max(1, total_said), hits / max(1, total_right))


def _common_places(left: Sequence[str], right: Sequence[str]) -> list[int]:
    """Places in `left` of one longest common subsequence with `right`."""
    rows = [[0] * (len(right) + 1)]
    for word in left:
        above, row = rows[-1], [0]
        for place, other in enumerate(right, start=1):
            row.append(above[place - 1] + 1 if word == other else max(above[place], row[-1]))
        rows.append(row)
    i, j, places = len(left), len(right), []
    while i and j:
        if left[i - 1] == right[j - 1]:
            places.append(i - 1)
            i, j = i - 1, j - 1
        elif rows[i][j - 1] > rows[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places[::-1]
