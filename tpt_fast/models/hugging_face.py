"""transformers' models: ``CLIPModel`` and ``MetaClip2Model`` through their weights, ``SiglipModel`` by its own code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .family import CLIP_VOCABULARY, Calls, Family, Tokenizer, clip_tokenizer, features_of
from .layers import expect, expect_known_code, is_known, linear, read_linear, read_norm, read_patches
from .matrix import Matrix
from .module import replica
from .preprocessing import Preprocessing, of_processor
from .weights import Block, Foreign, ImageWeights, TextWeights, Unsupported

PACKAGES = ("transformers", "torch")
READ = ("CLIPModel", "MetaClip2Model")  #: laid out alike
CALLED = ("SiglipModel",)


class HuggingFace(Family):
    """A model of transformers.

    Args:
        processor: its processor or image processor; without one, what lies beside the weights it was loaded from.

    Raises:
        TypeError: a model of another class than those of ``READ`` and ``CALLED``.
    """

    def __init__(self, model: Foreign, processor: Foreign | None = None) -> None:
        super().__init__(model)
        self._processor = processor
        self._kind = next((k.__name__ for k in type(model).__mro__ if k.__module__.startswith("transformers.")), "")
        if self._kind not in READ + CALLED:
            raise TypeError(
                f"model: expected one of transformers' {', '.join(READ + CALLED)}, got transformers' {self._kind}; "
                "open_clip may have its weights"
            )

    @staticmethod
    def owns(model: Foreign) -> bool:
        """Whether this is a model of transformers, of whatever class."""
        return any(
            k.__name__ == "PreTrainedModel" and k.__module__ == "transformers.modeling_utils"
            for k in type(model).__mro__
        )

    # --- the text tower

    @property
    def text(self) -> Foreign:
        return self.model.text_model

    @property
    def embedding(self) -> nn.Embedding:
        return self.text.embeddings.token_embedding

    @property
    def context_length(self) -> int:
        return self.text.config.max_position_embeddings

    def tokenizer(self) -> Tokenizer:
        """The processor's, or what lies beside the weights; CLIP's own where nothing does and the vocabulary is its."""
        if found := adapted(self._processor, self.context_length):
            return found
        vocabulary, name = self.embedding.num_embeddings, self.model.name_or_path
        beside = _beside("AutoTokenizer", name) if name else None
        if beside is not None and 2 * len(beside) > vocabulary:  # it makes an empty one where there are no files
            return Tokens(beside, self.context_length)
        if vocabulary == CLIP_VOCABULARY:
            return clip_tokenizer()
        raise ValueError(f"tokenizer: expected the tokenizer or processor of this {self._kind}, got None")

    def not_causal(self) -> str | None:
        if self._kind not in READ:
            return f"the text tower is a {type(self.text).__name__}, whose attention is not causal"
        if not is_known(self.model.get_text_features, PACKAGES):
            return f"{type(self.model).__name__} has a get_text_features of its own"
        if not isinstance(self.text.eos_token_id, int):
            return f"the text tower is read at one of {self.text.eos_token_id}"
        return None

    def read_lengths(self, ids: Tensor) -> Tensor | None:
        if self.not_causal():
            return None
        eos = self.text.eos_token_id
        # CLIPModel takes the 2 of its early configurations for a mistake, and the largest id for the end.
        largest = self._kind == "CLIPModel" and eos == 2
        return (ids if largest else (ids == eos).int()).argmax(-1) + 1

    def text_weights(self, dtype: torch.dtype) -> TextWeights:
        if reason := self.not_causal():
            raise Unsupported(reason)
        expect_known_code(self.text, self.model.text_projection, packages=PACKAGES)
        table = self.embedding.weight.detach()
        return TextWeights(
            table=table,
            position=self.text.embeddings.position_embedding.weight.detach(),
            blocks=_read_blocks(self.text.encoder, dtype),
            norm=read_norm(self.text.final_layer_norm, dtype, table.device),
            projection=read_linear(self.model.text_projection, dtype),
            dtype=dtype,
        )

    def for_text(self, dtype: torch.dtype) -> HuggingFace:
        alone = is_known(self.model.get_text_features, PACKAGES)
        return HuggingFace(replica(self.model, dtype, self.model.vision_model if alone else None))

    def cut(self, length: int) -> None:
        """Its code takes any number of tokens."""

    def replace_embedding(self, embedding: nn.Module) -> None:
        self.text.embeddings.token_embedding = embedding

    def encode_text(self, ids: Tensor) -> Tensor:
        return features_of(self.model.get_text_features(ids))

    @property
    def depth(self) -> int:
        return len(self.text.encoder.layers)

    # --- the image tower

    @cached_property
    def preprocessing(self) -> Preprocessing:
        size = self.model.vision_model.config.image_size
        processor = getattr(self._processor, "image_processor", self._processor)
        if not hasattr(processor, "image_mean"):
            processor = _beside("AutoImageProcessor", name) if (name := self.model.name_or_path) else None
        if processor is not None:
            return of_processor(processor, size)
        if self._kind != "CLIPModel":
            raise ValueError(
                f"tokenizer: expected the processor of this {self._kind}, which says how its images are prepared"
            )
        return Preprocessing(size, crop="floor")

    def image_weights(self, dtype: torch.dtype) -> ImageWeights:
        expect(self._kind in READ, f"the image tower is a {type(self.model.vision_model).__name__}")
        known = is_known(self.model.get_image_features, PACKAGES)
        expect(known, f"{type(self.model).__name__} has a get_image_features of its own")
        tower = self.model.vision_model
        expect_known_code(tower, self.model.visual_projection, packages=PACKAGES)
        embeddings = tower.embeddings
        position, conv = embeddings.position_embedding.weight.detach(), embeddings.patch_embedding
        projection = self.model.visual_projection
        expect(type(projection) is nn.Linear and projection.bias is None, "the image tower's projection has a bias")
        return ImageWeights(
            patch=read_patches(conv),
            embed=Matrix(conv.weight.detach().to(dtype).flatten(1)),
            first=(position[0] + embeddings.class_embedding.detach()).to(dtype),
            position=position[1:].to(dtype),
            norm_pre=read_norm(tower.pre_layrnorm, dtype, position.device),
            blocks=_read_blocks(tower.encoder, dtype),
            norm_post=read_norm(tower.post_layernorm, dtype, position.device),
            projection=projection.weight.detach().t().to(dtype),
        )

    def for_images(self, dtype: torch.dtype) -> nn.Module:
        alone = is_known(self.model.get_image_features, PACKAGES)
        return replica(Calls(self.model, "get_image_features"), dtype, self.text if alone else None)


def _read_blocks(encoder: Foreign, dtype: torch.dtype) -> tuple[Block, ...]:
    return tuple(_read_block(layer, dtype) for layer in encoder.layers)


def _read_block(layer: Foreign, dtype: torch.dtype) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    rows = [read_linear(part, dtype, None) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    biases = [row.bias for row in rows if row.bias is not None]
    expect(len(biases) == 3, "a query, key or value has no bias")
    device = attention.q_proj.weight.device
    return Block(
        norm1=read_norm(layer.layer_norm1, dtype, device),
        qkv=linear(torch.cat([row.matrix.weight for row in rows]), torch.cat(biases), dtype, dtype),
        out=read_linear(attention.out_proj, dtype),
        norm2=read_norm(layer.layer_norm2, dtype, device),
        fc=read_linear(mlp.fc1, dtype),
        activation=_activation(mlp.activation_fn),
        proj=read_linear(mlp.fc2, dtype),
        heads=attention.num_heads,
    )


def _activation(layer: Foreign) -> str:
    names = {"GELUActivation": "gelu", "QuickGELUActivation": "quick_gelu"}
    expect(type(layer).__name__ in names, f"the activation is {type(layer).__name__}")
    return names[type(layer).__name__]


# --- tokenizers and processors


@dataclass(frozen=True)
class Tokens:
    """A tokenizer of transformers as the towers call one."""

    tokenizer: Any
    length: int

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        """int64 [n, length], filled up and cut off at the context length."""
        length = context_length or self.length
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": length}
        return self.tokenizer(list(texts), **options, return_tensors="pt").input_ids


def adapted(given: Any, context_length: int) -> Tokenizer | None:
    """The tokenizer that was ``given``, alone or in a processor of transformers; None for None and for an image
    processor. Others, such as open_clip's adapter, change texts before they call one of transformers."""
    theirs = any(kind.__module__.startswith("transformers.") for kind in type(given).__mro__)
    tokenizer = getattr(given, "tokenizer", given) if theirs else given
    if hasattr(tokenizer, "convert_tokens_to_ids"):
        return Tokens(tokenizer, context_length)
    return None if hasattr(given, "image_mean") else given


def _beside(kind: str, name: str) -> Any:
    """What lies beside the weights of a model: transformers' ``kind``; None where its folder has no such thing.

    Raises:
        ValueError: it cannot be had from the hub.
    """
    return _loaded(kind, name, os.stat(name).st_mtime_ns if os.path.isdir(name) else None)


@lru_cache(maxsize=8)
def _loaded(kind: str, name: str, changed: int | None) -> Any:
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(name)
    except (OSError, ValueError) as error:
        if changed is not None:  # a folder
            return None
        raise ValueError(
            f"tokenizer: expected the processor of {name}, whose own cannot be loaded: {error}".partition("\n")[0]
        ) from error
