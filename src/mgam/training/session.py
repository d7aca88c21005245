"""One whole fit: a model, its texts, a policy, perhaps low-rank training, and what is kept of held-out text."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgam.errors import SettingError
from mgam.evaluation.texts import KNOWN
from mgam.integrations.loading import Loaded, load
from mgam.integrations.transformers.low_rank import adapters, attach, fingerprint, read
from mgam.integrations.transformers.models import architecture
from mgam.levels import Levels
from mgam.policies.files import FittedPolicy, resolve
from mgam.processes import own_device, rank
from mgam.training.adapting import Adapting, fit_adapter
from mgam.training.fit import Fitting, Say, fit, refuse_short
from mgam.training.lookups import LookupMaker
from mgam.training.measure import Kept, mass_kept, peers
from mgam.training.reading import Reading, fit_reading
from mgam.training.texts import Document, Windows, read_documents
from mgam.words import counted

FROZEN = "frozen"
"""Where the policy of the frozen model goes when low-rank training follows."""
KEPT = "kept.json"


@dataclass(frozen=True)
class FitSession:
    """What a person asked to be fitted."""

    out: Path
    data: Sequence[str]
    model: str | None = None
    fitting: Fitting = field(default_factory=Fitting)
    reading: Adapting | None = None
    """Low-rank training: by a policy afterwards (`Reading`), or alone (`Adapting`); None: the model stays as it is."""
    quotes: float = 0.0
    """Part of its questions that ask how a sentence of the text goes on."""
    alike: float = 0.0
    """Part of its texts that hold many like facts."""
    start: str | None = None
    """Adapters: to go on from, where these are trained alone; else those with which the model reads."""
    policy: str | None = None
    """A policy to go on from, in place of fitting one."""
    check: int = 4
    """Held-out texts to measure on; 0: none."""
    device: str = "auto"
    dtype: str | None = None
    download: bool = False


def run(session: FitSession, say: Say) -> dict[str, Any]:
    """Fits, trains if that is asked for, measures; returns what there is to say about it.

    Raises:
        SettingError, DocumentError: what was asked for cannot be; said before anything is fitted.
        FittingError: it stopped; says what was kept.
    """
    reading = session.reading if isinstance(session.reading, Reading) else None
    adapting = session.reading if reading is None else None
    if session.policy is not None:
        if reading is None:
            raise SettingError("--policy is what low-rank training goes on from; add --lora, or leave it out")
        resolve(session.policy)
    if session.start is not None and reading is not None:
        raise SettingError("with --lora adapters begin anew; leave --adapter out, or give --adapter-only in its place")
    began = time.perf_counter()
    say("loading the model")
    loaded = load(session.model, device=own_device(session.device), dtype=session.dtype, download=session.download)
    model: Any = loaded.model
    if session.policy is None and adapting is None:
        refuse_short(session.fitting, architecture(model.config).trained_window(model.config))
        if session.start is not None:
            attach(read(model, adapters(session.start)))
    say("reading texts")
    maker = None
    if _wants_lookups(session):
        maker = LookupMaker(loaded.tokenizer, session.data, quotes=session.quotes, alike=session.alike)
    found: dict[str, Any] = {"folder": str(session.out), "model": model.name_or_path}
    if adapting is not None:
        assert maker is not None
        trained = fit_adapter(model, maker, session.out, adapting, start=session.start, say=say)
        return {
            **found, "steps_reading": trained["steps"], "seconds_reading": trained["seconds"],
            "seconds": round(time.perf_counter() - began, 1),
        }  # fmt: skip
    alone = reading is None
    if session.policy is None:
        place = session.out if alone else session.out / FROZEN
        documents = read_documents(session.data, loaded.tokenizer)
        say(f"{counted(len(documents), 'text')} of {sum(len(one.ids) for one in documents):,} tokens")
        notes = {"model": model.name_or_path}
        if session.start is not None:
            notes["adapter"] = fingerprint(session.start)
        fitted = fit(model, documents, place, session.fitting, lookups=maker, say=say, notes=notes)
        found |= {"seconds_fitting": fitted.notes["seconds"]}
        if session.check and rank() == 0:
            found["kept"] = _check(session, loaded, fitted, place, say)
    else:
        fitted = FittedPolicy.load(resolve(session.policy))
    if reading is not None:
        assert maker is not None
        start = session.policy or str(session.out / FROZEN)
        fitted = fit_reading(model, start, maker, session.out, reading, say=say)
        found |= {"steps_reading": fitted.notes["reading_steps"], "seconds_reading": fitted.notes["reading_seconds"]}
    return {**found, "numbers": fitted.parameters, "seconds": round(time.perf_counter() - began, 1)}


def _wants_lookups(session: FitSession) -> bool:
    return session.reading is not None or bool(session.fitting.lookup_tokens)


def held_out(data: Sequence[str], tokenizer: Any) -> list[Document]:
    """Texts that nothing is fitted on: the TUNE split of the sources that have one."""
    sources = [name for name in data if name in KNOWN and not Path(name).exists()]
    return read_documents(sources, tokenizer, "tune") if sources else []


def _check(session: FitSession, loaded: Loaded, fitted: FittedPolicy, place: Path, say: Say) -> dict[str, Any] | None:
    """Measures what the policy keeps of held-out text, writes it by layer, and returns means."""
    documents = held_out(session.data, loaded.tokenizer)
    fitting = session.fitting
    if sum(len(one.ids) for one in documents) < fitting.tokens:
        say("no held-out text (only the sources of mgam data list have one), so nothing is measured")
        return None
    say(f"measuring on {session.check} held-out texts")
    windows = Windows(documents, fitting.tokens, session.check, 7)
    texts = [windows[number]["input_ids"] for number in range(session.check)]
    group = next(iter(fitted.model.layers.values()))[1]
    levels = Levels(fitting.levels, fitting.search)
    lines: dict[str, Any] = {}
    for lookahead in ("block", "none"):
        kept = mass_kept(
            loaded.model, texts, peers(fitted.layers, group, levels, BUDGET, fitting.block), levels, budget=BUDGET,
            window=fitting.window, block=fitting.block, lookahead=lookahead,
        )  # fmt: skip
        lines[f"lookahead={lookahead}"] = summary(kept)
    body = {"budget": BUDGET, "tokens": fitting.tokens, "texts": session.check, "split": "tune", **lines}
    (place / KEPT).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return {name: {key: line[key] for key in ("mean", "gap_closed", "layers_below")} for name, line in lines.items()}


BUDGET = 1024
"""Tokens opened where what a policy keeps is measured."""


def summary(kept: Kept) -> dict[str, Any]:
    """Means by policy, how much of the gap between the search of equal cost and the oracle is closed, and layers."""
    mean = {name: round(kept.mean(name), 4) for name in kept.shares}
    gap = kept.mean("oracle") - kept.mean(EQUAL)
    layers = {name: {layer: kept.layer(name, layer) for layer in texts} for name, texts in kept.shares.items()}
    below = [
        layer
        for layer, (learned, error) in layers["learned"].items()
        if learned < layers[EQUAL][layer][0] - max(error, layers[EQUAL][layer][1])
    ]
    closed = (kept.mean("learned") - kept.mean(EQUAL)) / gap if gap > 0 else None
    return {
        "mean": mean, "gap_closed": None if closed is None else round(closed, 3), "layers_below": below,
        "layers": {
            name: {str(layer): [round(value, 4) for value in pair] for layer, pair in found.items()}
            for name, found in layers.items()
        },
    }  # fmt: skip


EQUAL = "scored, equal cost"
