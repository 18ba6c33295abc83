"""CoCoOp (Zhou et al., CVPR 2022): a context that depends on the image."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import Tensor, nn

from .checkpoint import check_stored, read, read_header, state_of
from .coop import load_ctx

#: Its tensors' names in a checkpoint -> fields of a CoCoOp.
META_NET = {
    f"meta_net.{layer}.{what}": f"{what}{layer[-1]}" for layer in ("linear1", "linear2") for what in ("weight", "bias")
}
_OTHERS = {"token_prefix", "token_suffix"}  # of its training classes, not read


@dataclass(frozen=True, eq=False)
class CoCoOp:
    """The context of an image is ``ctx + W2 relu(W1 x + b1) + b2``, the same shift for each of its vectors (eq. 4).

    x is the feature of the image's view 0. CoCoOp's own code trains and answers with the feature divided by its length;
    TPT's code feeds the feature as the tower gives it, whose length is some 10 in CLIP, so that the shift is larger.
    """

    ctx: Tensor  #: float32 [n_ctx, W] on the CPU
    weight1: Tensor  #: [H, D] of features D wide
    bias1: Tensor  #: [H]
    weight2: Tensor  #: [W, H]
    bias2: Tensor  #: [W]
    normalised: bool = True  #: whether x has length 1

    def __post_init__(self) -> None:
        width = self.ctx.shape[-1]
        hidden, wide = self.weight1.shape if self.weight1.dim() == 2 else (0, 0)
        expected = {"ctx": [-1, width], "weight1": [hidden, wide], "bias1": [hidden], "weight2": [width, hidden]}
        for name, shape in (expected | {"bias2": [width]}).items():
            tensor = getattr(self, name)
            fits = tensor.dim() == len(shape) and all(n in (-1, m) for n, m in zip(shape, tensor.shape, strict=True))
            if not fits or not tensor.is_floating_point() or 0 in tensor.shape:
                raise ValueError(f"{name}: expected floating point {shape}, got {tensor.dtype} {list(tensor.shape)}")
            if not tensor.isfinite().all():
                raise ValueError(f"{name}: expected finite values, got NaN or infinity")

    @classmethod
    def load(cls, path: str | os.PathLike, *, normalised: bool = True) -> CoCoOp:
        """Of a checkpoint as CoCoOp's trainer leaves it; nothing that is in it is run.

        Raises:
            ValueError: an unreadable file, or one without ``ctx`` and ``meta_net``.
        """
        found = find_meta_net(path)
        if found is None:
            raise ValueError(f"ctx: the checkpoint {os.fspath(path)!r} has no 'meta_net.': expected CoCoOp's")
        return cls(**{name: value.float() for name, value in found.items()}, normalised=normalised)

    def tensors(self) -> tuple[Tensor, ...]:
        """Context and meta-net."""
        return self.ctx, self.weight1, self.bias1, self.weight2, self.bias2

    def to(self, like: Tensor) -> CoCoOp:
        """On the device and in the type of ``like``."""
        ctx, weight1, bias1, weight2, bias2 = (each.to(like) for each in self.tensors())
        return CoCoOp(ctx, weight1, bias1, weight2, bias2, self.normalised)

    def __call__(self, features: Tensor) -> Tensor:
        """Contexts [B, n_ctx, W] of features [B, D] of view 0, of length 1 if :attr:`normalised`, else as they are."""
        hidden = nn.functional.linear(features, self.weight1, self.bias1).relu()
        return self.ctx + nn.functional.linear(hidden, self.weight2, self.bias2).unsqueeze(1)


def find_meta_net(path: str | os.PathLike) -> dict[str, Tensor] | None:
    """The tensors of a :class:`CoCoOp` by its fields' names; None if the checkpoint has no meta-net.

    Raises:
        ValueError: an unreadable file, or a meta-net beside something else than CoCoOp's.
    """
    where = f"ctx: the checkpoint {os.fspath(path)!r}"
    try:
        state = state_of(read(path))
    except ValueError as error:
        raise ValueError(f"ctx: {error}") from error
    if state is None or not any(name.startswith("meta_net.") for name in state):
        return None
    if missing := sorted({"ctx", *META_NET} - state.keys()):
        raise ValueError(f"{where} has a meta_net, but no {', '.join(missing)}")
    if unknown := sorted(state.keys() - {"ctx", *META_NET} - _OTHERS):
        raise ValueError(f"{where} holds more than CoCoOp's prompt learner, {unknown[:4]}: it is another method's")
    found = {field: state[name].detach() for name, field in (("ctx", "ctx"), *META_NET.items())}
    for name, tensor in found.items():
        check_stored(f"{name} in {os.fspath(path)!r}", tensor)
    return found


def load_start(
    source: str | os.PathLike | Tensor | CoCoOp, width: int | None = None, *, normalised: bool = True
) -> Tensor | CoCoOp:
    """What prompts start from: a context (:func:`~tpt_fast.prompting.coop.load_ctx`), or CoCoOp's.

    Args:
        source: a tensor, a :class:`CoCoOp`, or a path of either's checkpoint, told apart by what it holds.
        width: the text tower's; None: any.
        normalised: of a checkpoint of CoCoOp's, which does not say it, as a file of :func:`tpt_fast.save_ctx` does.
    """
    if isinstance(source, (str, os.PathLike)) and find_meta_net(source) is not None:
        said = read_header(source).get("feature")
        normalised = normalised if said is None else said == "of length 1"
        source = CoCoOp.load(source, normalised=normalised)
    if not isinstance(source, CoCoOp):
        return load_ctx(source, width)
    if width not in (None, source.ctx.shape[-1]):
        raise ValueError(f"ctx: expected width {width} (the model's text tower), got {list(source.ctx.shape)}")
    return source
