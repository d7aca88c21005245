"""A document made of country profiles, filled to a number of tokens, with the place of every line known."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mgam.errors import SettingError
from mgam.evaluation.almanac import SOURCE, Profile
from mgam.evaluation.sample import Request, Span
from mgam.evaluation.tokens import TokenCounter

FEWEST = 4
PARTS = 16  # about as many profiles as this, until each has LARGEST tokens
LARGEST = 3000
SPARE = 24  # tokens of a profile's heading


@dataclass(frozen=True)
class Dossier:
    """The text, the profiles in it in order, their ids, and where each line begins."""

    text: str
    profiles: tuple[Profile, ...]
    ids: Mapping[str, str]  # by country code
    starts: Mapping[str, int]  # by country code: character at which the profile begins

    def line(self, profile: Profile, label: str) -> Span:
        """Where the line `label: value` of a profile stands."""
        start = self.text.index(f"\n{label}: ", self.starts[profile.code]) + 1
        end = self.text.find("\n", start)
        return start, end if end >= 0 else len(self.text)


def usable_profiles(request: Request) -> list[Profile]:
    """TEST profiles that say what every question needs."""
    records = request.texts.records(SOURCE, "test")
    return [profile for code, record in records.items() if (profile := Profile(code, record)).usable]


def how_many(room: int, available: int, counter: TokenCounter, pool: Sequence[Profile]) -> int:
    """Profiles for a document of `room` tokens: a few short ones, then more, then longer ones."""
    shortest = max(sum(counter.counts(profile.short_lines)) for profile in pool) + SPARE
    fit = room // shortest
    if fit < FEWEST:
        raise SettingError(
            f"{FEWEST} country profiles need {FEWEST * shortest} tokens and there are {room}; raise --lengths"
        )
    return min(available, fit, max(PARTS, room // LARGEST))


def build_dossier(
    request: Request, room: int, rng: random.Random, pool: Sequence[Profile], gold: Sequence[Profile] = ()
) -> Dossier:
    """Profiles in random order, the first gold one at the request's depth; gold ones are always in."""
    counter = request.counter
    count = how_many(room, len(pool), counter, pool)
    chosen = [*gold, *rng.sample([one for one in pool if one not in gold], max(0, count - len(gold)))][:count]
    order = chosen[1:]
    rng.shuffle(order)
    if gold:
        order.insert(min(len(order), int(request.depth() * count)), gold[0])
    else:
        order = [*order, *chosen[:1]]
    ids = _ids(rng, [profile.code for profile in order])
    left, share = room, 1.0
    for _ in range(4):  # lines are counted one by one, so the sum may be a little off
        text, starts = _write(order, ids, int(left * share), counter)
        exact = counter.count(text)
        if 0.97 * room <= exact <= room:
            break
        share *= 0.99 * room / exact
        if exact <= room and share > 1.2:  # nothing more to say about these countries
            break
    return Dossier(text, tuple(order), ids, starts)


def _ids(rng: random.Random, codes: Sequence[str]) -> dict[str, str]:
    """Six hexadecimal digits for each, none twice."""
    numbers = rng.sample(range(0x100000, 0x1000000), len(codes))
    return {code: f"{number:06x}" for code, number in zip(codes, numbers, strict=True)}


def _write(
    order: Sequence[Profile], ids: Mapping[str, str], room: int, counter: TokenCounter
) -> tuple[str, dict[str, int]]:
    parts: list[str] = []
    starts: dict[str, int] = {}
    left, place = room, 0
    for number, profile in enumerate(order):
        allowed = left // (len(order) - number)
        heading = f"{chr(10) * 2 if parts else ''}Document {ids[profile.code]}: {profile.name}"
        lines = [heading, *profile.short_lines]
        used = sum(counter.counts(lines))
        for line, tokens in zip(profile.long_lines, counter.counts(profile.long_lines), strict=True):
            if used + tokens <= allowed:
                lines.append(line)
                used += tokens
        starts[profile.code] = place
        written = "".join(lines)
        parts.append(written)
        place += len(written)
        left -= used
    return "".join(parts), starts
