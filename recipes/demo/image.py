"""The first stage: the image tower, by classes and by looks.

Images are told apart by free class vectors, which the text tower will learn to say in the second stage (``text.py``);
to run the text tower here would cost time and teach it that the words around a name do not matter. A second head tells
the looks apart: with a small weight, so that features keep what captions speak of beside the class.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from tpt_fast._files import atomic_write

from .augment import LOOKS, draw_looks, plain, random_views
from .data import Split
from .muon import Muon


@dataclass(frozen=True)
class ImageOptions:
    """epochs, decay_from: the rates are constant up to this fraction of the run, then fall to zero; a run may be
    stopped before that point and go on with another number of epochs. sizes: (fraction of the run, pixels) from where
    on images are so large. areas: of random crops. clear: fraction of images without a look."""

    epochs: float = 20
    decay_from: float = 0.4
    sizes: tuple[tuple[float, int], ...] = ((0, 48), (0.25, 64))
    batch: int = 256
    muon_lr: float = 0.04
    adam_lr: float = 1e-3
    warmup: int = 100
    areas: tuple[float, float] = (0.35, 1.0)
    clear: float = 0.8
    smoothing: float = 0.1
    look_weight: float = 0.1
    seed: int = 0
    threads: int = 2
    save_every: int = 60


class ImageTask(nn.Module):
    """The tower with what it is trained by: class vectors, a temperature, and a head for the looks."""

    def __init__(self, visual: ModifiedResNet, classes: int) -> None:
        super().__init__()
        self.visual = visual
        self.classes = nn.Parameter(torch.randn(classes, visual.output_dim) * visual.output_dim**-0.5)
        self.looks = nn.Linear(visual.output_dim, len(LOOKS))
        self.log_scale = nn.Parameter(torch.tensor(math.log(16.0)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] of any size -> logits of the classes [B, C] and of the looks."""
        features = encode(self.visual, x)
        return self.log_scale.exp() * features @ F.normalize(self.classes, dim=-1).T, 16 * self.looks(features)


