"""The model that a command works with: the embedded demo model, one of open_clip's, or one of transformers'."""

from __future__ import annotations

import difflib
import os
import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from ._shared import remark, stop, waiting

if TYPE_CHECKING:
    import torch
    from torch import nn

RANDOM = "none"  #: weights, by saying so
HUGGING_FACE = "hf:"  #: before the name of a model on the hub, or of a folder, that transformers loads


class Loaded(NamedTuple):
    """``classnames``: those that the model was made for, where that is known. ``tokenizer``: None
    for the model's own."""

    model: nn.Module
    tokenizer: Any
    classnames: tuple[str, ...] = ()


def load_demo(device: str | None = "cpu") -> Loaded:
    """What ``tpt_fast.demo.load()`` gives, without the seconds that importing open_clip takes."""
    import torch

    from ..demo import CLASSNAMES, weights
    from ..demo.clip import CLIP, tokenizer

    place = place_of(device)
    with torch.random.fork_rng(devices=[]):
        model = CLIP(**weights.read_config())
    try:
        weights.load_weights(model)
    except FileNotFoundError as error:
        stop(f"the demo model's weights are missing from this installation: {error}")
    return Loaded(model.to(place).eval().requires_grad_(False), tokenizer(), CLASSNAMES)


def warn_of_strange(names: Sequence[str], tokenizer: Any) -> None:
    """Names with words that no caption of the demo model has: it answers for them too, by chance."""
    from ..demo import weights

    padding = {0}
    trained = weights.trained_tokens() | padding
    rows = tokenizer([name.replace("_", " ") for name in names]).tolist()
    if strange := [repr(name) for name, row in zip(names, rows) if not trained.issuperset(row)]:
        shown = ", ".join(strange[:3]) + (f" and {len(strange) - 3} more" if len(strange) > 3 else "")
        remark(
            f"warning: the demo model has learned a hundred things, and not {shown}: for such names it answers by "
            "chance. A real CLIP: --model ViT-B-16-quickgelu --pretrained openai"
        )


def check_weights(name: str | None, pretrained: str | None) -> None:
    """Refuse weights of no model."""
    if name is None and pretrained is not None:
        raise typer.BadParameter("it goes with --model NAME", param_hint="--pretrained")


def load(name: str | None, pretrained: str | None, device: str | None) -> Loaded:
    """The model called ``name``, or without a name the demo model."""
    return load_demo(device) if name is None else load_model(name, pretrained, device)


def load_model(name: str, pretrained: str | None, device: str | None) -> Loaded:
    """One of open_clip's, or with ``hf:`` before its name transformers'; a wrong name or tag is bad usage, a failed
    download is not."""
    place = place_of(device)
    if name.startswith(HUGGING_FACE):
        return _of_transformers(name.removeprefix(HUGGING_FACE), pretrained, place)

    import open_clip

    if pretrained == RANDOM:
        check_name(name)
        return _random(name, place)
    if not name.startswith(("hf-hub:", "local-dir:")):
        check_name(name)
        _check_weights(name, pretrained)
    config = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    # OpenAI's weights, and some others, want QuickGELU: without it open_clip only warns, and accuracy drops.
    quick_gelu = bool(config.get("quick_gelu")) and not (open_clip.get_model_config(name) or {}).get("quick_gelu")
    if quick_gelu:
        remark(f"{pretrained} weights were trained with QuickGELU: using it ({name}-quickgelu)")
    try:
        with waiting(f"loading {name}"):
            model = open_clip.create_model(name, pretrained=pretrained, device=place, force_quick_gelu=quick_gelu)
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # a download, a file, a Hugging Face library that is missing: open_clip raises anything
        no_checkpoint = isinstance(error, pickle.UnpicklingError)  # torch's own words advise to run what is in it
        what = "it is no checkpoint" if no_checkpoint else f"{error}".partition("\n")[0]
        if os.path.isfile(pretrained or ""):
            raise typer.BadParameter(
                f"{pretrained} holds no weights of {name}: {what}", param_hint="--pretrained"
            ) from error
        stop(f"{name} with weights {pretrained} cannot be loaded: {what}")
    return Loaded(model.eval(), tokenizer)


def _of_transformers(name: str, pretrained: str | None, place: torch.device) -> Loaded:
    """A model with its processor; without one, the model's tokenizer and pixels are what ``Clip`` makes of it."""
    if pretrained not in (None, RANDOM):
        raise typer.BadParameter(
            f"{name} comes with its weights; expected nothing, or {RANDOM!r} for random ones, got {pretrained!r}",
            param_hint="--pretrained",
        )
    try:
        import transformers
    except ImportError:
        stop("transformers is missing, which loads such models: pip install transformers")
    try:
        with waiting(f"loading {name}"):
            transformers.utils.logging.disable_progress_bar()
            if pretrained is None:
                model = transformers.AutoModel.from_pretrained(name)
            else:
                remark(f"{name} with random weights: its labels mean nothing")
                model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(name))
    except Exception as error:  # a download, a file, a class that it does not know: transformers raises anything
        stop(f"{name} cannot be loaded: {error}")
    model.config._name_or_path = model.name_or_path = name
    return Loaded(model.eval().requires_grad_(False).to(place), None)


def _random(name: str, place: torch.device) -> Loaded:
    from ..bench.case import RandomModel

    remark(f"{name} with random weights: its labels mean nothing")
    try:
        with waiting(f"making {name}"):
            random = RandomModel.of(name, place)
    except Exception as error:  # open_clip raises anything
        stop(f"{name} cannot be made: {error}")
    return Loaded(random.model, random.tokenizer)


def place_of(device: str | None) -> torch.device:
    """cuda if there is a GPU, else cpu, where ``device`` is None; one that is not there is bad usage."""
    import torch

    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = f"{error}".partition("\n")[0]
        raise typer.BadParameter(
            f"expected cpu, cuda or cuda:N of a GPU that is there, got {device!r} ({reason})", param_hint="--device"
        ) from error
    return place


def check_name(name: str) -> None:
    """A model that open_clip does not know is bad usage."""
    import open_clip

    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), 3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; see open_clip.list_models()"
        raise typer.BadParameter(f"open_clip has no model {name!r}{hint}", param_hint="--model")


def _check_weights(name: str, pretrained: str | None) -> None:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    known = ", ".join(tags) or "none"
    if not pretrained:
        raise typer.BadParameter(
            f"{name} needs weights: a file, or a tag of it (there are: {known}), or {RANDOM!r} for random ones",
            param_hint="--pretrained",
        )
    if pretrained not in tags and not os.path.isfile(pretrained):
        raise typer.BadParameter(
            f"{pretrained!r} is neither a file nor a tag of {name} (there are: {known})", param_hint="--pretrained"
        )
