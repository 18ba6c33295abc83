"""Tuning for files: their rows, the table, the file of results and what is said at the end."""

from __future__ import annotations

import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..extension.toolkit import BuildError
from . import _shared
from ._shared import shown

if TYPE_CHECKING:
    from ..result import TuneResult
    from ..tuner import Tuner
    from ._results_file import ResultsFile

Row = dict[str, Any]
_WORTH_SAYING = 60  # seconds to go, for which a log has an estimate
_MOST_CLASSES = 20  # in the summary of confusions


@dataclass
class Summary:
    """What a run comes to. A file whose folder has the name of a class is known to show that class."""

    done: int = 0
    failed: int = 0
    seconds: float = 0.0
    timed: int = 0  #: how many of them were done in these seconds
    judged: Counter[tuple[str, str]] = field(default_factory=Counter)  #: (what it is, what it was taken for)
    zero_shot_right: int = 0

    def add(self, row: Row) -> None:
        self.done += 1
        self.failed += bool(row.get("error"))
        target, label = row.get("target"), row.get("label")
        if target and label:
            self.judged[target, label] += 1
            self.zero_shot_right += _plain(target) == _plain(row["zero_shot_label"])

    @property
    def right(self) -> int:
        return sum(count for (target, label), count in self.judged.items() if _plain(target) == _plain(label))

    def show(self, console: Any) -> None:
        rate = f", {self.seconds / self.timed:.3g} s each" if self.timed else ""
        fate = f"{self.failed} failed" if self.failed else "none failed"
        _shared.remark(f"{_count(self.done, 'image')}: {fate}; {_shared.clock(self.seconds)}{rate}")
        known = self.judged.total()
        if not known:
            return
        _shared.print_table(self._confusions(), console)
        said = f"accuracy {self.right / known:.1%} of {_count(known, 'image')} whose folder is a class"
        console.print(Text(f"{said}; zero-shot {self.zero_shot_right / known:.1%}"), soft_wrap=True)

    def _confusions(self) -> Table:
        """Of each class that was there, the worst first."""
        table = Table("class", "images", "right", "taken for", box=SIMPLE_HEAD)
        table.columns[1].justify = table.columns[2].justify = "right"
        of_class: dict[str, Counter[str]] = {}
        for (target, label), count in self.judged.items():
            of_class.setdefault(target, Counter())[label] += count
        lines = []
        for target, labels in of_class.items():
            wrong = Counter({label: n for label, n in labels.items() if _plain(label) != _plain(target)})
            lines.append((1 - wrong.total() / labels.total(), target, labels.total(), wrong))
        lines.sort(key=lambda line: line[:2])
        for share, target, total, wrong in lines[:_MOST_CLASSES]:
            others = ", ".join(f"{shown(label)} {count}" for label, count in wrong.most_common(3))
            others += ", ..." if len(wrong) > 3 else ""
            table.add_row(Text(shown(target)), str(total), f"{share:.1%}", Text(others))
        if len(lines) > _MOST_CLASSES:
            table.caption = f"the worst {_MOST_CLASSES} of {len(lines)} classes"
        return table


def run(
    tuner: Tuner,
    files: Sequence[Path],
    *,
    as_json: bool,
    top: int = 5,
    pictures: dict[Path, Path] | None = None,
    base: Path | None = None,
    results_file: ResultsFile | None = None,
    summarise: bool = True,
    seen: Callable[[Row], Any] = lambda _: None,
) -> Summary:
    """Tune for each file and show the rows: a table at the end, or a JSON line each at once.

    Args:
        pictures: where to save the plot of which files.
        base: folder that the files' names are shown relative to.
        results_file: has each row as soon as it is there, in place of the table; files that it has are skipped.
        summarise: say at the end what all came to.
        seen: called with each row.

    Returns:
        What all came to, the rows that the file had before included.
    """
    summary, rows, pictures = Summary(), [], pictures or {}
    if results_file is not None:
        files = _without_done(files, results_file, summary)
    begin, before = time.monotonic(), summary.done
    names = {_plain(name): name for name in tuner.classnames}
    try:
        streamed = closing(_results(tuner, files, bool(pictures)))
        with _warnings_as_remarks(), _shared.progress_bar() as bar, streamed as results:
            for file, result in bar.track(results, len(files), description="tuning"):
                row = _row(str(file.relative_to(base) if base else file), result, top)
                row["target"] = names.get(_plain(file.parent.name))
                if file in pictures and result.error is None:
                    try:
                        result.plot(pictures[file])
                    except OSError as error:
                        row["error"] = f"{pictures[file]} cannot be written: {error.strerror or error}"
                if results_file is not None:
                    _keep(row, results_file)
                elif not as_json:
                    rows.append(row)
                summary.add(row)
                seen(row)
                if as_json:
                    _shared.json_line(row)
                if summary.done == before + 1:
                    _estimate(time.monotonic() - begin, len(files))
    finally:  # an interrupted run shows what it has
        summary.seconds = time.monotonic() - begin
        done = summary.timed = summary.done - before
        if done < len(files):
            kept = f"; their rows are in {results_file.path}: --resume goes on" if results_file is not None else ""
            _shared.complain(f"stopped after {done} of {_count(len(files), 'image')}{kept}")
        if results_file is not None:
            _close(results_file)
        if rows:
            _shared.print_table(_table(rows))
            failures = [Text(f"{shown(row['file'])}: {shown(row['error'])}", "red") for row in rows if "error" in row]
            _shared.print_lines(*failures)
        if summarise and (len(files) > 1 or results_file is not None):
            summary.show(_shared.err if as_json else _shared.out)
    return summary


