"""Train the demo model: ``python -m recipes.demo.train --data DIR``.

Stops at any moment (Ctrl-C, or SIGTERM) and goes on when the same command is run again: README.md says what may change
in between. When the image tower's epochs are done, or with ``--text-only`` on what there is of it, the text tower is
trained and the model exported and judged on the validation images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from tpt_fast.demo import CLASSES, CLASSNAMES, weights

from . import captions
from .augment import LOOKS as VIEW_LOOKS
from .augment import draw_looks, plain, random_views
from .data import Split, hold_out, load_split
from .image import ImageOptions, ImageTraining, encode
from .text import LOOKS, Features, Texts, encode_text, train_text

CLOSE_UP = (0.08, 0.35)  # areas of the tight crops that no look of augment.py makes


@torch.no_grad()
def random_features(visual: nn.Module, train: Split, size: int, areas: tuple, passes: int, seed: int) -> Features:
    """Of ``passes`` random views of each training image, all looks of ``text.LOOKS`` being equally frequent."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    order = torch.cat([torch.randperm(len(train.labels), generator=generator) for _ in range(passes)])
    for i, chosen in enumerate(track(order.split(256), description="features", console=Console())):
        close = i % len(LOOKS) == LOOKS.index("close-up")
        looks = draw_looks(len(chosen), 1 / len(VIEW_LOOKS), generator)
        looks = torch.zeros_like(looks) if close else looks
        x = random_views(train.images[chosen], size, CLOSE_UP if close else areas, looks, generator)
        told = torch.full_like(looks, LOOKS.index("close-up")) if close else looks
        parts.append((encode(visual, x), train.labels[chosen], told))
    return Features(*(torch.cat(column) for column in zip(*parts)))


@torch.no_grad()
def zero_shot(model: nn.Module, tokens: Tensor, split: Split, batch: int = 250) -> float:
    """Top-1 in percent of the plain images against the prompts ``tokens`` [C, L]."""
    text, size = encode_text(model, tokens), model.visual.image_size
    hits = 0
    for images, labels in zip(split.images.split(batch), split.labels.split(batch)):
        features = F.normalize(model.visual(plain(images, size)), dim=-1)
        hits += int(((features @ text.T).argmax(1) == labels).sum())
    return 100 * hits / len(split.labels)


def main(
    data: Annotated[Path, typer.Option(help="Folder of tiny_imagenet_*.npz, or tiny-imagenet-200.")],
    run: Annotated[Path, typer.Option(help="Folder for the checkpoint and the log.")] = Path("demo-run"),
    out: Annotated[Path, typer.Option(help="Where the fp16 model goes.")] = weights.WEIGHTS,
    epochs: Annotated[float, typer.Option(help="Of the image tower.")] = ImageOptions.epochs,
    decay_from: Annotated[float, typer.Option(help="Fraction of the run after which the rates fall.")] = 0.4,
    sizes: Annotated[str, typer.Option(help="FRACTION:PIXELS,...: image sizes over the run.")] = "0:48,0.25:64",
    passes: Annotated[int, typer.Option(help="Views of each training image for the text tower.")] = 1,
    text_only: Annotated[bool, typer.Option(help="Take the image tower as far as it has come.")] = False,
    held_out: Annotated[int, typer.Option(help="Training images kept back to make choices with.")] = 2000,
    seed: int = 0,
    threads: Annotated[int, typer.Option(help="Each on its part of a batch with one core.")] = 2,
) -> None:
    """Train both towers, export in fp16 and judge the exported file on the validation images."""
    console = Console()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    run.mkdir(parents=True, exist_ok=True)
    texts = Texts()
    config = weights.read_config()
    full_vocab, width = config["text_cfg"]["vocab_size"], config["text_cfg"]["width"]
    # The compact vocabulary spares the optimiser 49,000 rows whose gradient is always zero.
    config["text_cfg"]["vocab_size"] = len(texts.token_ids)
    torch.manual_seed(seed)
    model = weights.build(config)
    model.token_embedding.weight.data.copy_(weights.token_table(full_vocab, width)[texts.token_ids])

    train, held = hold_out(load_split(data, train=True), held_out, seed)
    at = tuple((float(since), int(pixels)) for since, pixels in (pair.split(":") for pair in sizes.split(",")))
    options = ImageOptions(epochs=epochs, decay_from=decay_from, sizes=at, seed=seed, threads=threads)
    training = ImageTraining(model.visual, len(CLASSES), options, run / "image.ckpt")
    if not text_only and not training.run(train, held, run / "log.jsonl"):
        console.print("stopped; the same command goes on")
        return

    averaged = training.averaged()
    model.visual.load_state_dict(averaged.visual.state_dict())
    model.eval()
    size = model.visual.image_size
    seen = random_features(model.visual, train, size, options.areas, passes, seed)
    torch.set_num_threads(threads)
    classes = F.normalize(averaged.classes, dim=-1)
    train_text(model, texts, seen, classes, torch.Generator().manual_seed(seed), console)
    prompts = texts([captions.PROMPT.format(name) for name in CLASSNAMES])
    rows = {"held out, class vectors": training.accuracy(held, size), "held out": zero_shot(model, prompts, held)}
    weights.save_weights(model.state_dict(), texts.token_ids, out)
    exported = weights.load_weights(weights.build(weights.read_config()), out).eval()
    prompts = texts.tokenizer([captions.PROMPT.format(name) for name in CLASSNAMES])
    rows["validation, the file"] = zero_shot(exported, prompts, load_split(data, train=False))
    rows |= {"epochs": training.step * options.batch / len(train.labels), "MB": out.stat().st_size / 1e6}
    console.print(json.dumps(rows, indent=1))
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    typer.run(main)
