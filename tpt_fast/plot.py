"""The picture of one tuned image."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ._files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .result import TuneResult


def plot(result: TuneResult, path: str | os.PathLike | None = None, classes: int = 8) -> Figure:
    """See :meth:`TuneResult.plot`; the bars show the ``classes`` most probable classes before and after."""
    if result.views is None:
        raise ValueError("plot: this result holds no views; make it with keep_views=True")
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'tpt_fast[plot]'") from error

    views = result.views.float()
    low = views.amin((0, 2, 3), keepdim=True)
    pixels = ((views - low) / (views.amax((0, 2, 3), keepdim=True) - low).clamp_min(1e-6)).permute(0, 2, 3, 1).numpy()
    columns = min(len(views), 16)
    rows = math.ceil(len(views) / columns)
    figure = Figure(figsize=(14, 1.05 * rows + 3.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.05 * rows, 3.2])
    top, bottom = parts

    kept = set(result.selected.tolist()) if "selected" in result.extra else set()
    for view, axes in enumerate(top.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if view >= len(views):
            continue
        axes.imshow(pixels[view])
        number = f"{result.entropies[view]:.3f}" if "entropies" in result.extra else str(view)
        axes.set_title(number, fontsize=7, pad=2, weight="bold" if view in kept else "normal")
        if view in kept:
            axes.add_patch(
                Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, lw=4, color="#d62728", clip_on=False)
            )
    named = "entropy of each view in nats" if "entropies" in result.extra else "views"
    top.suptitle(f"{named}; the {len(kept)} kept are framed" if kept else named, fontsize=10)

    axes = bottom.subplots()
    before, after = result.zero_shot_probs, result.probs
    shown = torch.maximum(before, after).argsort(descending=True, stable=True)[:classes].tolist()
    places = range(len(shown))
    axes.bar([p - 0.2 for p in places], before[shown].tolist(), 0.4, label="before tuning", color="#9db4c8")
    axes.bar([p + 0.2 for p in places], after[shown].tolist(), 0.4, label="after tuning", color="#1f5f8b")
    axes.set_xticks(places, [result.classnames[i] for i in shown], parse_math=False)
    axes.set(ylim=(0, 1), ylabel="probability")
    title = result.label
    if "loss" in result.extra:
        title += f"   (loss {result.loss:.3f} to {result.loss_after:.3f})"
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    if path is not None:
        path = Path(path)
        with atomic_write(path if path.suffix else path.with_suffix(".png")) as aside:
            figure.savefig(aside, dpi=110)
    return figure
