"""`mgam bench`: speed of attention on this GPU, beside its peers, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mgam.cli.outputs import require_place
from mgam.errors import SettingError

LENGTHS = "8192,32768,131072"
WITH_METHODS = ("methods", "lengths", "out", "device")
"""Options that count with --methods."""
ONLY_WITH_METHODS = ("device",)
SHORTEST = 64


def bench(
    context: typer.Context,
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = LENGTHS,
    phases: Annotated[str, typer.Option(help="Any of prefill, decode, training, peers.")] = "prefill,decode,training",
    out: Annotated[Path | None, typer.Option(help="Folder for CSV, JSON and pictures.")] = None,
    positions: Annotated[
        str, typer.Option(help="Of decode: granular or absolute. Prefill and training are timed with both.")
    ] = "granular",
    budget: Annotated[int, typer.Option(help="Tokens opened besides window and sink.")] = 2048,
    window: Annotated[int, typer.Option(help="Tokens of the window.")] = 512,
    heads: Annotated[str, typer.Option(help="Query heads and KV heads.")] = "32,8",
    dim: Annotated[int, typer.Option(help="Dimensions of a head.")] = 128,
    every: Annotated[int, typer.Option(help="Every n-th query of a text searches.")] = 32,
    dims: Annotated[int, typer.Option(help="Dimensions of search keys.")] = 64,
    bits: Annotated[int, typer.Option(help="Bits of search keys: 8 or 16.")] = 8,
    methods: Annotated[
        str, typer.Option(help="Time these methods instead, dense beside them: names from mgam methods, with commas.")
    ] = "",
    device: Annotated[str, typer.Option(help="With --methods: where they are timed: auto, cpu, cuda, ...")] = "auto",
    name: Annotated[str, typer.Option(help="Name of the files.")] = "attention",
    commit: Annotated[str | None, typer.Option(help="Name of the code, where git cannot say.")] = None,
) -> None:
    """Time building, searching and reading, and dense attention in the same run, on a CUDA device.

    With --methods: one layer that reads a text with each of them, and one token after it, on any device. Of the other
    options --lengths, --out and --device count then; --device counts only then.
    """
    _refuse_what_does_not_count(context, bool(methods))
    tokens = _numbers(lengths, "lengths")
    if min(tokens) < SHORTEST:
        raise SettingError(f"--lengths {lengths!r}: a text of {SHORTEST} tokens is the shortest that can be timed")
    if out is not None:
        require_place("--out", out, folder=True)
    if methods:
        _time_methods([one.strip() for one in methods.split(",")], tokens, device, out)
        return

    from mgam.benchmarks import PHASES

    wanted = [one.strip() for one in phases.split(",")]
    if unknown := sorted(set(wanted) - set(PHASES)):
        raise SettingError(f"phases {', '.join(unknown)} are unknown; choose from {', '.join(PHASES)}")
    query_heads, kv_heads = _heads(heads)
    least = {"budget": (budget, 0), "window": (window, 1), "dim": (dim, 1)}
    for option, (value, lowest) in least.items():
        if value < lowest:
            raise SettingError(f"--{option} is {value}; at least {lowest} is wanted")
    if bits not in (8, 16):
        raise SettingError(f"--bits is {bits}; 8 or 16 is wanted")
    if positions not in ("granular", "absolute"):
        raise SettingError(f"--positions is {positions!r}; granular or absolute is wanted")

    from mgam.benchmarks.setting import Setting

    setting = Setting(
        query_heads, kv_heads, dim, budget=budget, window=window, every=every, dims=dims, bits=bits, positions=positions
    )
    _ = setting.policy  # which refuses other values that cannot work

    import torch

    if not torch.cuda.is_available():
        raise SettingError("mgam bench measures GPU kernels and needs a CUDA device; none is visible here")
    from mgam.benchmarks.plots import plot, pyplot
    from mgam.benchmarks.suite import run

    if out is not None:
        pyplot()  # said before anything is timed where it is not installed
    report = run(setting, tokens, wanted, out, commit, name, say=typer.echo)
    if out is not None:
        for path in plot(report, out):
            typer.echo(f"wrote {path}")


def _refuse_what_does_not_count(context: typer.Context, with_methods: bool) -> None:
    for option in context.params:
        source = context.get_parameter_source(option)
        if source is None or source.name != "COMMANDLINE":
            continue
        if with_methods and option not in WITH_METHODS:
            raise SettingError(f"--{option} does not count with --methods; leave it out")
        if not with_methods and option in ONLY_WITH_METHODS:
            raise SettingError(f"--{option} counts only with --methods; leave it out")


def _heads(text: str) -> tuple[int, int]:
    numbers = _numbers(text, "heads")
    if len(numbers) != 2 or min(numbers) < 1 or numbers[0] % numbers[1]:
        raise SettingError(f"--heads {text!r}: query heads and KV heads that divide them are wanted, as 32,8")
    return numbers[0], numbers[1]


def _time_methods(names: list[str], lengths: list[int], device: str, out: Path | None) -> None:
    import json

    from mgam.benchmarks.methods import time_method
    from mgam.integrations.loading import resolve_device
    from mgam.methods import get

    place = str(resolve_device(device))
    for known in names:
        get(known)
    rows = []
    typer.echo(f"{'method':16}{'tokens':>9}{'reading, ms':>13}{'a token, ms':>13}{'peak, MiB':>11}{'kept, MiB':>11}")
    for length in lengths:
        for named in dict.fromkeys(["dense", *names]):
            row = {"method": named, "tokens": length, "device": place, **time_method(named, length, place)}
            rows.append(row)
            token = f"{1000 * row['token_seconds']:.2f}" if "token_seconds" in row else ""
            peak, kept = (f"{row[key] / 2**20:,.1f}" if row.get(key) else "" for key in ("peak_bytes", "kept_bytes"))
            typer.echo(f"{named:16}{length:9,}{1000 * min(row['seconds']):13.2f}{token:>13}{peak:>11}{kept:>11}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "methods.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _numbers(text: str, name: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise SettingError(f"--{name} {text!r}: whole numbers separated by commas are wanted") from None


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("bench")(bench)
