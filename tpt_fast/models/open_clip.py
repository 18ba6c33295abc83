"""Which models are understood, and their weights under names that do not depend on the model's class.

The fast towers never call the model's modules: they read the weights once, through the functions here. A model that
they cannot represent exactly raises :class:`Unsupported` with the reason, and then runs through its own code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._modes import ON_THE_CPU
from ..ops._types import accumulation_dtype
from .matrix import Matrix
from .weights import PRECISIONS, Block, Foreign, Linear, Norm, TextWeights, Unsupported


def resolve_precision(precision: str | None, model: Foreign) -> torch.dtype:
    """The storage type for ``precision``, or the type of the model's own matrices for None."""
    if precision is None:
        matrices = [p for p in text_root(model).parameters() if p.ndim == 2 and p.is_floating_point()]
        # The token table may stay in float32 in a half-precision model, the matrices of the blocks do not.
        return min((p.dtype for p in matrices), key=lambda dtype: torch.finfo(dtype).bits)
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)} or None, got {precision!r}")
    return PRECISIONS[precision]


def text_root(model: Foreign) -> Foreign:
    """The module that owns the text tower: an open_clip ``CLIP`` itself, or the ``text`` of a ``CustomTextCLIP``."""
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


def prompt_embedding(root: Foreign) -> nn.Embedding:
    """:func:`token_embedding` of a tower that :func:`text_root` has found."""
    embedding = token_embedding(root)
    assert embedding is not None
    return embedding


def causal_reason(root: Foreign) -> str | None:
    """None if nothing after a prompt's EOT token can reach its feature; otherwise what can."""
    if getattr(root, "token_embedding", None) is None:
        return f"the text tower is a {type(root).__name__}, not open_clip's own transformer"
    if getattr(root, "cls_emb", None) is not None:
        return "the text tower reads an appended class token (embed_cls)"
    pool = pool_type(root)
    if pool not in ("argmax", "eos"):
        return f"the text tower pools by {pool!r}, not at the EOT token"
    mask = getattr(root, "attn_mask", None)
    if mask is None:
        return "the text tower's attention is not causal (no_causal_mask)"
    if not torch.equal(mask.float().cpu(), torch.full(mask.shape, -torch.inf, **ON_THE_CPU).triu(1)):
        return "the text tower's attention mask is not the causal one"
    return None


def read_lengths(root: Foreign, ids: Tensor) -> Tensor | None:
    """How many tokens of each row of ``ids`` [C, L] its feature depends on, int64 [C]; None where it may be all.

    A causal tower depends on those up to the one that it reads, wherever the tokenizer says that the prompt ends;
    open_clip's adapter of Hugging Face towers, on those that are no padding.
    """
    if causal_reason(root) is None:
        if pool_type(root) == "eos":
            ids = (ids == (root.text_eos_id if hasattr(root, "text_eos_id") else root.eos_id)).int()
        return ids.argmax(-1) + 1  # as open_clip looks for it
    if type(root).__name__ == "HFTextEncoder" and type(root.pooler).__name__ in _POOLERS:
        return ((ids != root.config.pad_token_id) * torch.arange(1, 1 + ids.shape[1], device=ids.device)).amax(-1)
    return None


_POOLERS = ("ClsLastHiddenStatePooler", "ClsPooler", "MeanPooler")  # open_clip's that leave padding out


def pool_type(root: Foreign) -> str:
    """How the tower pools: "argmax", "eos", "last", "first" or "none"."""
    return str(getattr(root, "text_pool_type", None) or getattr(root, "pool_type", "argmax"))


def expect_known_code(*parts: Foreign) -> None:
    """For ``parts`` of a model that will be read instead of called.

    Raises:
        Unsupported: a module in them is of somebody else's class, or has a hook or a forward function of its own.
    """
    for name, module in (found for part in parts for found in part.named_modules()):
        at = f"{name or 'a part of the tower'} ({type(module).__name__})"
        _expect(is_known(type(module)), f"{at} is not open_clip's or torch's")
        _expect("forward" not in vars(module), f"{at} has a forward function of its own")
        _expect(not module._forward_hooks and not module._forward_pre_hooks, f"{at} has hooks")


def is_known(code: type | Callable) -> bool:
    """Whether this class or function is one of a library whose code is known here; the demo's model is our own."""
    return code.__module__.partition(".")[0] in ("open_clip", "torch", "torchvision", "tpt_fast")


# --- weights under plain names --------------------------------------------------------------------------------------


