"""What the commands share: consoles, exit codes, progress, the kernels, rows of results."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .._files import check_writable
from ..extension.toolkit import BuildError

if TYPE_CHECKING:
    import torch

    from ..extension.load import Backend
    from ..result import TuneResult
    from ..tuner import Tuner

BAD_USAGE, ENVIRONMENT = 2, 3  #: exit codes; 0 is success
IMAGE_FAILED = ANSWERS_DIFFER = 1

out = Console()
err = Console(stderr=True)  # progress and remarks: stdout holds results and nothing else


def stop(message: str, code: int = ENVIRONMENT) -> NoReturn:
    """Say why on stderr and end with ``code``."""
    complain(message)
    raise typer.Exit(code)


def complain(message: str) -> None:
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def remark(message: str) -> None:
    err.print(Text(message, "dim"), soft_wrap=True)


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
def usage(option: str | None = None) -> Iterator[None]:
    """Turns what the library says of an option's value into bad usage."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


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
    try:
        check_writable(path)
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error.strerror}", param_hint=option) from error


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err, transient=True)


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
        tasks = []

        def advance(done: int, total: int) -> None:
            tasks[:] = tasks or [bar.add_task("compiling the kernels, once", total=total)]
            bar.update(tasks[0], completed=done, total=total)

        yield advance


def json_line(record: dict[str, Any]) -> None:
    typer.echo(json.dumps(_finite(record), allow_nan=False))


def _finite(value: Any) -> Any:
    """NaN and infinities are not JSON: null in their place."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run(
    tuner: Tuner,
    files: Iterable[Path],
    *,
    as_json: bool,
    top: int = 5,
    pictures: dict[Path, Path] | None = None,
    base: Path | None = None,
) -> int:
    """Tune for each file and show the rows: a table at the end, or a JSON line each at once.

    Args:
        pictures: where to save the plot of which files.
        base: folder that the files' names are shown relative to.

    Returns:
        How many files failed; the reason stands in the row of each.
    """
    from PIL.Image import DecompressionBombWarning

    warnings.simplefilter("ignore", DecompressionBombWarning)  # large photographs are welcome
    files, pictures, rows = list(files), pictures or {}, []
    try:
        with progress_bar() as bar, closing(tuner.map(files, keep_views=bool(pictures))) as results:
            for file, result in bar.track(zip(files, results, strict=True), len(files), description="tuning"):
                name = str(file.relative_to(base) if base else file)
                row = _row(name, result, top) if result.error is None else {"file": name, "error": str(result.error)}
                if file in pictures and result.error is None:
                    try:
                        result.plot(pictures[file])
                    except OSError as error:
                        row["error"] = f"{pictures[file]} cannot be written: {error.strerror or error}"
                rows.append(row)
                if as_json:
                    json_line(row)
    finally:  # an interrupted run shows what it has
        if not as_json and rows:
            out.print(_table(rows))
    return sum("error" in row for row in rows)


def _row(name: str, result: TuneResult, top: int) -> dict[str, Any]:
    best = result.topk(1)[0]
    return {
        "file": name,
        "label": best.label,
        "index": best.index,
        "prob": best.prob,
        "zero_shot_label": result.zero_shot_label,
        "zero_shot_prob": result.zero_shot_probs.max().item(),
        "entropy_before": result.extra.get("loss"),
        "entropy_after": result.extra.get("loss_after"),
        "status": result.status,
        "ms": 1e3 * result.timings["total"],
        "top": [prediction._asdict() for prediction in result.topk(top)],
        "engines": result.engines,
        "by_method": {name: each.topk(1)[0]._asdict() for name, each in result.by_method.items()},
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("file", "label", "prob", "zero-shot", "prob", "entropy", "ms")
    for column in table.columns:
        column.overflow = "fold"  # cut nothing off: the table may be written to a file
    for index in (2, 4, 6):
        table.columns[index].justify = "right"
    for row in rows:
        if "error" in row:
            table.add_row(Text(row["file"]), Text(row["error"], "red"))
        if "label" not in row:
            continue
        changed = row["label"] != row["zero_shot_label"]
        table.add_row(
            Text(row["file"]),
            Text(row["label"] + (" (skipped)" if row["status"] == "skipped" else ""), "bold"),
            f"{row['prob']:.1%}",
            Text(row["zero_shot_label"], "yellow" if changed else ""),
            f"{row['zero_shot_prob']:.1%}",
            "" if row["entropy_before"] is None else f"{row['entropy_before']:.3f} → {row['entropy_after']:.3f}",
            f"{row['ms']:.0f}",
        )
    return table
