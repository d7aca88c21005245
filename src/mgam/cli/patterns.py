"""`mgam patterns`: small models trained from scratch, to see which way of attending learns which pattern."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console

from mgam.errors import SettingError


def register(app: typer.Typer) -> None:
    """Adds `patterns` to the command line."""
    app.command("patterns")(patterns)


def patterns(
    methods: Annotated[str, typer.Option(help="Methods with trainable modules, with commas; all if not given.")] = "",
    only: Annotated[str, typer.Option("--patterns", help="Of the four patterns, with commas; all if not given.")] = "",
    length: Annotated[int, typer.Option(min=8, help="Tokens that can be looked at.")] = 32,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps of training at most; it ends early when all is learned.")
    ] = 2000,
    width: Annotated[int, typer.Option(min=8, help="Size of hidden states.")] = 64,
    seed: Annotated[int, typer.Option(help="Of weights and texts.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """Train small models on the four patterns of attention: noncausal and causal, self and cross.

    Accuracy is on texts that were not trained on. A method without a form for a pattern is left empty.
    """
    from mgam.evaluation.patterns import PATTERNS
    from mgam.evaluation.patterns.train import SIZES, Training, train_pattern
    from mgam.evaluation.registry import unknown
    from mgam.integrations.loading import resolve_device

    asked = _split(only) or list(PATTERNS)
    named = _split(methods) or list(SIZES)
    for kind, given, known in (("pattern", asked, PATTERNS), ("method", named, SIZES)):
        for name in given:
            if name not in known:
                raise SettingError(unknown(kind, name, list(known)))
    place = str(resolve_device(device))
    how = Training(length=length, steps=steps, width=width, seed=seed, device=place)
    found, notes = [], Console(stderr=True)
    for pattern in asked:
        for method in named:
            one = train_pattern(pattern, method, how)  # type: ignore[arg-type]
            found.append(one)
            if one.accuracy is not None:
                notes.print(f"{pattern} {method}: {one.accuracy:.1%} after {one.steps} steps", highlight=False)
    if as_json:
        json.dump([one.to_json() for one in found], sys.stdout, indent=1)
        sys.stdout.write("\n")
        return
    from rich.table import Table

    table = Table("method", *asked)
    for method in named:
        cells = {one.pattern: one for one in found if one.method == method}
        table.add_row(method, *("" if (one := cells[p]).accuracy is None else f"{one.accuracy:.1%}" for p in asked))
    Console().print(table)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