def _results(tuner: Tuner, files: Sequence[Path], keep_views: bool) -> Generator[tuple[Path, TuneResult], None, None]:
    """One for each file: whatever is raised, but for problems of the machine, is of the image whose turn it is."""
    left = deque(files)
    while left:
        try:
            with closing(tuner.map(left.copy(), keep_views=keep_views)) as stream:
                for result in stream:
                    yield left.popleft(), result
        except (ImportError, BuildError):
            raise
        except Exception as error:  # no memory for it, for one
            file = left.popleft()
            reason = f"image: {file} cannot be classified: {type(error).__name__} {error}"
            yield file, tuner.failed(ValueError(reason.partition("\n")[0]))


def _without_done(files: Sequence[Path], results_file: ResultsFile, summary: Summary) -> list[Path]:
    done = set()
    for row in results_file.rows():
        done.add(shown(row["file"]))
        summary.add(row)
    left = [file for file in files if shown(str(file)) not in done]
    if done:
        _shared.remark(f"{results_file.path} has {len(files) - len(left)} of {_count(len(files), 'image')} already")
    return left


def _keep(row: Row, results_file: ResultsFile) -> None:
    try:
        results_file.write(row)
    except OSError as error:
        _shared.stop(f"{results_file.path} cannot be written: {error.strerror}")


def _close(results_file: ResultsFile) -> None:
    try:
        results_file.close()
    except OSError as error:
        _shared.stop(f"{results_file.path} cannot be written: {error.strerror or error}")


def _estimate(seconds: float, total: int) -> None:
    """In a log, where no progress bar tells it."""
    if not _shared.err.is_terminal and seconds * (total - 1) >= _WORTH_SAYING:
        left = _shared.clock(seconds * (total - 1))
        _shared.remark(f"the first of {total} images took {seconds:.3g} s: {left} left at this rate")


@contextmanager
def _warnings_as_remarks() -> Iterator[None]:
    """What is said of an image, whichever thread it is said in."""
    from PIL.Image import DecompressionBombWarning

    with warnings.catch_warnings():
        warnings.filterwarnings("always", "image: ", UserWarning)
        warnings.simplefilter("ignore", DecompressionBombWarning)  # large photographs are welcome
        warnings.showwarning = lambda message, *_: _shared.remark(f"warning: {message}")
        yield


def _row(name: str, result: TuneResult, top: int) -> Row:
    if result.error is not None:
        return {"file": name, "error": getattr(result.error, "strerror", None) or str(result.error)}
    best = result.topk(1)[0]
    return {
        "file": name,
        "label": best.label,
        "index": best.index,
        "prob": best.prob,
        "zero_shot_label": result.zero_shot_label,
        "zero_shot_prob": result.zero_shot_probs.max().item(),
        "entropy_before": result.extra.get("loss"),  # of methods that have one
        "entropy_after": result.extra.get("loss_after"),
        "status": result.status,
        "ms": 1e3 * result.timings["total"],
        "top": [prediction._asdict() for prediction in result.topk(top)],
        "engines": result.engines,
        "by_method": {name: each.topk(1)[0]._asdict() for name, each in result.by_method.items()},
    }


def _table(rows: list[Row]) -> Table:
    table = Table("file", "label", "prob", "zero-shot", "prob", "entropy", "ms")
    for column in table.columns:
        column.overflow = "fold"  # cut nothing off
    for index in (2, 4, 6):
        table.columns[index].justify = "right"
    for row in rows:
        if "label" not in row:
            table.add_row(Text(shown(row["file"])), Text("failed", "red"))
            continue
        changed = row["label"] != row["zero_shot_label"]
        before, after = row["entropy_before"], row["entropy_after"]
        table.add_row(
            Text(shown(row["file"])),
            Text(shown(row["label"]) + (" (skipped)" if row["status"] == "skipped" else ""), "bold"),
            f"{row['prob']:.1%}",
            Text(shown(row["zero_shot_label"]), "yellow" if changed else ""),
            f"{row['zero_shot_prob']:.1%}",
            "" if before is None or after is None else f"{before:.3f} → {after:.3f}",
            f"{row['ms']:.0f}",
        )
    return table


def _plain(name: str) -> str:
    """As folders and classes are compared: ``_`` is a space to CLIP too."""
    return name.replace("_", " ").strip().casefold()


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number:,} {what}s"
