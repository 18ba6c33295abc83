"""prefix_attention: kernel against the reference, and the reference against attention on padded sequences."""

import bounds
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tpt_fast.ops.prefix_attention import prefix_attention, prefix_attention_backward
from tpt_fast.reference import prefix_attention as reference

pytestmark = pytest.mark.numerics

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# prefix, lengths of the suffixes, heads, head width
CASES = [
    (5, [3, 4, 1, 7], 2, 64),
    (1, [2], 1, 8),
    (0, [4, 1, 1], 3, 5),
    (9, [60, 1, 2], 2, 16),
    (3, [1] * 37, 1, 64),
    (4, [], 2, 8),
]


def inputs(case, dtype, batch=2, seed=0):
    prefix, lengths, heads, dim = case
    noise = torch.Generator().manual_seed(seed)
    offsets = prefix + torch.tensor([0, *lengths]).cumsum(0)
    rows, width = int(offsets[-1]), heads * dim
    qkv = torch.randn(batch, rows, 3 * width, generator=noise, dtype=torch.float64).to(dtype)
    return qkv[..., :width], qkv[..., width:], offsets, prefix, heads


def wide(*tensors):
    return [t.double() for t in tensors]


def assert_equals_the_reference(q, kv, offsets, *rest):
    """Output and gradients, within what rounding can do to these very numbers."""
    out = prefix_attention(q, kv, offsets, *rest)
    assert out.dtype == q.dtype
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    grads = [torch.full(t.shape, torch.nan, dtype=q.dtype) for t in (q, kv)]  # every element has to be written
    prefix_attention_backward(grad, q, kv, offsets, *rest, *grads)
    truth = [torch.empty(t.shape, dtype=torch.float64) for t in (q, kv)]
    reference.prefix_attention_backward(*wide(grad, q, kv), offsets, *rest, *truth)
    truth = reference.prefix_attention(*wide(q, kv), offsets, *rest), *truth
    allowed = bounds.attention(grad, q, kv, offsets, *rest, q.dtype)
    for got, want, bound, what in zip((out, *grads), truth, allowed, ("out", "grad_q", "grad_kv"), strict=True):
        bounds.assert_rounded(got, want, bound, what)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last_only", [False, True])
def test_equals_the_reference(case, dtype, last_only):
    q, kv, offsets, *rest = inputs(case, dtype)
    if last_only:
        q = q[:, offsets[1:] - 1]
    assert_equals_the_reference(q, kv, offsets, *rest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("dim", [32, 64])
def test_scores_far_below_zero(dtype, size, dim):
    """Keys that are not there score zero, which is much more; sums of exponentials are as small as exp(-128)."""
    q, kv, offsets, prefix, heads = inputs((5, [3, 4, 1, 7], 2, dim), dtype)
    width = q.shape[-1]
    q, kv = 0.1 * q - size, kv.clone()
    kv[..., :width] = 1 + 0.1 * kv[..., :width]
    assert_equals_the_reference(q, kv, offsets, prefix, heads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("case", [(5, [3, 7] * 17, 2, 64), (0, [40, 2], 3, 5), (9, [1, 30], 1, 128)])
def test_half_types_are_float32_rounded_once(case, dtype, last_only):
    """A sum over queries that were rounded on its way would differ: of a key's gradient, or of the prefix's."""
    q, kv, offsets, *rest = inputs(case, dtype)
    rows = slice(None) if not last_only else offsets[1:] - 1
    q, grad = q[:, rows], inputs(case, dtype, seed=1)[0][:, rows]

    def run(q, kv, grad):
        both = q.new_full((2, kv.shape[1], 3 * q.shape[2]), torch.nan)  # the gradients' rows are parts of longer ones
        grads = both[:, : q.shape[1], : q.shape[2]], both[..., q.shape[2] :]
        prefix_attention_backward(grad, q, kv, offsets, *rest, *grads)
        return prefix_attention(q, kv, offsets, *rest), *grads

    both = zip(run(q, kv, grad), run(q.float(), kv.float(), grad.float()), strict=True)
    for (one, two), bound in zip(both, bounds.attention(grad, q, kv, offsets, *rest, torch.float32), strict=True):
        bounds.assert_rounded(one, two, 2 * bound)  # both are float32's, and its sums may run in another order


@pytest.mark.parametrize("case", CASES[:-1])
def test_is_causal_attention_of_each_prompt(case):
    q, kv, offsets, prefix, heads = inputs(case, torch.float64, batch=1)
    out = prefix_attention(q, kv, offsets, prefix, heads)
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        prompt = [*range(prefix), *range(begin, end)]
        parts = [t[:, prompt].unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, -1))]
        truth = scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(-2)
        allowed = bounds.attention(q, q, kv, offsets, prefix, heads, torch.float64)[0][:, prompt]
        bounds.assert_within(out[:, prompt], truth, 2 * allowed)


