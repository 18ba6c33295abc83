"""The demo model's file: int8 and fp16 weights, and of the token embedding only the rows that training has touched.

A CLIP vocabulary has 49,408 tokens; the demo model's captions use some hundred. The other rows still hold what they
were initialised with, so they are drawn again at loading instead of being stored: 12 MB less in the wheel.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .._files import atomic_write

if TYPE_CHECKING:
    from open_clip import CLIP

Model = TypeVar("Model", bound=nn.Module)

FOLDER = Path(__file__).parent
CONFIG = FOLDER / "config.json"
WEIGHTS = FOLDER / "model.safetensors"
TOKEN_SEED = 20220917
SCALE = ".scale"  # of the rows of the tensor of that name without it


def read_config(path: Path = CONFIG) -> dict:
    """The open_clip model configuration: keyword arguments of ``open_clip.model.CLIP``."""
    return json.loads(path.read_text())


def token_table(vocab_size: int, width: int, seed: int = TOKEN_SEED) -> Tensor:
    """The untrained token embedding, float32 [vocab_size, width], uniform with CLIP's standard deviation of 0.02.

    Drawn from torch's CPU generator. Uniform and not normal, because a uniform draw is plain integer arithmetic: the
    same bits on every CPU, where a normal draw goes through vectorised logarithms and cosines that may differ.
    """
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(vocab_size, width, generator=generator) * 2 - 1) * (0.02 * 3**0.5)


def build(config: dict) -> CLIP:
    """An untrained CLIP of this configuration on the CPU; the global random generator is left as it was."""
    from open_clip.model import CLIP

    with torch.random.fork_rng(devices=[]):
        return CLIP(**config)


def save_weights(state: dict[str, Tensor], token_ids: Tensor, path: Path = WEIGHTS) -> None:
    """Write trained weights; ``token_embedding.weight`` holds the rows of ``token_ids`` int64 [T] alone, in order.

    The image tower's filters and matrices go into int8, each row (an output) with a scale of its own; the text tower's
    into fp16. Vectors, the batch norms' statistics among them, keep their type: they are small.
    """
    tensors = {"token_ids": token_ids.to(torch.int32)}
    for name, value in state.items():
        if value.ndim < 2:
            tensors[name] = value.contiguous()
        elif name.startswith("visual."):
            scale = value.flatten(1).abs().amax(1).clamp_min(1e-12) / 127
            tensors[name] = (value / _per_row(scale, value)).round().to(torch.int8).contiguous()
            tensors[f"{name}{SCALE}"] = scale
        else:
            tensors[name] = value.to(torch.float16).contiguous()
    with atomic_write(path) as aside:
        aside.write_bytes(save(tensors, metadata={"token_seed": str(TOKEN_SEED)}))


def load_weights(model: Model, path: Path = WEIGHTS) -> Model:
    """Fill ``model`` (float32) from a file of ``save_weights`` and return it.

    Raises ``FileNotFoundError`` without the file and ``RuntimeError`` when it does not fit the model.
    """
    state = load_file(path)
    for name in [name for name in state if name.endswith(SCALE)]:
        rows = name.removesuffix(SCALE)
        state[rows] = state[rows] * _per_row(state.pop(name), state[rows])
    ids = state.pop("token_ids").long()
    rows, width = cast(Any, model).token_embedding.weight.shape
    table = token_table(rows, width)
    table[ids] = state["token_embedding.weight"].float()
    state["token_embedding.weight"] = table
    model.load_state_dict(state)
    return model


def trained_tokens(path: Path = WEIGHTS) -> set[int]:
    """The tokens that occur in a caption: what the others mean is random."""
    with safe_open(path, "pt") as file:
        return set(file.get_tensor("token_ids").tolist())


def _per_row(scale: Tensor, value: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (value.ndim - 1))
