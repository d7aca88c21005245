"""Question answering with citations: is the evidence that is shown the place where the answer stands?

The form of L-CiteEval (Tang et al. 2024, arXiv 2410.02115), for the passages that `mgam ask` shows: a passage is right
if it holds the gold line. The headline is the F1 of the passages; the answer's own score stands beside it. A method
that shows no evidence, dense attention among them, scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from mgam.evaluation.almanac import SOURCE
from mgam.evaluation.evidence import evidence_scores
from mgam.evaluation.metrics import Score
from mgam.evaluation.reader import Passage
from mgam.evaluation.registry import Task, register
from mgam.evaluation.sample import Sample
from mgam.evaluation.tasks import factbook, questions


def score_evidence(sample: Sample, evidence: Sequence[Passage]) -> Score:
    """F1 of the passages; precision and recall beside it."""
    found = evidence_scores(evidence, sample.spans)
    return Score(found.pop("evidence_f1"), found)


register(
    Task(
        name="citation",
        summary="whether the evidence shown is where the answer stands, over invented entries",
        paper="arXiv 2410.02115",
        groups=("synthetic", "citations"),
        max_new_tokens=questions.NEW_TOKENS,
        build=lambda request: questions.build(1, request),
        score=questions.score,
        score_evidence=score_evidence,
    )
)
register(
    Task(
        name="citation_facts",
        summary="whether the evidence shown is where the answer stands, over country profiles",
        paper="arXiv 2410.02115",
        groups=("real", "citations"),
        max_new_tokens=factbook.ONE_TOKENS,
        build=lambda request: factbook.build_single(False, request),
        score=factbook.score_answer,
        score_evidence=score_evidence,
        needs=SOURCE,
    )
)
