"""`mgam digest FILE... -o NAME.mgam`: read once, keep what was read, ask it as often as one likes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgam.cli.ask import Lookahead, NumberFormat, quiet_libraries, whole_number
from mgam.cli.digests import ADAPTER_DEFAULT, ADAPTER_HELP, AGAIN, MEMORY_HELP, adapter_of, facts, in_words, load_for
from mgam.cli.outputs import require_place
from mgam.errors import SettingError

if TYPE_CHECKING:
    from mgam.documents.store.manifest import Manifest


@dataclass(frozen=True)
class Request:
    """What was asked for, before anything is loaded."""

    files: list[str]
    out: Path
    append: bool
    memory: str | None
    eight_bits: bool
    model: str | None
    device: str
    dtype: str | None
    download: bool
    method: str | None
    settings: dict[str, Any]
    adapter: str | None


def digest(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="NAME.mgam", help="Folder of the digest.")],
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE...", help="Text files; none goes on with a digest that was stopped."),
    ] = None,
    append: Annotated[bool, typer.Option("--append", help="Add the files to a finished digest.")] = False,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help=MEMORY_HELP)] = None,
    eight_bits: Annotated[bool, typer.Option("--eight-bits", help="Keep keys and values in 8 bits.")] = False,
    model: Annotated[str | None, typer.Option(help="Hub id, local folder or GGUF file.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[NumberFormat | None, typer.Option(help="Number format.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch a hub id that is not here yet.")] = False,
    method: Annotated[str | None, typer.Option(help="How the text is read.", show_default="mgam")] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            parser=whole_number, metavar="TOKENS", help="What a query may read in full outside window and sink."
        ),
    ] = None,
    lookahead: Annotated[Lookahead | None, typer.Option(help="Who decides what a block of the text reads.")] = None,
    dense_until: Annotated[
        int | None,
        typer.Option(parser=whole_number, metavar="TOKENS", help="Tokens before this position read everything."),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="FOLDER", help=ADAPTER_HELP, show_default=ADAPTER_DEFAULT)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Digest texts into a folder; the same command goes on where it was stopped."""
    dials = {"budget": budget, "lookahead": lookahead and lookahead.value, "dense_until": dense_until}
    given = {name: value for name, value in dials.items() if value is not None}
    request = Request(
        files or [],
        out,
        append,
        memory,
        eight_bits,
        model,
        device,
        dtype and dtype.value,
        download,
        method,
        given,
        adapter,
    )
    quiet_libraries()
    started = time.perf_counter()
    manifest = _run(request, silent=as_json)
    found = {**facts(manifest, out), "seconds": round(time.perf_counter() - started, 3)}
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        texts = "one text" if len(manifest.texts) == 1 else f"{len(manifest.texts)} texts"
        typer.echo(
            f"{out}: {manifest.tokens:,} tokens of {texts}, {found['bytes'] / 2**20:,.1f} MiB "
            f'({found["bytes_per_token"]:,.0f} bytes a token); ask with: mgam ask {out} "..."'
        )


def register(app: typer.Typer) -> None:
    """Adds `digest` to the command line."""
    app.command("digest")(digest)


def _run(request: Request, *, silent: bool) -> Manifest:
    from mgam.cli.progress import Stage
    from mgam.documents.sources import read_source
    from mgam.documents.store.manifest import NAME, Manifest
    from mgam.documents.tiers import parse_memory

    there = Manifest.read(request.out) if (request.out / NAME).exists() else None
    if there is None and not request.files:
        raise SettingError("no text was given; name at least one file, or - for standard input")
    if there is None and request.append:
        raise SettingError(f"there is no digest {request.out} to append to; leave out --append to make it")
    memory = parse_memory(request.memory)
    if there is None:
        require_place("--out", request.out, folder=True)
    sources = [read_source(name) for name in request.files]
    settings = _settings(request, there)
    with Stage(silent=silent) as stage:
        from mgam.documents import digesting
        from mgam.documents.document import Document
        from mgam.documents.rehearsing import rehearse
        from mgam.integrations.loading import load
        from mgam.integrations.transformers.apply import apply

        if there is not None:
            loaded = load_for(there, request.model, request.device, request.download, stage, request.dtype)
        else:
            stage.say("loading the model")
            loaded = load(
                request.model,
                device=request.device,
                dtype=request.dtype,
                download=request.download,
                on_status=stage.say,
            )
        adapter = adapter_of(loaded.model, request.adapter) if there is None else {}
        model = apply(loaded.model, settings.pop("method"), **settings, **adapter)
        stage.say("making tokens of the texts")
        begun = False

        def progress(done: int, total: int) -> None:
            nonlocal begun
            if not begun:
                stage.begin(total, done)
                begun = True
            stage.advance(done, total)

        manifest = digesting.digest(
            model,
            loaded.tokenizer,
            sources,
            request.out,
            append=request.append,
            memory=memory,
            eight_bits=request.eight_bits,
            on_progress=progress,
        )
        stage.say("making it ready for questions")
        document = Document.open(request.out, model, loaded.tokenizer, memory=memory)
        rehearse(document, AGAIN if manifest.settings.method == "mgam" else 0)
        document.close()
        return manifest


def _settings(request: Request, there: Manifest | None) -> dict[str, Any]:
    """The digest's own settings where there is one, else those asked for, checked before a model is loaded."""
    from mgam import methods

    given = {**({"method": request.method} if request.method else {}), **request.settings}
    if there is None:
        methods.get(request.method or "mgam").settings(**request.settings)
        return {"method": "mgam", **given}
    if request.adapter is not None:
        given["adapter"] = None if request.adapter == "none" else request.adapter
    kept = {**there.settings.as_dict(), "dense_until": there.dense_until}
    if differing := [name for name, value in given.items() if kept[name] != value]:
        words = ", ".join(in_words(name, kept[name]) for name in differing)
        raise SettingError(f"{request.out} was begun {words}; leave that out, or digest into a new folder")
    if request.eight_bits and there.shape.bits != 8:
        raise SettingError(f"{request.out} was begun without --eight-bits; leave it out, or digest into a new folder")
    return {**there.settings.as_dict(), "dense_until": there.settings.dense_until}
