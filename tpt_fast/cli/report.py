"""``tpt-fast report``: what the rows of an evaluation come to, computed again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .._files import atomic_write
from . import _shared
from ._shared import shown

if TYPE_CHECKING:
    from ..evaluation.report import SetReport
    from ..evaluation.sets import ImageSet


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The --out of `tpt-fast eval`.")],
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", file_okay=False, help="Where the files go. Default: FOLDER.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line for each set and method.")] = False,
    rows: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="All rows in one Parquet file.")
    ] = None,
) -> None:
    """Show what the rows of an evaluation come to, and write it as HTML, CSV, JSON and LaTeX. Nothing is run.

    Exit codes: 0 fine, 2 bad usage, 3 a problem of the environment.
    """
    _shared.check_stdout()
    with _shared.environment():
        from ..evaluation import report as reports
        from ..evaluation.folder import set_folders
        from ..evaluation.rows import write_merged

        with _shared.usage("FOLDER"):
            found = reports.report(folder)
        folders = set_folders(folder)
        if rows is not None:
            if len(folders) > 1:
                names = ", ".join(each.name for each in folders)
                raise typer.BadParameter(f"one file for {len(folders)} sets: give one of {names}", param_hint="--rows")
            _shared.check_file(rows, "--rows")
        try:
            if as_json:
                for line in reports.lines(found):
                    _shared.json_line(line)
            else:
                show(found)
        finally:  # even if nobody reads that any more
            write(found, to or folder)
            if rows is not None:
                _shared.remark(f"{write_merged(folders[0] / 'rows', rows):,} rows in {rows}")


def show(found: list[SetReport]) -> None:
    """The tables, a line for each method, on stdout."""
    for of_set in found:
        _shared.print_table(_table(of_set))
        said = [f"{of_set.images:,} images, {len(of_set.about['classnames'])} classes"]
        if of_set.peak_bytes:
            said.append(f"peak memory {of_set.peak_bytes / 1e9:.2f} GB")
        if of_set.peak_gpu_bytes:
            said.append(f"GPU {of_set.peak_gpu_bytes / 1e9:.2f} GB")
        said += [shown(each) for each in of_set.devices]
        _shared.print_lines(Text("; ".join(said), "dim"), *(Text(line, "dim") for line in _remarks(of_set)))
        _shared.print_lines(*(Text(f"{shown(id)}: {shown(why)}", "red") for id, why in of_set.errors.items()))


def write(found: list[SetReport], folder: Path) -> None:
    """The files of a report."""
    from ..evaluation import report as reports
    from ..evaluation.page import write_page

    folder.mkdir(parents=True, exist_ok=True)
    reports.write_csv(found, folder / "report.csv")
    reports.write_classes(found, folder / "classes.csv")
    for name, text in (("report.json", reports.as_json(found)), ("report.tex", reports.as_latex(found))):
        with atomic_write(folder / name) as aside:
            aside.write_text(text, "utf-8")
    write_page(found, folder / "report.html", _images)
    _shared.remark(f"report.html, report.csv, classes.csv, report.json and report.tex are in {folder}")


def _images(of_set: SetReport) -> ImageSet | str:
    """The images as the run opened them, for the pictures of the report."""
    from ..evaluation.sets import open_set

    source = of_set.about["model"].get("source")
    if source is None:
        return "the set was not opened by its name"
    try:
        images = open_set(source["set"], source["root"], as_published=source["as_published"], subset=source["subset"])
        if images.digest != of_set.about["digest"]:
            return f"{source['set']} holds other images now"
    except (OSError, ValueError) as error:
        return str(error)
    return images


def _table(of_set: SetReport) -> Table:
    from ..evaluation.published import Published
    from ..evaluation.report import METRICS

    columns = [
        "method",
        *(f"{heading} %" for heading, _ in METRICS.values()),
        "to zero-shot [95 %]",
        "s/image",
        "paper",
    ]
    table = Table(*columns, box=SIMPLE_HEAD, title=Text(shown(of_set.name), "bold"), title_justify="left")
    for column in table.columns[1:-1]:
        column.justify = "right"
    for each in of_set.methods:
        against, figure = each.against_zero_shot, each.published
        seconds = each.seconds_kept if math.isnan(each.seconds) else each.seconds
        paper = f"{figure.top1:.2f}" if isinstance(figure, Published) else "–"
        if isinstance(figure, Published) and figure.ece is not None:
            paper += f" (ECE {figure.ece:.2f})"
        table.add_row(
            Text(shown(each.label), "bold"),
            *(_spread(each.mean[name], each.sd[name]) for name in METRICS),
            ""
            if against is None
            else f"{100 * against.difference:+.2f} [{100 * against.low:+.2f}, {100 * against.high:+.2f}]",
            "" if math.isnan(seconds) else f"{seconds:.3g}" + (" kept" if math.isnan(each.seconds) else ""),
            paper,
        )
    return table


def _remarks(of_set: SetReport) -> list[str]:
    """Reasons, the same of several methods said once."""
    from ..evaluation.published import Published

    said: dict[str, list[str]] = {}
    for each in of_set.methods:
        if not isinstance(each.published, Published):
            said.setdefault(f"no published figure, {each.published}", []).append(each.label)
        elif each.differs:
            said.setdefault(f"{each.published.source}: {each.differs}", []).append(each.label)
        if each.failed:
            said.setdefault(f"{each.failed} images failed, in no metric", []).append(each.label)
        if each.images + each.failed < of_set.images:
            said.setdefault(f"{each.images + each.failed} of {of_set.images} images so far", []).append(each.label)
    return [f"{shown(', '.join(labels))}: {why}" for why, labels in said.items()]


def _spread(mean: float, sd: float) -> str:
    if math.isnan(mean):
        return ""
    return f"{100 * mean:.2f}" + ("" if math.isnan(sd) else f" ± {100 * sd:.2f}")
