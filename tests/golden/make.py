"""Makes the answers in this folder: ``python tests/golden/make.py``. The published algorithm, plainly, in float64.

The model is not stored but drawn: numbers of NumPy's PCG64, the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from tpt_fast.demo import PHOTO_FOLDER
from tpt_fast.methods.published import marginal_entropy, view_entropies
from tpt_fast.views.crops import draw_boxes
from tpt_fast.views.decode import load_image
from tpt_fast.views.make import CLIP_MEAN, CLIP_STD, make_views, pass_order

HERE = Path(__file__).resolve().parent
PHOTO, SIZE, VIEWS = PHOTO_FOLDER / "rocket.jpg", 32, 24
NAMES = ["cat", "great white shark", "sports car", "goldfish", "space rocket", "cup of coffee", "temple", "dog",
         "aircraft carrier", "daisy", "traffic light", "violin"]  # fmt: skip
#: template, steps, and whether the context is a given one in place of the words' embeddings
CASES = {
    "end1": ("a photo of a [CLS]", 1, False),
    "end3": ("a photo of a [CLS]", 3, False),
    "given1": ("a photo of a [CLS]", 1, True),
    "middle1": ("a photo of a [CLS] in the wild", 1, False),
}
RHO, LR = 0.25, 5e-3


def numbers(generator: np.random.PCG64, *shape: int) -> Tensor:
    """From -1 to 1, in steps that float32 holds exactly; NumPy promises the raw stream for ever."""
    raw = generator.random_raw(int(np.prod(shape))) >> np.uint64(48)
    return torch.from_numpy(raw.astype(np.float64).reshape(shape) / 2**15 - 1).float()


def model() -> nn.Module:
    """A small CLIP in float32 whose classes and views differ and in which no branch of a block is negligible."""
    generator = np.random.PCG64(1)
    vision = {"image_size": SIZE, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    clip = open_clip.model.CLIP(32, vision, text, quick_gelu=True).eval().requires_grad_(False)
    for name, p in sorted(clip.named_parameters()):
        if p.dim():
            p.copy_((numbers(generator, *p.shape) * (0.25 if p.dim() > 1 else 0.125)) + (name.endswith("ln.weight")))
    clip.logit_scale.fill_(np.log(100.0))
    return clip


def normalised(views: np.ndarray) -> Tensor:
    mean, std = (torch.tensor(v).double()[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return (torch.from_numpy(views).double() / 255 - mean) / std


def published(
    clip: nn.Module, views: Tensor, names: Sequence[str], template: str, steps: int, rho: float, lr: float,
    ctx: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """What the published code answers: whole prompts of 77 tokens, autograd and ``torch.optim.AdamW``."""
    tokenize = open_clip.SimpleTokenizer()
    before, after = template.split("[CLS]")
    words = [len(tokenize.encode(text)) for text in (before, after)]
    ids = tokenize([f"{template.replace('[CLS]', name)}." for name in names])
    length = torch.tensor([len(tokenize.encode(name)) for name in names])[:, None]
    columns = torch.arange(sum(words)).expand(len(ids), -1)
    columns = 1 + columns + torch.where(columns >= words[0], length, 0)
    rows = torch.arange(len(ids))[:, None].expand_as(columns)
    table = clip.token_embedding
    start = (table.weight[ids[rows, columns][0]] if ctx is None else ctx).to(views.dtype)
    leaf = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([leaf], lr=lr, weight_decay=0.01)
    features = clip.encode_image(views, normalize=True)

    def logits() -> Tensor:
        x = table(ids).index_put((rows, columns), leaf.expand(len(ids), -1, -1))
        x = clip.ln_final(clip.transformer(x + clip.positional_embedding, attn_mask=clip.attn_mask))
        text = normalize(x[torch.arange(len(ids)), ids.argmax(-1)] @ clip.text_projection, dim=-1)
        return clip.logit_scale.exp() * features @ text.T

    first = logits().detach()
    entropies = view_entropies(first)
    selected = entropies.argsort(stable=True)[: int(len(views) * rho)]
    for _ in range(steps):
        loss = marginal_entropy(logits()[selected])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {
        "logits_before": first, "entropies": entropies, "selected": selected, "loss": marginal_entropy(first[selected]),
        "ctx_init": start, "ctx": leaf.detach(), "grad": leaf.grad, "logits": logits()[0].detach(),
    }  # fmt: skip


def given_context() -> Tensor:
    return numbers(np.random.PCG64(2), 4, 64) / 4


def answer(name: str, clip: nn.Module, views: Tensor) -> dict[str, Tensor]:
    template, steps, given = CASES[name]
    return published(clip, views, NAMES, template, steps, RHO, LR, given_context() if given else None)


def main() -> None:
    height, width = load_image(PHOTO).shape[:2]
    boxes = draw_boxes(height, width, VIEWS - 1, seed=0).numpy()
    made = make_views(PHOTO, size=SIZE, boxes=boxes, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    views = made.round().byte().numpy()
    np.savez_compressed(HERE / "views.npz", boxes=boxes, views=views, order=pass_order())
    clip = model().double()
    for name in CASES:
        found = answer(name, clip, normalised(views))
        np.savez_compressed(HERE / f"{name}.npz", **{key: value.numpy() for key, value in found.items()})


if __name__ == "__main__":
    main()
