"""How far a right answer may be from the exact one: what rounding can do on any CPU, not what one of them did.

Rounding to a type changes a number by at most its unit roundoff u of itself. A sum of n terms in any order, in vectors
of any width, with or without fused multiply-adds, is off by at most n u of the sum of their absolute values, and where
roundings are independent by more than 8 sqrt(n) u of it only once in 10^13 (Higham and Mary, A new approach to
probabilistic rounding error analysis, 2019: 2 exp(-8^2 / 2)). :func:`growth` is the lesser of both. Every bound of the
suite is such a number of roundings times the size of what was rounded, computed from the test's own numbers in float64.

Types narrower than float32 are computed with in float32 and rounded once when they are stored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from tpt_fast.methods.published import tpt
from tpt_fast.reference import prefix_attention as reference_attention

EXP = 4  # roundings of an exponential or a logarithm: two units in the last place


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def growth(terms: int) -> float:
    """By how many roundings of all its terms' absolute values a sum of so many terms may be off."""
    return min(terms, 8 * terms**0.5)


def rounding(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative error of a chain of so many terms and roundings, computed with in ``dtype``'s own accumulation."""
    return growth(terms) * roundoff(computed_in(dtype))


def chain(module: nn.Module, tokens: int = 77) -> int:
    """Terms of the sums that follow one another through a tower: of each product as many as its weight has inputs, of a
    norm's mean and variance, of the scores and values of attention. A gradient goes there and back: twice as many."""
    terms = sum(p[0].numel() if p.dim() else 1 for p in module.parameters())
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            terms += 2 * part.normalized_shape[-1]
        elif hasattr(part, "in_proj_weight"):
            terms += tokens + part.head_dim
    return terms


def halved(module: nn.Module, dtype: torch.dtype, tokens: int = 77) -> float:
    """Relative error of a tower whose weights and rows are kept in a 16-bit type: on top of its sums, one rounding of
    what goes into each product and one of what comes out of it."""
    weights = sum(p.dim() > 1 for p in module.parameters())
    return rounding(chain(module, tokens)) + growth(4 * weights) * roundoff(dtype)


def assert_within(got: Tensor, want: Tensor, bound: Tensor | float, what: str = "") -> None:
    """``|got - want| <= bound``, element by element; infinities and NaN are the same ones."""
    assert got.shape == want.shape, f"{what} {list(got.shape)} in place of {list(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    bound = torch.as_tensor(bound, dtype=torch.float64).expand_as(want)
    finite = want.isfinite()
    torch.testing.assert_close(got[~finite], want[~finite], rtol=0, atol=0, equal_nan=True)
    error, allowed = (got - want).abs()[finite], bound[finite]
    wrong = ~(error <= allowed)  # NaN too
    if wrong.any():
        worst = (error / allowed).nan_to_num(torch.inf).argmax()
        raise AssertionError(
            f"{what} {int(wrong.sum())} of {wrong.numel()} elements are off by more than rounding: "
            f"{error[worst]:.3g} where {allowed[worst]:.3g} is allowed"
        )


def assert_rounded(got: Tensor, want: Tensor, bound: Tensor | float, what: str = "") -> None:
    """:func:`assert_within` of what was computed with ``bound`` and then stored in the type of ``got``."""
    if got.dtype == torch.float64:
        bound = 2 * bound  # what it is compared with is no better
    elif got.dtype != torch.float32:
        info = torch.finfo(got.dtype)
        size = want.detach().double().abs() + bound
        bound = bound + roundoff(got.dtype) * size + info.smallest_normal * info.eps
        largest = size > info.max * (1 - roundoff(got.dtype))  # rounds to infinity, or does not
        want = torch.where(largest & got.isinf(), got.double(), want.double())
    assert_within(got, want, bound, what)


def distance(got: Tensor, want: Tensor) -> float:
    """Relative to the largest element."""
    want = want.detach().double()
    return float((got.detach().double() - want).abs().max() / want.abs().max())


# The ops: bounds of each element, of tensors in float64 whose values are exactly those that the kernel was given.


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of x @ weight.T + bias."""
    x, weight = x.double().abs(), weight.double().abs()
    size = x @ weight.t() + (0 if bias is None else bias.double().abs())
    return rounding(x.shape[-1] + 2, dtype) * size


def activation(biased: Tensor, dtype: torch.dtype) -> Tensor:
    """Of GELU and QuickGELU of ``biased``: eight roundings of the polynomial and the exponential, whose values are
    below 1, times a number that was itself rounded."""
    return roundoff(computed_in(dtype)) * (8 * biased.clamp_min(0).clamp_min(1) + biased.abs())


def activation_slope(biased: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Slopes are below 1.2, and so are their changes with ``biased``."""
    return roundoff(computed_in(dtype)) * grad.abs() * 1.2 * (12 + biased.abs())


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Of the normalised rows of ``x``: the mean is off by roundings of the row's size, the variance (to which that is
    of second order) by roundings of its own."""
    u, sums = roundoff(computed_in(dtype)), growth(x.shape[-1]) + 2
    centred = x - x.mean(-1, keepdim=True)
    mean = u * sums * x.abs().mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    rstd = (variance + eps).rsqrt()
    relative = (u * (sums + 2) * variance + mean.square()) * rstd.square() / 2 + 3 * u
    size = (centred * rstd * weight).abs()
    return (weight.abs() * rstd * (mean + u * centred.abs())) + size * (relative + 3 * u) + u * (size + bias.abs())


def layer_norm_backward(
    grad: Tensor, through: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    u, sums = roundoff(computed_in(dtype)), growth(x.shape[-1]) + 8
    scale = rstd.unsqueeze(-1)
    weighted, unit = (grad * weight).abs(), ((x - mean.unsqueeze(-1)) * scale).abs()
    size = weighted + weighted.mean(-1, keepdim=True) + unit * (weighted * unit).mean(-1, keepdim=True)
    return u * (sums * scale * size + (0 if through is None else 2 * through.abs()))


def attention(
    grad: Tensor, q: Tensor, kv: Tensor, offsets: Tensor, prefix: int, heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the output and of the gradients of q and kv: scores, whose errors are relative errors of probabilities, then
    sums weighted by these, of absolute values here."""
    grad, q, kv = grad.double(), q.double(), kv.double()
    k, v = kv.chunk(2, -1)
    dim, longest = q.shape[-1] // heads, int(offsets.diff().max()) if len(offsets) > 1 else 0
    keys, root, u = prefix + longest, dim**0.5, roundoff(computed_in(dtype))

    def largest(a: Tensor, b: Tensor) -> float:  # sum of |a b| over a head, of any two rows
        a, b = (t.abs().unflatten(-1, (heads, -1)) for t in (a, b))
        products = torch.einsum("bqhd,bkhd->bhqk", a, b)
        return float(products.max()) if products.numel() else 0.0

    def weighted(values: Tensor) -> Tensor:  # by the probabilities, over the keys of each query
        return reference_attention.prefix_attention(q, torch.cat([k, values.abs()], -1), offsets, prefix, heads)

    def weighted_over_queries(values: Tensor) -> Tensor:
        whole = torch.empty_like(q), torch.empty_like(kv)
        reference_attention.prefix_attention_backward(values.abs(), q, kv, offsets, prefix, heads, *whole)
        return whole[1].chunk(2, -1)[1]

    scores, slopes = largest(q, k) / root, largest(grad, v)
    probability = u * (2 * growth(dim + 2) * scores + 4 * scores + 2 * growth(keys) + 2 * EXP + 8)
    slope = 3 * probability + u * (2 * growth(dim) + growth(keys) + 2 * growth(max(keys, q.shape[1])) + 4)
    over_queries = probability + rounding(q.shape[1], dtype)
    return (
        (probability + rounding(keys, dtype)) * weighted(v),
        slope * slopes / root * weighted(k),
        torch.cat([slope * slopes / root * weighted_over_queries(q), over_queries * weighted_over_queries(grad)], -1),
    )


