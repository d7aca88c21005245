"""Question answering over documents: RULER's two QA tasks, over a small invented world.

RULER (arXiv 2404.06654) pads SQuAD and HotpotQA questions with other paragraphs. The paragraphs here are invented, so
that no model can know an answer by heart, and the tasks run with no network: people, the firms that they work for, the
towns where firms have their seat. `questions_hop` goes from a person by way of the firm to its town. Over real
documents, see `factbook.py`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from mgam.evaluation.haystack import Needle, build_haystack
from mgam.evaluation.metrics import Score, any_found, best, exact_match, token_f1
from mgam.evaluation.registry import Task, register
from mgam.evaluation.sample import Draft, Request, Sample, Span

NEW_TOKENS = 32


def _list(joined: str) -> tuple[str, ...]:
    return tuple(joined.split(", "))


_STARTS = _list(
    "Bar, Cal, Dor, Eld, Fen, Gar, Hal, Ister, Jor, Kel, Lor, Mar, Nor, Orl, Pel, Quin, Ros, Sel, Tor, Var, Wel, Zan"
)
_MIDDLES = _list("a, e, i, o, u, an, el, in, or, ul, ia, eo, ara, ine, ola, umi")
_ENDS = _list("bek, dan, fel, gor, hem, kin, lund, mar, nes, pol, rick, sen, tal, vik, wen, zor")
_TRADES = _list("glassblower, surveyor, bookbinder, brewer, locksmith, gardener, translator, clockmaker")
_GOODS = _list("lamps, barometers, saddles, compasses, teapots, violins, umbrellas, stoves, lenses, carpets")
_RIVERS = _list("Ambel, Corrin, Dwyle, Esker, Fallow, Greth, Hollin, Isk")
_PASTIMES = _list("chess, rowing, choir singing, beekeeping, sketching, birdwatching, long walks, old coins")


class _Names:
    """Invented names, none given out twice."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._seen: set[str] = set()

    def fresh(self, words: int = 1) -> str:
        while True:
            made = " ".join(
                self._rng.choice(_STARTS) + self._rng.choice(_MIDDLES) + self._rng.choice(_ENDS) for _ in range(words)
            )
            if made not in self._seen:
                self._seen.add(made)
                return made


@dataclass
class _World:
    """Makes entries of people, firms and towns that do not contradict each other."""

    rng: random.Random
    names: _Names = field(init=False)

    def __post_init__(self) -> None:
        self.names = _Names(self.rng)

    def person(self, name: str, firm: str, born_in: str, year: int) -> str:
        pick = self.rng.choice
        return (
            f"{name} was born in {year} in {born_in}. After an apprenticeship as a {pick(_TRADES)}, {name} joined the "
            f"firm {firm}, and has worked there ever since. In free hours {name} is given to {pick(_PASTIMES)}."
        )

    def firm(self, name: str, seat: str) -> str:
        pick = self.rng.choice
        return (
            f"The firm {name} makes {pick(_GOODS)} and was founded in {self.rng.randrange(1790, 1960)}. Its seat is in "
            f"the town of {seat}. It employs {self.rng.randrange(12, 900)} people."
        )

    def town(self, name: str) -> str:
        return (
            f"{name} is a town on the river {self.rng.choice(_RIVERS)} with {self.rng.randrange(2, 90)} thousand "
            f"inhabitants. Its market is held every {self.rng.choice(['Monday', 'Thursday', 'Saturday'])}."
        )

    def year(self) -> int:
        return self.rng.randrange(1880, 1990)

    def others(self) -> Iterator[str]:
        """Entries that look like the gold ones and are about somebody else."""
        fresh = self.names.fresh
        while True:
            kind = self.rng.randrange(3)
            if kind == 0:
                yield _entry(self.person(fresh(2), fresh(), fresh(), self.year()))
            elif kind == 1:
                yield _entry(self.firm(fresh(), fresh()))
            else:
                yield _entry(self.town(fresh()))


def _entry(text: str) -> str:
    return "\n\n" + text


def build(hops: int, request: Request) -> Draft:
    """A question about one person among many, answered by one entry or by two."""
    rng = request.rng()
    world = _World(rng)
    person, firm, seat, born_in = world.names.fresh(2), world.names.fresh(), world.names.fresh(), world.names.fresh()
    needles = [Needle(_entry(world.person(person, firm, born_in, world.year())), request.depth())]
    if hops == 1:
        question = f"In which town was {person} born? Answer with the name of the town only."
        answer = born_in
    else:
        needles.append(Needle(_entry(world.firm(firm, seat)), rng.random()))
        question = (
            f"In which town is the seat of the firm that {person} works for? Answer with the name of the town only."
        )
        answer = seat
    room = request.room(question, NEW_TOKENS)
    stack = build_haystack(world.others(), needles, room, request.counter, keep_out=request.keep_out)
    details = {"ruler": f"qa_{hops}"}
    said = [born_in] if hops == 1 else [firm, seat]  # what each entry must tell
    spans = tuple(_sentence(stack.text, span, words) for span, words in zip(stack.spans, said, strict=True))
    return Draft(stack.text, question, (answer,), spans, hops=hops, details=details)


def _sentence(document: str, span: Span, words: str) -> Span:
    """The sentence of an entry that holds some words; the rest of the entry is no evidence."""
    place = document.index(words, *span)
    start = document.rfind(". ", span[0], place) + 2
    return max(span[0], start), document.index(".", place) + 1


def score(sample: Sample, reply: str) -> Score:
    """RULER's "gold is found in the reply"; beside it exact match and F1, which a chatty reply lowers."""
    parts = {"em": best(exact_match, reply, sample.answers), "f1": best(token_f1, reply, sample.answers)}
    return Score(any_found(reply, sample.answers), parts)


for _hops, _name in ((1, "questions"), (2, "questions_hop")):
    register(
        Task(
            name=_name,
            summary=f"a question over invented entries, {_hops} of which must be read (RULER qa_{_hops})",
            paper="arXiv 2404.06654",
            groups=("synthetic", "ruler") + (("quick",) if _hops == 2 else ()),
            max_new_tokens=NEW_TOKENS,
            build=partial(build, _hops),
            score=score,
            hits=True,
        )
    )
