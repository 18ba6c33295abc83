"""Does tuning help the demo model? ``python -m recipes.demo.evaluate --data DIR``.

Top-1 of zero-shot and of each method on the same views of the same validation images, and their difference with a
paired bootstrap interval: both answers are about the same image, so their difference is known far better than either
accuracy. Each kind of corruption is written as soon as it is done; the same command again goes on with the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from tpt_fast._files import atomic_write
from tpt_fast.demo import load, weights

from .corruptions import KINDS, corrupt
from .data import load_split

METHODS = "tpt,ctpt,otpt,rtpt,tps,zero,mta,tda,ensemble"


def paired_interval(
    before: NDArray[np.bool_], after: NDArray[np.bool_], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of ``after - before`` [N] in points, and its 95 % percentile bootstrap interval over the N images.

    An image counts +1 (corrected), -1 (spoilt) or 0; resampling images is drawing the three counts from a multinomial.
    """
    n = len(before)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    counts = np.random.default_rng(seed).multinomial(n, [gained / n, lost / n, 1 - (gained + lost) / n], resamples)
    differences = 100 * (counts[:, 0] - counts[:, 1]) / n
    low, high = np.quantile(differences, [0.025, 0.975])
    return 100 * (gained - lost) / n, float(low), float(high)


def markdown(rows: list[dict]) -> str:
    """One table line a row."""
    head = [
        "| kind | method | zero-shot | method's | difference (95 % interval) | corrected, spoilt |",
        "|" + "---|" * 6,
    ]
    return "\n".join(
        head
        + [
            f"| {r['kind']} | {r['method']} | {r['zero_shot']:.2f} | {r['tuned']:.2f} | "
            f"{r['difference']:+.2f} ({r['low']:+.2f} .. {r['high']:+.2f}) | {r['corrected']}, {r['spoilt']} |"
            for r in rows
        ]
    )


def side_by_side(rows: list[dict], intervals: bool = False) -> str:
    """Methods down, kinds across: top-1 less zero-shot's, in points; bold where the 95 % interval leaves out zero."""
    kinds, methods = (list(dict.fromkeys(row[name] for row in rows)) for name in ("kind", "method"))
    by = {(row["kind"], row["method"]): row for row in rows}

    def cell(row: dict) -> str:
        mark = "" if row["low"] <= 0 <= row["high"] else "**"
        interval = f" ({row['low']:+.2f} .. {row['high']:+.2f})" if intervals else ""
        return f"{mark}{row['difference']:+.2f}{mark}{interval}"

    lines = [["top-1 in percent", *kinds], ["---"] * (1 + len(kinds))]
    lines.append(["zero-shot", *(f"{by[kind, methods[0]]['zero_shot']:.2f}" for kind in kinds)])
    lines += [[f"`{method}`", *(cell(by[kind, method]) for kind in kinds)] for method in methods]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(
    data: Annotated[Path, typer.Option(help="Folder of tiny_imagenet_val.npz, or tiny-imagenet-200.")],
    n: Annotated[int, typer.Option(help="Validation images, the same seeded choice for every kind.")] = 2000,
    kinds: Annotated[list[str] | None, typer.Option(help="Repeat for several; default: all.")] = None,
    severity: Annotated[int, typer.Option(min=1, max=5)] = 3,
    seed: int = 0,
    method: Annotated[str, typer.Option(help="With commas several, on the same views.")] = METHODS,
    set_: Annotated[list[str] | None, typer.Option("--set", help="TuneConfig field: name=json; repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="Rows; the table goes beside it, as .md.")] = Path("demo_evaluation.json"),
) -> None:
    """Evaluate, resuming after the kinds that ``out`` already has for these settings."""
    import tpt_fast

    console = Console()
    options = {name: json.loads(value) for name, value in (item.split("=", 1) for item in set_ or [])}
    demo = load()
    methods = method.split(",")
    tuner = tpt_fast.Tuner(demo.model, list(demo.classnames), tpt_fast.TuneConfig(method=method, **options))
    validation = load_split(data, train=False)
    chosen = np.random.default_rng(seed).permutation(len(validation.labels))[:n]
    images, labels = validation.images.numpy()[chosen], validation.labels.numpy()[chosen]
    digest = hashlib.sha256(weights.WEIGHTS.read_bytes()).hexdigest()[:12]
    settings = dict(n=len(labels), severity=severity, seed=seed, options=options, model=digest)

    rows = json.loads(out.read_text()) if out.exists() else []

    def has(kind: str, name: str) -> bool:
        same = dict(kind=kind, method=name, **settings)
        return any(all(row.get(key) == value for key, value in same.items()) for row in rows)

    for kind in kinds or KINDS:
        if all(has(kind, name) for name in methods):
            continue
        before, after = np.zeros(len(labels), bool), np.zeros((len(methods), len(labels)), bool)
        began = time.perf_counter()
        for i, image in enumerate(track(corrupt(images, kind, severity, seed), description=kind, console=console)):
            found = tuner(torch.from_numpy(image)).by_method
            before[i] = int(next(iter(found.values())).zero_shot_logits.argmax()) == labels[i]
            after[:, i] = [int(result.index) == labels[i] for result in found.values()]
        seconds = (time.perf_counter() - began) / len(labels)
        rows = [row for row in rows if not any(row["kind"] == kind and row.get("method") == name for name in methods)]
        for name, right in zip(methods, after, strict=True):
            difference, low, high = paired_interval(before, right)
            row = dict(kind=kind, method=name, **settings, zero_shot=100 * float(before.mean()))
            row |= dict(tuned=100 * float(right.mean()), difference=difference, low=low, high=high)
            row |= dict(corrected=int((right & ~before).sum()), spoilt=int((before & ~right).sum()))
            row |= dict(seconds_per_image=seconds, torch=torch.__version__, python=platform.python_version())
            rows.append(row | dict(machine=platform.machine(), cores=os.cpu_count()))
        for path, text in ((out, json.dumps(rows, indent=1)), (out.with_suffix(".md"), markdown(rows))):
            with atomic_write(path) as aside:
                aside.write_text(f"{text}\n")
    print(markdown(rows), side_by_side(rows), side_by_side(rows, intervals=True), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
