"""`mgam ask FILE... "question"`: read, answer, and show what the answers rest on."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgam.cli.digests import (
    ADAPTER_DEFAULT,
    ADAPTER_HELP,
    AGAIN,
    AGAIN_HELP,
    MEMORY_HELP,
    adapter_of,
    in_words,
    is_digest,
    open_document,
)
from mgam.cli.outputs import require_place
from mgam.errors import SettingError

if TYPE_CHECKING:
    from mgam.cli.progress import Stage
    from mgam.documents.asking import Answer
    from mgam.documents.chart import Chart
    from mgam.documents.estimate import Estimate
    from mgam.documents.prompt import Prompt
    from mgam.documents.sources import Source
    from mgam.integrations.loading import Loaded


EXAMPLE = 'mgam ask FILE "Who is the captain?"'
CHOSEN_FROM = 128
"""Tokens that are read in full where short texts are to be read by choice too."""
ASKING = ("question_budget", "reread")
"""Settings that change nothing in how texts are read."""


class Lookahead(StrEnum):
    """Who decides what a block of queries reads."""

    none = "none"
    block = "block"


class Positions(StrEnum):
    """Where entries stand."""

    granular = "granular"
    absolute = "absolute"


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
    questions: Sequence[str]
    model: str | None
    device: str
    dtype: str | None
    download: bool
    memory: str | None
    method: str
    max_new_tokens: int
    settings: dict[str, Any]
    """Dials of `mgam.Settings` that the user turned."""
    adapter: str | None = None
    chart: Path | None = None
    """Where to draw what was read."""


def ask(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE...",
            help="Texts (plain, Markdown, HTML, PDF), or one digest; - is standard input.",
            show_default=False,
        ),
    ] = None,
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION", help="What you want to know; or give it with -q.", show_default=False),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--question", "-q", metavar="QUESTION", help="A question, or a further one; repeat it for more."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id, local folder or GGUF file.", show_default="the small model that is installed with mgam"
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            parser=whole_number,
            metavar="TOKENS",
            help="What a query may read in full outside window and sink.",
            show_default="1024, or the method's own",
        ),
    ] = None,
    question_budget: Annotated[
        int | None,
        typer.Option(
            parser=whole_number,
            metavar="TOKENS",
            help="The same for the question and the answer, which are few and may read more.",
            show_default="an eighth of the model's window, from the budget up to 4096",
        ),
    ] = None,
    reread: Annotated[
        int | None,
        typer.Option(
            parser=whole_number,
            metavar="TOKENS",
            help=AGAIN_HELP,
            show_default=f"{AGAIN} with method mgam",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    max_new_tokens: Annotated[
        int, typer.Option(parser=whole_number, metavar="TOKENS", help="The answer's greatest length.")
    ] = 64,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, or a list for several questions, and nothing else.")
    ] = False,
    method: Annotated[
        str, typer.Option(help="How the text is read, see: mgam methods; dense reads all of it, slowly.")
    ] = "mgam",
    positions: Annotated[
        Positions | None,
        typer.Option(
            help="Where entries stand: at their rank in what is read, for any length, or at their place in the text.",
            show_default="granular, or the method's own",
        ),
    ] = None,
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
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="A learned policy: what mgam fit wrote, a hub id, or `default`, the one that is shipped.",
        ),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="FOLDER", help=ADAPTER_HELP, show_default=ADAPTER_DEFAULT)
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option(help="Of a learned policy: the share of attention to read in full; easy passages then open less."),
    ] = None,
    chart: Annotated[
        Path | None,
        typer.Option(
            "--map",
            metavar="PAGE.html",
            help="Draw what each layer and head read at which level, for a browser.",
        ),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a hub id that is not on this machine yet.")
    ] = False,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Of a digest: " + MEMORY_HELP)] = None,
) -> None:
    """Ask one or more questions of one or more texts, however long; the texts are read once.

    What reading will take is said first. The answer appears as it is made; then the passages it rests on, whether it
    seems to stand in the text, what was read at which level, time and memory.
    """
    dials = {
        "budget": budget,
        "question_budget": question_budget,
        "reread": reread,
        "lookahead": lookahead and lookahead.value,
        "dense_until": dense_until,
        "positions": positions and positions.value,
        "policy": policy,
        "recall": recall,
    }
    words = [*(files or ()), *(() if question is None else (question,))]
    texts, questions = _parted(words, more or [])
    request = Request(
        texts,
        questions,
        model,
        device,
        dtype and dtype.value,
        download,
        memory,
        method,
        max_new_tokens,
        {name: value for name, value in dials.items() if value is not None},
        adapter,
        chart,
    )
    _refuse_bad_request(request)
    quiet_libraries()
    _run(request, as_json=as_json)


def _parted(words: Sequence[str], more: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files and questions: the last word asks, unless it is the only one or names a file, and -q asks."""
    named = bool(words) and (words[-1] == "-" or os.path.exists(words[-1]))
    if more and words and (named or len(words) == 1):
        return list(words), [one.strip() for one in more]
    if len(words) < 2 or named:
        but = f"; {words[-1]} is the name of a file" if len(words) > 1 else ""
        raise SettingError(f"a file and a question are wanted, as in: {EXAMPLE}{but}")
    return list(words[:-1]), [one.strip() for one in (words[-1], *more)]


