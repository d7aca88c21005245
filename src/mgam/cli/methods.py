"""`mgam methods`: the ways to read that can be chosen, and what each declares of itself."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def methods(as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False) -> None:
    """List the ways to read, with their declared properties."""
    from mgam.methods import get, names

    declared = [get(name).declared() for name in names()]
    if as_json:
        typer.echo(json.dumps(declared, ensure_ascii=False, default=str))
        return
    for method in declared:
        needs = f"; needs {', '.join(method['needs'])}" if method["needs"] else ""
        typer.echo(f"{method['name']}: {method['title']}")
        typer.echo(f"    {method['paper']}")
        typer.echo(f"    {method['phase']}, causal: {method['causal']}, cover: {method['cover']}{needs}")