def objective(logits: Tensor, selected: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of the entropies, the loss and its gradient, whose terms are p log p: absolute errors of the logarithms are
    relative ones of the probabilities. Infinities and NaN have no part in it."""
    u, logits = roundoff(computed_in(dtype)), logits.double()
    log_probs = logits.log_softmax(-1).clamp_min(-1e30)
    probs, sums = log_probs.exp(), growth(logits.shape[-1])
    shift = (logits - logits.max(-1, keepdim=True).values).abs().nan_to_num(0, 0)  # of a class that is not there

    def summed(terms: Tensor) -> Tensor:
        return terms.nan_to_num(0, 0).sum(-1, keepdim=True)

    mean_shift = summed(probs * shift)
    log_sum = u * (sums + mean_shift + 2 * EXP)
    size = 1 + mean_shift + (logits - logits.max(-1, keepdim=True).values).logsumexp(-1, keepdim=True)
    entropy = (2 * sums + 4 * EXP) * u * size + 2 * u * summed(probs * shift.square()) + log_sum * mean_shift

    rows = selected.unsqueeze(-1).expand(*selected.shape, logits.shape[-1])
    kept, k = log_probs.gather(-2, rows), selected.shape[-1]
    p, log_mean = kept.exp(), kept.logsumexp(-2, keepdim=True) - torch.tensor(float(k)).log().double()
    q = log_mean.exp()
    log_p = log_sum.gather(-2, selected.unsqueeze(-1)) + 2 * u * (shift.gather(-2, rows) + kept.abs() + EXP)
    log_q = log_p.max(-2, keepdim=True).values + u * (growth(k) + 3 * EXP + 3 * log_mean.abs())
    loss = summed(q * (log_q * (1 + log_mean.abs()) + (sums + EXP) * u * log_mean.abs()))[..., 0, 0]
    cross = summed(p * ((log_p + sums * u) * log_mean.abs() + log_q))
    distance = log_mean.abs() + summed(p * log_mean.abs())
    least = 2 * torch.finfo(computed_in(dtype)).smallest_normal  # an exponential below this is zero
    grad = (p * (distance * (log_p + (EXP + 4) * u) + cross + log_q) + least * distance) / k
    return entropy[..., 0], loss, grad.nan_to_num(0, 0)


# Whole answers


def moved(
    model: nn.Module, answer: Callable[[nn.Module], dict[str, Tensor]], dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """How far each part of ``answer(model)``, computed in float64, is off by rounding in ``dtype``. A computation with
    rounding is an exact one with weights that are off: by sqrt(n) roundings in a sum of n terms; where rows are kept
    in 16 bits, by one each of the weight, of what it is multiplied with, of the product and of the residual sum. The
    result is eight standard deviations over such models."""

    def off(seed: int) -> nn.Module:
        noise, twin = torch.Generator().manual_seed(seed), copy.deepcopy(exact)
        for p in twin.parameters():
            terms = p[0].numel() if p.dim() else 1
            size = terms**0.5 * roundoff(torch.float32) + (4 * roundoff(dtype) if dtype != torch.float32 else 0)
            p.data *= 1 + size * (2.0 * torch.randint(0, 2, p.shape, generator=noise) - 1)
        return twin

    exact = copy.deepcopy(model).double().requires_grad_(False)
    want, found = answer(exact), [answer(off(seed)) for seed in range(3)]
    return {
        name: 8 * float(torch.stack([one[name] - value for one in found]).square().mean().sqrt())
        for name, value in want.items()
        if value.is_floating_point()
    }


FIELDS = ("zero_shot_logits", "entropies", "loss", "grad", "logits")


def answers(model: nn.Module, views: Tensor, names: Sequence[str], **options: Any) -> dict[str, float]:
    """:func:`moved` of what the published algorithm (:func:`tpt_fast.methods.published.tpt`) answers for ``views``."""
    tokenize = options.pop("tokenizer", None) or open_clip.SimpleTokenizer()

    def answer(model: nn.Module) -> dict[str, Tensor]:
        found = tpt(model, views.double(), names, tokenize, **options)
        return {field: torch.as_tensor(getattr(found, field), dtype=torch.float64) for field in FIELDS}

    return moved(model, answer)


def logits(model: nn.Module, *dtypes: torch.dtype) -> float:
    """Of a class's logit, a product of unit vectors: by how much two computations of it in these types may differ."""
    off = {torch.float32: lambda tower: rounding(chain(tower))}
    towers = model.visual, getattr(model, "text", None) or model.transformer
    errors = [off.get(dtype, lambda tower, dtype=dtype: halved(tower, dtype))(t) for dtype in dtypes for t in towers]
    return float(model.logit_scale.detach().exp()) * sum(errors)


def assert_same_answer(got: Any, want: Any, allowed: dict[str, float], lr: float = 5e-3, steps: int = 1) -> None:
    """Of two computations in float32 for the same views (a TuneResult or what has its fields), each of which is off by
    no more than ``allowed``."""
    allowed = {field: 2 * bound for field, bound in allowed.items()}
    allowed["grad"] *= 4  # its way back is rounded too, and each view's logits by themselves
    for field in ("zero_shot_logits", "entropies"):
        assert_within(getattr(got, field), getattr(want, field), allowed[field], field)
    kept = (want.entropies[one.selected].sort().values for one in (got, want))
    assert_within(*kept, 2 * allowed["entropies"], "entropies of the selected")
    assert abs(got.loss - want.loss) <= allowed["loss"], "loss"
    assert_within(got.ctx_init, want.ctx_init, 0.0, "ctx_init")
    if not steps:
        assert torch.equal(got.logits, got.zero_shot_logits)
        return
    if steps == 1:
        assert_within(got.grad, want.grad, allowed["grad"], "grad")
    # A step goes by the gradient over its own size, so where that is all rounding, so is the step.
    step, change = (got.ctx - want.ctx).abs().double(), (want.ctx - want.ctx_init).double()
    assert_within(got.ctx, want.ctx, 2.1 * lr * steps, "ctx")
    sure = want.grad.abs() > 10 * allowed["grad"]
    rounded = 0.2 * lr * steps + 16 * steps * roundoff(torch.float32) * want.ctx.abs()
    assert sure.float().mean() > 0.5
    assert (step > rounded)[sure].float().mean() < 0.02 * steps, "ctx where the gradient is not small"
    # For its length, no difference of contexts moves the answer by more than eight times what tuning did.
    tuned = float((want.logits - want.zero_shot_logits).abs().max()) * float(step.norm() / change.norm())
    assert_within(got.logits, want.logits, allowed["logits"] + 8 * tuned, "logits")
