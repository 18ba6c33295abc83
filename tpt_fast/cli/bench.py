"""``tpt-fast bench``: what tpt_fast gains on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from . import _models, _shared
from ._bench_models import Options, check, measure

_MODELS, _OUTPUT = "Models of open_clip", "Output"


def bench(
    repeats: Annotated[int, typer.Option(min=3, help="Timed calls of each, taking turns; the medians count.")] = 9,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="An open_clip model to measure; may be repeated.", rich_help_panel=_MODELS),
    ] = None,
    classes: Annotated[
        list[int] | None,
        typer.Option(
            min=2,
            max=1000,
            help="So many of ImageNet's names; may be repeated. Default: 10, 200 and 1000.",
            rich_help_panel=_MODELS,
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="Default: cuda if there is a GPU, else cpu.", rich_help_panel=_MODELS),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16. Default: fp32.", rich_help_panel=_MODELS)
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="About the most that the timed calls of one row take together; one is made at least. Default: 60.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            min=0, help="Images of a batch and of a stream; 0 leaves both out. Default: 4.", rich_help_panel=_MODELS
        ),
    ] = None,
    skip_published: Annotated[
        bool, typer.Option("--skip-published", help="Without the published algorithm.", rich_help_panel=_MODELS)
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object a line for each comparison or row.", rich_help_panel=_OUTPUT),
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
    """Time tpt_fast against the published algorithm in plain PyTorch and PIL.

    Without --model in seconds, on the demo model and the CPU; with it whole images of 64 views by open_clip's models,
    with random weights, on which speed does not depend, and both sides' answers are compared.

    Exit codes: 0 all fine, 1 answers differ, 2 bad usage, 3 a problem of the environment.
    """
    with _shared.environment():
        if model:
            options = {"device": device, "precision": precision, "seconds": seconds, "images": images}
            given = {name: value for name, value in options.items() if value is not None}
            options = Options(model, classes or [10, 200, 1000], repeats, not skip_published, **given)
            measure(options, check(options, rows, plot), as_json, rows, plot)
            return
        needs = {"--classes": classes, "--device": device, "--precision": precision, "--seconds": seconds}
        needs |= {"--images": images, "--skip-published": skip_published or None, "--rows": rows, "--plot": plot}
        for name, value in needs.items():
            if value is not None:
                raise typer.BadParameter("it goes with --model NAME", param_hint=name)
        _demo(repeats, as_json)


def _demo(repeats: int, as_json: bool) -> None:
    """The quick comparison: one image, its views, the objective."""
    import torch
    from PIL import Image

    from .. import ops
    from ..bench.turns import take_turns
    from ..demo import PHOTO_FOLDER
    from ..methods import published as published
    from ..models.preprocessing import Preprocessing
    from ..tuner import Tuner
    from ..views.make import make_views

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
        published.pil_views(photo, 64, Preprocessing(224))

    comparisons: dict[str, tuple[Callable, Callable]] = {
        f"one image, 64 views of 32 px, {len(loaded.classnames)} classes": (lambda: tuner(photo), plain_image),
        f"views: 64 of 224 px from {photo.width} x {photo.height}": (lambda: make_views(photo), plain_views),
        "objective: 64 x 1000, with gradient": (lambda: ops.objective(logits, 6), plain_objective),
    }
    rows = []
    with _shared.progress_bar() as bar:
        for what, (ours, peer) in bar.track(comparisons.items(), len(comparisons), description="timing"):
            runs = {"ms": ours, "peer_ms": peer}
            take_turns(runs, 1)  # warms up
            row = {name: 1e3 * statistics.median(taken) for name, taken in take_turns(runs, repeats).items()}
            row = {"what": what, **row, "ratio": row["peer_ms"] / row["ms"], "repeats": repeats}
            rows.append({**row, "backend": backend.name, "threads": torch.get_num_threads()})
            if as_json:
                _shared.json_line(rows[-1])
    if not as_json:
        _shared.out.print(_table(rows))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("", "tpt_fast, ms", "plain PyTorch and PIL, ms", "times faster", caption="medians")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(row["what"], f"{row['ms']:.2f}", f"{row['peer_ms']:.2f}", f"{row['ratio']:.1f}")
    return table
