"""Train the demo model: ``python -m recipes.demo.train --data DIR``.

Stops and resumes at any epoch: run the same command again. The learning rate is constant until ``--decay-from`` and
then falls to zero, so a run may also be resumed with another number of ``--epochs`` before that point. When the epochs
are done, the text tower is trained once more, by itself (``text.py``).
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from torch import Tensor, nn

from tpt_fast._files import atomic_write
from tpt_fast.demo import weights

from . import captions
from .augment import random_views
from .data import CLASSNAMES, Split, load_split
from .initialise import initialise
from .muon import Muon
from .text import LOOKS, Texts, encode_text, train_text

MEAN = torch.tensor(OPENAI_DATASET_MEAN).view(3, 1, 1)
STD = torch.tensor(OPENAI_DATASET_STD).view(3, 1, 1)


def contrastive_loss(logits: Tensor, labels: Tensor, looks: Tensor, generic_sets: int, look_weight: float) -> Tensor:
    """Cross-entropy of the right caption, without those captions that would be right as well.

    logits: [B, (generic_sets + looks) * C], captions in the order of ``captions.sample``. The captions of one set name
    different classes, so among them exactly one is right; across the sets of looks, the one of class and look.
    """
    classes = len(CLASSNAMES)
    generic, described = logits.split([generic_sets * classes, len(LOOKS) * classes], dim=1)
    by_class = F.cross_entropy(generic.reshape(-1, classes), labels.repeat_interleave(generic_sets))
    by_look = F.cross_entropy(described, looks * classes + labels)
    return by_class + look_weight * by_look


class Workers:
    """The image tower's forward and backward, the batch split over threads that compute with one core each.

    All cores in every matrix product would wait for each other a thousand times a step, which is slow wherever other
    programs run as well; this way they wait once. (Patch dropout draws from the global generator in whatever order the
    threads reach it, so with several workers two runs agree in distribution, not in bits.)
    """

    def __init__(self, model: nn.Module, count: int, generic_sets: int, look_weight: float) -> None:
        self.model, self.count = model, count
        self.loss = partial(contrastive_loss, generic_sets=generic_sets, look_weight=look_weight)
        self.parameters = [*model.visual.parameters(), model.logit_scale]
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def backward(self, x: Tensor, labels: Tensor, looks: Tensor, text: Tensor) -> float:
        """Leave the gradients of the mean loss in ``grad``; returns the loss. x: 0..1; text: features with a graph."""
        parts = zip(x.chunk(self.count), labels.chunk(self.count), looks.chunk(self.count))
        results = list(self.pool.map(lambda part: self._part(*part, text.detach(), len(part[0]) / len(x)), parts))
        for_text, *gradients = [sum(g) for g in zip(*(gradients for _, gradients in results))]
        for p, gradient in zip(self.parameters, gradients):
            p.grad = gradient
        text.backward(for_text)
        return sum(loss for loss, _ in results)

    def _part(self, x: Tensor, labels: Tensor, looks: Tensor, text: Tensor, weight: float) -> tuple:
        text = text.requires_grad_()
        image = F.normalize(self.model.visual((x - MEAN) / STD), dim=-1)
        loss = weight * self.loss(self.model.logit_scale.exp() * image @ text.T, labels, looks)
        return loss.item(), torch.autograd.grad(loss, [text, *self.parameters])


@torch.no_grad()
def zero_shot(model: nn.Module, tokens: Tensor, split: Split, batch: int = 500) -> float:
    """Top-1 in percent of the plain images against the ten prompts ``tokens``."""
    model.eval()
    text = encode_text(model, tokens)
    hits = 0
    for images, labels in zip(split.images.split(batch), split.labels.split(batch)):
        x = (images.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
        hits += int(((model.visual(x) @ text.T).argmax(1) == labels).sum())
    model.train()
    return 100 * hits / len(split.labels)


@torch.no_grad()
def random_features(
    model: nn.Module, split: Split, batch: int, min_scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Features [B, D] of random views, normalised, their labels and their looks, all looks being equally frequent."""
    chosen = torch.randint(len(split.labels), (batch,), generator=generator)
    x, looks = random_views(split.images[chosen], min_scale, 1 / len(LOOKS), generator)
    return F.normalize(model.eval().visual((x - MEAN) / STD), dim=-1), split.labels[chosen], looks


