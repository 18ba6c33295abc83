"""``tpt-fast bench``: what tpt_fast gains on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.table import Table

from . import _models, _shared


def bench(
    repeats: Annotated[int, typer.Option(min=3, help="Timed calls of each, taking turns; the medians count.")] = 9,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line for each comparison.")] = False,
) -> None:
    """Time tpt_fast against the published algorithm in plain PyTorch and PIL, on the demo model and the CPU."""
    with _shared.environment():
        import torch
        from PIL import Image

        from .. import ops
        from ..demo import PHOTO_FOLDER
        from ..reference import tpt as published
        from ..tuner import Tuner
        from ..views import make_views

        loaded = _models.load_model(None, None, "cpu")
        backend = _shared.kernels()
        tuner = Tuner(loaded.model, loaded.classnames, tokenizer=loaded.tokenizer)
        photo = Image.open(PHOTO_FOLDER / "cat.jpg").convert("RGB")
        logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) * 4
        leaf = logits.clone().requires_grad_()

        def plain_objective() -> None:
            kept = leaf[published.view_entropies(leaf.detach()).argsort()[:6]]
            torch.autograd.grad(published.marginal_entropy(kept), leaf)

        def plain_image() -> None:
            published.tpt(loaded.model, photo, loaded.classnames, loaded.tokenizer)

        def plain_views() -> None:
            published.pil_views(photo, 64, 224, (0.5,) * 3, (0.5,) * 3)

        comparisons: dict[str, tuple[Callable, Callable]] = {
            f"one image, 64 views of 32 px, {len(loaded.classnames)} classes": (lambda: tuner(photo), plain_image),
            f"views: 64 of 224 px from {photo.width} x {photo.height}": (lambda: make_views(photo), plain_views),
            "objective: 64 x 1000, with gradient": (lambda: ops.objective(logits, 6), plain_objective),
        }
        rows = []
        with _shared.progress_bar() as bar:
            for what, (ours, peer) in bar.track(comparisons.items(), len(comparisons), description="timing"):
                row = {"what": what, **_compare(ours, peer, repeats), "repeats": repeats}
                rows.append({**row, "backend": backend.name, "threads": torch.get_num_threads()})
                if as_json:
                    _shared.json_line(rows[-1])
    if not as_json:
        _shared.out.print(_table(rows))


def _compare(ours: Callable, peer: Callable, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, the two taking turns so that a busy moment meets both."""
    taken: dict[Callable, list[float]] = {ours: [], peer: []}
    for turn in range(repeats + 1):
        for call, times in taken.items():
            started = time.perf_counter()
            call()
            if turn:  # the first warms up
                times.append(1e3 * (time.perf_counter() - started))
    mine, theirs = map(statistics.median, taken.values())
    return {"ms": mine, "peer_ms": theirs, "ratio": theirs / mine}


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("", "tpt_fast, ms", "plain PyTorch and PIL, ms", "times faster", caption="medians")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(row["what"], f"{row['ms']:.2f}", f"{row['peer_ms']:.2f}", f"{row['ratio']:.1f}")
    return table
