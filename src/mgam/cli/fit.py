"""`mgam fit MODEL --data ... -o FOLDER`: a learned policy for any model, and low-rank training if it is asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mgam.cli.ask import NumberFormat, quiet_libraries
from mgam.cli.outputs import require_place
from mgam.errors import SettingError


def fit(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where the policy goes.")],
    data: Annotated[
        list[str],
        typer.Option(
            "--data", metavar="TEXT", help="A file, a folder of .txt and .md files, or a source of: mgam data list."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Hub id, local folder or GGUF file.",
            show_default="the small model that is installed with mgam",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a text, at most what the model was trained for.")] = 8192,
    steps: Annotated[int, typer.Option(help="Steps of fitting.")] = 250,
    minutes: Annotated[float, typer.Option(help="It ends sooner after so long; 0: it does not.")] = 0.0,
    batch: Annotated[int, typer.Option(help="Texts of a step, over all devices.")] = 4,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    width: Annotated[int, typer.Option(help="Search dimensions.")] = 32,
    slots: Annotated[
        int, typer.Option(help="Search queries of a position and KV head; 0: one for each query head.")
    ] = 0,
    lookup_tokens: Annotated[
        int,
        typer.Option(help="Every second text is one of so many tokens with facts hidden in it and questions; 0: none."),
    ] = 0,
    importance: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Texts on which it is measured how much each head matters, for --recall; a text is read once for each "
            "layer and KV head. 0: all matter alike.",
            show_default="2 on a GPU, 0 without",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    check: Annotated[int, typer.Option(min=0, help="Held-out texts to measure the policy on.")] = 4,
    lora: Annotated[
        bool, typer.Option("--lora", help="Then train the model too, by low-rank adapters, to read by the policy.")
    ] = False,
    adapter_only: Annotated[
        bool,
        typer.Option(
            "--adapter-only",
            help="Fit no policy: train low-rank adapters alone, with full attention inside the model's window, to look "
            "things up. Read with them by --adapter FOLDER.",
        ),
    ] = False,
    policy: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="With --lora: go on from this policy instead of fitting one.")
    ] = None,
    lora_steps: Annotated[int, typer.Option(help="Most steps of low-rank training.")] = 400,
    lora_minutes: Annotated[float, typer.Option(help="It ends sooner after so long; 0: it does not.")] = 0.0,
    lora_batch: Annotated[int | None, typer.Option(help="Texts of its steps.", show_default="2; alone 4")] = None,
    lora_at_once: Annotated[
        int | None,
        typer.Option(help="How many of them are read together: faster, and more memory.", show_default="1"),
    ] = None,
    questions: Annotated[int, typer.Option(help="Questions about each of its texts.")] = 16,
    quotes: Annotated[
        float, typer.Option(min=0, max=1, help="Part of them that asks how a sentence of the text goes on.")
    ] = 0.0,
    alike: Annotated[
        float, typer.Option(min=0, max=1, help="Part of the texts with questions that hold many like facts.")
    ] = 0.0,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Adapters that the model reads with; with --adapter-only, to go on from."),
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the adapters.", show_default="16; alone 32")] = None,
    lora_rate: Annotated[
        float | None, typer.Option(help="Its learning rate.", show_default="0.0004; alone 0.0006")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Tokens of its texts, with commas.", show_default="6144,12288,24576; alone 2048,4096,8192"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    dtype: Annotated[
        NumberFormat | None, typer.Option(help="Number format.", show_default="float32 on the CPU, bfloat16 on a GPU")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch a hub id that is not here yet.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Fit a learned policy to a model, which stays as it is; the same command goes on where it was stopped.

    On several GPUs: accelerate launch -m mgam fit ... Read with it by --policy FOLDER, or mgam.apply(model,
    policy="FOLDER").
    """
    quiet_libraries()
    require_place("--out", out, folder=True)
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
    except ImportError as error:
        raise SettingError(f"fitting needs {error.name}: pip install 'mgam[train]'") from error
    from mgam.training.adapting import Adapting
    from mgam.training.fit import Fitting
    from mgam.training.reading import Reading
    from mgam.training.session import FitSession, run

    fitting = Fitting(
        tokens=tokens, steps=steps, minutes=minutes, batch=batch, rate=rate, width=width, slots=slots,
        lookup_tokens=lookup_tokens, importance=importance, seed=seed,
    )  # fmt: skip
    if lora and adapter_only:
        raise SettingError("--lora trains adapters by a policy, --adapter-only without one; give one of the two")
    wanted = {
        "lengths": lengths and _numbers(lengths), "batch": lora_batch, "at_once": lora_at_once, "rank": lora_rank,
        "rate": lora_rate,
    }  # fmt: skip
    dials: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    dials |= {"steps": lora_steps, "minutes": lora_minutes, "questions": questions, "seed": seed}
    session = FitSession(
        out, data, model, fitting, Reading(**dials) if lora else Adapting(**dials) if adapter_only else None, quotes,
        alike, adapter, policy, check, device, dtype and dtype.value, download,
    )  # fmt: skip
    first = int(os.environ.get("RANK", "0")) == 0
    found = run(session, (lambda line: None) if as_json or not first else _say)
    if not first:
        return
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _show(found)


def register(app: typer.Typer) -> None:
    """Adds `fit` to the command line."""
    app.command("fit")(fit)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _show(found: dict[str, Any]) -> None:
    for name, kept in (found.get("kept") or {}).items():
        shares = ", ".join(f"{one} {share:.1%}" for one, share in kept["mean"].items())
        typer.echo(f"of the attention outside sink and window, {name} opens: {shares}")
    option = "policy" if "numbers" in found else "adapter"
    size = f"{found['numbers']:,} numbers, " if "numbers" in found else ""
    typer.echo(
        f"{found['folder']}: {size}{found['seconds']:,.0f} s; read with it: "
        f'mgam ask FILE "..." --{option} {found["folder"]}'
    )


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise SettingError(f"--lengths is {text!r}; give numbers of tokens with commas, as 6144,12288") from error