def parameter_groups(model: nn.Module) -> tuple[list[Tensor], list[dict]]:
    """Hidden matrices of the image tower for Muon; the rest for AdamW, with weight decay on the text matrices only."""
    hidden, decayed, plain = [], [], []
    for name, p in model.named_parameters():
        matrix = p.ndim == 2 and ".resblocks." in f".{name}"
        (hidden if matrix and name.startswith("visual.") else decayed if matrix else plain).append(p)
    return hidden, [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]


def learning_rate(progress: float, warmup: float, decay_from: float) -> float:
    """Factor 0..1 at ``progress`` 0..1 of the run: linear rise, plateau, linear fall to zero."""
    return min(1.0, progress / warmup, (1 - progress) / (1 - decay_from))


def main(
    data: Annotated[Path, typer.Option(help="Folder of cifar10_*.npz, or a torchvision data root.")] = Path("data"),
    out: Annotated[Path, typer.Option(help="Where the fp16 model goes.")] = weights.WEIGHTS,
    checkpoint: Annotated[Path, typer.Option(help="Resumable state, written after each epoch.")] = Path("demo.ckpt"),
    epochs: int = 20,
    batch: int = 256,
    muon_lr: float = 0.02,
    adam_lr: float = 2e-3,
    warmup: Annotated[float, typer.Option(help="Fraction of the run.")] = 0.03,
    decay_from: Annotated[float, typer.Option(help="Fraction of the run after which the rates fall.")] = 0.4,
    patch_dropout: Annotated[float, typer.Option(help="Fraction of patches dropped, except in the last epochs.")] = 0.5,
    full_epochs: Annotated[int, typer.Option(help="Last epochs, with all patches.")] = 2,
    min_scale: Annotated[float, typer.Option(help="Smallest random crop, as a fraction of the area.")] = 0.5,
    clear: Annotated[float, typer.Option(help="Fraction of images without blur, noise, darkness, glare.")] = 0.75,
    generic_sets: Annotated[int, typer.Option(help="Sets of ten captions without a look, each step.")] = 2,
    look_weight: float = 0.2,
    feature_batches: Annotated[int, typer.Option(help="Batches of features for the text tower's own stage.")] = 160,
    holdout: Annotated[int, typer.Option(help="Training images kept back to watch progress with.")] = 1000,
    seed: int = 0,
    threads: Annotated[int, typer.Option(help="CPU cores to use; 0: all that torch sees.")] = 0,
) -> None:
    """Train, keep the state after each epoch, export in fp16 and judge the exported file on the test images."""
    console = Console()
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)

    everything = load_split(data, train=True, download=True)
    order = torch.randperm(len(everything.labels), generator=torch.Generator().manual_seed(seed))
    train, watched = (Split(everything.images[i], everything.labels[i]) for i in (order[holdout:], order[:holdout]))
    texts = Texts()
    prompts = texts([captions.PROMPT.format(name) for name in CLASSNAMES])

    # The compact vocabulary spares the optimiser 49,000 rows whose gradient is always zero.
    config = weights.read_config()
    full_vocab, width = config["text_cfg"]["vocab_size"], config["text_cfg"]["width"]
    config["text_cfg"]["vocab_size"] = len(texts.token_ids)
    config["vision_cfg"]["patch_dropout"] = patch_dropout or 0.01

    def untrained() -> nn.Module:
        fresh = weights.build(config)
        fresh.token_embedding.weight.data.copy_(weights.token_table(full_vocab, width)[texts.token_ids])
        return fresh

    model = untrained().train()
    sample, _ = random_views(train.images[:2048], min_scale, clear, generator)
    initialise(model, (sample - MEAN) / STD)
    workers = Workers(model, torch.get_num_threads(), generic_sets, look_weight)

    hidden, others = parameter_groups(model)
    optimisers = [Muon(hidden, lr=muon_lr), torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), fused=True)]
    rates = [muon_lr, adam_lr]
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"]):
            optimiser.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        generator.set_state(state["generator"])
        first, seconds = state["epoch"], state["seconds"]
        console.print(f"resuming after epoch {first}")

    steps = len(train.labels) // batch
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    for epoch in range(first, epochs):
        began = time.monotonic()
        model.visual.patch_dropout.prob = patch_dropout if epoch < epochs - full_epochs else 0.0
        order = torch.randperm(len(train.labels), generator=generator)
        running = math.nan
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task(f"epoch {epoch + 1}/{epochs}", total=steps)
            for step in range(steps):
                factor = learning_rate((epoch * steps + step + 1) / (epochs * steps + 1), warmup, decay_from)
                for optimiser, rate in zip(optimisers, rates):
                    for group in optimiser.param_groups:
                        group["lr"] = rate * factor
                chosen = order[step * batch : (step + 1) * batch]
                x, looks = random_views(train.images[chosen], min_scale, clear, generator)
                text = encode_text(model, texts(captions.sample(CLASSNAMES, generic_sets, generator)))
                loss = workers.backward(x, train.labels[chosen], looks, text)
                nn.utils.clip_grad_norm_([p for group in others for p in group["params"]], 1.0)
                for optimiser in optimisers:
                    optimiser.step()
                    optimiser.zero_grad()
                with torch.no_grad():
                    model.logit_scale.clamp_(0, math.log(100))
                running = loss if math.isnan(running) else 0.98 * running + 0.02 * loss
                progress.update(bar, advance=1, description=f"epoch {epoch + 1}/{epochs} loss {running:.3f}")
        seconds += time.monotonic() - began
        accuracy = zero_shot(model, prompts, watched)
        console.print(f"epoch {epoch + 1}: loss {running:.3f}, held-out top-1 {accuracy:.1f} %, {seconds:.0f} s in all")
        save_checkpoint(checkpoint, model, optimisers, generator, epoch + 1, seconds)

    final = untrained()
    final.visual.load_state_dict(model.visual.state_dict())
    final.logit_scale.data.copy_(model.logit_scale)
    batches = track(range(feature_batches), "features", console=console)
    seen = [random_features(final, train, batch, min_scale, generator) for _ in batches]
    train_text(final, texts, *(torch.cat(column) for column in zip(*seen)), generator, console)
    console.print(f"held-out top-1 {zero_shot(final, prompts, watched):.1f} % with the final text tower")

    weights.save_weights(final.state_dict(), texts.token_ids, out)
    exported = weights.load_weights(weights.build(weights.read_config()), out)
    test = load_split(data, train=False, download=True)
    accuracy = zero_shot(exported, texts.tokenizer(list(map(captions.PROMPT.format, CLASSNAMES))), test)
    size = out.stat().st_size / 1e6
    console.print(f"test top-1 {accuracy:.2f} % of {len(test.labels)}, {size:.2f} MB, {seconds:.0f} s of training")


def save_checkpoint(
    path: Path, model: nn.Module, optimisers: list, generator: torch.Generator, epoch: int, seconds: float
) -> None:
    """An interruption leaves the last epoch's state whole."""
    state = dict(
        model=model.state_dict(),
        optimisers=[optimiser.state_dict() for optimiser in optimisers],
        rng=torch.get_rng_state(),
        generator=generator.get_state(),
        epoch=epoch,
        seconds=seconds,
    )
    with atomic_write(path) as aside:
        torch.save(state, aside)


if __name__ == "__main__":
    typer.run(main)
