"""The command line ``tpt-fast``: one file a command. torch is imported inside the commands, so that help is instant."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import _shared, bench, bench_demo, demo, doctor, methods, report, train, tune, words
from .eval import evaluate
from .map import map_image


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if hasattr(error, "format_message"):  # bad usage, which may name a file
                error.message = _shared.shown_lines(error.message)  # type: ignore[attr-defined]
            raise


app = typer.Typer(
    name="tpt-fast",
    cls=_Commands,
    help="Test-time prompt tuning of CLIP, exact and fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    tune.tune,
    train.train,
    methods.methods,
    words.words,
    demo.demo,
    doctor.doctor,
    bench.bench,
    bench_demo.bench_demo,
    report.report,
):
    app.command()(command)
app.command("map")(map_image)
app.command("eval")(evaluate)


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


def _end(number: int, _frame: Any) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    """Run the command line. Exit codes: 0 fine, 1 some image failed, 2 bad usage, 3 a problem of the environment, and
    128 more than a signal that has ended it."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)  # what is done until then is shown
    if sys.stdout is not None:  # file names need not be text, nor an encoding have every letter
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        app()
    except OSError as error:  # a full disk under stdout
        with suppress(OSError, AttributeError):
            sys.stdout.close()  # or Python tries to write the rest once more
        _shared.complain(str(error))
        sys.exit(_shared.ENVIRONMENT)