def read_text_tower(model: Foreign, dtype: torch.dtype) -> TextWeights:
    """The weights of a causal EOT tower in storage type ``dtype`` (shared with the model where the type is the same).

    Raises:
        Unsupported: the tower is none, with the reason.
    """
    root = text_root(model)
    if reason := causal_reason(root):
        raise Unsupported(reason)
    if root is model:
        _expect(is_known(model.encode_text), f"{type(model).__name__} has an encode_text of its own")
        expect_known_code(root.transformer, root.token_embedding, root.ln_final)
    else:
        expect_known_code(root)
    table, projection = root.token_embedding, root.text_projection
    linear: Linear | None
    if isinstance(projection, nn.Linear):
        linear = _read_linear(projection, dtype)
    else:
        linear = None if projection is None else _linear(projection.t(), None, dtype)
    return TextWeights(
        table=table.weight.detach(),
        position=root.positional_embedding.detach(),
        blocks=read_blocks(root.transformer, dtype),
        norm=read_norm(root.ln_final, dtype, table.weight.device),
        projection=linear,
        dtype=dtype,
    )


def read_blocks(transformer: Foreign, dtype: torch.dtype) -> tuple[Block, ...]:
    """The blocks of an open_clip ``Transformer`` of either tower, in storage type ``dtype``.

    Raises:
        Unsupported: a block is not the plain pre-norm block.
    """
    return tuple(_read_block(block, dtype) for block in transformer.resblocks)


def _read_block(block: Foreign, dtype: torch.dtype) -> Block:
    _expect(type(block).__name__ == "ResidualAttentionBlock", f"a block is a {type(block).__name__}")
    _expect(not hasattr(block, "ln_1_kv"), "a block has cross-attention")
    attention = block.attn
    _expect(type(attention) is nn.MultiheadAttention, f"a block's attention is a {type(attention).__name__}")
    qkv, bias = attention.in_proj_weight, attention.in_proj_bias
    plain = qkv is not None and attention.bias_k is None and not attention.add_zero_attn
    _expect(plain, "a block's attention has separate projections, key biases or a zero key")
    mlp = type(block.mlp), *dict(block.mlp.named_children())
    _expect(mlp == (nn.Sequential, "c_fc", "gelu", "c_proj"), "a block's MLP has other parts than two linear layers")
    return Block(
        norm1=read_norm(block.ln_1, dtype, qkv.device),
        qkv=_linear(qkv, bias, dtype, dtype),
        out=_read_linear(attention.out_proj, dtype, block.ls_1),
        norm2=read_norm(block.ln_2, dtype, qkv.device),
        fc=_read_linear(block.mlp.c_fc, dtype),
        activation=_activation(block.mlp.gelu),
        proj=_read_linear(block.mlp.c_proj, dtype, block.ls_2),
        heads=attention.num_heads,
    )


def read_norm(layer: Foreign, dtype: torch.dtype, device: torch.device) -> Norm:
    """Weight, bias and epsilon of an ``nn.LayerNorm`` (or of open_clip's variants of it) on ``device``."""
    _expect(isinstance(layer, nn.LayerNorm), f"a norm is a {type(layer).__name__}")
    accumulate = accumulation_dtype(dtype)
    width = layer.normalized_shape
    weight = torch.ones(width, device=device) if layer.weight is None else layer.weight.detach()
    bias = torch.zeros_like(weight) if layer.bias is None else layer.bias.detach()
    return Norm(weight.to(accumulate), bias.to(accumulate), layer.eps)


def _read_linear(layer: Foreign, dtype: torch.dtype, scale: Foreign | None = None) -> Linear:
    """An ``nn.Linear``, with the LayerScale behind it if there is one."""
    _expect(isinstance(layer, nn.Linear), f"a projection is a {type(layer).__name__}")
    weight, bias = layer.weight.detach(), layer.bias
    if not isinstance(scale, (nn.Identity, type(None))):
        _expect(type(scale).__name__ == "LayerScale", f"a branch is scaled by a {type(scale).__name__}")
        gamma = scale.gamma.detach().to(accumulation_dtype(dtype))
        weight, bias = weight.to(dtype).to(gamma.dtype) * gamma[:, None], None if bias is None else bias * gamma
    return _linear(weight, bias, dtype)


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, bias_dtype: torch.dtype | None = None) -> Linear:
    matrix = Matrix(weight.detach().to(dtype))
    return Linear(matrix, None if bias is None else bias.detach().to(bias_dtype or accumulation_dtype(dtype)))


def _activation(layer: Foreign) -> str:
    if type(layer) is nn.GELU:
        _expect(layer.approximate == "none", "the activation is GELU's tanh approximation")
        return "gelu"
    _expect(type(layer).__name__ == "QuickGELU", f"the activation is {type(layer).__name__}")
    return "quick_gelu"


def _expect(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsupported(reason)