def encode(visual: ModifiedResNet, x: Tensor) -> Tensor:
    """Features [B, D] of length 1, float32, of images of any size; in bfloat16 where the processor multiplies it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
        x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(x)))))
        return F.normalize(_pool(visual.attnpool, x).float(), dim=-1)


def _pool(pool: nn.Module, x: Tensor) -> Tensor:
    """``AttentionPool2d``, for the one query that is read, with positions interpolated to the grid of ``x``."""
    _, channels, height, width = x.shape
    mean_position, positions = pool.positional_embedding[:1], pool.positional_embedding[1:]
    side = math.isqrt(len(positions))
    grid = positions.T.reshape(1, channels, side, side)
    if (height, width) != (side, side):
        grid = F.interpolate(grid, (height, width), mode="bilinear", align_corners=False)
    rows = x.flatten(2).transpose(1, 2)
    positions = torch.cat([mean_position, grid[0].flatten(1).T]).to(x.dtype)
    rows = torch.cat([rows.mean(1, keepdim=True), rows], 1) + positions
    query, key, value = (
        projection(of).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
        for projection, of in ((pool.q_proj, rows[:, :1]), (pool.k_proj, rows), (pool.v_proj, rows))
    )
    chances = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    return pool.c_proj((chances.to(value.dtype) @ value).transpose(1, 2).flatten(1))


class ImageTraining:
    """Everything that a run carries from one step to the next, and its file."""

    def __init__(self, visual: ModifiedResNet, classes: int, options: ImageOptions, checkpoint: Path) -> None:
        self.options, self.checkpoint = options, checkpoint
        self.task = ImageTask(visual, classes).to(memory_format=torch.channels_last).train()
        # A thread computes with one core on its part of the batch, and waits for the others once a step: cores that
        # share every product would wait a thousand times, which is slow wherever other programs run. The copies share
        # parameters and have running means of their own.
        self.parameters = dict(self.task.named_parameters())
        shared = {id(p): p for p in self.parameters.values()}
        self.copies = [self.task, *(copy.deepcopy(self.task, dict(shared)) for _ in range(options.threads - 1))]
        self.pool = ThreadPoolExecutor(options.threads, initializer=torch.set_num_threads, initargs=(1,))
        filters = [p for p in self.parameters.values() if p.ndim == 4]
        decayed = [p for name, p in self.parameters.items() if p.ndim == 2 and "proj" in name]
        others = [p for name, p in self.parameters.items() if p.ndim != 4 and not (p.ndim == 2 and "proj" in name)]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        adam = torch.optim.AdamW(groups, lr=options.adam_lr, betas=(0.9, 0.98), fused=True)
        self.optimisers = {"muon": Muon(filters, options.muon_lr, over=self.pool.map), "adam": adam}
        self.average = {name: value.clone() for name, value in self.task.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        if checkpoint.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        for task in self.copies:
            task.load_state_dict(state["task"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state[name])
        self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]

    def save(self) -> None:
        """An interruption leaves the last state whole."""
        state = dict(task=self.task.state_dict(), average=self.average, step=self.step, seconds=self.seconds)
        state |= {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()}
        with atomic_write(self.checkpoint) as aside:
            torch.save(state, aside)

    def run(self, train: Split, held: Split, log: Path) -> bool:
        """Train to the end of the epochs, or to a SIGTERM or SIGINT; whether the end was reached.

        One JSON object for each epoch goes to ``log``.
        """
        o = self.options
        steps = len(train.labels) // o.batch
        total = int(o.epochs * steps)
        losses: list[float] = []
        if self.step < total:
            _write(log, dict(step=self.step, options=asdict(o), images=len(train.labels)))
        with _until_interrupted() as stop:
            while self.step < total and not stop:
                began = time.monotonic()
                progress = self.step / total
                size = [pixels for since, pixels in o.sizes if progress >= since][-1]
                rate = min(1.0, (self.step + 1) / o.warmup, (1 - progress) / (1 - o.decay_from))
                losses.append(self._step(train, self._batch(len(train.labels)), size, rate))
                self.step += 1
                self.seconds += time.monotonic() - began
                if self.step % o.save_every == 0 or self.step % steps == 0:
                    self.save()
                if self.step % steps == 0:
                    row = dict(epoch=self.step // steps, step=self.step, size=size, rate=rate)
                    row |= dict(loss=sum(losses) / len(losses))
                    losses.clear()
                    row |= dict(held_out=self.accuracy(held, o.sizes[-1][1]), seconds=round(self.seconds))
                    _write(log, row)
        self.save()
        return self.step >= total

    def _batch(self, images: int) -> Tensor:
        """Indices of this step's images: each epoch takes all in an order of its own."""
        epoch, place = divmod(self.step, images // self.options.batch)
        order = torch.randperm(images, generator=torch.Generator().manual_seed(self.options.seed + 1000 + epoch))
        return order[place * self.options.batch :][: self.options.batch]

    def _step(self, train: Split, chosen: Tensor, size: int, rate: float) -> float:
        parts = chosen.chunk(self.options.threads)
        work = range(len(parts)), parts
        results = list(self.pool.map(lambda k, part: self._part(k, train, part, size, len(part) / len(chosen)), *work))
        for p, *gradients in zip(self.parameters.values(), *(gradients for _, gradients in results)):
            p.grad = sum(gradients)
        for name, peak in (("muon", self.options.muon_lr), ("adam", self.options.adam_lr)):
            for group in self.optimisers[name].param_groups:
                group["lr"] = peak * rate
            self.optimisers[name].step()
        with torch.no_grad():
            self.task.log_scale.clamp_(0, math.log(50))
            keep = min(0.998, (1 + self.step) / (10 + self.step))
            for name, value in self.task.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - keep)
                else:
                    self.average[name].copy_(value)
        return sum(loss for loss, _ in results)

    def _part(self, k: int, train: Split, chosen: Tensor, size: int, weight: float) -> tuple[float, tuple[Tensor, ...]]:
        """Loss and gradients of copy ``k`` on its part of the batch; the step and ``k`` say what is drawn."""
        o = self.options
        generator = torch.Generator().manual_seed((o.seed * 1_000_003 + self.step) * 16 + k)
        looks = draw_looks(len(chosen), o.clear, generator)
        x = random_views(train.images[chosen], size, o.areas, looks, generator)
        by_class, by_look = self.copies[k](x)
        loss = F.cross_entropy(by_class, train.labels[chosen], label_smoothing=o.smoothing)
        loss = weight * (loss + o.look_weight * F.cross_entropy(by_look, looks))
        return loss.item(), torch.autograd.grad(loss, list(self.copies[k].parameters()))

    def averaged(self) -> ImageTask:
        """A copy with the mean of the last some hundred steps' weights, in evaluation mode."""
        task = copy.deepcopy(self.task)
        task.load_state_dict(self.average)
        return task.eval().requires_grad_(False)

    def accuracy(self, split: Split, size: int, batch: int = 250) -> float:
        """Top-1 in percent of whole images by the averaged weights."""
        task = self.averaged()

        def hits(part: Tensor) -> int:
            with torch.no_grad():
                logits, _ = task(plain(split.images[part], size))
            return int((logits.argmax(1) == split.labels[part]).sum())

        parts = torch.arange(len(split.labels)).split(batch)
        return 100 * sum(self.pool.map(hits, parts)) / len(split.labels)


def _write(log: Path, row: dict) -> None:
    row = dict(time=time.strftime("%Y-%m-%d %H:%M:%S")) | row
    print(json.dumps(row), flush=True)
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")


@contextmanager
def _until_interrupted() -> Iterator[list]:
    """A list that holds something once the process was asked to end."""
    stop: list[int] = []
    before = {number: signal.signal(number, lambda n, _: stop.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