def _refuse_bad_request(request: Request) -> None:
    if not all(request.questions):
        which = "the question" if len(request.questions) == 1 else "one of the questions"
        raise SettingError(f"{which} is empty; ask something, as in: {EXAMPLE}")
    if request.files.count("-") > 1:
        raise SettingError("standard input (-) is named more than once, and can be read once only")
    if request.max_new_tokens < 1:
        raise SettingError(f"--max-new-tokens is {request.max_new_tokens}; at least 1 is wanted")
    if request.chart is not None and is_digest(request.files[0]):
        raise SettingError("--map draws how texts are read; name the text itself, not its digest")
    if request.chart is not None and not request.chart.absolute().parent.is_dir():
        raise SettingError(f"--map {request.chart}: there is no folder {request.chart.parent} to write it to")
    if request.chart is not None:
        require_place("--map", request.chart)


def quiet_libraries() -> None:
    """Their bars and notes would break up ours; set before they are imported, and only in this process."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _run(request: Request, *, as_json: bool) -> None:
    """Asks all questions and prints the answers: as they come, or as JSON at the end."""
    from mgam.cli.progress import Stage
    from mgam.cli.result import show

    several = len(request.questions) > 1
    found: list[dict[str, Any]] = []
    with Stage(silent=as_json) as stage:
        answers = _ask_digest(request, stage) if is_digest(request.files[0]) else _ask_texts(request, stage)
        for number, question in enumerate(request.questions):
            if several:
                stage.head(question, first=not number)
            answer, known = next(answers)
            stage.finish()
            if as_json:
                found.append({"question": question, **asdict(answer), **known})
            else:
                show(answer)
    if as_json:
        _print_json(found if several else found[0])


def _ask_texts(request: Request, stage: Stage) -> Iterator[tuple[Answer, dict[str, Any]]]:
    """Answers, each with what else is known of it."""
    from mgam.documents.reading import answers
    from mgam.documents.sources import read_source

    if request.memory is not None:
        raise SettingError("--memory bounds the reading of digests; make one first: mgam digest FILE... -o NAME.mgam")
    sources = [read_source(name) for name in request.files]  # before torch is imported: a wrong name is told at once
    dials = _checked_dials(request)
    _refuse_map(request)
    started = time.perf_counter()
    loaded = _load(request, stage)
    loading = round(time.perf_counter() - started, 3)
    model, retrieval = _applied(request, loaded, dials)
    estimate = _estimate(model, loaded.tokenizer, sources, stage)
    stage.begin(estimate.tokens)
    how: dict[str, Any] = {
        "max_new_tokens": request.max_new_tokens,
        "on_progress": stage.advance,
        "on_text": stage.write,
        "retrieval": retrieval,
    }
    if request.chart is not None:
        how["on_chart"] = _draw(request.chart, stage)
    for answer in answers(model, loaded.tokenizer, sources, request.questions, **how):
        yield replace(answer, seconds={"loading": loading, **answer.seconds}), {"estimate": asdict(estimate)}
        loading = 0.0


def _refuse_map(request: Request) -> None:
    from mgam import methods

    if request.chart is not None and (request.method == "dense" or methods.get(request.method).form == "loop"):
        raise SettingError(f"--map draws how passages are chosen, which --method {request.method} does not do")


def _draw(path: Path, stage: Stage) -> Callable[[Chart, Prompt, Answer], None]:
    """Writes a page for each answer in which something was chosen: the first as it was named, others with a number."""
    from mgam.documents.chart import write_map

    number = 0

    def draw(chart: Chart, prompt: Prompt, answer: Answer) -> None:
        nonlocal number
        if not chart.reads:
            tokens = answer.tokens["document"]
            longer = tokens > answer.settings["window"] + CHOSEN_FROM
            hint = f" (--dense-until {CHOSEN_FROM} reads them by choice)" if longer else ""
            stage.note(f"no map: all {tokens:,} tokens were read in full{hint}", always=True)
            return
        number += 1
        place = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        write_map(place, chart, prompt, answer, tuple(answer.settings["levels"]))
        stage.note(f"the map is in {place}")

    return draw


def _ask_digest(request: Request, stage: Stage) -> Iterator[tuple[Answer, dict[str, Any]]]:
    """Answers, each with what else is known of it: nothing."""
    if len(request.files) > 1:
        raise SettingError("one digest is asked at a time; add texts with: mgam digest FILE... -o NAME.mgam --append")
    path, model = request.files[0], request.model
    _refuse_other_settings(request, path)
    budget, again = (request.settings.get(name) for name in ASKING)
    document, seconds = open_document(
        path, model, request.device, request.download, request.memory, stage, budget, again
    )
    for question in request.questions:
        answer = document.ask(question, max_new_tokens=request.max_new_tokens, on_text=stage.write)
        yield replace(answer, seconds={**seconds, **answer.seconds}), {}
        seconds = dict.fromkeys(seconds, 0.0)


def _refuse_other_settings(request: Request, path: str) -> None:
    """A digest is asked as it was read, but for what concerns questions alone."""
    from mgam.documents.store.manifest import Manifest

    manifest = Manifest.read(Path(path))
    kept = {**manifest.settings.as_dict(), "dense_until": manifest.dense_until}
    kept["dtype"] = manifest.shape.dtype
    asked = {**request.settings, **({} if request.method == "mgam" else {"method": request.method})}
    if request.adapter is not None:
        asked["adapter"] = None if request.adapter == "none" else request.adapter
    if request.dtype is not None:
        asked["dtype"] = request.dtype
    for name, value in asked.items():
        if name in ASKING or value == kept[name]:
            continue
        option = f"--{name.replace('_', '-')} {'none' if value is None else value}"
        if name in ("policy", "recall"):
            raise SettingError(f"{path} is searched without training, as all digests are; leave out {option}")
        raise SettingError(f"{path} was digested {in_words(name, kept[name])} and is asked so; leave out {option}")


def _checked_dials(request: Request) -> Any:
    """The method's dials, checked before a model is loaded for nothing."""
    from mgam import methods

    return methods.get(request.method).checked(**request.settings)


