"""Questions over country profiles: the five abilities of M4LE, and two hops.

Kwan et al. 2024, "M4LE: A Multi-Ability Multi-Range Multi-Task Multi-Domain Long-Context Evaluation Benchmark"
(arXiv 2310.19240): explicit (a document is named) or semantic (it must be recognised), single or multiple, and global.
The documents are TEST profiles of The World Factbook of 2015, so some answers may be known to a model by heart: each
question about a single document takes a fact at random, and most of them are figures. This is not HotpotQA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mgam.errors import SettingError
from mgam.evaluation.almanac import CAPITAL, FACTS, POPULATION, SOURCE
from mgam.evaluation.dossier import Dossier, build_dossier, how_many, usable_profiles
from mgam.evaluation.metrics import (
    Score,
    any_found,
    best,
    exact_match,
    list_items,
    number_match,
    set_scores,
    token_f1,
)
from mgam.evaluation.registry import Task, register
from mgam.evaluation.sample import Draft, Request, Sample

PAPER = "arXiv 2310.19240"
ONE_TOKENS, LIST_TOKENS, COUNT_TOKENS = 32, 192, 16
QUESTION_ROOM = 64  # tokens kept for a question that is not yet worded


def _room(request: Request, new_tokens: int) -> int:
    return request.room("", new_tokens) - QUESTION_ROOM


def build_single(explicit: bool, request: Request) -> Draft:
    """One fact of one document, which is named by its id or by its country."""
    rng = request.rng()
    pool = usable_profiles(request)
    profile = rng.choice(pool)
    fact = rng.choice([fact for fact in FACTS if profile.answer(fact)])
    dossier = build_dossier(request, _room(request, ONE_TOKENS), rng, pool, [profile])
    of = f"of the country in document {dossier.ids[profile.code]}" if explicit else f"of {profile.name}"
    question = f"{fact.asked.format(of=of)} Answer with the answer only."
    details = {"ability": f"{'explicit' if explicit else 'semantic'}-single"}
    return Draft(dossier.text, question, (profile.answer(fact),), (dossier.line(profile, fact.label),), details=details)


def build_two_hop(request: Request) -> Draft:
    """The capital of the neighbour with which a country has its longest land border."""
    rng = request.rng()
    pool = usable_profiles(request)
    names = {profile.name: profile for profile in pool}
    first = rng.choice([profile for profile in pool if profile.longest_border in names])
    second = names[first.longest_border]
    dossier = build_dossier(request, _room(request, ONE_TOKENS), rng, pool, [first, second])
    question = (
        f"What is the capital of the country with which {first.name} has its longest land border? Answer with the name "
        "of the capital only."
    )
    spans = (dossier.line(first, "Land borders"), dossier.line(second, CAPITAL.label))
    details = {"ability": "two-hop"}
    return Draft(dossier.text, question, (second.answer(CAPITAL),), spans, hops=2, details=details)


def _some_of_a_region(request: Request, new_tokens: int) -> tuple[Dossier, str]:
    """A document in which some profiles, at least one and not all, belong to one region."""
    rng = request.rng()
    pool = usable_profiles(request)
    room = _room(request, new_tokens)
    count = how_many(room, len(pool), request.counter, pool)
    regions = sorted({profile.region for profile in pool})
    common = [region for region in regions if sum(one.region == region for one in pool) >= 5]
    region = rng.choice(common)
    members = [profile for profile in pool if profile.region == region]
    others = [profile for profile in pool if profile.region != region]
    number = rng.randint(1, min(len(members), max(1, count // 2)))
    chosen = [*rng.sample(members, number), *rng.sample(others, min(len(others), count - number))]
    return build_dossier(request, room, rng, chosen, rng.sample(chosen, 1)), region


def build_list(request: Request) -> Draft:
    """The ids of all documents whose stated region is the one asked for: explicit, multiple."""
    dossier, region = _some_of_a_region(request, LIST_TOKENS)
    gold = [profile for profile in dossier.profiles if profile.region == region]
    question = (
        f'Which documents are about countries whose region is "{region}"? Answer with a JSON list of the ids of these '
        "documents (six characters each) only."
    )
    spans = tuple(dossier.line(profile, "Region") for profile in gold)
    ids = tuple(dossier.ids[profile.code] for profile in gold)
    return Draft(dossier.text, question, ids, spans, details={"ability": "explicit-multiple"})


def build_count(request: Request) -> Draft:
    """How many documents belong to a region: semantic, multiple."""
    dossier, region = _some_of_a_region(request, COUNT_TOKENS)
    gold = [profile for profile in dossier.profiles if profile.region == region]
    question = f'How many of the documents are about countries whose region is "{region}"? Answer with a number only.'
    spans = tuple(dossier.line(profile, "Region") for profile in gold)
    return Draft(dossier.text, question, (str(len(gold)),), spans, details={"ability": "semantic-multiple"})


def build_landlocked(request: Request) -> Draft:
    """The names of all countries without a coast, which no line says in these words: semantic, multiple."""
    rng = request.rng()
    pool = usable_profiles(request)
    inland = [profile for profile in pool if profile.landlocked]
    dossier = build_dossier(request, _room(request, LIST_TOKENS), rng, pool, [rng.choice(inland)])
    gold = [profile for profile in dossier.profiles if profile.landlocked]
    question = (
        "Which of the countries in the documents have no coast on the ocean or on a sea that opens to it? Answer with "
        "a JSON list of the countries' names only."
    )
    spans = tuple(dossier.line(profile, "Coastline") for profile in gold)
    names = tuple(profile.name for profile in gold)
    return Draft(dossier.text, question, names, spans, details={"ability": "semantic-multiple"})


def build_largest(request: Request) -> Draft:
    """The country with the most people, which only a look at all of them can tell: global."""
    rng = request.rng()
    pool = usable_profiles(request)
    first = rng.choice(pool)
    lesser = [profile for profile in pool if profile.population < first.population]
    room = _room(request, ONE_TOKENS)
    if len(lesser) < how_many(room, len(pool), request.counter, pool) - 1:
        first, lesser = max(pool, key=lambda profile: profile.population), pool
    dossier = build_dossier(request, room, rng, [*lesser, first] if first not in lesser else lesser, [first])
    question = (
        "Which of the countries in the documents has the largest population? Answer with the name of the country only."
    )
    spans = tuple(dossier.line(profile, POPULATION.label) for profile in dossier.profiles)
    largest = max(dossier.profiles, key=lambda profile: profile.population)
    if sum(profile.population == largest.population for profile in dossier.profiles) > 1:
        raise SettingError("two countries have the same population; please report this seed")
    return Draft(dossier.text, question, (largest.name,), spans, details={"ability": "global"})


def score_answer(sample: Sample, reply: str) -> Score:
    """1 if the answer stands in the reply (M4LE's accuracy); beside it exact match and F1."""
    parts = {"em": best(exact_match, reply, sample.answers), "f1": best(token_f1, reply, sample.answers)}
    return Score(any_found(reply, sample.answers), parts)


def score_list(sample: Sample, reply: str) -> Score:
    """F1 of the set of items in the reply (M4LE's cls_f1)."""
    found = set_scores(list_items(reply), sample.answers)
    return Score(found.pop("f1"), found)


def score_count(sample: Sample, reply: str) -> Score:
    """1 if the first number of the reply is right."""
    return Score(number_match(reply, sample.answers[0]))


@dataclass(frozen=True)
class _Kind:
    summary: str
    tokens: int
    build: Callable[[Request], Draft]
    score: Callable[[Sample, str], Score]


_KINDS = {
    "facts_by_id": _Kind(
        "a fact of the country in the document with a given id (explicit, single)",
        ONE_TOKENS,
        lambda request: build_single(True, request),
        score_answer,
    ),
    "facts_by_name": _Kind(
        "a fact of a country that is named (semantic, single)",
        ONE_TOKENS,
        lambda request: build_single(False, request),
        score_answer,
    ),
    "facts_two_hop": _Kind(
        "the capital of the neighbour with the longest border", ONE_TOKENS, build_two_hop, score_answer
    ),
    "facts_list": _Kind("ids of all countries of a region (explicit, multiple)", LIST_TOKENS, build_list, score_list),
    "facts_count": _Kind("how many countries are of a region", COUNT_TOKENS, build_count, score_count),
    "facts_landlocked": _Kind(
        "all countries without a coast (semantic, multiple)", LIST_TOKENS, build_landlocked, score_list
    ),
    "facts_largest": _Kind("the country with the most people (global)", ONE_TOKENS, build_largest, score_answer),
}

for _name, _kind in _KINDS.items():
    register(
        Task(
            name=_name,
            summary=_kind.summary,
            paper=PAPER,
            groups=("real", "factbook"),
            max_new_tokens=_kind.tokens,
            build=_kind.build,
            score=_kind.score,
            hits=_kind.score is not score_list,
            needs=SOURCE,
        )
    )
