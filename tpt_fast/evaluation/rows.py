"""Rows of a run: one for each image, method and seed, in Parquet files that any number of processes write aside.

Each file (a part) is whole or absent, so whatever is killed leaves rows that hold. Parts are merged when they are read:
a row that two processes have written counts once. ``docs/how-to/evaluate.md`` says what each column means.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._files import atomic_write

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError as error:
    raise ImportError("an evaluation needs pyarrow: pip install 'tpt_fast[eval]'") from error

#: Columns of a row. ``rank`` is how many classes stand before the right one; -1, as ``prediction``, where ``error`` is.
SCHEMA = pa.schema(
    {
        "image": pa.int64(),
        "id": pa.string(),
        "seed": pa.uint64(),
        "method": pa.dictionary(pa.int32(), pa.string()),
        "label": pa.int32(),
        "prediction": pa.int32(),
        "confidence": pa.float32(),
        "label_prob": pa.float32(),
        "rank": pa.int32(),
        "entropy_before": pa.float32(),
        "entropy_after": pa.float32(),
        "status": pa.dictionary(pa.int32(), pa.string()),
        "error": pa.string(),
        "seconds": pa.float32(),
        "kept": pa.bool_(),
        "entropies": pa.list_(pa.float32()),
        "selected": pa.list_(pa.int32()),
    }
)

#: How long a run took, and whether its features were kept, is no part of its answers.
OF_THE_RUN = ("seconds", "kept")

_ABOUT = b"tpt_fast"


class Answers(NamedTuple):
    """What one method said with one seed, ascending in ``image``, each image once: arrays of one length."""

    image: np.ndarray  #: int64, index in the set
    label: np.ndarray
    prediction: np.ndarray  #: -1 where the image could not be read
    confidence: np.ndarray  #: float32
    label_prob: np.ndarray
    rank: np.ndarray  #: of the right class, 0 is right
    seconds: np.ndarray
    kept: np.ndarray  #: bool: from features that were kept

    @property
    def failed(self) -> np.ndarray:
        return self.prediction < 0

    @property
    def right(self) -> np.ndarray:
        return self.rank == 0


class RowWriter:
    """Collects rows and writes them, a part each time.

    Args:
        folder: of the parts; made if it is missing.
        about: what is true of all rows of this process, kept in its parts.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._folder, self._about = folder, dict(about)
        self._rows: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.written_at = time.monotonic()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)

    def write(self, **about: Any) -> None:
        """Have the rows so far on the disk; OSError, and they stay here, where that cannot be."""
        if self._rows:
            said = json.dumps(self._about | about).encode()
            table = pa.Table.from_pylist(self._rows, SCHEMA.with_metadata({_ABOUT: said}))
            with atomic_write(self._folder / f"part-{secrets.token_hex(8)}.parquet") as aside:
                pq.write_table(table, aside)
            self._rows.clear()
        self.written_at = time.monotonic()


def parts(folder: Path) -> list[Path]:
    """The files with rows, in an order that does not depend on the file system."""
    return sorted(folder.glob("part-*.parquet"))


def about(folder: Path) -> Iterator[dict[str, Any]]:
    """Of each part, what its writer had to say."""
    for part in parts(folder):
        yield json.loads(pq.read_schema(part).metadata[_ABOUT])


def runs(folder: Path) -> list[tuple[str, int]]:
    """The methods and seeds that there are rows of, sorted."""
    found: set[tuple[str, int]] = set()
    for part in parts(folder):
        table = pq.read_table(part, columns=["method", "seed"])
        table = table.set_column(0, "method", table["method"].cast(pa.string()))
        different = table.group_by(["method", "seed"]).aggregate([])
        found |= {(each["method"], each["seed"]) for each in different.to_pylist()}
    return sorted(found)


def done(folder: Path, method: str, seed: int, images: int) -> np.ndarray:
    """bool [images]: of which of a set's images there are rows of one method and seed."""
    there = np.zeros(images, bool)
    there[_of(folder, method, seed, ["image"])["image"].to_numpy()] = True
    return there


def read(folder: Path, method: str, seed: int) -> Answers:
    """The rows of one method and seed, merged."""
    table = _of(folder, method, seed, [*Answers._fields])
    arrays = {name: table[name].to_numpy() for name in Answers._fields}
    _, first = np.unique(arrays["image"], return_index=True)
    return Answers(**{name: array[first] for name, array in arrays.items()})


def merged(folder: Path) -> Iterator[pa.Table]:
    """All columns of all rows: a table for each method and seed as :func:`runs` has them, ascending in ``image``."""
    for method, seed in runs(folder):
        table = _of(folder, method, seed, SCHEMA.names)
        _, first = np.unique(table["image"].to_numpy(), return_index=True)
        yield table.take(pa.array(first))


def write_merged(folder: Path, path: Path) -> int:
    """All rows in one file, in row groups; how many there are."""
    rows = 0
    with atomic_write(path) as aside, pq.ParquetWriter(aside, SCHEMA) as writer:
        for table in merged(folder):
            writer.write_table(table)
            rows += len(table)
    return rows


def some(folder: Path, method: str, seed: int, images: np.ndarray) -> dict[int, dict[str, Any]]:
    """All columns of the rows of a few images, by index."""
    names = [name for name in SCHEMA.names if name not in ("method", "seed")]
    rows = _of(folder, method, seed, names, pc.field("image").isin(pa.array(images))).to_pylist()
    return {row["image"]: row for row in rows}


def errors(folder: Path, most: int = 20) -> dict[str, str]:
    """Of the first images that could not be read, by index, the id and why."""
    found: dict[int, tuple[str, str]] = {}
    for part in parts(folder):
        table = pq.read_table(part, columns=["image", "id", "error"], filters=~pc.field("error").is_null())
        found |= {each["image"]: (each["id"], each["error"]) for each in table.to_pylist()}
        found = dict(sorted(found.items())[:most])
    return dict(found.values())


def _of(folder: Path, method: str, seed: int, columns: list[str], also: pc.Expression | None = None) -> pa.Table:
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    of_run = (pc.field("method") == method) & (pc.field("seed") == pa.scalar(seed, pa.uint64()))
    of_run = of_run if also is None else of_run & also
    tables = [pq.read_table(part, columns=columns, filters=of_run).cast(schema) for part in parts(folder)]
    return pa.concat_tables(tables or [schema.empty_table()]).unify_dictionaries().combine_chunks()
