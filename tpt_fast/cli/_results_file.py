"""The file of ``--out``: rows are on the disk as soon as they are made, and a run can go on where another ended.

CSV and JSON lines are appended to. A Parquet file is written at the end, in row groups; until then its rows are JSON
lines in ``FILE.part``. ``FILE.options.json`` says what the rows were made with.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import typer

from .._files import atomic_write
from . import _shared

KINDS = (".csv", ".jsonl", ".parquet")
_GROUP = 1000  # rows

#: Every column with its type by pyarrow's name.
COLUMNS = {
    "file": "string",
    "target": "string",
    "label": "string",
    "index": "int32",
    "prob": "float64",
    "zero_shot_label": "string",
    "zero_shot_prob": "float64",
    "entropy_before": "float64",
    "entropy_after": "float64",
    "status": "string",
    "ms": "float64",
    "error": "string",
    "top": "string",
    "engines": "string",
    "by_method": "string",
}

Row = dict[str, Any]


class ResultsFile:
    """Open for rows.

    Args:
        path: a file of one of :data:`KINDS`.
        made_with: what rows that stand in one file have in common, as JSON holds it.
        resume: go on with the rows that are there, where there are any.

    Raises:
        typer.BadParameter: it is there already, or was made with something else, or cannot be written.
        ImportError: pyarrow is missing.
    """

    def __init__(self, path: Path, made_with: Row, resume: bool) -> None:
        self.path, self._kind = path, path.suffix.lower()
        if self._kind not in KINDS:
            raise typer.BadParameter(f"{path} ends in none of {', '.join(KINDS)}", param_hint="--out")
        if self._kind == ".parquet":
            _pyarrow()
        self._journal = path.with_name(f"{path.name}.part") if self._kind == ".parquet" else path
        for each in (path, self._journal):
            if each.exists() and not each.is_file():
                raise typer.BadParameter(f"{each} is no regular file", param_hint="--out")
        try:
            self._file = open(self._journal, "a+b", buffering=0)  # noqa: SIM115 (until close)
        except OSError as error:
            raise typer.BadParameter(f"{path} cannot be written: {error.strerror}", param_hint="--out") from error
        try:
            self._begin(json.loads(json.dumps(made_with)), resume)
        except BaseException:
            if self._journal != path and not self._size():
                self._journal.unlink()
            self._file.close()
            raise

    def _begin(self, made_with: Row, resume: bool) -> None:
        path, options = self.path, self.path.with_name(f"{self.path.name}.options.json")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise typer.BadParameter(f"another run is writing {path}", param_hint="--out") from error
        if self._size() or (self._journal != path and path.exists()):
            if not resume:
                raise typer.BadParameter(f"{path} is there already: add --resume to go on with it", param_hint="--out")
            _check_same(path, options, made_with)
        else:
            try:
                with atomic_write(options) as aside:
                    aside.write_text(f"{json.dumps(made_with, indent=1)}\n", "utf-8")
            except OSError as error:
                raise typer.BadParameter(
                    f"{options} cannot be written: {error.strerror}", param_hint="--out"
                ) from error
        _drop_half_a_line(self._file)
        if self._kind == ".csv" and not self._size():
            self._append(",".join(COLUMNS))

    def rows(self) -> Iterator[Row]:
        """Those that it has, with the columns that can be read back from it.

        Raises:
            typer.BadParameter: it holds something else.
        """
        try:
            if self._kind == ".parquet" and self.path.exists():
                yield from _parquet_rows(self.path)
            self._file.seek(0)
            lines = io.TextIOWrapper(io.BytesIO(self._file.read()), "utf-8", newline="\n")
            yield from csv.DictReader(_checked(lines)) if self._kind == ".csv" else map(_json_row, lines)
        except (ValueError, KeyError, csv.Error) as error:
            message = f"{self.path} holds something else than rows of results: {error}"
            raise typer.BadParameter(message, param_hint="--out") from error

    def write(self, row: Row) -> None:
        """Have one more row on the disk, or raise OSError and leave those before it."""
        if self._kind == ".csv":
            cells = _flat(row)
            text = io.StringIO()
            csv.writer(text, lineterminator="").writerow([_cell(cells.get(name)) for name in COLUMNS])
            self._append(text.getvalue())
        else:
            self._append(json.dumps(_shared.finite(row), allow_nan=False))

    def close(self) -> None:
        """Write a Parquet file from its rows; OSError where that cannot be."""
        if self._kind == ".parquet":
            if self._size() or not self.path.exists():
                self._write_parquet()
            self._journal.unlink()
        self._file.close()

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _append(self, line: str) -> None:
        size, left = self._size(), memoryview(f"{line}\n".encode())
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError:  # a full disk
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise

    def _write_parquet(self) -> None:
        pa, parquet = _pyarrow()
        schema = pa.schema({name: getattr(pa, kind)() for name, kind in COLUMNS.items()})
        with atomic_write(self.path) as aside, parquet.ParquetWriter(aside, schema) as writer:
            for group in _groups(map(_flat, self.rows())):
                writer.write_table(pa.Table.from_pylist(group, schema), row_group_size=_GROUP)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("--out FILE.parquet needs pyarrow: pip install 'tpt_fast[parquet]'") from error
    return pyarrow, pyarrow.parquet


def _check_same(path: Path, options: Path, made_with: Row) -> None:
    try:
        before = json.loads(options.read_text("utf-8"))
    except (OSError, ValueError) as error:
        message = f"{options}, which says what {path} was made with, cannot be read ({error})"
        raise typer.BadParameter(message, param_hint="--resume") from error
    for name in before | made_with:
        was, now = before.get(name), made_with.get(name)
        if was == now:
            continue
        if isinstance(was, list) and isinstance(now, list):
            place = next((i for i, (a, b) in enumerate(zip(was, now)) if a != b), None)
            what = f"{len(was)} {name}, not {len(now)}" if place is None else f"{was[place]!r}, not {now[place]!r}"
            what = what if place is None else f"{name} whose number {place} is {what}"
        else:
            what = f"{name} {was!r}, not {now!r}"
        raise typer.BadParameter(f"{path} was made with {what}", param_hint="--resume")


def _drop_half_a_line(file: BinaryIO) -> None:
    """A run that was killed, or a machine that went down, may have left one."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        _shared.remark("dropped half a row at the end, which a run that was killed has left")
        file.truncate(whole)


def _checked(lines: Iterable[str]) -> Iterator[str]:
    header, lines = ",".join(COLUMNS), iter(lines)
    if (found := next(lines, "").rstrip("\n")) != header:
        raise ValueError(f"expected the columns {header}, got {found[:80]!r}")
    yield header
    yield from lines


def _json_row(line: str) -> Row:
    row = json.loads(line)
    if not isinstance(row, dict) or "file" not in row:
        raise ValueError(f"expected an object with a file, got {line[:40]!r}")
    return row


def _parquet_rows(path: Path) -> Iterator[Row]:
    _, parquet = _pyarrow()
    with parquet.ParquetFile(path) as file:
        if file.schema_arrow.names != [*COLUMNS]:
            raise ValueError(f"expected the columns {', '.join(COLUMNS)}, got {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(_GROUP):
            yield from batch.to_pylist()


def _flat(row: Row) -> Row:
    """Strings and numbers: what is nested becomes JSON, and strings are in one line and UTF-8."""
    flat = {}
    for name, value in _shared.finite(row).items():
        value = json.dumps(value) if isinstance(value, (list, dict)) else value
        flat[name] = _shared.shown(value) if isinstance(value, str) else value
    return flat


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while group := list(islice(rows, _GROUP)):
        yield group
