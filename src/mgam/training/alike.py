"""Texts of many like facts, of which a question asks for one: what is asked for must be told from all that is like it.

Four kinds of text: invented things as records, sentences, paragraphs or rows of a table; profiles of countries, most
of them under another name, so that no fact is known by heart; what these profiles tell in paragraphs, with invented
sentences between; and prose, asked for figures and names in its own sentences.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mgam.evaluation.almanac import FACTS, Profile
from mgam.evaluation.texts import split_sentences
from mgam.training.gaps import gap
from mgam.training.things import Thing, invent, kinds, place
from mgam.training.wordings import ALMANAC, BRIEFLY, HEADINGS, LABELLED, LINES, RETURNS, Pair

Prose = Callable[[random.Random, int], str]
"""Running text of about so many characters."""
ABSENT = 1 / 12
"""Part of the questions that ask for what the text does not hold. They are answered by a value that is drawn, so that
nothing is learned there but to be unsure."""
TOLD = (("Introduction", "Background"), ("Economy", "Economy - overview"), ("Geography", "Geography - note"))
LANDS = ("country", "island", "town")
"""Kinds of things of which a profile's paragraphs may tell more."""
NOWHERE = (0, 0)


@dataclass
class Writing:
    """A text that grows piece by piece."""

    parts: list[str] = field(default_factory=list)
    length: int = 0

    def add(self, piece: str) -> tuple[int, int]:
        """Where the piece stands, without the white space before it."""
        piece = piece if self.parts else piece.lstrip()
        self.parts.append(piece)
        self.length += len(piece)
        return self.length - len(piece.lstrip()), self.length

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.parts)


@dataclass(frozen=True)
class _Said:
    thing: Thing
    field: int
    ident: str
    """What its heading calls it besides its name, "" where that says nothing."""
    place: tuple[int, int]


Piece = tuple[str, int | None]
"""Some words about a thing, and which of its fields they tell."""


def invented(rng: random.Random, characters: int, questions: int, prose: Prose) -> tuple[str, list[Pair]]:
    """A text about invented things, and questions."""
    chosen = rng.sample(kinds(), rng.choice((1, 1, 1, 2, 3)))
    told = {one.noun: sorted(rng.sample(range(len(one.fields)), rng.randint(3, len(one.fields)))) for one in chosen}
    form = rng.choice((_Records, _Records, _Sentences, _Paragraphs, _Rows))(rng)
    between = rng.choice((0, 0, 150, 600, 1800)) if form.seam else 0
    writing, said, taken = Writing(), list[_Said](), set[str]()
    while writing.length < characters:
        thing = invent(rng, rng.choice(chosen), taken)
        ident = f"{rng.randrange(0x100000, 0x1000000):06x}"
        for piece, number in form.write(thing, told[thing.kind.noun], ident):
            where = writing.add(piece)
            if number is not None:
                said.append(_Said(thing, number, ident if form.numbered else "", where))
        if between:
            writing.add(form.seam + prose(rng, rng.randrange(between)).strip())
    return writing.text, [_question(rng, said, told, taken) for _ in range(questions)]


def _question(rng: random.Random, said: Sequence[_Said], told: dict[str, list[int]], taken: set[str]) -> Pair:
    one = rng.choice(said)
    asked, value, where = one.thing.kind.fields[one.field], one.thing.values[one.field], one.place
    noun, name = one.thing.kind.noun, one.thing.name
    brief = rng.choice(BRIEFLY["text"])
    if rng.random() < ABSENT:
        name, value, where = invent(rng, one.thing.kind, taken).name, asked.value(rng), NOWHERE
    elif one.ident and rng.random() < 0.3:
        name = rng.choice((f"the {noun} with the number {{}}", f"the {noun} of entry {{}}")).format(one.ident)
    elif rng.random() < 0.08 and sum(one.field == other.field and value == other.thing.values[one.field]
                                     for other in said if other.thing.kind is one.thing.kind) == 1:  # fmt: skip
        question = rng.choice(RETURNS).format(noun=noun, label=asked.label.lower(), value=value)
        return Pair(question + brief, name, where)
    if rng.random() < 0.25:
        return Pair(rng.choice(LABELLED).format(label=asked.label, n=name) + brief, value, where)
    return Pair(_named(rng.choice(asked.asks), name) + brief, value, where)


