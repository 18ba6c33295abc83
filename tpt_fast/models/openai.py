"""OpenAI's own models, as ``clip.load`` of its package gives them, and copies of that package's code."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .._modes import ON_THE_CPU
from .family import Calls
from .layers import expect_known_code, is_known
from .module import replica
from .open_clip import OpenClip, is_causal, read_text, read_vit, token_embedding
from .weights import Foreign, ImageWeights, TextWeights, Unsupported

TOWERS = ("VisionTransformer", "ModifiedResNet")
#: How far features of length 1 may be apart in float32; on CUDA convolutions may round to TF32. Code that does
#: something else is further off.
SAME_ON_A_CPU, SAME_ON_A_GPU = 1e-4, 1e-2


class Layout(OpenClip):
    """What a model in the layout of OpenAI's ``clip/model.py`` is, if its code does what that of the package does: its
    ``encode_text`` asks the image tower for its type, and each block has the causal mask."""

    def not_causal(self) -> str | None:
        masks = {id(block.attn_mask): block.attn_mask for block in self.text.transformer.resblocks}
        if any(mask is None or not is_causal(mask) for mask in masks.values()):
            return "the text tower's attention mask is not the causal one"
        return None

    def read_lengths(self, ids: Tensor) -> Tensor | None:
        return None if self.not_causal() else ids.argmax(-1) + 1

    def text_weights(self, dtype: torch.dtype) -> TextWeights:
        if reason := self.not_causal():
            raise Unsupported(reason)
        root = self.text
        expect_known_code(root.transformer, root.token_embedding, root.ln_final, packages=self._packages)
        return read_text(root, dtype)

    def image_weights(self, dtype: torch.dtype) -> ImageWeights | nn.Module:
        visual = self.model.visual
        expect_known_code(visual, packages=self._packages)
        return visual if type(visual).__name__ == "ModifiedResNet" else read_vit(visual, dtype)

    @property
    def _packages(self) -> tuple[str, ...]:
        return type(self.model).__module__.partition(".")[0], "torch"

    # --- by its own code

    def for_text(self, dtype: torch.dtype) -> Layout:
        return type(self)(_own_code(self.text, dtype))

    def for_images(self, dtype: torch.dtype) -> nn.Module:
        return _own_code(Calls(self.model, "encode_image"), dtype)

    def cut(self, length: int) -> None:
        root = self.model
        root.positional_embedding = nn.Parameter(root.positional_embedding[:length], requires_grad=False)
        for block in root.transformer.resblocks:
            block.attn_mask = block.attn_mask[:length, :length]

    def replace_embedding(self, embedding: nn.Module) -> None:
        self.model.token_embedding = embedding


class OpenAI(Layout):
    """A :class:`Layout` whose code is held to its own features, for anybody may have copied and changed it: a tower is
    read where what is read gives the features that the model itself gives."""

    @staticmethod
    def owns(model: Foreign) -> bool:
        """Whether this is laid out so."""
        visual, transformer = getattr(model, "visual", None), getattr(model, "transformer", None)
        blocks = getattr(transformer, "resblocks", None)
        return (
            isinstance(model, nn.Module)
            and not is_known(type(model))
            and type(visual).__name__ in TOWERS
            and hasattr(visual, "input_resolution")
            and isinstance(blocks, nn.Sequential)
            and all(hasattr(block, "attn_mask") for block in blocks)
            and token_embedding(model) is not None
        )

    def not_causal(self) -> str | None:
        return self._other_text

    def text_weights(self, dtype: torch.dtype) -> TextWeights:
        if reason := self._other_text:
            raise Unsupported(reason)
        return super().text_weights(dtype)

    def image_weights(self, dtype: torch.dtype) -> ImageWeights | nn.Module:
        if reason := self._other_images:
            raise Unsupported(reason)
        return super().image_weights(dtype)

    def for_text(self, dtype: torch.dtype) -> OpenAI:
        made = OpenAI(_own_code(self.text, dtype))
        made._other_text = self._other_text
        return made

    @cached_property
    @torch.no_grad()
    def _other_text(self) -> str | None:
        """Why the text tower is not what its layout says."""
        from ..text.packed import PackedTower  # which reads models
        from ..text.prompts import Prompts

        vocabulary, length = self.embedding.num_embeddings, self.context_length
        lengths, places = torch.tensor([length // 3, length], device="cpu"), torch.arange(length, device="cpu")
        ids = torch.randint(1, vocabulary - 1, (2, length), generator=torch.Generator().manual_seed(0), device="cpu")
        ids[places >= lengths[:, None]] = 0
        ids[:, 0] = vocabulary - 2
        ids[places == lengths[:, None] - 1] = vocabulary - 1
        prompts = Prompts(("",) * 2, ids, lengths, ids[:, :0], first=1, lead=0)
        nothing = self.embedding.weight.new_empty(0, self.embedding.weight.shape[1], dtype=torch.float32)
        try:
            packed = PackedTower(Layout(self.model), torch.float32).bind(prompts, nothing, False)
        except Unsupported as reason:
            return str(reason)
        own = Layout(self.model).for_text(torch.float32).encode_text(ids.to(nothing.device))
        return self._compare(packed.forward(nothing, False)[0], own, "encode_text")

    @cached_property
    @torch.no_grad()
    def _other_images(self) -> str | None:
        """Why the image tower is not what its layout says."""
        from ..vision import ImageEncoder

        encoder = ImageEncoder(Layout(self.model), torch.float32)
        if encoder.why_module is not None:
            return encoder.why_module
        views = torch.randn(2, 3, *encoder.sides, generator=torch.Generator().manual_seed(0), **ON_THE_CPU)
        views[1] = views[1, :, :, :1]  # noise and stripes, for two of a kind may look alike
        views = views.to(self.scale.device)
        return self._compare(encoder.encode(views), self.for_images(torch.float32)(views), "encode_image")

    def _compare(self, read: Tensor, own: Tensor, name: str) -> str | None:
        same, own = SAME_ON_A_GPU if own.is_cuda else SAME_ON_A_CPU, normalize(own, dim=-1)
        if read.shape != own.shape or not (read - own).norm(dim=-1).amax() <= same:
            return f"{type(self.model).__name__}.{name} gives other features than OpenAI's code with these weights"
        if (own[0] - own[1]).norm() < 4 * same:
            return f"{type(self.model).__name__}.{name} gives the same features for everything, which shows nothing"
        return None


def _own_code(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A :func:`~tpt_fast.models.module.replica` whose LayerNorms, which compute in float32, have float32 weights."""
    made = replica(module, dtype)
    for norm, given in zip(made.modules(), module.modules(), strict=True):
        if isinstance(given, nn.LayerNorm) and not is_known(type(given), ("torch",)):
            for name, value in given.named_parameters():
                setattr(norm, name, nn.Parameter(value.detach().float(), requires_grad=False))
    return made
