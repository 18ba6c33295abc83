"""What the commands share: consoles, exit codes, messages, progress, the kernels."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from .._files import check_writable
from ..extension.toolkit import BuildError

if TYPE_CHECKING:
    import torch

    from ..extension.load import Backend

BAD_USAGE, ENVIRONMENT = 2, 3  #: exit codes; 0 is success
IMAGE_FAILED = ANSWERS_DIFFER = 1
READABLE = 60  # columns of a terminal in which a table can be read folded


class _Results(Console):
    def on_broken_pipe(self) -> None:
        """rich itself ends the process with 1 and says nothing."""
        _reader_has_gone()


out = _Results()
err = Console(stderr=True)  # progress and remarks: stdout holds results and nothing else


def shown(text: str) -> str:
    """``text`` with escapes in place of what a terminal would obey: control characters, changes of direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown_lines(text: str) -> str:
    return "\n".join(map(shown, text.split("\n")))


def stop(message: str, code: int = ENVIRONMENT) -> NoReturn:
    """Say why on stderr and end with ``code``."""
    complain(message)
    raise typer.Exit(code)


def complain(message: str) -> None:
    err.print(Text.assemble(("error: ", "bold red"), shown_lines(message)), soft_wrap=True)


def remark(message: str, style: str = "dim") -> None:
    err.print(Text(shown_lines(message), style), soft_wrap=True)


@contextmanager
def environment() -> Iterator[None]:
    """Turns problems of the machine into a message and the exit code for them."""
    try:
        yield
    except ImportError as error:
        stop(f"{error}. `tpt-fast doctor` shows what is missing.")
    except BuildError as error:
        stop(str(error))


@contextmanager
def usage(option: str | Callable[[str], str | None] | None = None, *, anything: bool = False) -> Iterator[None]:
    """Turns what the library says of an option's value into bad usage.

    Args:
        option: its name, or a function that finds it in the message.
        anything: whatever is raised, but for problems of the machine, is about the option.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (TypeError, ValueError)) and (
            not anything or isinstance(error, (ImportError, BuildError, typer.Exit))
        ):
            raise
        message = str(error) if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: {error}"
        raise typer.BadParameter(message, param_hint=option(message) if callable(option) else option) from error


def check_picture(path: Path, option: str) -> None:
    """Find out now, before long work, that a picture could not be written there.

    Raises:
        ImportError: matplotlib is missing.
        typer.BadParameter: an ending that it does not know, or a file that cannot be written.
    """
    import matplotlib  # noqa: F401 (the whole, before a part of it that may have been imported already)
    from matplotlib.backend_bases import FigureCanvasBase

    endings = FigureCanvasBase.get_supported_filetypes().keys() - {"pgf"}  # which needs LaTeX
    if path.suffix[1:].lower() not in endings:
        raise typer.BadParameter(f"{path} ends in none of {', '.join(sorted(endings))}", param_hint=option)
    check_file(path, option)


def check_file(path: Path, option: str) -> None:
    """Find out now whether it can be written.

    Raises:
        typer.BadParameter: it cannot.
    """
    try:
        check_writable(path)
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error.strerror}", param_hint=option) from error


class TimeLeft(ProgressColumn):
    """An estimate from the first step on."""

    def render(self, task: Task) -> Text:
        if not task.completed or task.total is None or task.elapsed is None:
            return Text("-:--:-- left")
        return Text(f"{clock(task.elapsed / task.completed * (task.total - task.completed))} left", "cyan")


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def progress_bar() -> Progress:
    described = TextColumn("{task.description}", markup=False)
    return Progress(described, BarColumn(), MofNCompleteColumn(), TimeLeft(), console=err, transient=True)


def kernels(device: torch.device | str = "cpu") -> Backend:
    """Have the kernels for ``device`` ready, under a progress bar where they must be compiled first."""
    from ..extension import load

    with warnings.catch_warnings(record=True) as caught, compiling() as progress:
        warnings.simplefilter("always", load.BackendWarning)
        try:
            backend = load.ensure(device, progress=progress)
        except ValueError as error:  # TPT_FAST_BACKEND is misspelt
            stop(str(error))
    for warning in caught:
        remark(str(warning.message))
    return backend


@contextmanager
def compiling() -> Iterator[Any]:
    """A callback for :func:`tpt_fast.extension.load.ensure` that draws a bar once there is something to compile."""
    with progress_bar() as bar:
        tasks: list[TaskID] = []

        def advance(done: int, total: int) -> None:
            tasks[:] = tasks or [bar.add_task("compiling the kernels, once", total=total)]
            bar.update(tasks[0], completed=done, total=total)

        yield advance


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on a terminal."""
    with err.status(Text(shown(what))):
        yield


def check_stdout() -> None:
    """Results that nobody could see are not computed."""
    if sys.stdout is None:
        stop("standard output is closed: the results have no place to go")


@contextmanager
def _to_stdout() -> Iterator[None]:
    """A reader that has gone, as ``head`` does, ends the command with a message instead of silently."""
    try:
        yield
    except BrokenPipeError:
        _reader_has_gone()


def _reader_has_gone() -> NoReturn:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())  # or Python tries to write the rest once more
    stop("standard output was closed by its reader: results are lost")


def json_line(record: dict[str, Any]) -> None:
    with _to_stdout():
        typer.echo(json.dumps(finite(record), allow_nan=False))


def finite(value: Any) -> Any:
    """NaN and infinities are not JSON: null in their place."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(table: Table, console: Console = out) -> None:
    """Fold it on a terminal; in a file, a pipe or a terminal too narrow for that its lines are as long as they are."""
    wide = console.options.update(width=1_000_000)
    natural = console.measure(table, options=wide).maximum
    folds = console.file.isatty() and console.width >= READABLE
    with _to_stdout():
        if folds:
            console.print(table)
        else:
            # both sides, or a dumb one has 80 columns
            type(console)(file=console.file, width=natural, height=console.height).print(table)


def print_lines(*lines: Text) -> None:
    with _to_stdout():
        for line in lines:
            out.print(line, soft_wrap=True)
