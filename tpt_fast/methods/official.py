"""The published loop: TPT as its authors' code runs it, one image after the other.

In float32 that is :class:`~tpt_fast.methods.tpt.Tpt`, which gives the published answers. Under fp16 autocast, which
the published code uses on a GPU, it is written here once more, with the GradScaler that all images share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._locks import Lock
from .._stages import Stages
from ..text.classes import Classes
from . import Answer, n_selected
from .published import marginal_entropy, view_entropies
from .tpt import Tpt

INITIAL_SCALE = 1000.0  # of the published GradScaler; torch's own is 65536


@dataclass(frozen=True)
class Official(Tpt):
    """TPT as its authors' code runs it, to the precision and its draws. No view to keep is an error, as there."""

    name: ClassVar[str] = "official"

    autocasts: bool = False  #: whether the towers run under fp16 autocast
    scaler: Any = field(default=None, compare=False)  #: a torch.amp.GradScaler, made at the first image
    _lock: Lock = field(default_factory=Lock, compare=False, repr=False)

    @property
    def loop(self) -> str:  # type: ignore[override]
        return "published" if self.autocasts else "eager"

    @property
    def online(self) -> bool:  # type: ignore[override]
        """Late images depend on early ones through the scale of the gradient: it halves where a gradient overflows,
        which also skips that step, and doubles after 2000 clean steps."""
        return self.autocasts

    @property
    def capturable(self) -> bool:
        return not self.autocasts and super().capturable

    def check(self, n_views: int) -> None:
        n_selected(n_views, self.rho, strict=True)

    def __call__(self, images: Tensor, classes: Classes, stages: Stages) -> Answer:
        if not self.autocasts:
            return super().__call__(images, classes, stages)
        with self._lock:
            if self.scaler is None:
                scaler = torch.amp.GradScaler(images.device.type, init_scale=INITIAL_SCALE)
                object.__setattr__(self, "scaler", scaler)
            answers = [self._one(classes.scaled(each), classes, stages) for each in images]
        return Answer(
            logits=torch.stack([each.logits for each in answers]),
            zero_shot_logits=torch.stack([each.zero_shot_logits for each in answers]),
            usable=torch.stack([each.usable for each in answers if each.usable is not None]),
            extra={name: torch.stack([each.extra[name] for each in answers]) for name in answers[0].extra},
        )

    def _one(self, images: Tensor, classes: Classes, stages: Stages) -> Answer:
        """Of one image's scaled features [N, D]; results without the images' dimension."""
        device, start = images.device, classes.text.ctx_init
        ctx, taken = nn.Parameter(start.clone()), 0
        optimizer = torch.optim.AdamW([ctx], lr=self.lr, weight_decay=self.weight_decay)

        def logits_of(ctx: Tensor) -> Tensor:
            features = classes.text.encode(ctx)
            with torch.autocast(device.type, torch.float16):
                return classes.logits(images, features)  # fp16: between 16 and 32, steps of 1/64

        with torch.enable_grad(), stages("tune"):
            for step in range(self.steps):
                logits = logits_of(ctx)
                if step == 0:
                    before, entropies, selected = self._chosen(logits)
                loss = marginal_entropy(logits[selected].float())
                optimizer.zero_grad()
                self.scaler.scale(loss).backward()
                scaled_by = self.scaler.get_scale()
                self.scaler.step(optimizer)
                self.scaler.update()
                taken += self.scaler.get_scale() >= scaled_by  # it falls where the step was skipped
        with torch.no_grad(), stages("tune"):
            after = logits_of(ctx)
            if self.steps == 0:
                before, entropies, selected = self._chosen(after)
        return Answer(
            logits=after[0],
            zero_shot_logits=before[0],
            usable=torch.tensor(taken > 0 or self.steps == 0, device=device),
            extra={
                "ctx": ctx.detach(),
                "grad": torch.zeros_like(start) if ctx.grad is None else ctx.grad,
                "entropies": entropies,
                "selected": selected,
                "loss": marginal_entropy(before[selected].float()),
                "loss_after": marginal_entropy(after[selected].float()),
            },
        )

    def _chosen(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits.detach()
        entropies = view_entropies(logits.float())
        return logits, entropies, entropies.argsort(stable=True)[: n_selected(len(logits), self.rho, strict=True)]