def _load(request: Request, stage: Stage) -> Loaded:
    stage.say("loading the model")
    from mgam.integrations.loading import load

    return load(
        request.model, device=request.device, dtype=request.dtype, download=request.download, on_status=stage.say
    )


def _applied(request: Request, loaded: Loaded, dials: Any) -> tuple[Any, Any]:
    """The model as it is to read, and the dials of a loop around it where the method is one."""
    import mgam
    from mgam import methods

    if methods.get(request.method).form == "loop":
        if request.adapter is not None:
            raise SettingError(f"--adapter has no part in --method {request.method}; leave it out")
        return loaded.model, dials
    adapter = adapter_of(loaded.model, request.adapter, request.settings.get("policy"))
    settings = {**({"reread": AGAIN} if request.method == "mgam" else {}), **request.settings}
    return mgam.apply(loaded.model, request.method, **settings, **adapter), None


def _estimate(model: Any, tokenizer: Any, sources: Sequence[Source], stage: Stage) -> Estimate:
    """What reading will take, said before it begins; refused where memory cannot suffice."""
    from mgam.documents.estimate import estimate

    stage.say("estimating what reading will take")
    tokens = sum(len(tokenizer(source.text, verbose=False).input_ids) for source in sources)
    found = estimate(model, tokens)
    stage.note(found.in_words())
    return found


def _print_json(found: object) -> None:
    import json

    json.dump(found, sys.stdout, ensure_ascii=False, default=str)
    sys.stdout.write("\n")
    sys.stdout.flush()
