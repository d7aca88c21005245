"""What a model chose, against what is wanted."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mgam.evaluation.metrics import token_f1
from mgam.evaluation.rouge import rouge_lsum, rouge_n
from papertable.hop import SHORT_VALUE
from papertable.library import Library
from papertable.sample import ASKED, Sample

LONGEST, LOOKED_AT = 16, 20
ROUGES = ("rouge1", "rouge2", "rougeLsum")


@dataclass(frozen=True)
class Choice:
    """Numbers of units, best first, and places of first and last token; None: nothing was said."""

    units: Sequence[int]
    span: tuple[int, int] | None


def oracle(sample: Sample) -> Choice:
    """What is wanted."""
    return Choice(sample.gold.tolist(), sample.span if sample.span[0] >= 0 else None)


SILENCE = Choice((), None)


def choices(units: Tensor, tokens: Tensor, samples: Sequence[Sample]) -> list[Choice]:
    """The best units and the best span of each sample, from a model's logits (B, M) and (B, 2, T)."""
    few = min(LOOKED_AT, units.shape[1])
    looked = tokens.float().topk(LOOKED_AT, -1)
    parts = [units.topk(few, -1).indices, looked.values.flatten(1), looked.indices.flatten(1)]
    sent = torch.cat([part.double() for part in parts], 1).cpu().numpy()  # at once: others wait for the device too
    best, values, places = np.split(sent, np.cumsum([part.shape[1] for part in parts])[:-1], 1)
    best, places = best.astype(int), places.astype(int).reshape(len(samples), 2, -1)
    values = values.astype(np.float32).reshape(len(samples), 2, -1)
    return [
        Choice([at for at in best[row].tolist() if at < len(sample.ends)], _span(sample, values[row], places[row]))
        for row, sample in enumerate(samples)
    ]


def _span(sample: Sample, values: np.ndarray, places: np.ndarray) -> tuple[int, int] | None:
    first, last = places[0][:, None], places[1][None, :]
    unit = np.searchsorted(sample.ends, places)
    fits = (first <= last) & (last < first + LONGEST) & (unit[0][:, None] == unit[1][None, :])
    total = np.where(fits, values[0][:, None] + values[1][None, :], -np.inf)
    at = np.unravel_index(int(total.argmax()), total.shape)
    return (int(places[0][at[0]]), int(places[1][at[1]])) if np.isfinite(total[at]) else None


def score(library: Library, sample: Sample, choice: Choice) -> dict[str, float]:
    """Accuracy; and F1 where the task has a span, ROUGE where it has a lead. Shares from 0 to 1."""
    chosen = list(choice.units)[: len(sample.gold)]
    found = {"accuracy": len({*chosen} & {*sample.gold.tolist()}) / len(sample.gold)}
    if sample.span[0] >= 0 and len(sample.gold) > 1:  # the answer's line is the last hop
        last = int(np.searchsorted(sample.ends, sample.span[0]))
        others = {*sample.gold.tolist()} - {last}
        found |= {"first hop": len({*chosen} & others) / len(others), "last hop": float(last in chosen)}
    if sample.span[0] >= 0:
        said = "" if choice.span is None else library.text(sample.tokens[choice.span[0] : choice.span[1] + 1])
        found["f1"] = token_f1(said, library.text(sample.tokens[sample.span[0] : sample.span[1] + 1]))
    if sample.lead:
        found |= rouges(library, sample, chosen)
    return found


def rouges(library: Library, sample: Sample, units: Sequence[int]) -> dict[str, float]:
    """ROUGE of some units, in order and a line each, against the lead."""
    said = "\n".join(library.text(sample.unit(number)) for number in sorted(units))
    parts = [rouge_n(said, sample.lead, n, stem=True).f1 for n in (1, 2)]
    gold = "\n".join(line for line in sample.lead.split(". ") if line.strip())
    return dict(zip(ROUGES, [*parts, rouge_lsum(said, gold, stem=True).f1], strict=True))


def first_hop_alone(library: Library, sample: Sample) -> dict[str, float]:
    """Expected figures of a reader that finds the line which tells the country, and then takes any line with the label
    that is asked for, whatever country it belongs to."""
    last = int(np.searchsorted(sample.ends, sample.span[0]))
    label = sample.unit(last)[: sample.span[0] - (sample.ends[last - 1] + 1 if last else 1 + ASKED)]
    lines = [sample.unit(number) for number in range(len(sample.ends))]
    alike = [line[len(label) :] for line in lines if np.array_equal(line[: len(label)], label)]
    answer = library.text(sample.tokens[sample.span[0] : sample.span[1] + 1])
    said = [re.split(SHORT_VALUE, library.text(line))[0].strip() for line in alike]
    return {"accuracy": (1 + 1 / len(alike)) / 2, "f1": statistics.mean(token_f1(one, answer) for one in said)}
