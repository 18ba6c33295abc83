"""The project's ops on CPU tensors, computed by the CUDA kernels on the CPU; each with the schema of its op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import build

_CLASSES_AT_ONCE = 12  # kPrefixAttentionClassesAtOnce


def _call(name: str, **arguments: Any) -> None:
    """Call a launcher; NumPy has no bfloat16, so half types travel as int16."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (value.view(torch.int16) if value.element_size() == 2 else value).detach().numpy()

    getattr(build.load(), name)(**{name: convert(value) for name, value in arguments.items()})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    """NaN, or -1: what a kernel forgets to write, or reads before writing, shows."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else -1, dtype=dtype)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def objective(logits: Tensor, n_selected: int, selected: Tensor | None = None) -> tuple[Tensor, ...]:
    batched, logits = logits.dim() == 3, _dense(logits)
    logits = logits if batched else logits[None]
    batch, views, classes = logits.shape
    dtype, chosen = logits.dtype, _unwritten(batch, n_selected, dtype=torch.int64)
    if selected is not None:
        chosen.copy_(selected.reshape(batch, n_selected))
    arrived = torch.zeros(batch, dtype=torch.int32)
    entropy, loss = _unwritten(batch, views, dtype=dtype), _unwritten(batch, dtype=dtype)
    grad = _unwritten(batch, n_selected, classes, dtype=dtype)
    _call(
        f"objective_{_name(dtype)}",
        logits=logits,
        entropy=entropy,
        shift=_unwritten(batch, views, 2, dtype=dtype),
        selected=chosen,
        log_mean=_unwritten(batch, classes, dtype=dtype),
        loss=loss,
        grad=grad,
        arrived=arrived,
        sizes=(batch, views, classes, n_selected),
        reselect=selected is None,
    )
    assert not arrived.any(), "the counters are ready for the next launch"
    results = entropy, chosen, loss, grad
    return results if batched else tuple(t[0] for t in results)


def views(
    image: Tensor,
    specs: Tensor,
    table: Tensor,
    view_height: int,
    view_width: int,
    vertical_first_when_taller: bool = True,
    patch: int | None = None,
) -> Tensor:
    (height, width, _), count = image.shape, len(specs)
    sides = view_height, view_width
    taps = build.load().views_max_taps(height, width, *sides)
    together = build.load().views_at_once(taps, max(sides), count)
    shape = (3, *sides)
    if patch is not None:
        shape = view_height // patch * (view_width // patch), 3 * patch**2
    out = torch.full((count, *shape), torch.nan if table.is_floating_point() else 0, dtype=table.dtype)
    _call(
        f"views_{table.element_size()}",
        image=_dense(image),
        specs=_dense(specs),
        table=_dense(table),
        weights=_unwritten(together, 2, 2 + taps, max(sides), dtype=torch.int32),
        pixels=_unwritten(height, width, dtype=torch.int32),
        out=out,
        sizes=(height, width, count, *sides, patch or sides[0], patch or sides[1], taps, together),
        vertical_first=vertical_first_when_taller,
    )
    return out


def augmix(
    crops: Tensor,
    steps: Tensor,
    parameters: Tensor,
    weights: Tensor,
    table: Tensor,
    out: Tensor,
    patch: int | None = None,
) -> None:
    views, _, height, width = crops.shape
    together = build.load().augmix_at_once(height * width, views)
    _call(
        f"augmix_{_name(out.dtype)}",
        crops=_dense(crops),
        steps=_dense(steps),
        parameters=_dense(parameters),
        weights=_dense(weights),
        table=_dense(table),
        images=torch.full((together, 3, 2, 3, height, width), 255, dtype=torch.uint8),
        ends=torch.full((together, 3, 769), 255, dtype=torch.uint8),
        out=out,
        sizes=(views, steps.shape[2], height, width, patch or height, patch or width, together),
    )


def add_layer_norm(
    x: Tensor, delta: Tensor | None, delta_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[:-1]
    total = _unwritten(*((0,) if delta is None else x.shape), dtype=x.dtype)
    normed = _unwritten(*x.shape, dtype=x.dtype)
    mean, rstd = (_unwritten(*rows, dtype=_accumulate(x.dtype)) for _ in range(2))
    _call(
        f"add_layer_norm_{_name(x.dtype)}",
        x=_dense(x),
        delta=_dense(delta),
        delta_bias=_dense(delta_bias),
        weight=_dense(weight),
        bias=_dense(bias),
        sum=None if delta is None else total,
        normed=normed,
        mean=mean,
        rstd=rstd,
        sizes=(rows.numel(), x.shape[-1]),
        eps=eps,
    )
    return total, normed, mean, rstd


def add_layer_norm_backward(
    grad_normed: Tensor, grad_sum: Tensor | None, sum: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> Tensor:
    grad = _unwritten(*sum.shape, dtype=sum.dtype)
    _call(
        f"add_layer_norm_backward_{_name(sum.dtype)}",
        grad_normed=_dense(grad_normed),
        grad_sum=_dense(grad_sum),
        sum=_dense(sum),
        mean=_dense(mean),
        rstd=_dense(rstd),
        weight=_dense(weight),
        grad=grad,
        sizes=(sum.shape[:-1].numel(), sum.shape[-1]),
    )
    return grad


def bias_act(x: Tensor, bias: Tensor | None, quick: bool) -> Tensor:
    return _bias_act_either(None, x, bias, quick)


def bias_act_(x: Tensor, bias: Tensor | None, quick: bool) -> None:
    _bias_act_either(None, x, bias, quick, out=x)


def bias_act_backward(grad: Tensor, x: Tensor, bias: Tensor | None, quick: bool) -> Tensor:
    return _bias_act_either(grad, x, bias, quick)


def _bias_act_either(
    grad: Tensor | None, x: Tensor, bias: Tensor | None, quick: bool, out: Tensor | None = None
) -> Tensor:
    out = _unwritten(*x.shape, dtype=x.dtype) if out is None else out
    _call(
        f"bias_act_{_name(x.dtype)}",
        x=_dense(x),
        bias=_dense(bias),
        grad=_dense(grad),
        out=out,
        sizes=(x.shape[:-1].numel(), x.shape[-1]),
        quick=quick,
    )
    return out


def prefix_attention(q: Tensor, kv: Tensor, offsets: Tensor, prefix: int, heads: int) -> Tensor:
    out = _unwritten(*q.shape, dtype=q.dtype)
    _prefix_attention_either(q, kv, offsets, prefix, heads, out=out)
    return out


def prefix_attention_backward(
    grad: Tensor, q: Tensor, kv: Tensor, offsets: Tensor, prefix: int, heads: int, grad_q: Tensor, grad_kv: Tensor
) -> None:
    (batch, queries, width), wide = q.shape, _accumulate(q.dtype)
    blocks = -(-(len(offsets) - 1) // _CLASSES_AT_ONCE)
    _prefix_attention_either(
        *(q, kv, offsets, prefix, heads),
        grad=_dense(grad),
        grad_q=grad_q,
        grad_kv=grad_kv,
        partial=_unwritten(batch, blocks, prefix, 2 * width, dtype=wide),
        stats=_unwritten(batch, heads, queries, 2, dtype=wide),
    )


def _prefix_attention_either(
    q: Tensor, kv: Tensor, offsets: Tensor, prefix: int, heads: int, **arguments: Tensor
) -> None:
    names = "grad", "out", "grad_q", "grad_kv", "partial", "stats"
    strides = (0, 0, 0, 0)
    if "grad_q" in arguments:
        strides = arguments["grad_q"].stride()[:2] + arguments["grad_kv"].stride()[:2]
    _call(
        f"prefix_attention_{_name(q.dtype)}",
        q=q,
        kv=kv,
        offsets=_dense(offsets),
        **{name: arguments.get(name) for name in names},
        sizes=(*kv.shape[:2], prefix, len(offsets) - 1, q.shape[2], heads),
        strides=q.stride()[:2] + kv.stride()[:2],
        grad_strides=strides,
        last_only=q.shape[1] != kv.shape[1],
    )


def adamw_step(
    context: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    step: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    skip_nonfinite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = [_unwritten(*context.shape, dtype=context.dtype) for _ in range(3)]
    step_out = _unwritten(len(context), dtype=torch.int64)
    _call(
        f"adamw_step_{_name(context.dtype)}",
        context=_dense(context),
        grad=_dense(grad),
        exp_avg=_dense(exp_avg),
        exp_avg_sq=_dense(exp_avg_sq),
        step=_dense(step),
        context_out=outputs[0],
        exp_avg_out=outputs[1],
        exp_avg_sq_out=outputs[2],
        step_out=step_out,
        sizes=(len(context), context[0].numel() if len(context) else 0),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        skip_nonfinite=skip_nonfinite,
    )
    return (*outputs, step_out)


OPS = (
    objective,
    views,
    augmix,
    add_layer_norm,
    add_layer_norm_backward,
    bias_act,
    bias_act_,
    bias_act_backward,
    prefix_attention,
    prefix_attention_backward,
    adamw_step,
)
