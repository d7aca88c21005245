"""`mgam info NAME.mgam`: what a digest holds and how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mgam.cli.digests import facts


def info(
    path: Annotated[Path, typer.Argument(metavar="NAME.mgam", help="A digest.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a digest holds; needs no model."""
    from mgam.documents.store import Manifest
    from mgam.documents.store.store import changed

    manifest = Manifest.read(path)
    found = {**facts(manifest, path), "changed": changed(manifest)}
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    state = "complete" if manifest.complete else f"unfinished, {manifest.done:,} tokens are digested"
    typer.echo(f"{path}: {manifest.tokens:,} tokens, {state}")
    typer.echo(f"  model     {manifest.model['name']}, {manifest.shape.dtype}, pages of {manifest.shape.bits} bits")
    typer.echo(f"  on disk   {found['bytes'] / 2**20:,.1f} MiB, {found['bytes_per_token']:,.0f} bytes a token")
    typer.echo(f"  in memory {found['resident_bytes_per_token']:,.0f} bytes a token, and pages as they are chosen")
    settings = manifest.settings
    typer.echo(f"  read by   {settings.method}, budget {settings.budget}, window {settings.window}")
    for text in manifest.texts:
        note = ", has changed since" if text.name in found["changed"] else ""
        typer.echo(f"  text      {text.name}, {text.bytes:,} bytes{note}")
    typer.echo("  made with " + ", ".join(f"{name} {version}" for name, version in manifest.made_with.items()))


def register(app: typer.Typer) -> None:
    """Adds `info` to the command line."""
    app.command("info")(info)
