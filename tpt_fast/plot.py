"""Pictures: one tuned image, and the score maps of one."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._checks import check_integer
from ._files import atomic_write
from .views.decode import ImageLike, load_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .result import TuneResult


DPI = 110
KEPT = "#ff7f0e"


def plot(result: TuneResult, path: str | os.PathLike | None = None, classes: int = 8) -> Figure:
    """See :meth:`TuneResult.plot`; the bars show the ``classes`` most probable classes before and after."""
    if result.views is None:
        raise ValueError("plot: this result holds no views; make it with keep_views=True")
    figure_of = _matplotlib()
    from matplotlib.patches import Rectangle

    views = result.views.float()
    low = views.amin((0, 2, 3), keepdim=True)
    pixels = ((views - low) / (views.amax((0, 2, 3), keepdim=True) - low).clamp_min(1e-6)).permute(0, 2, 3, 1).numpy()
    columns = min(len(views), 16)
    rows = math.ceil(len(views) / columns)
    figure = figure_of(figsize=(10, 0.8 * rows + 3.4), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[0.8 * rows + 0.3, 3.1])
    top, bottom = parts

    kept = set(result.selected.tolist()) if "selected" in result.extra else set()
    for view, axes in enumerate(top.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if view >= len(views):
            continue
        axes.imshow(pixels[view])
        number = f"{result.entropies[view]:.2f}" if "entropies" in result.extra else str(view)
        axes.set_title(number, fontsize=9, pad=3, weight="bold" if view in kept else "normal")
        if view in kept:
            axes.add_patch(
                Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, lw=4, color=KEPT, clip_on=False)
            )
    named = f"{len(views)} views, the first the plain image"
    if "entropies" in result.extra:
        named += "; above each its entropy: how unsure the model is, in nats"
    top.suptitle(f"{named}; the {len(kept)} kept are framed" if kept else named, fontsize=10)

    axes = bottom.subplots()
    before, after = result.zero_shot_probs, result.probs
    shown = torch.maximum(before, after).argsort(descending=True, stable=True)[:classes].tolist()
    places = range(len(shown))
    for offset, probs, when, color in ((-0.2, before, "before", "#9db4c8"), (0.2, after, "after", "#1f5f8b")):
        lengths = probs[shown].tolist()
        bars = axes.barh([p + offset for p in places], lengths, 0.4, label=f"{when} tuning", color=color)
        axes.bar_label(bars, [f"{length:.1%}" for length in lengths], fontsize=9, padding=3)
    axes.set_yticks(places, [result.classnames[i] for i in shown], parse_math=False)
    axes.invert_yaxis()  # the most probable on top
    axes.set_xticks([])
    axes.margins(x=0.08)  # for the numbers
    title = f"{result.zero_shot_label} before tuning, {result.label} after"
    if "loss" in result.extra:
        title += f"   (loss {result.loss:.2f} to {result.loss_after:.2f})"
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return _saved(figure, path)


MAP_PIXELS = 400  # of a panel's longer side: maps are no sharper than that, and photographs draw in seconds


def plot_map(
    scores: Tensor,
    image: ImageLike,
    classnames: Sequence[str],
    path: str | os.PathLike | None = None,
    classes: int = 7,
) -> Figure:
    """Draw the scores of :func:`tpt_fast.score_map` over the image, a panel a class.

    All panels share one scale, so that they can be compared: what a class has of its own is seen, and that most of a
    map is what all classes share.

    Args:
        scores: [C, H, W].
        image: that they were made of, as for :func:`tpt_fast.score_map`.
        classnames: C names.
        path: where to save the picture; the format follows the ending, PNG where there is none.
        classes: how many panels at most, 1 or more: those of the highest scores, in the order of the names.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is missing (``pip install 'tpt_fast[plot]'``).
        ValueError: scores that do not fit the names or the image, or an ending that matplotlib does not know.
        OSError: the picture cannot be written.
    """
    pixels = load_image(image).permute(2, 0, 1).cpu()
    expected = [len(classnames), *pixels.shape[1:]]
    if not isinstance(scores, Tensor) or list(scores.shape) != expected:
        came = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"scores: expected {expected} (names, height and width of the image), got {came}")
    check_integer("classes", classes, 1)
    figure_of = _matplotlib()

    factor = min(1.0, MAP_PIXELS / max(expected[1:]))
    small = [max(1, round(factor * length)) for length in expected[1:]]
    photo, maps = (
        nn.functional.interpolate(each[None].float().cpu(), small, mode="area")[0] for each in (pixels / 255, scores)
    )
    shown = sorted(maps.flatten(1).amax(1).argsort(descending=True, stable=True)[:classes].tolist())
    columns = min(4, 1 + len(shown))
    rows = math.ceil((1 + len(shown)) / columns)
    figure = figure_of(
        figsize=(3.2 * columns, 3.2 * rows * small[0] / small[1] + 0.4 * rows + 0.3), layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    panels[0, 0].imshow(photo.permute(1, 2, 0).numpy())
    low, high = float(maps[shown].min()), float(maps[shown].max())
    grey = photo.mean(0).numpy()
    for axes, index in zip(panels.flat[1:], shown, strict=False):
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1)
        drawn = axes.imshow(maps[index].numpy(), cmap="viridis", alpha=0.6, vmin=low, vmax=high)
        axes.set_title(classnames[index], fontsize=10, parse_math=False)
    bar = figure.colorbar(drawn, ax=panels, fraction=0.03, pad=0.01)
    bar.set_label("cosine", fontsize=9)
    return _saved(figure, path)


def _matplotlib() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'tpt_fast[plot]'") from error

    class Shown(Figure):
        """A notebook shows it without pyplot."""

        def _repr_png_(self) -> bytes:
            return png(self)

    return Shown


def png(figure: Figure) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    return drawn.getvalue()


def _saved(figure: Figure, path: str | os.PathLike | None) -> Figure:
    if path is not None:
        path = Path(path)
        with atomic_write(path if path.suffix else path.with_suffix(".png")) as aside:
            figure.savefig(aside, dpi=DPI)
    return figure