@pytest.mark.host
def test_gradcheck():
    q, kv, *rest = inputs((2, [3, 1], 2, 3), torch.float64, batch=2)
    q, kv = q.clone().requires_grad_(), kv.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, kv: prefix_attention(q, kv, *rest), (q, kv))
    last = rest[0][1:] - 1
    assert torch.autograd.gradcheck(lambda q, kv: prefix_attention(q[:, last], kv, *rest), (q, kv))


@pytest.mark.host
def test_opcheck():
    q, kv, *rest = inputs((2, [3, 1], 2, 4), torch.float32)
    q, kv = q.clone().requires_grad_(), kv.clone().requires_grad_()
    torch.library.opcheck(torch.ops.tpt_fast.prefix_attention.default, (q, kv, *rest))
    q, kv = q.detach(), kv.detach()
    args = q, q, kv, *rest, torch.zeros_like(q), torch.zeros_like(kv)
    torch.library.opcheck(torch.ops.tpt_fast.prefix_attention_backward.default, args)


@pytest.mark.long
@pytest.mark.host
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bit_for_bit_on_any_number_of_threads(dtype, threads):
    q, kv, *rest = inputs((5, [3, 4, 2] * 30, 2, 64), dtype)

    def run():
        grads = torch.empty_like(q), torch.empty_like(kv)
        prefix_attention_backward(q, q, kv, *rest, *grads)
        return prefix_attention(q, kv, *rest), *grads

    alone = run()
    for n in (1, 2, 3):
        threads(n)
        for one, two in zip(alone, run(), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_scores_and_bad_rows(dtype):
    q, kv, offsets, prefix, heads = inputs((2, [2, 2], 1, 8), dtype, batch=1)
    kv = kv.clone()
    kv[0, 3, 8:] = torch.nan  # a value of the first suffix's last row
    out = prefix_attention(200 * q, kv, offsets, prefix, heads)
    assert out[0, 3].isnan().all()
    assert out[0, [0, 1, 2, 4, 5]].isfinite().all()


@pytest.mark.host
def test_messages():
    q, kv, offsets, prefix, heads = inputs(CASES[0], torch.float32)
    with pytest.raises(ValueError, match="heads: expected a divisor of the width 128, got 3"):
        prefix_attention(q, kv, offsets, prefix, 3)
    with pytest.raises(ValueError, match="q: expected 20 rows, or 4"):
        prefix_attention(q[:, :7], kv, offsets, prefix, heads)
    with pytest.raises(ValueError, match="prefix: expected 0 to 20"):
        prefix_attention(q, kv, offsets, 21, heads)
    with pytest.raises(TypeError, match="q, kv: expected both in torch"):
        prefix_attention(q.double(), kv, offsets, prefix, heads)
    with pytest.raises(ValueError, match="grad_kv: expected"):
        prefix_attention_backward(q, q, kv, offsets, prefix, heads, q, kv[:1])
    with pytest.raises(ValueError, match=r"offsets: expected int64 \[C \+ 1\]"):
        prefix_attention(q, kv, offsets.int(), prefix, heads)


@pytest.mark.host
def test_offsets_are_checked_by_the_kernel():
    from tpt_fast.extension import load

    if load.ensure().name != "native":
        pytest.skip("the reference does not look at the offsets")
    q, kv, offsets, prefix, heads = inputs(CASES[0], torch.float32)
    for broken, message in (
        (offsets.flip(0), "offsets: expected to start at the prefix, 5, got 20"),
        (torch.tensor([5, 4, 9, 13, 20]), "offsets: expected ascending, got 4 after 5"),
        (torch.tensor([5, 8, 9, 13, 19]), "offsets: expected to end at the number of rows, 20, got 19"),
    ):
        with pytest.raises(RuntimeError, match=message):
            prefix_attention(q, kv, broken, prefix, heads)
