"""The published loop in its own precision: float32 weights under fp16 autocast, and a GradScaler for all images."""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor, nn

from .._stages import Stages
from ..config import TuneConfig
from ..text import TextEncoder
from ..vision import ImageEncoder
from .published import marginal_entropy, view_entropies
from .tpt import Classes, Tuned

INITIAL_SCALE = 1000.0  # of the published GradScaler; torch's own is 65536


class UnderAutocast(nn.Module):
    """``module`` under fp16 autocast, wherever it is called from: a backward pass that computes again calls it too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Tensor) -> Tensor:
        with torch.autocast(arguments[0].device.type, torch.float16):
            return self.module(*arguments)


class OfficialLoop:
    """One image after the other, as the published code runs them, on the towers' own modules.

    Late images depend on early ones through the scale of the gradient: it halves where a gradient overflows, which also
    skips that step, and doubles after 2000 clean steps.
    """

    def __init__(self, images: ImageEncoder, device: torch.device) -> None:
        tower = images._tower
        tower._visual = UnderAutocast(tower._visual)
        self._images, self._device = images, device
        self.scaler = torch.amp.GradScaler(device.type, init_scale=INITIAL_SCALE)
        self._lock = Lock()

    @staticmethod
    def put_under_autocast(encoder: TextEncoder) -> None:
        """Of ``encoder``, which runs the model's own module, from now on."""
        encoder._engine._module = UnderAutocast(encoder._engine._module)

    def __call__(self, views: Tensor, classes: Classes, config: TuneConfig, scale: Tensor, stages: Stages) -> Tuned:
        """Of B images' views [B, N, 3, S, S]; see :func:`tpt_fast.methods.tpt.tune_features`."""
        with self._lock:
            rows = [self._one(each, classes, config, scale, stages) for each in views]
        return Tuned(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def _one(self, views: Tensor, classes: Classes, config: TuneConfig, scale: Tensor, stages: Stages) -> Tuned:
        with stages("encode"):
            images = scale * self._images.encode(views)
        start = classes.text.ctx_init
        ctx, taken = nn.Parameter(start.clone()), 0
        optimizer = torch.optim.AdamW([ctx], lr=config.lr, weight_decay=config.weight_decay)

        def logits_of(ctx: Tensor) -> Tensor:
            features = classes.text.encode(ctx)
            with torch.autocast(self._device.type, torch.float16):
                return classes.logits(images, features)  # fp16: between 16 and 32, steps of 1/64

        with torch.enable_grad(), stages("tune"):
            for step in range(config.steps):
                logits = logits_of(ctx)
                if step == 0:
                    before, entropies, selected = self._chosen(logits, config)
                loss = marginal_entropy(logits[selected].float())
                optimizer.zero_grad()
                self.scaler.scale(loss).backward()
                scaled_by = self.scaler.get_scale()
                self.scaler.step(optimizer)
                self.scaler.update()
                taken += self.scaler.get_scale() >= scaled_by  # it falls where the step was skipped
        with torch.no_grad(), stages("tune"):
            after = logits_of(ctx)
            if config.steps == 0:
                before, entropies, selected = self._chosen(after, config)
        return Tuned(
            logits=after[0],
            zero_shot_logits=before[0],
            ctx=ctx.detach(),
            grad=torch.zeros_like(start) if ctx.grad is None else ctx.grad,
            entropies=entropies,
            selected=selected,
            loss=marginal_entropy(before[selected].float()),
            loss_after=marginal_entropy(after[selected].float()),
            status=torch.tensor(taken > 0 or config.steps == 0, device=self._device),
        )

    @staticmethod
    def _chosen(logits: Tensor, config: TuneConfig) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits.detach()
        entropies = view_entropies(logits.float())
        return logits, entropies, entropies.argsort(stable=True)[: config.n_selected(len(logits))]
