"""Questions about sentences as they stand in a text: a figure or a name in one is asked for by words around it."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from mgam.training.wordings import FIGURES, GAPS, Pair

FIGURE = re.compile(r"(?<![\w.,-])\$?\d+(?:[,.]\d+)*(?:%| percent| million| billion| trillion)?(?![\w-])")
NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*")
COUNTED = re.compile(r" ((?!has|was|years)[a-z]{3,}(?: [a-z]{4,}){0,2})")
WORD = re.compile(r"[A-Za-z][a-z]{4,}")


def gap(rng: random.Random, sentences: Sequence[str], number: int, begin: int, about: str) -> Pair | None:
    """Asks for something in sentence `number`, which begins at character `begin`; None where nothing can be asked.

    `about` is what the text calls what these sentences are about, "" if they have no heading.
    """
    sentence = sentences[number]
    names = (one for one in NAME.finditer(sentence) if not about or (one[0] not in about and about not in one[0]))
    found = list(FIGURE.finditer(sentence)) or list(names)
    if not found or len(sentence) < 50:
        return None
    one = rng.choice(found)
    figure = FIGURE.fullmatch(one.group()) is not None
    on = f" on {about}" if about else ""
    span = (begin, begin + len(sentence.lstrip()))
    counted = COUNTED.match(sentence, one.end())
    keys = [word for word in WORD.findall(sentence[: one.start()] + sentence[one.end() :]) if word not in about]
    keys = sorted(rng.sample(keys, min(len(keys), 3)), key=sentence.index)
    known = len(keys) == 3 and sum(all(key in other for key in keys) for other in sentences) == 1
    if figure and counted and known and one.group().isdigit() and counted[1].endswith("s") and len(one.group()) < 4:
        question = f"How many {counted.group(1)} does the text{on} name beside {keys[0]} and {keys[1]}?"
    elif known and rng.random() < 0.6:
        what = "figure" if figure else "name"
        question = rng.choice(FIGURES).format(what=what, on=on, one=keys[0], two=keys[1], three=keys[2])
    else:
        left, right = sentence[: one.start()].split()[-6:], sentence[one.end() :].split()[:4]
        if len(left) + len(right) < 6 or not left:
            return None
        question = rng.choice(GAPS).format(on=on, left=" ".join(left), right=" ".join(right)).replace(" ,", ",")
    return Pair(question, one.group(), span)
