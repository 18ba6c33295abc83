"""How users call the package: mypy reads this file, which nothing runs."""

from pathlib import Path

import torch
from torch import Tensor, nn

import tpt_fast


def one_image(model: nn.Module, path: Path) -> str:
    result = tpt_fast.tune(model, path, ["cat", "dog"], n_views=32, rho=0.2, keep_views=True)
    tpt_fast.tune.cache_clear()
    loss: float = result.loss
    kept: Tensor = result.selected
    return f"{result.label} {loss} {len(kept)} {result.topk(3)[0].prob}"


def many_images(model: nn.Module, paths: list[Path]) -> list[str]:
    tuner = tpt_fast.Tuner(model, ("cat", "dog"), tpt_fast.TuneConfig(n_views=3))
    other = tpt_fast.Tuner(tuner.clip, ["bird"])
    print(tuner.memory().own, other.classnames)
    stream = tuner.map(paths)
    found = [result.label for result in stream if result.error is None]
    stream.close()
    return found


def a_map(model: nn.Module, path: Path) -> Tensor:
    scores = tpt_fast.score_map(model, path, ["cat", "dog"], tokens="raw")
    tpt_fast.plot_map(scores, path, ["cat", "dog"], "map.png")
    return scores


def an_op() -> Tensor:
    return tpt_fast.ops.objective(torch.randn(4, 5), 2).loss
