"""The second stage: the text tower, on features of the finished image tower.

An image tower that is trained first and then read by a text tower is what X. Zhai et al. call locked-image tuning (CVPR
2022). Here it is what makes prompts matter: a text tower that learns together with the images learns that the words
around a class name say nothing of the class, and a prompt that does not matter cannot be tuned. This one learns, for
each look, to tell the classes apart *in images of that look* by that look's captions, so that the words around the name
choose among classifiers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from . import captions

LOOKS = list(captions.LOOKS)


class Features(NamedTuple):
    """Of M random views: ``features`` [M, D] of length 1; ``labels`` and ``looks`` (into ``LOOKS``), int64 [M]."""

    features: Tensor
    labels: Tensor
    looks: Tensor


class Texts:
    """Captions as the token ids of a compact vocabulary: only tokens of some caption, numbered in ascending order.

    The end-of-text token keeps the highest number, by which CLIP finds it.
    """

    def __init__(self) -> None:
        self.tokenizer = SimpleTokenizer()
        self.token_ids = torch.unique(self.tokenizer(captions.all_captions()))
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        """int64 [len(texts), L], L the longest caption's length: what follows an end-of-text is never read."""
        for text in texts:
            if text not in self._known:
                self._known[text] = torch.searchsorted(self.token_ids, self.tokenizer([text])[0])
        tokens = torch.stack([self._known[text] for text in texts])
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
    seen: Features,
    classes: Tensor,
    generator: torch.Generator,
    console: Console,
    steps: int = 500,
    batch: int = 512,
    lr: float = 2e-3,
    embedding_lr: float = 2e-4,
) -> None:
    """Train ``model``'s text tower, fresh from its initialisation, in place.

    A step asks with sets of captions: one of all classes in the plain prompt, about clear images; one of all classes in
    a caption of some look, about images of that look; and, taking turns, one in a template that says nothing, about any
    image, or the kinds of things, narrow and wide, in place of classes. The plain prompt is also drawn to ``classes``
    [C, D], the vectors of length 1 that the image tower was trained by: they are known to be good, where the features
    of images that the tower has seen are surer than those of others.

    ``embedding_lr`` is small, so that token embeddings stay of the size that CLIP's have and TPT's learning rate of
    5e-3, which is absolute, means as much here as there.
    """
    embeddings = [model.token_embedding.weight, model.positional_embedding]
    blocks = [*model.transformer.parameters(), *model.ln_final.parameters(), model.text_projection, model.logit_scale]
    groups = [{"params": blocks, "lr": lr}, {"params": embeddings, "lr": embedding_lr, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / 50, 1, 2 * (1 - step / steps))
    )
    everything = torch.arange(len(seen.labels))
    kinds = captions.kinds(0), captions.kinds(1)
    of_look = [everything[seen.looks == look] for look in range(len(LOOKS))]

    for step in track(range(steps), description="text tower", console=console):
        look = int(torch.randint(len(LOOKS), (), generator=generator))
        template = captions.draw(captions.LOOKS[LOOKS[look]], generator)
        asked = [(captions.of_classes(captions.PROMPT), of_look[LOOKS.index("clear")], seen.labels)]
        asked.append((captions.of_classes(template, generator), of_look[look], seen.labels))
        if step % 2:
            template = captions.draw(captions.GENERIC, generator)
            asked.append((captions.of_classes(template, generator), everything, seen.labels))
        else:
            for names, kind_of in kinds:
                asked.append(([captions.PROMPT.format(name) for name in names], everything, kind_of[seen.labels]))
        text = encode_text(model, texts([caption for one_set, _, _ in asked for caption in one_set]))
        prompts = text.split([len(one_set) for one_set, _, _ in asked])
        scale = model.logit_scale.exp()
        loss = 2 * (1 - (prompts[0] * classes).sum(1)).mean()
        for (_, among, targets), of_set in zip(asked, prompts, strict=True):
            chosen = among[torch.randint(len(among), (batch,), generator=generator)]
            loss = loss + F.cross_entropy(scale * seen.features[chosen] @ of_set.T, targets[chosen]) / len(asked)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(blocks + embeddings, 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
