"""The command line ``tpt-fast``: one file a command. torch is imported inside the commands, so that help is instant."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated

import typer

from . import _shared, bench, demo, doctor, methods, tune

app = typer.Typer(
    name="tpt-fast",
    help="Test-time prompt tuning of CLIP, exact and fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (tune.tune, methods.methods, demo.demo, doctor.doctor, bench.bench):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        import tpt_fast

        typer.echo(f"tpt-fast {tpt_fast.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. Exit codes: 0 fine, 1 some image failed, 2 bad usage, 3 a problem of the environment."""
    if sys.stdout is not None:  # file names need not be text, nor an encoding have every letter
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except OSError as error:  # a full disk under stdout
        with suppress(OSError, AttributeError):
            sys.stdout.close()  # or Python tries to write the rest once more
        _shared.complain(str(error))
        sys.exit(_shared.ENVIRONMENT)
