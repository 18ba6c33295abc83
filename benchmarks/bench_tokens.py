"""Tokens of a class list before and after packing, and what that should save: ``python benchmarks/bench_tokens.py``."""

from pathlib import Path
from typing import Annotated

import open_clip
import typer
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from rich.console import Console
from rich.table import Table

from tpt_fast.text.prompts import build_prompts


def counts(names, tokenizer, template, length):
    """Rows of the text tower: as published, packed, and the shared and longest parts of the packed ones."""
    prompts = build_prompts(names, template, None, tokenizer, length)
    prefix = prompts.first + prompts.lead
    suffixes = prompts.lengths - prefix
    return {
        "classes": len(names),
        "tokens of all prompts, padded": prompts.ids.numel(),
        "tokens, packed": prefix + int(suffixes.sum()),
        "shared prefix": prefix,
        "mean suffix": round(suffixes.double().mean().item(), 2),
        "longest suffix": int(suffixes.max()),
    }


def main(
    classes: Annotated[
        Path | None, typer.Argument(help="A text file with one name a line; ImageNet's names without it.", exists=True)
    ] = None,
    template: Annotated[str, typer.Option(help="The words around the name, as TuneConfig.ctx_init.")] = "a photo of a",
    model: Annotated[str, typer.Option(help="open_clip model whose tokenizer is used.")] = "ViT-B-16",
) -> None:
    """Count the tokens of a class list before and after packing.

    The expected saving counts rows of matrix products, which are nearly all of the text tower's time: three passes over
    every token as published, against two over the packed ones once the first image has left its activations.
    """
    lines = IMAGENET_CLASSNAMES if classes is None else classes.read_text().splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise typer.BadParameter(f"{classes}: no class names")
    tokenizer = open_clip.get_tokenizer(model)
    found = counts(names, tokenizer, template, tokenizer.context_length)
    table = Table(show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    for what, count in found.items():
        table.add_row(what, f"{count:,}")
    saving = found["tokens of all prompts, padded"] / found["tokens, packed"]
    table.add_row("expected: a pass", f"{saving:.1f}x")
    table.add_row("expected: an image, 3 passes to 2", f"{1.5 * saving:.1f}x")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
