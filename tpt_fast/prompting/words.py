"""What a context says: the words that its vectors are nearest to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_integer
from .._modes import plain_modes
from .coop import load_ctx
from .saved import text_tower

if TYPE_CHECKING:
    from ..clip import Clip
    from ..tuner import Tuner


class Word(NamedTuple):
    """A token of the vocabulary near a context vector."""

    text: str  #: as the tokenizer decodes it; "-" stands behind a piece that no word ends with, where that is known
    distance: float  #: of the vectors, Euclidean


@plain_modes
@torch.no_grad()
def nearest_words(ctx: Tensor, model: Tuner | Clip | nn.Module, k: int = 5) -> list[list[Word]]:
    """The ``k`` tokens whose embeddings are nearest to each context vector, nearest first.

    What CoOp's authors warn of holds: learned vectors are often far from every word, and the nearest one says little.
    Compare the distances with those between words themselves.

    Args:
        ctx: [n_ctx, width]; of class-specific contexts [C, n_ctx, width] give one, ``ctx[i]``.
        model: whose context it is; its tokenizer must have ``decode``.
        k: 1 or more.

    Returns:
        For each of the n_ctx vectors a list of ``k``.

    Raises:
        TypeError, ValueError: a context that is none of this model's; a tokenizer that decodes nothing.
    """
    from ..tuner import Tuner

    check_integer("k", k, 1)
    tower = text_tower(model.clip if isinstance(model, Tuner) else model)
    ctx = load_ctx(ctx, tower.width)
    if ctx.dim() != 2:
        raise ValueError(f"ctx: expected [n_ctx, {tower.width}], got {list(ctx.shape)}; give one of them, ctx[i]")
    decode = _decoder(tower.tokenizer)
    table = tower.embed(torch.arange(tower.vocabulary, device=tower.device)).to(tower.dtype)
    # By differences: through products, as is faster, a vector would stand away from itself.
    apart = torch.cdist(ctx.to(table), table, compute_mode="donot_use_mm_for_euclid_dist")
    near = apart.topk(min(k, len(table)), largest=False)
    return [
        [Word(decode(token), distance) for distance, token in zip(*row, strict=True)]
        for row in zip(near.values.tolist(), near.indices.tolist(), strict=True)
    ]


def _decoder(tokenizer: Any) -> Callable[[int], str]:
    """From a token to what people read."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # of open_clip's wrapper around one of Hugging Face's
    found = getattr(tokenizer, "decode", None) or getattr(inner, "decode", None)
    if found is None:
        raise TypeError(f"tokenizer: expected one with decode(), got {type(tokenizer).__name__}")
    pieces = hasattr(tokenizer, "byte_decoder")  # CLIP's own: a blank stands behind what ends a word

    def decode(token: int) -> str:
        text = found([token])
        return text.strip() + ("-" if pieces and not text.endswith((" ", ">")) else "")

    return decode
