"""The published algorithm, whole and plain: what every fast path is held to and timed against.

Test-time prompt tuning (Shu et al., NeurIPS 2022) in PyTorch, torchvision and PIL, step by step as its authors' code
does it, in float32: 64 PIL views, every token of every prompt, autograd, ``torch.optim.AdamW``, view 0 encoded again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from ..models import read
from ..models.preprocessing import Preprocessing


class Outcome(NamedTuple):
    """C classes, N views of which K are kept, context of n_ctx vectors; names as in :class:`tpt_fast.TuneResult`."""

    logits: Tensor  #: [C] of view 0 with the tuned context
    zero_shot_logits: Tensor  #: [C] of view 0 with the initial context
    ctx_init: Tensor  #: [n_ctx, width]
    ctx: Tensor  #: [n_ctx, width]
    entropies: Tensor  #: [N]
    selected: Tensor  #: [K] int64, ascending in entropy
    loss: float  #: before the first step
    grad: Tensor  #: [n_ctx, width] of the last step


def pil_views(image: Image.Image, n_views: int, wanted: Preprocessing) -> Tensor:
    """[N, 3, H, W]: the plain image, then random resized crops and flips drawn from torch's global generator."""
    from open_clip.transform import image_transform  # importing it takes seconds, and not all that is here needs it

    plain = image_transform(
        wanted.size,
        is_train=False,
        mean=wanted.mean,
        std=wanted.std,
        resize_mode=wanted.resize_mode,
        interpolation=wanted.interpolation,
        fill_color=wanted.fill,
    )
    crop = transforms.Compose([
        transforms.RandomResizedCrop(wanted.size), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(wanted.mean, wanted.std),
    ])  # fmt: skip
    image = image.convert("RGB")
    return torch.stack([plain(image), *(crop(image) for _ in range(n_views - 1))])


def view_entropies(logits: Tensor) -> Tensor:
    """[N, C] -> [N], of each view's class probabilities."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def marginal_entropy(logits: Tensor) -> Tensor:
    """[K, C] -> [], of the mean over views of the class probabilities."""
    log_mean = logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))
    log_mean = log_mean.clamp_min(torch.finfo(logits.dtype).min)
    return -(log_mean.exp() * log_mean).sum()


@contextmanager
def context_in_place(table: nn.Module, ctx: Tensor) -> Iterator[None]:
    """While this lasts, the embeddings of tokens 1 to n_ctx of every prompt are ``ctx``."""

    def put(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        rows = ctx.to(embedded.dtype).expand(len(embedded), -1, -1)
        return torch.cat([embedded[:, :1], rows, embedded[:, 1 + ctx.shape[0] :]], dim=1)

    handle = table.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def tpt(
    model: Any,
    image: Image.Image | Tensor,
    classnames: Sequence[str],
    tokenizer: Callable,
    *,
    ctx_init: str = "a photo of a",
    n_views: int = 64,
    rho: float = 0.1,
    steps: int = 1,
    lr: float = 5e-3,
    weight_decay: float = 0.01,
) -> Outcome:
    """Tune the prompt for one image and classify it.

    Args:
        model: an open_clip ``CLIP`` or ``CustomTextCLIP`` with open_clip's own text tower, in evaluation mode. Its
            weights must not require gradients (the published code freezes them too).
        image: a PIL image, whose crops are drawn from torch's global generator, or normalised views [N, 3, H, W].
        classnames: C names; ``_`` reads as a space.
        tokenizer: ``texts -> int64 [n, context length]``.
        ctx_init: words before every name; their embeddings are the initial context.
        n_views, rho, steps, lr, weight_decay: see :class:`tpt_fast.TuneConfig`; one step or more.

    Raises:
        ValueError: ``steps`` below 1.
    """
    if steps < 1:
        raise ValueError(f"steps: expected 1 or more, got {steps}")
    family = read(model)
    prepared, table = family.preprocessing, family.embedding
    device = table.weight.device
    prompts = [f"{ctx_init} {name.replace('_', ' ')}." for name in classnames]
    ids = tokenizer(prompts).to(device)
    words = tokenizer([ctx_init])[0]
    n_ctx = int(words.argmax()) - 1  # the end token has the highest id
    start = table.weight[words[1 : 1 + n_ctx].to(device)].detach()

    views = image if isinstance(image, Tensor) else pil_views(image, n_views, prepared)
    views = views.to(device)
    kept = max(1, int(len(views) * rho))
    ctx = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([ctx], lr=lr, weight_decay=weight_decay)
    scale, bias = model.logit_scale.detach().exp(), getattr(model, "logit_bias", None)

    def logits_of(features: Tensor) -> Tensor:
        with context_in_place(table, ctx):
            logits = scale * features @ model.encode_text(ids, normalize=True).T
        return logits if bias is None else logits + bias.detach()

    with torch.no_grad():
        features = model.encode_image(views, normalize=True)
    for step in range(steps):
        logits = logits_of(features)
        if step == 0:
            before = logits.detach()
            entropies = view_entropies(before)
            selected = entropies.argsort(stable=True)[:kept]  # later steps keep to it
            first = float(marginal_entropy(before[selected]))
        loss = marginal_entropy(logits[selected])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        logits = logits_of(model.encode_image(views[:1], normalize=True))[0]
    assert ctx.grad is not None
    return Outcome(logits, before[0], start, ctx.detach(), entropies, selected, first, ctx.grad)
