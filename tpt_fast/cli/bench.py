"""``tpt-fast bench``: whole images of open_clip's models against the published algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from . import _models, _shared

if TYPE_CHECKING:
    import torch

    from ..bench.case import Case
    from ..bench.rows import Row

_OUTPUT = "Output"


class Options(NamedTuple):
    """What is measured, and how."""

    models: list[str]
    classes: list[int]
    repeats: int
    published: bool
    device: str | None
    precision: str
    seconds: float
    images: int


def bench(
    model: Annotated[list[str], typer.Option(metavar="NAME", help="An open_clip model to measure; may be repeated.")],
    classes: Annotated[
        list[int], typer.Option(min=2, max=1000, help="So many of ImageNet's names; may be repeated.")
    ] = [10, 200, 1000],  # noqa: B006 (typer copies it)
    repeats: Annotated[int, typer.Option(min=3, help="Timed calls of each, taking turns; the medians count.")] = 9,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="Default: cuda if there is a GPU, else cpu.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    seconds: Annotated[
        float,
        typer.Option(min=0, help="About the most that the timed calls of one row take together; at least one is made."),
    ] = 60.0,
    images: Annotated[int, typer.Option(min=0, help="Images of a batch and of a stream; 0 leaves both out.")] = 4,
    skip_published: Annotated[bool, typer.Option("--skip-published", help="Without the published algorithm.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line for each row.", rich_help_panel=_OUTPUT)
    ] = False,
    rows: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="Keep the rows here as JSON lines, in place of older ones of the same case and machine.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", dir_okay=False, help="Picture of where one image's time goes.", rich_help_panel=_OUTPUT
        ),
    ] = None,
) -> None:
    """Time whole images of open_clip's models against the published algorithm in plain PyTorch and PIL.

    64 views, random weights, on which speed does not depend; both sides' answers are compared. `tpt-fast bench-demo`
    takes seconds.

    Exit codes: 0 all fine, 1 answers differ, 2 bad usage, 3 a problem of the environment.
    """
    _shared.check_stdout()
    with _shared.environment():
        options = Options(model, classes, repeats, not skip_published, device, precision, seconds, images)
        measure(options, check(options, rows, plot), as_json, rows, plot)


def check(options: Options, rows: Path | None, plot: Path | None) -> torch.device:
    """Find bad usage now, before hours of measuring; returns the device."""
    from .._checks import check_choice
    from ..config import STORED

    with _shared.usage("--precision"):
        check_choice("precision", options.precision, STORED)
    place = _models.place_of(options.device)
    if plot is not None:
        _shared.check_picture(plot, "--plot")
    for name in options.models:
        _models.check_name(name)
    if rows is not None:
        from ..bench.rows import write

        try:
            with _shared.usage("--rows"):
                write(rows, [])  # as it will be written after every row
        except OSError as error:
            raise typer.BadParameter(f"{rows} cannot be written: {error.strerror}", param_hint="--rows") from error
    return place


def measure(options: Options, place: torch.device, as_json: bool, file: Path | None, plot: Path | None) -> None:
    """Measure every case and show its rows: a table at the end, or a JSON line each at once.

    ``file`` has each row as soon as it is measured, and an interrupted run shows what it has. Answers that differ make
    no rows; the other cases go on, and the exit code is 1.
    """
    import torch

    from ..bench.agreement import Disagreement
    from ..bench.case import MODES, STARTS
    from ..bench.measure import many_images, one_image
    from ..bench.rates import full_float32

    _shared.kernels(place)
    full_float32()
    times: dict[str, Any] = {"repeats": options.repeats, "seconds": options.seconds}
    parts = [*STARTS, *MODES] if options.images else STARTS
    total = len(options.models) * len(options.classes) * len(parts)
    rows: list[Row] = []
    wrong = 0
    try:
        with _shared.progress_bar() as bar:
            task = bar.add_task("", total=total)
            for case in _cases(options, place, lambda doing: bar.update(task, description=doing)):
                published = options.published and _can_be_published(case)
                for part in parts:
                    bar.update(task, description=case.title(part))
                    try:
                        if part in STARTS:
                            new = one_image(case, part, published=published, **times)
                        else:
                            new = many_images(case, part, options.images, **times)
                    except Disagreement as error:
                        _shared.complain(f"{case.title(part)}: {error}")
                        wrong, new = wrong + 1, []
                    except torch.OutOfMemoryError as error:
                        _shared.stop(f"{case.title(part)}: {error}".partition("\n")[0])
                    rows += new
                    if file is not None:
                        _keep(new, file)
                    for row in new if as_json else ():
                        _shared.json_line(row)
                    bar.advance(task)
                del case  # before the next one's tensors
    except KeyboardInterrupt:
        where = f", which are in {file}" if file is not None else ""
        _shared.remark(f"interrupted after {len(rows)} rows{where}")
        raise
    finally:
        if rows and not as_json:
            _shared.print_table(_table(rows))
        if plot is not None and rows:
            _draw(rows, plot)
    if wrong:
        _shared.stop(f"answers differ in {wrong} of {total} measurements", _shared.ANSWERS_DIFFER)


def _cases(options: Options, place: torch.device, say: Callable[[str], None]) -> Iterator[Case]:
    from ..bench.case import Case, RandomModel

    for name in options.models:
        say(f"making {name}")
        try:
            random = RandomModel.of(name, place)
        except Exception as error:  # a download, a Hugging Face library that is missing: open_clip raises anything
            _shared.stop(f"{name} cannot be made: {error}")
        for classes in options.classes:
            say(f"{name}, encoding {classes} class names")
            try:
                case = Case(random, classes, options.precision)
            except (TypeError, ValueError) as error:
                _shared.stop(f"{name} cannot be tuned: {error}")
            yield case
            del case
        del random


def _can_be_published(case: Case) -> bool:
    if reason := case.unpublished():
        _shared.remark(f"{case.title('published')}: left out, {reason}")
    return reason is None


def _keep(rows: list[Row], file: Path) -> None:
    from ..bench.rows import write

    try:
        write(file, rows)
    except OSError as error:  # a full disk
        _shared.stop(f"{file} cannot be written: {error.strerror}")


def _draw(rows: list[Row], plot: Path) -> None:
    from ..bench.picture import draw

    try:
        draw(rows, plot)
    except OSError as error:
        _shared.stop(f"{plot} cannot be written: {error.strerror or error}")


def _table(rows: list[Row]) -> Table:
    machine = f"{rows[0]['gpu'] or rows[0]['cpu']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}"
    headings = "case", "", "median", "20 %, 80 %", "images/s", "peak MB", "ratio", "floors"
    caption = f"{machine}; ratio: to tpt_fast; floors: times the time of its matrix products at this machine's rate"
    table = Table(*headings, caption=caption, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.columns[0].overflow = "fold"  # cut nothing off: the table may be written to a file
    for column in table.columns[1:]:
        column.no_wrap, column.justify = True, "right"
    for case in dict.fromkeys(row["case"] for row in rows):
        lines = [_line(row) for row in rows if row["case"] == case]
        table.add_row(case, *map("\n".join, zip(*lines, strict=True)))
    return table


def _line(row: Row) -> list[str]:
    from ..bench.rows import duration

    return [
        row["backend"],
        duration(row["median"]),
        f"{duration(row['q20'])}, {duration(row['q80'])}",
        f"{row['images_per_s']:.3g}",
        "?" if row["peak_mb"] is None else f"{row['peak_mb']}",
        f"{row['ratio']:.1f}",
        f"{row['over_floor']:.2f}" if "over_floor" in row else "",
    ]
