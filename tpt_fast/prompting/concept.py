"""A concept without a name, learned from a few images that show it and a few that do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .._checks import MAX_SEED, check_integer, check_number
from .._modes import ON_THE_CPU, plain_modes
from ..clip import Clip
from ..text.prompts import Prompts, build_prompts
from ..views.decode import ImageLike
from .examples import check_features, encode_examples


@dataclass(frozen=True, eq=False)
class Concept:
    """What :func:`fit_concept` has learned: two prompts, of the concept and of its absence, in this order."""

    ctx: Tensor  #: [n_ctx, W], of both prompts, float32 on the CPU
    names: Tensor  #: [2, n_name, W], the vectors that stand where a class name does
    features: Tensor = field(repr=False)  #: [2, D] of the prompts, of length 1
    losses: list[float] = field(repr=False)  #: before each step
    clip: Clip = field(repr=False)

    @plain_modes
    @torch.no_grad()
    def __call__(self, images: Sequence[ImageLike] | Tensor) -> Tensor:
        """Probabilities [N] that images show the concept, float32 on the CPU.

        Args:
            images: a list of N, or their features [N, D].
        """
        if not isinstance(images, Tensor):
            images = encode_examples(self.clip, images, views=0, progress=False)[:, 0]
        features = check_features(images.unsqueeze(-2), self.features)[:, 0]
        return _logits(self.clip, features, self.features).softmax(-1)[:, 0].float().cpu()


@plain_modes
def fit_concept(
    model: nn.Module | Clip,
    positives: Sequence[ImageLike] | Tensor,
    negatives: Sequence[ImageLike] | Tensor,
    *,
    ctx_init: str = "a photo of a",
    n_ctx: int | None = None,
    n_name: int = 1,
    steps: int = 64,
    lr: float = 5e-3,
    weight_decay: float = 0.01,
    views: int = 0,
    seed: int = 0,
) -> Concept:
    """Learn a concept that no word names, as TPT does for Bongard-HOI: six images of somebody who rides a bicycle, and
    six of somebody who does something else with one.

    There are two prompts, ``[ctx] [name] .``, with a context in common and with names of vectors that are drawn from
    the normal distribution of deviation 0.02. Context and names together are moved to lower the cross-entropy of the
    examples, by AdamW.

    Args:
        model: see :class:`~tpt_fast.Tuner`.
        positives: images that show it, or their features [P, V, D], of :func:`tpt_fast.encode_examples`.
        negatives: those that do not; another number of them is weighed as much in all.
        ctx_init, n_ctx: the start of the context, see :class:`~tpt_fast.TuneConfig`; "[CLS]" marks the name.
        n_name: vectors of each name, 1 or more.
        steps, lr, weight_decay: of AdamW.
        views: random crops of each image, which count as images; 0 is the plain image alone.
        seed: of the names, of a random context, and of crops.

    Raises:
        TypeError, ValueError, OSError: naming the argument, what was expected and what came.
        FloatingPointError: the loss is not finite.
    """
    check_integer("n_name", n_name, 1)
    check_integer("steps", steps, 1)
    check_integer("seed", seed, 0, MAX_SEED)
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        check_number(name, value, "a number of 0 or more", lambda number: number >= 0)
    clip = model if isinstance(model, Clip) else Clip(model)
    prompts, ctx, names = _prompts(clip, ctx_init, n_ctx, n_name, seed)

    def joined() -> Tensor:
        return torch.cat([ctx.expand(2, -1, -1), names], 1)

    text, _ = clip.text.bind(prompts, joined(), keep=True)
    like = text.forward(joined(), False)[0]
    examples = []
    for name, images in (("positives", positives), ("negatives", negatives)):
        if not isinstance(images, Tensor):
            try:
                images = encode_examples(clip, images, views=views, seed=seed, progress=False)
            except (TypeError, ValueError, OSError) as error:
                raise type(error)(str(error).replace("images", name, 1)) from error
        examples.append(check_features(images, like, name).flatten(0, 1))
    features = torch.cat(examples)
    counts = torch.tensor([*map(len, examples)], device=clip.device)
    targets = torch.arange(2, device=clip.device).repeat_interleave(counts)
    weights = counts.sum() / (2 * counts).to(features)

    moved = [nn.Parameter(ctx), nn.Parameter(names)]
    optimizer = torch.optim.AdamW(moved, lr=lr, weight_decay=weight_decay, foreach=False)
    losses = []
    for step in range(steps):
        leaf, tape = text.forward(joined().detach(), True)
        with torch.enable_grad():
            logits = _logits(clip, features, leaf.requires_grad_())
            loss = nn.functional.cross_entropy(logits, targets, weights)
            (slope,) = torch.autograd.grad(loss, leaf)
        losses.append(loss.item())
        if not loss.isfinite():
            raise FloatingPointError(f"the loss before step {step + 1} is {losses[-1]}; lower lr={lr}")
        back = text.backward(tape, slope)
        moved[0].grad, moved[1].grad = back[:, : len(ctx)].sum(0), back[:, len(ctx) :]
        optimizer.step()
    ctx, names = (each.detach() for each in moved)
    found = text.forward(joined(), False)[0]
    return Concept(ctx.float().cpu(), names.float().cpu(), found, losses, clip)


def _prompts(clip: Clip, ctx_init: str, n_ctx: int | None, n_name: int, seed: int) -> tuple[Prompts, Tensor, Tensor]:
    """Prompts whose names are context vectors too, behind the others; where the context starts, and the names."""
    tower = clip.text

    def build(name: str) -> Prompts:
        return build_prompts([name, name], ctx_init, n_ctx, tower.tokenizer, tower.context_length)

    placeholder = " ".join(["X"] * n_name)
    prompts = build(placeholder)
    if not torch.equal(build(f"{placeholder} X").lengths, prompts.lengths + 1):
        raise ValueError("model: expected a tokenizer that makes one token of 'X', which marks where a name stands")
    noise = torch.Generator().manual_seed(seed)
    names = 0.02 * torch.randn(2, n_name, tower.width, generator=noise, **ON_THE_CPU)
    if n_ctx is None:
        ctx = tower.embed(prompts.ids[0, prompts.positions[0]])
    else:
        ctx = 0.02 * torch.randn(n_ctx, tower.width, generator=noise, **ON_THE_CPU)
    at = torch.arange(n_name, device="cpu") + prompts.first + prompts.lead
    positions = torch.cat([prompts.positions, at.expand(2, -1)], 1)
    ctx, names = (each.to(tower.device, tower.dtype, copy=True) for each in (ctx, names))
    return replace(prompts, positions=positions), ctx, names


def _logits(clip: Clip, images: Tensor, text: Tensor) -> Tensor:
    logits = clip.scale.to(images) * images @ text.to(images).T
    return logits if clip.bias is None else logits + clip.bias.to(images)
