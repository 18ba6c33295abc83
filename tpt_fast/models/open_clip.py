"""open_clip's models: ``CLIP``, ``CustomTextCLIP`` and what is laid out as they are."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from .._modes import ON_THE_CPU
from ..ops._types import accumulation_dtype
from .family import CLIP_VOCABULARY, Calls, Family, Tokenizer, clip_tokenizer, features_of
from .layers import expect, expect_known_code, is_known, linear, read_linear, read_norm, read_patches
from .matrix import Matrix
from .module import replica
from .preprocessing import Preprocessing, of_open_clip
from .weights import Block, Foreign, ImageWeights, TextWeights, Unsupported

_POOLERS = ("ClsLastHiddenStatePooler", "ClsPooler", "MeanPooler")  # of Hugging Face towers that leave padding out


class OpenClip(Family):
    """A model of open_clip, or what has its names: towers of other code run by that."""

    @property
    def text(self) -> Foreign:
        """The module that owns the text tower: a ``CLIP`` itself, or the ``text`` of a ``CustomTextCLIP``."""
        return text_root(self.model)

    @property
    def embedding(self) -> nn.Embedding:
        embedding = token_embedding(self.text)
        assert embedding is not None  # of every tower that text_root finds
        return embedding

    @property
    def context_length(self) -> int:
        return int(getattr(self.text, "context_length", 0) or getattr(self.model, "context_length", 0) or 77)

    def tokenizer(self) -> Tokenizer:
        """Its own BPE for CLIP's vocabulary, the Hugging Face one for such towers."""
        vocabulary = self.embedding.num_embeddings
        if vocabulary == CLIP_VOCABULARY:
            return clip_tokenizer()
        name = getattr(getattr(self.text, "config", None), "name_or_path", None)
        if name:
            from open_clip.tokenizer import HFTokenizer

            return HFTokenizer(name, context_length=self.context_length)
        raise ValueError(
            f"tokenizer: the model's vocabulary has {vocabulary} tokens, CLIP's has {CLIP_VOCABULARY}; pass the "
            "tokenizer that belongs to the model (open_clip.get_tokenizer(model_name))"
        )

    def not_causal(self) -> str | None:
        root = self.text
        if getattr(root, "token_embedding", None) is None:
            return f"the text tower is a {type(root).__name__}, not open_clip's own transformer"
        if getattr(root, "cls_emb", None) is not None:
            return "the text tower reads an appended class token (embed_cls)"
        pool = _pool_type(root)
        if pool not in ("argmax", "eos"):
            return f"the text tower pools by {pool!r}, not at the EOT token"
        mask = getattr(root, "attn_mask", None)
        if mask is None:
            return "the text tower's attention is not causal (no_causal_mask)"
        if not is_causal(mask):
            return "the text tower's attention mask is not the causal one"
        return None

    def read_lengths(self, ids: Tensor) -> Tensor | None:
        """A causal tower depends on the tokens up to the one that it reads, wherever the tokenizer says that the prompt
        ends; open_clip's adapter of Hugging Face towers, on those that are no padding."""
        root = self.text
        if self.not_causal() is None:
            if _pool_type(root) == "eos":
                ids = (ids == (root.text_eos_id if hasattr(root, "text_eos_id") else root.eos_id)).int()
            return ids.argmax(-1) + 1  # as open_clip looks for it
        if type(root).__name__ == "HFTextEncoder" and type(root.pooler).__name__ in _POOLERS:
            return ((ids != root.config.pad_token_id) * torch.arange(1, 1 + ids.shape[1], device=ids.device)).amax(-1)
        return None

    def text_weights(self, dtype: torch.dtype) -> TextWeights:
        root = self.text
        if reason := self.not_causal():
            raise Unsupported(reason)
        if root is self.model:
            expect(is_known(root.encode_text), f"{type(root).__name__} has an encode_text of its own")
            expect_known_code(root.transformer, root.token_embedding, root.ln_final)
        else:
            expect_known_code(root)
        return read_text(root, dtype)

    def for_text(self, dtype: torch.dtype) -> OpenClip:
        # An encode_text that is not known may ask the image tower for something, as OpenAI's does for its type.
        alone = self.text is self.model and is_known(type(self.model))
        return type(self)(replica(self.text, dtype, getattr(self.model, "visual", None) if alone else None))

    def cut(self, length: int) -> None:
        root = self.model
        root.positional_embedding = nn.Parameter(root.positional_embedding[:length], requires_grad=False)
        root.attn_mask = root.attn_mask[:length, :length]

    def replace_embedding(self, embedding: nn.Module) -> None:
        root = self.model
        if hasattr(root, "set_grad_checkpointing") and hasattr(root.transformer, "grad_checkpointing"):
            root.transformer.grad_checkpointing = False
        if getattr(root, "token_embedding", None) is not None:
            root.token_embedding = embedding
        else:
            root.transformer.set_input_embeddings(embedding)

    def encode_text(self, ids: Tensor) -> Tensor:
        run: Foreign = getattr(self.model, "encode_text", self.model)
        return features_of(run(ids))

    @property
    def depth(self) -> int:
        return len(getattr(getattr(self.text, "transformer", None), "resblocks", ())) or super().depth

    @cached_property
    def preprocessing(self) -> Preprocessing:
        return of_open_clip(self.model)

    def image_weights(self, dtype: torch.dtype) -> ImageWeights | nn.Module:
        visual, kind = self.model.visual, type(self.model.visual).__name__
        expect(is_known(self.model.encode_image), f"{type(self.model).__name__} has an encode_image of its own")
        expect(kind in ("VisionTransformer", "ModifiedResNet"), f"the image tower is a {kind}")
        expect_known_code(visual)
        if kind == "ModifiedResNet":
            return visual
        expect(getattr(visual, "attn_pool", None) is None, "the image tower pools by attention")
        pool = getattr(visual, "pool_type", None)  # older releases say it in other words
        expect(pool == "tok", f"the image tower pools by {pool!r}, not at the class token")
        dropout = type(getattr(visual, "patch_dropout", None)).__name__
        expect(dropout in ("Identity", "PatchDropout"), f"the image tower drops patches by a {dropout}")
        return read_vit(visual, dtype)

    def for_images(self, dtype: torch.dtype) -> nn.Module:
        own = not is_known(self.model.encode_image)
        return replica(Calls(self.model, "encode_image") if own else Calls(self.model.visual), dtype)


