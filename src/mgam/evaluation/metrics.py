"""Scores of a reply against gold, each normalised as its source does. All are shares from 0 to 1.

Which normalisation belongs to which benchmark, and where they disagree, is said at each function. An empty reply
scores 0 everywhere; it is never left out of a mean.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CONTROL = re.compile(r"[\x00-\x1f]")
_YES_NO = ("yes", "no", "noanswer")


@dataclass(frozen=True)
class Score:
    """The headline of one reply, and other figures of the same reply beside it."""

    value: float
    parts: dict[str, float] = field(default_factory=dict)


# --- question answering: SQuAD, HotpotQA, LongBench -----------------------------------------------------------------


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single blanks: SQuAD's order, also HotpotQA's and LongBench's."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(reply: str, gold: str) -> float:
    """1 if both are equal once normalised. An empty reply is never right, not even when gold normalises to nothing."""
    return float(bool(reply.strip()) and normalise(reply) == normalise(gold))


def _precision_recall(reply: Sequence[str], gold: Sequence[str]) -> tuple[float, float, float]:
    shared = sum((Counter(reply) & Counter(gold)).values())
    if not shared:
        return 0.0, 0.0, 0.0
    precision, recall = shared / len(reply), shared / len(gold)
    return 2 * precision * recall / (precision + recall), precision, recall


def token_f1(reply: str, gold: str) -> float:
    """F1 over the multiset of normalised words, as SQuAD and LongBench score it; 0 without a common word."""
    return _precision_recall(normalise(reply).split(), normalise(gold).split())[0]


def hotpot_f1(reply: str, gold: str) -> tuple[float, float, float]:
    """F1, precision, recall as HotpotQA's own scorer: a yes, no or noanswer on one side only counts 0."""
    left, right = normalise(reply), normalise(gold)
    if left != right and (left in _YES_NO or right in _YES_NO):
        return 0.0, 0.0, 0.0
    return _precision_recall(left.split(), right.split())


def hotpot_joint(
    answer: tuple[float, float, float], reply_facts: set[tuple[str, int]], gold_facts: set[tuple[str, int]]
) -> dict[str, float]:
    """Supporting-fact and joint scores of HotpotQA: precision and recall of both parts are multiplied."""
    shared = len(reply_facts & gold_facts)
    precision = shared / len(reply_facts) if reply_facts else 0.0
    recall = shared / len(gold_facts) if gold_facts else 0.0
    joint_p, joint_r = answer[1] * precision, answer[2] * recall
    return {
        "sp_f1": _harmonic(precision, recall),
        "sp_em": float(reply_facts == gold_facts),
        "joint_f1": _harmonic(joint_p, joint_r),
    }


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def best(metric: Callable[[str, str], float], reply: str, golds: Iterable[str]) -> float:
    """The highest score over several right answers; 0 where none is given."""
    return max((metric(reply, gold) for gold in golds), default=0.0)


# --- gold strings inside the reply: RULER ---------------------------------------------------------------------------


def _plain(text: str) -> str:
    return _CONTROL.sub("\n", text).lower()


def share_found(reply: str, golds: Sequence[str]) -> float:
    """Share of gold strings that stand anywhere in the reply (RULER's score of needles, variables and words)."""
    plain = _plain(reply)
    return sum(gold.lower() in plain for gold in golds) / len(golds) if golds else 0.0


def any_found(reply: str, golds: Sequence[str]) -> float:
    """1 if some gold string stands in the reply (RULER's score of question answering)."""
    plain = _plain(reply)
    return float(any(gold.lower() in plain for gold in golds))


# --- lists ----------------------------------------------------------------------------------------------------------


def list_items(reply: str) -> list[str]:
    """Items of a list in a reply: JSON or Python brackets where there are some, else commas, semicolons and lines."""
    inside = re.search(r"\[(.*?)\]", reply, flags=re.DOTALL)
    body = inside.group(1) if inside else reply
    if inside:
        try:
            return [str(item).strip() for item in json.loads(f"[{body}]")]
        except ValueError:
            pass
    pieces = re.split(r"[,;\n]|\band\b", body)
    cleaned = (re.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", piece) for piece in pieces)
    return [item for item in (piece.strip(" \t'\"`.") for piece in cleaned) if item]


def set_scores(reply: Iterable[str], gold: Iterable[str]) -> dict[str, float]:
    """F1, precision, recall and intersection over union of two sets of normalised items."""
    said, right = {normalise(item) for item in reply} - {""}, {normalise(item) for item in gold}
    shared = len(said & right)
    precision = shared / len(said) if said else 0.0
    recall = shared / len(right) if right else 0.0
    union = len(said | right)
    return {
        "f1": _harmonic(precision, recall),
        "precision": precision,
        "recall": recall,
        "iou": shared / union if union else 0.0,
    }


def words_scores(reply: str, gold: Sequence[str]) -> dict[str, float]:
    """Share of gold words that stand in the reply as whole words, and IoU, which naming everything does not raise."""
    said = set(re.findall(r"[\w-]+", reply.lower()))
    right = {word.lower() for word in gold}
    shared = len(said & right)
    return {"recall": shared / len(right), "iou": shared / len(said | right) if said | right else 0.0}


def first_number(reply: str) -> int | None:
    """The first whole number in a reply, thousands commas allowed; None without one."""
    found = re.search(r"-?\d[\d,]*", reply)
    return int(found.group().replace(",", "")) if found else None


def number_match(reply: str, gold: str) -> float:
    """1 if the first number of the reply is the gold one."""
    said = first_number(reply)
    return float(said is not None and said == first_number(gold))


# --- LongBench's own ------------------------------------------------------------------------------------------------


def longbench_classification(reply: str, gold: str, classes: Sequence[str]) -> float:
    """1 / number of class names in the reply if gold is among them; names contained in gold are dropped first."""
    named = [name for name in classes if name in reply]
    named = [name for name in named if name == gold or name not in gold]
    return 1.0 / len(named) if gold in named else 0.0


def longbench_numbers(reply: str, gold: str) -> float:
    """Share of the integers in the reply that are the gold one (passage retrieval and counting)."""
    wanted = re.findall(r"\d+", gold)
    said = re.findall(r"\d+", reply)
    return sum(number == wanted[0] for number in said) / len(said) if said and wanted else 0.0


def longbench_code(reply: str, gold: str) -> float:
    """Similarity of the reply's first line of code with gold: 2 * matching / all characters, rounded to percents."""
    lines = reply.lstrip("\n").split("\n")
    line = next((one for one in lines if "`" not in one and "#" not in one and "//" not in one), "")
    return round(100 * _ratio(line, gold)) / 100


def _ratio(left: str, right: str) -> float:
    """Indel similarity: 2 * longest common subsequence / total length (what rapidfuzz calls ratio)."""
    if not left or not right:
        return 0.0
    row = [0] * (len(right) + 1)
    for character in left:
        diagonal = 0
        for place, other in enumerate(right, start=1):
            above = row[place]
            row[place] = diagonal + 1 if character == other else max(above, row[place - 1])
            diagonal = above
    return 2 * row[-1] / (len(left) + len(right))
