"""Captions, and the second stage of the training: the text tower by itself, on features of the finished image tower.

The first stage teaches the text tower that the words around a class name do not matter, and a prompt that does not
matter cannot be tuned. So the text tower starts anew, and what a look's captions are good for is telling the classes
apart *in images of that look*: the words around the name then choose among classifiers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from . import captions
from .data import CLASSNAMES

LOOKS = list(captions.LOOKS)


class Texts:
    """Captions as the token ids of a compact vocabulary: only tokens of some caption, numbered in ascending order.

    The end-of-text token keeps the highest number, by which CLIP finds it.
    """

    def __init__(self) -> None:
        self.tokenizer = SimpleTokenizer()
        self.token_ids = torch.unique(self.tokenizer(captions.all_captions(CLASSNAMES)))

    def __call__(self, texts: list[str]) -> Tensor:
        """int64 [len(texts), L], L the longest caption's length: what follows an end-of-text is never read."""
        tokens = torch.searchsorted(self.token_ids, self.tokenizer(texts))
        return tokens[:, : int(tokens.argmax(1).max()) + 1]


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """``model.encode_text`` for tokens that were cut to fewer than ``context_length``; features are normalised."""
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return F.normalize(x[torch.arange(len(x)), tokens.argmax(1)] @ model.text_projection, dim=-1)


def train_text(
    model: nn.Module,
    texts: Texts,
    features: Tensor,
    labels: Tensor,
    looks: Tensor,
    generator: torch.Generator,
    console: Console,
    steps: int = 600,
    batch: int = 512,
    lr: float = 2e-3,
    embedding_lr: float = 2e-4,
) -> None:
    """Train ``model``'s text tower, fresh from its initialisation, in place.

    Args:
        features: [M, D] of random views, normalised; labels, looks: int64 [M].
        embedding_lr: small, so that token embeddings stay of the size that CLIP's have and TPT's learning rate of
            5e-3, which is absolute, means as much here as there.
    """
    embeddings = [model.token_embedding.weight, model.positional_embedding]
    blocks = [*model.transformer.parameters(), *model.ln_final.parameters(), model.text_projection, model.logit_scale]
    groups = [{"params": blocks, "lr": lr}, {"params": embeddings, "lr": embedding_lr, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / 50, 1, 2 * (1 - step / steps))
    )
    of_look = [(features[looks == i], labels[looks == i]) for i in range(len(LOOKS))]
    # The plain prompt is the clear look's too: it is what the model is asked with.
    seen = [*of_look, of_look[LOOKS.index("clear")]]

    def some(count: int) -> Tensor:
        return torch.randint(count, (batch,), generator=generator)

    for _ in track(range(steps), description="text tower", console=console):
        sets = [*captions.sample_looks(CLASSNAMES, generator), captions.of_classes(captions.PROMPT, CLASSNAMES)]
        tokens = texts([caption for captions_of_one_look in sets for caption in captions_of_one_look])
        text = encode_text(model, tokens).view(len(sets), len(CLASSNAMES), -1)
        scale = model.logit_scale.exp()
        loss = torch.zeros(())
        for (images, classes), prompts in zip(seen, text, strict=True):
            chosen = some(len(images))
            loss = loss + F.cross_entropy(scale * images[chosen] @ prompts.T, classes[chosen]) / len(sets)
        chosen = some(len(features))
        every = scale * features[chosen] @ text[: len(LOOKS)].flatten(0, 1).T
        loss = loss + 0.1 * F.cross_entropy(every, looks[chosen] * len(CLASSNAMES) + labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(blocks + embeddings, 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
