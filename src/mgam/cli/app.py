"""The commands, by name."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from mgam.cli.ask import ask
from mgam.cli.bench import register as register_bench
from mgam.cli.chat import register as register_chat
from mgam.cli.digest import register as register_digest
from mgam.cli.env import env
from mgam.cli.eval import register as register_evaluation
from mgam.cli.failure import DEBUG_VARIABLE
from mgam.cli.fit import register as register_fit
from mgam.cli.info import register as register_info
from mgam.cli.methods import methods
from mgam.cli.patterns import register as register_patterns
from mgam.cli.verify import register as register_verify

app = typer.Typer(
    help="Ask questions of texts that are longer than the model was made for.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("ask")(ask)
register_bench(app)
register_digest(app)
register_chat(app)
register_info(app)
register_verify(app)
app.command("env")(env)
app.command("methods")(methods)
register_evaluation(app)
register_patterns(app)
register_fit(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        import mgam

        typer.echo(f"mgam {mgam.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Show where an error arose; {DEBUG_VARIABLE}=1 does the same.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"
