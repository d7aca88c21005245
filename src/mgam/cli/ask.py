"""`mgam ask FILE... "question"`: read, answer, and show what the answer rests on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgam.cli.digests import MEMORY_HELP, is_digest, open_document
from mgam.errors import SettingError

if TYPE_CHECKING:
    from mgam.cli.progress import Stage
    from mgam.documents.asking import Answer
    from mgam.documents.sources import Source
    from mgam.integrations.loading import Loaded


class Lookahead(StrEnum):
    """Who decides what a block of queries reads."""

    none = "none"
    block = "block"


class NumberFormat(StrEnum):
    """Number formats of weights, keys and values."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def whole_number(text: str | int) -> int:
    """A number of tokens, as typed."""
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a whole number of tokens") from error


@dataclass(frozen=True)
class Request:
    """What was asked for, before anything is loaded."""

    files: Sequence[str]
    question: str
    model: str | None
    device: str
    dtype: str | None
    download: bool
    memory: str | None
    method: str
    max_new_tokens: int
    settings: dict[str, Any]
    """Dials of `mgam.Settings` that the user turned."""


def ask(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Text files, or one digest; - is standard input.", show_default=False),
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What you want to know.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id, local folder or GGUF file.", show_default="the small model that is installed with mgam"
        ),
    ] = None,
    budget: Annotated[
        int,
        typer.Option(
            parser=whole_number, metavar="TOKENS", help="What a query may read in full outside window and sink."
        ),
    ] = 1024,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    max_new_tokens: Annotated[
        int, typer.Option(parser=whole_number, metavar="TOKENS", help="The answer's greatest length.")
    ] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    method: Annotated[str, typer.Option(help="How the text is read; dense reads all of it, slowly.")] = "mgam",
    lookahead: Annotated[
        Lookahead | None,
        typer.Option(
            help="Who decides what a block of the text reads: all its tokens, or those up to its first.",
            show_default="block",
        ),
    ] = None,
    dense_until: Annotated[
        int | None,
        typer.Option(
            parser=whole_number,
            metavar="TOKENS",
            help="Tokens before this position read everything in full.",
            show_default="4096, at most the model's window",
        ),
    ] = None,
    dtype: Annotated[
        NumberFormat | None, typer.Option(help="Number format.", show_default="float32 on the CPU, bfloat16 on a GPU")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a hub id that is not on this machine yet.")
    ] = False,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Of a digest: " + MEMORY_HELP)] = None,
) -> None:
    """Ask a question of one or more texts, however long.

    The answer appears as it is made; then the passages it rests on, what was read at which level, time and memory.
    """
    dials = {"budget": budget, "lookahead": lookahead and lookahead.value, "dense_until": dense_until}
    settings = {name: value for name, value in dials.items() if value is not None}
    request = Request(
        files,
        question.strip(),
        model,
        device,
        dtype and dtype.value,
        download,
        memory,
        method,
        max_new_tokens,
        settings,
    )
    _refuse_bad_request(request)
    quiet_libraries()
    answer = _answer(request, silent=as_json)
    _print_json(request, answer) if as_json else _print_rest(answer)


def _refuse_bad_request(request: Request) -> None:
    if not request.question:
        raise SettingError('the question is empty; ask something, as in: mgam ask FILE "Who is the captain?"')
    if request.files.count("-") > 1:
        raise SettingError("standard input (-) is named more than once, and can be read once only")
    if request.max_new_tokens < 1:
        raise SettingError(f"--max-new-tokens is {request.max_new_tokens}; at least 1 is wanted")


def quiet_libraries() -> None:
    """Their bars and notes would break up ours; set before they are imported, and only in this process."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _answer(request: Request, *, silent: bool) -> Answer:
    from mgam.cli.progress import Stage
    from mgam.documents.sources import read_source

    if is_digest(request.files[0]):
        return _ask_digest(request, silent=silent)
    if request.memory is not None:
        raise SettingError("--memory bounds the reading of digests; make one first: mgam digest FILE... -o NAME.mgam")
    sources = [read_source(name) for name in request.files]  # before torch is imported: a wrong name is told at once
    _refuse_bad_settings(request)
    with Stage(silent=silent) as stage:
        started = time.perf_counter()
        loaded = _load(request, stage)
        loading = time.perf_counter() - started
        stage.begin(_count_and_check(loaded, sources))
        answer = _read_and_answer(request, loaded, sources, stage)
    return replace(answer, seconds={"loading": round(loading, 3), **answer.seconds})


def _ask_digest(request: Request, *, silent: bool) -> Answer:
    from mgam.cli.progress import Stage

    if len(request.files) > 1:
        raise SettingError("one digest is asked at a time; add texts with: mgam digest FILE... -o NAME.mgam --append")
    path, model = request.files[0], request.model
    _refuse_other_settings(request, path)
    with Stage(silent=silent) as stage:
        document, seconds = open_document(path, model, request.device, request.download, request.memory, stage)
        answer = document.ask(request.question, max_new_tokens=request.max_new_tokens, on_text=stage.write)
    return replace(answer, seconds={**seconds, **answer.seconds})


def _refuse_other_settings(request: Request, path: str) -> None:
    """A digest is asked as it was read."""
    from pathlib import Path

    from mgam.documents.store.manifest import Manifest

    manifest = Manifest.read(Path(path))
    kept = {**manifest.settings.as_dict(), "dense_until": manifest.dense_until}
    usual = {"method": "mgam", "budget": 1024}
    for name, value in {**request.settings, "method": request.method}.items():
        if value not in (kept[name], usual.get(name)):
            raise SettingError(f"{path} was digested with {name} {kept[name]} and is asked with it; leave out {value}")


def _refuse_bad_settings(request: Request) -> None:
    """Before a model is loaded for nothing."""
    from mgam import methods

    methods.get(request.method).checked(**request.settings)


def _load(request: Request, stage: Stage) -> Loaded:
    stage.say("loading the model")
    from mgam.integrations.loading import load

    return load(
        request.model, device=request.device, dtype=request.dtype, download=request.download, on_status=stage.say
    )


def _count_and_check(loaded: Loaded, sources: Sequence[Source]) -> int:
    """Tokens of all sources, where there is memory for them; else the memory's error."""
    from mgam.integrations.memory import refuse_if_too_large

    tokens = sum(len(loaded.tokenizer(source.text, verbose=False).input_ids) for source in sources)
    refuse_if_too_large(loaded.model, tokens)
    return tokens


def _read_and_answer(request: Request, loaded: Loaded, sources: Sequence[Source], stage: Stage) -> Answer:
    import mgam
    from mgam import methods
    from mgam.documents import asking, infiniretri

    method = methods.get(request.method)
    how: dict[str, Any] = {
        "max_new_tokens": request.max_new_tokens,
        "on_progress": stage.advance,
        "on_text": stage.write,
    }
    if method.form == "loop":
        how["retrieval"] = method.checked(**request.settings)
        return infiniretri.ask(loaded.model, loaded.tokenizer, sources, request.question, **how)
    model = mgam.apply(loaded.model, request.method, **request.settings)
    return asking.ask(model, loaded.tokenizer, sources, request.question, **how)


def _print_json(request: Request, answer: Answer) -> None:
    import json

    result = {"question": request.question, **asdict(answer)}
    json.dump(result, sys.stdout, ensure_ascii=False, default=str)
    sys.stdout.write("\n")
    sys.stdout.flush()


def _print_rest(answer: Answer) -> None:
    from mgam.cli.result import show

    show(answer)
