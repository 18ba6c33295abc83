"""``tpt-fast bench-demo``: in seconds, what tpt_fast gains on this machine, by the demo model."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.table import Table

from . import _models, _shared


def bench_demo(
    repeats: Annotated[int, typer.Option(min=3, help="Timed calls of each, taking turns; the medians count.")] = 9,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line for each comparison.")] = False,
) -> None:
    """Time tpt_fast against plain PyTorch and PIL in seconds: the demo model, its views and the objective, on the CPU.

    `tpt-fast bench --model NAME` measures whole images of larger models.
    """
    _shared.check_stdout()
    with _shared.environment():
        _compare(repeats, as_json)


def _compare(repeats: int, as_json: bool) -> None:
    import torch
    from PIL import Image

    from .. import ops
    from ..bench.turns import take_turns
    from ..demo import PHOTO_FOLDER
    from ..methods import published
    from ..models.preprocessing import Preprocessing
    from ..tuner import Tuner
    from ..views.make import make_views

    loaded = _models.load_demo()
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
        published.pil_views(photo, 64, Preprocessing(224))

    comparisons: dict[str, tuple[Callable, Callable]] = {
        f"one image, 64 views of 64 px, {len(loaded.classnames)} classes": (lambda: tuner(photo), plain_image),
        f"views: 64 of 224 px from {photo.width} x {photo.height}": (lambda: make_views(photo), plain_views),
        "objective: 64 x 1000, with gradient": (lambda: ops.objective(logits, 6), plain_objective),
    }
    rows = []
    with _shared.progress_bar() as bar:
        for what, (ours, peer) in bar.track(comparisons.items(), len(comparisons), description="timing"):
            runs = {"ms": ours, "peer_ms": peer}
            take_turns(runs, 1)  # warms up
            times = {name: 1e3 * statistics.median(taken) for name, taken in take_turns(runs, repeats).items()}
            row = {"what": what, **times, "ratio": times["peer_ms"] / times["ms"], "repeats": repeats}
            rows.append({**row, "backend": backend.name, "threads": torch.get_num_threads()})
            if as_json:
                _shared.json_line(rows[-1])
    if not as_json:
        _shared.print_table(_table(rows))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("", "tpt_fast, ms", "plain PyTorch and PIL, ms", "times faster", caption="medians")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(row["what"], f"{row['ms']:.2f}", f"{row['peer_ms']:.2f}", f"{row['ratio']:.1f}")
    return table
