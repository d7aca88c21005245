"""`mgam chat NAME.mgam`: many questions, each of which sees what was said before."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from mgam.cli.ask import quiet_libraries, whole_number
from mgam.cli.digests import AGAIN, AGAIN_HELP, MEMORY_HELP, TIER_HELP, Tier, open_document


def chat(
    path: Annotated[str, typer.Argument(metavar="NAME.mgam", help="A digest.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file of the model that made it.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help=MEMORY_HELP)] = None,
    tier: Annotated[Tier, typer.Option(help=TIER_HELP)] = Tier.DISK,
    max_new_tokens: Annotated[
        int, typer.Option(parser=whole_number, metavar="TOKENS", help="An answer's greatest length.")
    ] = 128,
    reread: Annotated[
        int | None,
        typer.Option(
            parser=whole_number, metavar="TOKENS", help="Of the first question: " + AGAIN_HELP, show_default=str(AGAIN)
        ),
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch a hub id that is not here yet.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line for each answer.")] = False,
) -> None:
    """Talk about a digest: one question a line; an empty line or Ctrl-D ends."""
    quiet_libraries()
    from mgam.cli.progress import Stage

    with Stage(silent=as_json) as stage:
        document, _ = open_document(path, model, device, download, memory, stage, reread=reread, tier=tier)
    talk = document.chat()
    try:
        while question := _ask(as_json):
            if as_json:
                answer = talk.say(question, max_new_tokens=max_new_tokens)
                typer.echo(json.dumps({"question": question, **asdict(answer)}, ensure_ascii=False, default=str))
            else:
                with Stage(silent=False) as stage:
                    talk.say(question, max_new_tokens=max_new_tokens, on_text=stage.write)
    finally:
        document.close()


def register(app: typer.Typer) -> None:
    """Adds `chat` to the command line."""
    app.command("chat")(chat)


def _ask(silent: bool) -> str:
    """The next question; empty when there is none."""
    if not silent and sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    return sys.stdin.readline().strip()
