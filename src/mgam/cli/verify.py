"""`mgam verify NAME.mgam`: checks every byte of a digest, without the model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mgam.errors import DigestError


def verify(
    path: Annotated[Path, typer.Argument(metavar="NAME.mgam", help="A digest.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check every byte of a digest; exit code 2 and a list where something is wrong."""
    from mgam.cli.progress import Stage
    from mgam.documents import store

    with Stage(silent=as_json) as stage:
        stage.say(f"checking {path}")
        faults = store.verify(path)
    count = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
    if as_json and faults:
        listed = [asdict(fault) for fault in faults]
        message = f"{path} has {count}"
        typer.echo(json.dumps({"error": {"kind": DigestError.__name__, "message": message, "faults": listed}}))
        raise typer.Exit(2)
    if faults:
        for fault in faults:
            typer.echo(fault.message)
        raise DigestError(f"{path} has {count}; take the files from a copy, or digest the texts again")
    manifest = store.Manifest.read(path)
    whole = {"path": str(path), "complete": manifest.complete, "tokens": manifest.done, "faults": []}
    typer.echo(json.dumps(whole) if as_json else f"{path}: every byte is as it was written ({manifest.done:,} tokens)")


def register(app: typer.Typer) -> None:
    """Adds `verify` to the command line."""
    app.command("verify")(verify)
