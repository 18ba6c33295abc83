"""CSV and Parquet files of images: columns ``path`` and ``label``."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import checks
from .folders import path_name
from .names import Labels, given
from .sets import Files, ImageSet, Rows

_COLUMNS = ("path", "label")


def open_table(path: Path, root: Path | None, classnames: Sequence[str] | None = None) -> ImageSet:
    """Images by their paths, which begin at ``root``, by default the folder of the table; other columns are not read.

    Labels are the places of classes, or their names, never both. Names, in label order, are ``classnames``, those in
    ``classnames.txt`` beside the table, those that Hugging Face's datasets keep in a Parquet file, or, where labels are
    names, these in the order of Python's strings.
    """
    folder = root or path.parent
    names, read = given(classnames, [path.parent]), _csv if path.suffix.lower() == ".csv" else _parquet
    if names is None and read is _parquet:
        names = _datasets_names(path)
    labels, rows, missing, total = Labels(path, names), Rows(), [], 0
    outside = None
    for file, label in read(path):
        total += 1
        if not file or not label:
            raise ValueError(f"{path}: row {total} has no {'path' if not file else 'label'}")
        if os.path.isabs(file):
            inside = os.path.relpath(file, folder)
            if inside.startswith(".."):
                outside = outside or file
            else:
                file = inside
        try:
            size = os.stat(os.path.join(folder, file)).st_size
        except OSError:
            missing.append(file)
            continue
        rows.add(file, labels.meet(label), size)
    name = path_name(path.with_suffix(""))
    checks.files(name, missing, total, folder)
    if not total:
        raise ValueError(f"{name}: {path} has no rows")
    places, names = labels.resolve()
    rows.relabel(places)
    notes = [f"{outside} lies outside of {folder}: ids of such rows are of this machine"] if outside else []
    return rows.to_set(name, names, Files(str(folder)), notes=notes)


def _csv(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        header = [each.strip() for each in next(rows, [])]
        at = _columns(header, path)
        for number, row in enumerate(rows, 1):
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(f"{path}: row {number} has {len(row)} columns, expected {len(header)}")
            yield row[at[0]], row[at[1]].strip()


def _parquet(path: Path) -> Iterator[tuple[str, str]]:
    file = _open_parquet(path)
    _columns(file.schema_arrow.names, path)
    label = file.schema_arrow.field("label").type
    if not (str(label).startswith(("int", "uint", "string", "large_string", "dictionary"))):
        raise ValueError(f"{path}: expected integers or strings in column label, got {label}")
    for batch in file.iter_batches(batch_size=8192, columns=list(_COLUMNS)):
        paths, labels = (batch.column(name).to_pylist() for name in _COLUMNS)
        for one, other in zip(paths, labels):
            yield one or "", "" if other is None else str(other)


def _columns(header: Sequence[str], path: Path) -> list[int]:
    for each in _COLUMNS:
        if list(header).count(each) != 1:
            hint = ""
            if "image" in header and each == "path":
                hint = ": images within a Parquet file cannot be read one by one; write them to files, or to tars"
            raise ValueError(f"{path}: expected one column {each!r}, got {', '.join(header) or 'none'}{hint}")
    return [list(header).index(each) for each in _COLUMNS]


def _datasets_names(path: Path) -> tuple[str, ...] | None:
    """Names that Hugging Face's datasets write down beside integer labels."""
    metadata = _open_parquet(path).schema_arrow.metadata or {}
    try:
        return tuple(json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (KeyError, ValueError, TypeError):
        return None


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path}: reading Parquet needs pyarrow: pip install 'tpt_fast[parquet]'") from error
    return pyarrow.parquet.ParquetFile(path)
