"""The packed text tower: what all classes share is computed once, and nothing that is never read is computed.

In a causal transformer the rows of SOS and of the context before the names do not depend on the name, so they are
computed once for all classes; nothing behind EOT is read, so it is left out; of the last block only the EOT rows are
read; and rows of the first block that hold no context are the same for every context. Weights are frozen, so the
backward pass, written by hand, carries gradients of rows only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from weakref import ref

import torch
from torch import Tensor

from .._machine import give_back
from ..models.family import Family
from ..models.weights import Norm, TextWeights, Unsupported
from ..ops._types import accumulation_dtype
from ..ops.add_layer_norm import add_layer_norm, add_layer_norm_backward
from ..ops.bias_act import bias_act, bias_act_backward
from ..ops.prefix_attention import MAX_CUDA_HEAD, prefix_attention, prefix_attention_backward
from .half import into_range
from .layout import Layout, pack
from .memory import KEPT_BESIDE_LAYOUT, Plan, plan
from .prompts import Prompts


@dataclass
class _Norm:
    """Input of a LayerNorm with its statistics."""

    rows: Tensor
    mean: Tensor
    rstd: Tensor


@dataclass
class _Saved:
    """What the backward pass of one block reads."""

    norm1: _Norm  # of the touched rows only in the first block
    q: Tensor  # of the EOT rows only in the last block
    kv: Tensor
    norm2: _Norm
    hidden: Tensor  # before bias and activation


@dataclass
class _ChunkTape:
    """Filled by the forward pass, block by block; what has no default is there when it ends."""

    blocks: list[_Saved] = field(default_factory=list)
    final: _Norm = field(init=False)
    features: Tensor = field(init=False)
    length: Tensor = field(init=False)  # of the features before they were normalised

    def tensors(self) -> list[Tensor]:
        norms = [norm for saved in self.blocks for norm in (saved.norm1, saved.norm2)] + [self.final]
        saved = [tensor for each in self.blocks for tensor in (each.q, each.kv, each.hidden)]
        return [*saved, *(t for norm in norms for t in (norm.rows, norm.mean, norm.rstd)), self.features, self.length]


@dataclass(frozen=True)
class _Tape:
    ctx: Tensor
    chunks: list[_ChunkTape | None]  # None: computed again


@dataclass(frozen=True)
class _Chunk:
    layout: Layout
    rows: Tensor  # [R, W] what enters the first block, without the context vectors
    qkv: Tensor  # [R, 3W] the first block's, right in the rows that hold no context


class PackedTower:
    """A tower whose :meth:`~tpt_fast.models.family.Family.text_weights` can be read, once.

    Raises:
        Unsupported: the tower is none, with the reason.
    """

    def __init__(self, family: Family, dtype: torch.dtype) -> None:
        self._family, self._weights = family, family.text_weights(dtype)
        width, heads = self._weights.table.shape[1], self._weights.blocks[0].heads
        if self._weights.table.is_cuda and width > heads * MAX_CUDA_HEAD:
            raise Unsupported(f"heads of {width // heads} are wider than the {MAX_CUDA_HEAD} of the CUDA kernels")
        self._laid_out: Callable[[], TextWeights | None] = lambda: None  # a weak reference, once there is one

    def bind(self, prompts: Prompts, ctx_init: Tensor, keep: bool) -> PackedText:
        """The tower with one class list; see :meth:`tpt_fast.text.tower.TextTower.bind`.

        Raises:
            Unsupported: the tower does not read these prompts where it would have to.
        """
        lengths = self._family.read_lengths(prompts.ids)
        assert lengths is not None  # of every tower that is causal
        if (lengths <= prompts.ends).any():
            raise Unsupported("the text tower does not read these prompts at a token behind context and name")
        specific, device, width = ctx_init.ndim == 3, ctx_init.device, ctx_init.shape[-1]
        blocks = self._weights.blocks
        expansion = blocks[0].fc.matrix.weight.shape[0] // width
        memory = plan(device, width, len(blocks), expansion, self._weights.dtype.itemsize)
        layouts = pack(replace(prompts, lengths=lengths), specific, memory.rows_at_once, device)
        activations = memory.row_bytes * sum(layout.rows for layout in layouts)
        weights = self._weights if activations > KEPT_BESIDE_LAYOUT else self._for_our_own_product()
        return PackedText(weights, layouts, memory, specific, keep)

    def _for_our_own_product(self) -> TextWeights:
        """The weights laid out, which class lists share as long as one uses them."""
        weights = self._laid_out()
        if weights is None:
            weights = self._weights.lay_out()
            self._laid_out = ref(weights)
        return weights


class PackedText:
    """One class list on a :class:`PackedTower`."""

    name = "packed"

    def __init__(self, weights: TextWeights, layouts: list[Layout], memory: Plan, specific: bool, keep: bool) -> None:
        self._tower = tower = weights
        self._plan, self._specific, width = memory, specific, weights.table.shape[1]
        self._rows = sum(layout.rows for layout in layouts)
        last = tower.blocks[-1].qkv
        self._last_q, self._last_kv = last.rows(0, width), last.rows(width, 3 * width)
        self._chunks = list(map(self._prepare, layouts))
        self._kept_chunks = self._affordable() if keep else 0

    def describe(self) -> dict:
        kept = sum(chunk.layout.rows for chunk in self._chunks[: self._kept_chunks])
        return {
            "tokens": self._rows,
            "chunk": max(len(chunk.layout.last) for chunk in self._chunks),
            "chunks": len(self._chunks),
            "kept_chunks": self._kept_chunks,
            "kept_bytes": kept * self._plan.row_bytes,
        }

    @property
    def laid_out(self) -> bool:
        """Whether a second copy of the weights is held, in the layout of our own product."""
        return self._tower.laid_out

    def weights(self) -> list[Tensor]:
        """What the tower holds."""
        return [*self._tower.tensors(), *self._last_q.tensors(), *self._last_kv.tensors()]

    def tensors(self) -> list[Tensor]:
        """What it holds for its class list, beside the tower."""
        return [tensor for chunk in self._chunks for tensor in (chunk.rows, chunk.qkv, *chunk.layout.tensors())]

    @staticmethod
    def tape_tensors(tape: _Tape) -> list[Tensor]:
        """What ``tape`` keeps."""
        return [tape.ctx, *(tensor for chunk in tape.chunks if chunk is not None for tensor in chunk.tensors())]

    @torch.no_grad()
    def forward(self, ctx: Tensor, keep: bool) -> tuple[Tensor, _Tape | None]:
        features, tapes = [], []
        for i, chunk in enumerate(self._chunks):
            tape = _ChunkTape() if keep and i < self._kept_chunks else None
            features.append(self._forward(chunk, self._part(ctx, chunk), tape))
            tapes.append(tape)
            self._tidy()
        return torch.cat(features), _Tape(ctx.clone(), tapes) if keep else None

    @torch.no_grad()
    def backward(self, tape: _Tape, grad: Tensor) -> Tensor:
        grads = []
        for chunk, kept in zip(self._chunks, tape.chunks, strict=True):
            if kept is None:
                kept = _ChunkTape()
                self._forward(chunk, self._part(tape.ctx, chunk), kept)
            grads.append(self._backward(chunk, kept, grad[chunk.layout.classes]))
            self._tidy()
        return torch.cat(grads) if self._specific else torch.stack(grads).sum(0)

    # --- one chunk

    def _prepare(self, layout: Layout) -> _Chunk:
        tower = self._tower
        rows = tower.table[layout.ids].to(tower.dtype)
        rows[layout.touched] = 0
        rows += tower.position[layout.position].to(tower.dtype)
        block = tower.blocks[0]
        normed = _normalise(rows, None, block.norm1, None)[1]
        return _Chunk(layout, rows, block.qkv.project(normed))

    def _forward(self, chunk: _Chunk, ctx: Tensor, tape: _ChunkTape | None) -> Tensor:
        """Normalised features [C, D] of the chunk's classes; fills ``tape``."""
        layout, tower = chunk.layout, self._tower
        residual, (lead, own) = chunk.rows.clone(), self._vectors(ctx, layout)
        residual[layout.shared] += lead
        residual[layout.own] += own

        # The first block's queries, keys and values are known but for the rows that the context touches.
        block = tower.blocks[0]
        qkv = chunk.qkv.clone()
        norm1, normed = _normalise(residual[layout.touched], None, block.norm1, None)
        qkv[layout.touched] = block.qkv.project(normed)

        for i, block in enumerate(tower.blocks):
            width = residual.shape[-1]
            final = block is tower.blocks[-1]
            if final:  # only the EOT rows are queries; the rest is dropped
                if i == 0:
                    q, kv = qkv[layout.last, :width], qkv[:, width:]
                else:
                    q, kv = self._last_q.project(normed[layout.last]), self._last_kv.project(normed)
                residual = residual[layout.last]
            else:
                if i > 0:
                    qkv = block.qkv.project(normed)
                q, kv = qkv[:, :width], qkv[:, width:]
            attended = prefix_attention(q[None], kv[None], layout.offsets, layout.prefix, block.heads)[0]
            norm2, normed = _normalise(residual, block.out.matrix.project(attended), block.norm2, block.out.bias)
            if tape is None:
                active = block.fc.matrix.activate(normed, block.fc.bias, block.activation)
            else:  # the backward pass needs what comes before bias and activation
                hidden = block.fc.matrix.project(normed)
                active = bias_act(hidden, block.fc.bias, block.activation)
                tape.blocks.append(_Saved(norm1, q, kv, norm2, hidden))
            branch = block.proj.matrix.project(active)
            following = tower.norm if final else tower.blocks[i + 1].norm1
            norm1, normed = _normalise(norm2.rows, branch, following, block.proj.bias)
            residual = norm1.rows

        accumulate = accumulation_dtype(tower.dtype)
        if tower.projection is not None:
            normed = tower.projection.matrix.project(normed).to(accumulate)
            normed = normed if tower.projection.bias is None else normed + tower.projection.bias
        raw = normed.to(accumulate)
        length = raw.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        features = raw / length
        if tape is not None:
            tape.final, tape.features, tape.length = norm1, features, length
        return features

    def _backward(self, chunk: _Chunk, tape: _ChunkTape, grad: Tensor) -> Tensor:
        """Gradient of the context, [n_ctx, W] or class-specific [C, n_ctx, W], from that of the features [C, D]."""
        layout, tower = chunk.layout, self._tower
        grad = grad.to(tape.features.dtype)
        grad = (grad - tape.features * (tape.features * grad).sum(-1, keepdim=True)) / tape.length
        scale = into_range(grad, tower.dtype)
        grad = (grad * scale).to(tower.dtype)
        if tower.projection is not None:
            grad = tower.projection.matrix.back(grad)
        grad = _normalise_backward(grad, None, tape.final, tower.norm)

        for i in reversed(range(len(tower.blocks))):
            block, saved = tower.blocks[i], tape.blocks[i]
            inner = bias_act_backward(block.proj.matrix.back(grad), saved.hidden, block.fc.bias, block.activation)
            grad = _normalise_backward(block.fc.matrix.back(inner), grad, saved.norm2, block.norm2)
            attended = block.out.matrix.back(grad)
            width, final = grad.shape[-1], i == len(tower.blocks) - 1
            wide = attended.new_empty(layout.rows, (2 if final else 3) * width)  # of keys and values, of queries too
            grad_q, grad_kv = (torch.empty_like(attended), wide) if final else (wide[:, :width], wide[:, width:])
            prefix_attention_backward(
                attended[None], saved.q[None], saved.kv[None], layout.offsets, layout.prefix, block.heads,
                grad_q[None], grad_kv[None],
            )  # fmt: skip
            through, rows = grad, slice(None) if i > 0 else layout.touched  # the other rows hold constants
            if final:  # only the EOT rows were queries
                through = torch.zeros_like(wide[:, :width]).index_copy_(0, layout.last, grad)
                inner = self._last_kv.matrix.back(wide)
                inner.index_add_(0, layout.last, self._last_q.matrix.back(grad_q))
                inner = inner[rows]
            else:
                inner = block.qkv.matrix.back(wide[rows])
            grad = _normalise_backward(inner, through[rows], saved.norm1, block.norm1)

        grad = grad.to(accumulation_dtype(tower.dtype)) / scale
        lead = layout.shared.stop - layout.shared.start
        own = grad[lead:].view(*layout.own.shape, grad.shape[-1])
        return own if self._specific else torch.cat([grad[:lead], own.sum(0)])

    def _vectors(self, ctx: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Context vectors that stand in the prefix, and those in the suffixes."""
        ctx = ctx.to(self._tower.dtype)
        lead = layout.shared.stop - layout.shared.start
        return (ctx[:0, 0], ctx) if self._specific else (ctx[:lead], ctx[lead:])

    def _part(self, ctx: Tensor, chunk: _Chunk) -> Tensor:
        return ctx[chunk.layout.classes] if self._specific else ctx

    def _tidy(self) -> None:
        """After a chunk, on a CPU: what is kept of it cuts the heap of its temporaries into holes, and glibc does not
        always fill one with an aligned block of its own size. With 1000 classes they are some hundred MB, how many
        depends on the machine; giving back what nobody uses takes a hundredth of a chunk's time."""
        if self._plan.row_bytes * self._rows > KEPT_BESIDE_LAYOUT and self._chunks[0].rows.device.type == "cpu":
            give_back()

    def _affordable(self) -> int:
        budget = self._plan.kept_bytes
        for count, chunk in enumerate(self._chunks):
            budget -= chunk.layout.rows * self._plan.row_bytes
            if budget < 0:
                return count
        return len(self._chunks)


def _normalise(rows: Tensor, branch: Tensor | None, norm: Norm, branch_bias: Tensor | None) -> tuple[_Norm, Tensor]:
    total, normed, mean, rstd = add_layer_norm(
        rows, branch, norm.weight, norm.bias, norm.eps, delta_bias=branch_bias if branch is not None else None
    )
    return _Norm(total, mean, rstd), normed


def _normalise_backward(grad: Tensor, through: Tensor | None, saved: _Norm, norm: Norm) -> Tensor:
    return add_layer_norm_backward(grad, through, saved.rows, saved.mean, saved.rstd, norm.weight)