def text_root(model: Foreign) -> Foreign:
    """The module that owns the text tower: a ``CLIP`` itself, or the ``text`` of a ``CustomTextCLIP``."""
    text = getattr(model, "text", None)
    root = text if isinstance(text, nn.Module) else model
    if not isinstance(root, nn.Module) or token_embedding(root) is None:
        raise TypeError(
            "model: expected an open_clip CLIP or CustomTextCLIP with a text tower (a token embedding and a "
            f"transformer), got {type(model).__module__}.{type(model).__qualname__}"
        )
    return root


def token_embedding(root: Foreign) -> nn.Embedding | None:
    """The embedding of token ids of a text tower, Hugging Face towers included."""
    embedding = getattr(root, "token_embedding", None)
    if embedding is None and hasattr(getattr(root, "transformer", None), "get_input_embeddings"):
        embedding = root.transformer.get_input_embeddings()
    return embedding if isinstance(embedding, nn.Embedding) else None


def is_causal(mask: Tensor) -> bool:
    """Whether ``mask`` [L, L], which is added to scores, hides from each token those behind it and nothing else."""
    return torch.equal(mask.float().cpu(), torch.full(mask.shape, -torch.inf, **ON_THE_CPU).triu(1))


def _pool_type(root: Foreign) -> str:
    """How the tower pools: "argmax", "eos", "last", "first" or "none"."""
    return str(getattr(root, "text_pool_type", None) or getattr(root, "pool_type", "argmax"))


def read_text(root: Foreign, dtype: torch.dtype) -> TextWeights:
    """Of a causal tower that is read at EOT."""
    table, projection = root.token_embedding, root.text_projection
    if isinstance(projection, nn.Linear):
        projection = read_linear(projection, dtype)
    elif projection is not None:
        projection = linear(projection.t(), None, dtype)
    return TextWeights(
        table=table.weight.detach(),
        position=root.positional_embedding.detach(),
        blocks=_read_blocks(root.transformer, dtype),
        norm=read_norm(root.ln_final, dtype, table.weight.device),
        projection=projection,
        dtype=dtype,
    )


def read_vit(visual: Foreign, dtype: torch.dtype) -> ImageWeights:
    """Of a ``VisionTransformer`` that is read at its class token."""
    conv, wide = visual.conv1, accumulation_dtype(dtype)
    patch = read_patches(conv)
    position = visual.positional_embedding.detach().to(wide)
    pre, device = visual.ln_pre, position.device
    return ImageWeights(
        patch=patch,
        embed=Matrix(conv.weight.detach().to(dtype).flatten(1)),
        first=(position[0] + visual.class_embedding.detach()).to(dtype),
        position=(position[1:] if conv.bias is None else position[1:] + conv.bias.detach()).to(dtype),
        norm_pre=None if isinstance(pre, nn.Identity) else read_norm(pre, dtype, device),
        blocks=_read_blocks(visual.transformer, dtype),
        norm_post=read_norm(visual.ln_post, dtype, device),
        projection=None if visual.proj is None else visual.proj.detach().to(dtype),
    )


def _read_blocks(transformer: Foreign, dtype: torch.dtype) -> tuple[Block, ...]:
    """The blocks of a ``Transformer`` of either tower, in storage type ``dtype``.

    Raises:
        Unsupported: a block is not the plain pre-norm block.
    """
    return tuple(_read_block(block, dtype) for block in transformer.resblocks)


def _read_block(block: Foreign, dtype: torch.dtype) -> Block:
    expect(type(block).__name__ == "ResidualAttentionBlock", f"a block is a {type(block).__name__}")
    expect(not hasattr(block, "ln_1_kv"), "a block has cross-attention")
    attention = block.attn
    expect(type(attention) is nn.MultiheadAttention, f"a block's attention is a {type(attention).__name__}")
    qkv, bias = attention.in_proj_weight, attention.in_proj_bias
    plain = qkv is not None and attention.bias_k is None and not attention.add_zero_attn
    expect(plain, "a block's attention has separate projections, key biases or a zero key")
    mlp = type(block.mlp), *dict(block.mlp.named_children())
    expect(mlp == (nn.Sequential, "c_fc", "gelu", "c_proj"), "a block's MLP has other parts than two linear layers")
    return Block(
        norm1=read_norm(block.ln_1, dtype, qkv.device),
        qkv=linear(qkv, bias, dtype, dtype),
        out=read_linear(attention.out_proj, dtype, getattr(block, "ls_1", None)),
        norm2=read_norm(block.ln_2, dtype, qkv.device),
        fc=read_linear(block.mlp.c_fc, dtype),
        activation=_activation(block.mlp.gelu),
        proj=read_linear(block.mlp.c_proj, dtype, getattr(block, "ls_2", None)),
        heads=attention.num_heads,
    )


def _activation(layer: Foreign) -> str:
    if type(layer) is nn.GELU:
        expect(layer.approximate == "none", "the activation is GELU's tanh approximation")
        return "gelu"
    expect(type(layer).__name__ == "QuickGELU", f"the activation is {type(layer).__name__}")
    return "quick_gelu"