def _named(wording: str, name: str, value: str = "") -> str:
    """A wording with a name in it, which may bring an article of its own."""
    if name.startswith("the "):
        wording = wording.replace("The {n}", "{n}").replace("the {n}", "{n}").replace("A {n}", "{n}")
    made = wording.format(n=name, v=value)
    return made[0].upper() + made[1:]


class _Records:
    """Label and value, line by line, under a heading."""

    seam = "\n"

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.heading = rng.choice(HEADINGS)
        self.line = rng.choice(LINES)
        self.mixed = rng.random() < 0.3
        self.numbered = "{ident}" in self.heading

    def write(self, thing: Thing, told: Sequence[int], ident: str) -> list[Piece]:
        """One record."""
        order = self.rng.sample(told, len(told)) if self.mixed else told
        head = self.heading.format(name=thing.name, ident=ident, noun=thing.kind.noun.capitalize())
        lines = [self.line.format(label=thing.kind.fields[one].label, value=thing.values[one]) for one in order]
        return [(head, None), *zip(lines, order, strict=True)]


class _Sentences:
    """Sentences of which each names what it is about."""

    seam, numbered = " ", False

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def write(self, thing: Thing, told: Sequence[int], ident: str) -> list[Piece]:
        """Some sentences, in any order."""
        return [
            (" " + _named(self.rng.choice(thing.kind.fields[one].says), thing.name, thing.values[one]), one)
            for one in self.rng.sample(told, len(told))
        ]


class _Paragraphs(_Sentences):
    """A paragraph each, which says the name once."""

    seam = "\n\n"

    def write(self, thing: Thing, told: Sequence[int], ident: str) -> list[Piece]:
        """One paragraph."""
        name, before, pieces = thing.name, "\n\n", list[Piece]()
        for one in self.rng.sample(told, len(told)):
            said = _named(self.rng.choice(thing.kind.fields[one].says), name, thing.values[one])
            pieces.append((before + said, one))
            name, before = f"the {thing.kind.noun}", " "
        return pieces


class _Rows:
    """Rows of a table, whose first line has the labels."""

    seam, numbered = "", False

    def __init__(self, rng: random.Random) -> None:
        self.between = rng.choice((" | ", ", ", "; ", "\t"))
        self.headed = set[str]()

    def write(self, thing: Thing, told: Sequence[int], ident: str) -> list[Piece]:
        """One row, and the head before the first of a kind."""
        fields, head = thing.kind.fields, list[Piece]()
        if thing.kind.noun not in self.headed:
            self.headed.add(thing.kind.noun)
            labels = [thing.kind.noun.capitalize(), *(fields[one].label for one in told)]
            head = [("\n\n" + self.between.join(labels), None)]
        return [*head, ("\n" + thing.name, None), *((self.between + thing.values[one], one) for one in told)]


