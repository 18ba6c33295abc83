"""What the rows of a folder come to: tables, computed from the rows alone, and again whenever they are asked for."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._files import atomic_write
from . import metrics, rows
from .answers import ZERO_SHOT
from .folder import read_about, set_folders
from .metrics import Interval
from .published import Published, differences, published

Numbers = dict[str, float]

#: Metric -> heading, and whether it is a share, shown in percent.
METRICS = {
    "top1": ("top-1", True),
    "top5": ("top-5", True),
    **{f"ece{bins}": (f"ECE ({bins} bins)", True) for bins in metrics.BINS},
    "aurc": ("AURC", True),
}


@dataclass
class MethodReport:
    """What one method came to on one set. Images that could not be read are counted and in no metric."""

    label: str
    method: str  #: its own name
    seeds: dict[int, Numbers]  #: of each seed the metrics
    mean: Numbers
    sd: Numbers  #: over seeds; NaN of one
    images: int  #: with an answer, of the seed that has the fewest
    failed: int
    seconds: float  #: an image, from one answer to the next, all methods of a run together; NaN where none was encoded
    seconds_kept: float  #: the same where features were kept
    per_class: list[float]  #: accuracy, mean over seeds; NaN of a class without images
    calibration: dict[str, list[float]]  #: of the first seed, 20 bins
    against_zero_shot: Interval | None
    published: Published | str  #: or why there is none
    differs: str  #: what keeps it from being compared


@dataclass
class SetReport:
    """One set of a folder."""

    name: str
    folder: Path
    about: dict[str, Any]
    images: int
    class_images: list[int]
    methods: list[MethodReport]
    pairs: list[tuple[str, str, Interval]]  #: each two methods: how much more often the first is right
    errors: dict[str, str]  #: of the first images that could not be read, by id
    peak_bytes: int  #: of a process
    peak_gpu_bytes: int
    devices: list[str]


def report(out: str | Path) -> list[SetReport]:
    """Compute everything from the rows in ``out``, of :func:`tpt_fast.evaluation.run.evaluate`.

    Raises:
        ValueError: it is no such folder.
    """
    return [_set_report(folder) for folder in set_folders(out)]


def _set_report(folder: Path) -> SetReport:
    about, of_rows = read_about(folder), folder / "rows"
    seeds: dict[str, list[int]] = {}
    for label, seed in rows.runs(of_rows):
        seeds.setdefault(label, []).append(seed)
    # What can be held against others is an array of bits an image, so that of many images little is in memory.
    right: dict[str, np.ndarray] = {}  # bool [images, seeds]
    there: dict[str, np.ndarray] = {}
    known = [label for label in about["methods"] if label in seeds]
    made, class_images = [], np.zeros(len(about["classnames"]), np.int64)
    for label in sorted(known, key=lambda label: label != ZERO_SHOT):  # which comes first
        right[label] = np.zeros((about["images"], len(seeds[label])), bool)
        there[label] = np.zeros_like(right[label])
        one = _method_report(of_rows, about, label, seeds[label], right[label], there[label])
        made.append(one[0])
        class_images = np.maximum(class_images, one[1])
    pairs = []
    for i, each in enumerate(made):
        for other in made[:i]:
            pairs.append((each.label, other.label, _paired(each.label, other.label, seeds, right, there)))
    for each in made:
        if each.label != ZERO_SHOT and ZERO_SHOT in seeds:
            each.against_zero_shot = next(found for a, b, found in pairs if (a, b) == (each.label, ZERO_SHOT))
    said = list(rows.about(of_rows))
    return SetReport(
        name=about["name"],
        folder=folder,
        about=about,
        images=about["images"],
        class_images=class_images.tolist(),
        methods=made,
        pairs=pairs,
        errors=rows.errors(of_rows),
        peak_bytes=max((each.get("peak_bytes", 0) for each in said), default=0),
        peak_gpu_bytes=max((each.get("peak_gpu_bytes", 0) for each in said), default=0),
        devices=sorted({each["device"] for each in said}),
    )


def _method_report(
    of_rows: Path, about: dict[str, Any], label: str, seeds: list[int], right: np.ndarray, there: np.ndarray
) -> tuple[MethodReport, np.ndarray]:
    """The report, and the images of each class; which image was right, and was there, is written into the arrays."""
    classes, of_seed = len(about["classnames"]), {}
    shares, counts, seconds, seconds_kept = [], [], [], []
    calibration: dict[str, list[float]] = {}
    images, failed = about["images"], 0
    for i, seed in enumerate(seeds):
        found = rows.read(of_rows, label, seed)
        good = ~found.failed
        images, failed = min(images, int(good.sum())), max(failed, int(found.failed.sum()))
        there[found.image[good], i], right[found.image[good], i] = True, found.right[good]
        seconds.append(found.seconds[~found.kept & good])
        seconds_kept.append(found.seconds[found.kept])
        rank, confidence, hit = found.rank[good], found.confidence[good], found.right[good]
        of_seed[seed] = {
            "top1": metrics.top(rank, 1),
            "top5": metrics.top(rank, 5),
            **{f"ece{bins}": metrics.ece(confidence, hit, bins) for bins in metrics.BINS},
            "aurc": metrics.aurc(confidence, hit),
        }
        count, share = metrics.per_class(found.label[good], hit, classes)
        counts.append(count)
        shares.append(share)
        if not calibration:
            bins = metrics.calibration(confidence, hit, metrics.BINS[-1])
            calibration = {name: value.tolist() for name, value in bins._asdict().items()}
    over = {name: metrics.over_seeds([each[name] for each in of_seed.values()]) for name in METRICS}
    described, model = about["methods"][label], about["model"]
    made = MethodReport(
        label=label,
        method=described["method"],
        seeds=of_seed,
        mean={name: mean for name, (mean, _) in over.items()},
        sd={name: sd for name, (_, sd) in over.items()},
        images=images,
        failed=failed,
        seconds=_mean(seconds),
        seconds_kept=_mean(seconds_kept),
        per_class=np.mean(shares, 0).tolist(),
        calibration=calibration,
        against_zero_shot=None,
        published=published(about["name"], described["method"], model.get("model"), model.get("pretrained")),
        differs=differences(
            about["name"],
            described,
            about["options"]["n_views"],
            about["options"].get("views", "crops"),
        ),
    )
    if images + failed < about["images"]:
        made.differs = ", ".join(filter(None, [f"{images + failed} of {about['images']} images so far", made.differs]))
    return made, np.max(counts, 0)


def _paired(
    one: str, other: str, seeds: dict[str, list[int]], right: dict[str, np.ndarray], there: dict[str, np.ndarray]
) -> Interval:
    """On the images that both have, with the seeds that both have."""
    common = [seed for seed in seeds[one] if seed in seeds[other]]
    a, b = ([seeds[label].index(seed) for seed in common] for label in (one, other))
    both = (there[one][:, a] & there[other][:, b]).all(1)
    return metrics.paired(right[one][:, a][both], right[other][:, b][both])


def _mean(parts: list[np.ndarray]) -> float:
    together = np.concatenate(parts) if parts else np.zeros(0)
    return float(together.mean()) if len(together) else float("nan")


# --- as text


def as_json(reports: list[SetReport]) -> str:
    """Everything; NaN is null."""
    plain = [dataclasses.asdict(each) | {"folder": str(each.folder)} for each in reports]
    for each in plain:
        each["pairs"] = [{"method": a, "other": b, **found._asdict()} for a, b, found in each["pairs"]]
        for method in each["methods"]:
            for name in ("against_zero_shot", "published"):
                if hasattr(method[name], "_asdict"):
                    method[name] = method[name]._asdict()
    return json.dumps(_finite(plain), indent=1, allow_nan=False)


def lines(reports: list[SetReport]) -> Iterator[dict[str, Any]]:
    """A line for each set and method: shares in percent, None where there is nothing to say."""
    for of_set in reports:
        for each in of_set.methods:
            against, figure = each.against_zero_shot, each.published
            line: dict[str, Any] = {"set": of_set.name, "method": each.label, "seeds": len(each.seeds)}
            line |= {"images": each.images, "failed": each.failed}
            for name, (_, share) in METRICS.items():
                line[name] = each.mean[name] * (100 if share else 1)
                line[f"{name}_sd"] = each.sd[name] * (100 if share else 1)
            for name in ("difference", "low", "high"):
                line[f"{name}_to_zero_shot"] = None if against is None else 100 * getattr(against, name)
            line["gained"], line["lost"] = (None, None) if against is None else (against.gained, against.lost)
            line |= {"seconds": each.seconds, "seconds_kept": each.seconds_kept}
            line |= {"peak_bytes": of_set.peak_bytes or None, "peak_gpu_bytes": of_set.peak_gpu_bytes or None}
            line["published"] = figure.top1 if isinstance(figure, Published) else None
            line["published_ece"] = figure.ece if isinstance(figure, Published) else None
            line["published_by"] = figure.source if isinstance(figure, Published) else figure
            line["differs"] = each.differs
            yield _finite(line)


def write_csv(reports: list[SetReport], path: Path) -> None:
    """:func:`lines` as CSV."""
    _write_csv(path, list(lines(reports)))


def write_classes(reports: list[SetReport], path: Path) -> None:
    """Accuracy of each class by each method as CSV."""
    found = []
    for of_set in reports:
        for i, name in enumerate(of_set.about["classnames"]):
            line = {"set": of_set.name, "class": i, "name": name, "images": of_set.class_images[i]}
            for each in of_set.methods:
                found.append(_finite(line | {"method": each.label, "top1": 100 * each.per_class[i]}))
    _write_csv(path, found)


def as_latex(reports: list[SetReport], metric: str = "top1") -> str:
    r"""A table with methods in rows and sets in columns, as papers have it; needs ``booktabs``."""
    labels = list(dict.fromkeys(each.label for of_set in reports for each in of_set.methods))
    heading, share = METRICS[metric]
    body = []
    for label in labels:
        cells = []
        for of_set in reports:
            each = next((each for each in of_set.methods if each.label == label), None)
            cells.append("--" if each is None else _latex_cell(each.mean[metric], each.sd[metric], share))
        body.append(" & ".join([_escaped(label), *cells]) + r" \\")
    names = " & ".join(["Method", *(_escaped(of_set.name) for of_set in reports)])
    return "\n".join(
        [
            f"% {heading}, mean and standard deviation over seeds" + (", in percent" if share else ""),
            rf"\begin{{tabular}}{{l{'r' * len(reports)}}}",
            r"\toprule",
            rf"{names} \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _latex_cell(mean: float, sd: float, share: bool) -> str:
    if math.isnan(mean):
        return "--"
    factor, digits = (100, 2) if share else (1, 4)
    spread = "" if math.isnan(sd) else rf" $\pm$ {factor * sd:.{digits}f}"
    return f"{factor * mean:.{digits}f}{spread}"


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def _write_csv(path: Path, found: list[dict[str, Any]]) -> None:
    with atomic_write(path) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]) if found else [])
        writer.writeheader()
        writer.writerows(found)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