def countries(
    rng: random.Random, characters: int, questions: int, profiles: Sequence[Profile]
) -> tuple[str, list[Pair]]:
    """Profiles of countries, line by line, and questions about any short line."""
    heading = rng.choice(HEADINGS)
    writing, known, other = Writing(), list[Pair](), list[Pair]()
    chosen = _some(rng, characters, profiles, 1200)
    for number, (profile, name) in enumerate(chosen):
        share = writing.length + (characters - writing.length) // (len(chosen) - number)
        ident = f"{rng.randrange(0x100000, 0x1000000):06x}"
        writing.add(heading.format(name=name, ident=ident, noun="Country"))
        facts = {f"\n{one.label}: {profile.get(one.path)}": one for one in FACTS if profile.answer(one)}
        short = list(profile.short_lines)
        if rng.random() < 0.3:
            rng.shuffle(short)
        more = [line for line in profile.long_lines if rng.random() < 0.7]
        for line in (*short, *more):
            if line not in facts and line not in short and writing.length + len(line) > share:
                continue
            where = writing.add(line.replace(profile.name, name))
            label, _, value = line.strip().partition(": ")
            if (fact := facts.get(line)) is not None:
                of, answer = rng.choice((f"of {name}", f"in {name}")), profile.answer(fact)
                wording = rng.choice((*ALMANAC[fact.label], *LABELLED[:2]))
                question = wording.format(of=of, label=fact.label, n=name)
                known.append(Pair(question, answer.replace(profile.name, name), where))
            elif len(value) < 40 and profile.name not in value:
                other.append(Pair(rng.choice(LABELLED).format(label=label, n=name), value, where))
    further = rng.sample(other, min(questions // 3, len(other)))
    return writing.text, _briefly(rng, further + rng.sample(known, min(questions - len(further), len(known))))


def descriptions(
    rng: random.Random, characters: int, questions: int, profiles: Sequence[Profile]
) -> tuple[str, list[Pair]]:
    """What profiles tell in paragraphs, with some sentences that are invented, and questions about single ones."""
    heading = rng.choice(HEADINGS)
    kind = rng.choice([one for one in kinds() if one.noun in LANDS])
    writing, pairs = Writing(), list[Pair]()
    for profile, name in _some(rng, characters, profiles, 1500):
        writing.add(heading.format(name=name, ident=f"{rng.randrange(0x100000, 0x1000000):06x}", noun="Country"))
        pieces = [one for path in TOLD for one in split_sentences(profile.get(path).replace(profile.name, name))]
        added: dict[str, Pair] = {}
        for new in rng.sample(kind.fields, rng.randrange(4)):
            value, said = new.value(rng), rng.choice((name, name, f"the {kind.noun}"))
            statement = " " + _named(rng.choice(new.says), said, value)
            pieces.insert(rng.randrange(len(pieces) + 1), statement)
            added[statement] = Pair(_named(rng.choice(new.asks), name), value, NOWHERE)
        for number, sentence in enumerate(pieces):
            if writing.length + len(sentence) > characters:
                break
            where = writing.add(sentence)
            if sentence in added:
                pairs.append(replace(added[sentence], evidence=where))
            elif (one := gap(rng, pieces, number, where[0], name)) is not None:
                pairs.append(one)
    return writing.text, _briefly(rng, rng.sample(pairs, min(questions, len(pairs))))


def told(rng: random.Random, questions: int, sentences: Sequence[str]) -> tuple[str, list[Pair]]:
    """Running text as it is, and questions about single sentences."""
    writing = Writing()
    begins = [writing.add(one)[0] for one in sentences]
    pairs = list[Pair]()
    for number in rng.sample(range(len(sentences)), len(sentences)):
        if len(pairs) < questions and (one := gap(rng, sentences, number, begins[number], "")) is not None:
            pairs.append(one)
    return writing.text, _briefly(rng, pairs)


def _briefly(rng: random.Random, pairs: list[Pair]) -> list[Pair]:
    """The pairs in any order, some with a word about how to answer."""
    rng.shuffle(pairs)
    return [Pair(one.question + rng.choice(BRIEFLY["text"]), one.answer, one.evidence) for one in pairs]


def _some(rng: random.Random, characters: int, profiles: Sequence[Profile], least: int) -> list[tuple[Profile, str]]:
    """Profiles that fit, of at least so many characters each, with the names that they get in this text."""
    count = min(len(profiles), max(3, characters // least))
    chosen = rng.sample(profiles, rng.randint(max(3, count // 2), count))
    own = rng.random() < 0.3
    return [(one, one.name if own else place(rng)) for one in chosen]
