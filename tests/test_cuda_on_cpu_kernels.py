"""What only the CUDA kernels have to be tested for: each of their paths, in shuffled orders of blocks and threads."""

import bounds
import pytest
import torch

pytest.importorskip("pybind11")
from cuda_on_cpu import build, ops

from tpt_fast.reference import add_layer_norm as reference_norm
from tpt_fast.reference import bias_act as reference_bias_act
from tpt_fast.reference import prefix_attention as reference_attention
from tpt_fast.reference.objective import objective as reference_objective
from tpt_fast.reference.views import views as reference_views

if build.compiler() is None:
    pytest.skip("no host compiler", allow_module_level=True)

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module", autouse=True)
def shim():
    return build.load()


def in_every_order(shim, run):
    """The results of ``run()``, which must be the same bits in every order of blocks and threads."""
    results = []
    for seed in SEEDS:
        shim.set_seed(seed)
        results.append(run())
    shim.set_seed(0)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    return results[0]


# Four at a time or one, one kind of block for few classes and another for many.
@pytest.mark.parametrize(("views", "classes", "kept"), [(7, 300, 3), (5, 301, 5), (2, 4100, 1), (2, 4101, 2)])
def test_objective(shim, views, classes, kept):
    logits = 6 * torch.randn(2, views, classes)
    logits[0, 1, 3] = -torch.inf
    logits[1, 1] = logits[1, 0]  # a tie
    got = in_every_order(shim, lambda: ops.objective(logits, kept))
    want = reference_objective(logits.double(), kept)
    assert torch.equal(got[1], want[1])
    for one, two, bound in zip(
        (got[0], *got[2:]), (want[0], *want[2:]), bounds.objective(logits, want[1], logits.dtype)
    ):
        bounds.assert_within(one, two, bound)


def test_objective_of_a_given_selection(shim):
    logits, chosen = 5 * torch.randn(2, 6, 40), torch.tensor([[5, 0, 3], [1, 2, 0]])
    got = in_every_order(shim, lambda: ops.objective(logits, 3, chosen))
    want = reference_objective(logits.double(), 3, chosen)
    assert torch.equal(got[1], chosen)
    for one, two, bound in zip(got[2:], want[2:], bounds.objective(logits, chosen, logits.dtype)[1:], strict=True):
        bounds.assert_within(one, two, bound)


def test_objective_refuses_more_than_shared_memory_holds():
    with pytest.raises(RuntimeError, match="invalid argument"):
        ops.objective(torch.randn(1, 3000, 2), 3000)


# Boxes larger than a chunk of shared memory, a bicubic one with a window, a mirrored sliver, a low strip.
SPECS = [
    [0, 0, 300, 220, 40, 40, 0, 0, 0, 0],
    [0, 9, 300, 150, 40, 40, 0, 0, 1, 0],
    [3, 5, 250, 180, 70, 66, 9, 13, 1, 1],
    [0, 7, 300, 2, 41, 40, 1, 0, 1, 0],
    [290, 0, 4, 220, 90, 40, 50, 0, 0, 1],
]


@pytest.mark.parametrize("vertical_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
@pytest.mark.parametrize("sides", [(40, 40), (40, 16)])
def test_views(shim, dtype, vertical_first, sides):
    image = torch.randint(0, 256, (300, 220, 3), dtype=torch.uint8)
    image[100:] = (image[100:] > 127) * 255  # over- and undershoots
    table = torch.arange(256).expand(3, 256).to(dtype).contiguous()
    specs = torch.tensor(SPECS, dtype=torch.int32)
    for patch in (None, 8):
        given = image, specs, table, *sides, vertical_first, patch
        (got,) = in_every_order(shim, lambda: [ops.views(*given)])  # noqa: B023 - called at once
        assert torch.equal(got, reference_views(*given))


def test_views_of_a_long_image_go_in_groups_that_share_their_weights(shim):
    """Of 1 x 1,000,000 at 224 px the weights of 64 views would take 2 GB."""
    assert build.load().views_at_once(build.load().views_max_taps(1, 1_000_000, 224, 224), 224, 64) == 2
    assert build.load().views_at_once(build.load().views_max_taps(3000, 4000, 224, 224), 224, 64) == 64
    width, size, count = 150_000, 40, 15
    assert 1 < build.load().views_at_once(build.load().views_max_taps(1, width, size, size), size, count) < count - 1
    image = torch.randint(0, 256, (1, width, 3), dtype=torch.uint8)
    table = torch.arange(256).expand(3, 256).to(torch.uint8).contiguous()
    specs = torch.tensor(
        [[0, 9999 * i, 1, 50 + i, 40, 40, 0, 0, i % 2, i % 2] for i in range(count)], dtype=torch.int32
    )
    got = ops.views(image, specs, table, size, size)
    assert torch.equal(got, reference_views(image, specs, table, size, size))


def test_the_shared_memory_that_objective_says_it_needs(shim):
    """At 1000 classes 227 KB, an H100's, hold 4,000 of 4,000 views; up to 47 KB nothing is asked for."""
    needs = build.load().objective_shared_bytes
    assert needs(64, 1000, 6) < 48 << 10
    assert needs(4000, 1000, 4000) < 227 << 10 < needs(4500, 1000, 4500)
    assert needs(64, 5000, 6) > needs(64, 4000, 6)  # larger blocks


# Rows held in registers up to 768 and up to 1536, longer ones, and such as no vector fits.
@pytest.mark.parametrize("width", [512, 768, 1024, 1536, 2048, 770])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_add_layer_norm(shim, width, dtype):
    x, delta, grad_normed, grad_sum = torch.randn(4, 5, width).to(dtype)
    weight, bias, delta_bias = torch.randn(3, width)
    got = in_every_order(shim, lambda: ops.add_layer_norm(x, delta, delta_bias, weight, bias, 1e-5))
    parts = [t.double() for t in (x, delta, delta_bias)]
    bounds.assert_rounded(got[0], sum(parts), bounds.rounding(2) * sum(t.abs() for t in parts), "sum")
    stored = got[0].double(), weight.double(), bias.double()
    want = reference_norm.add_layer_norm(stored[0], None, None, *stored[1:], 1e-5)[1]
    bounds.assert_rounded(got[1], want, bounds.layer_norm(*stored, 1e-5, dtype), "normed")
    arguments = grad_normed, grad_sum, got[0], got[2], got[3], weight
    (grad,) = in_every_order(shim, lambda: [ops.add_layer_norm_backward(*arguments)])
    wide = [t.double() for t in arguments]
    want = reference_norm.add_layer_norm_backward(*wide)
    bounds.assert_rounded(grad, want, bounds.layer_norm_backward(*wide, dtype), "grad")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 515])
def test_bias_act(shim, width, dtype):
    (x, grad), bias = torch.randn(2, 9, width).to(dtype), torch.randn(width)
    biased = x.double() + bias.double()
    for quick in (False, True):
        (y,) = in_every_order(shim, lambda: [ops.bias_act(x, bias, quick)])  # noqa: B023 - called at once
        bounds.assert_rounded(y, reference_bias_act.bias_act(biased, None, quick), bounds.activation(biased, dtype))
        want = reference_bias_act.bias_act_backward(grad.double(), biased, None, quick)
        slope = bounds.activation_slope(biased, grad.double(), dtype)
        bounds.assert_rounded(ops.bias_act_backward(grad, x, bias, quick), want, slope)


def test_rows_at_an_odd_address():
    x, weight, bias = torch.randn(3 * 64 + 1)[1:].view(3, 64), torch.randn(64), torch.randn(64)
    wide = x.double(), weight.double(), bias.double()
    want = torch.nn.functional.layer_norm(wide[0], (64,), *wide[1:])
    got = ops.add_layer_norm(x, None, None, weight, bias, 1e-5)[1]
    bounds.assert_within(got, want, bounds.layer_norm(*wide, 1e-5, x.dtype))
    biased = wide[0] + wide[2]
    want = reference_bias_act.bias_act(biased, None, True)
    bounds.assert_within(ops.bias_act(x, bias, True), want, bounds.activation(biased, x.dtype))


# Heads of up to 64 elements of which vectors fit, and all others; suffixes longer than what is worked on at once.
@pytest.mark.parametrize("dim", [1, 5, 8, 32, 33, 64, 65, 80, 96, 128])
@pytest.mark.parametrize("last_only", [False, True])
def test_prefix_attention_of_every_head_size(shim, dim, last_only):
    check_attention(shim, torch.tensor([3, 5, 6, 38]), 3, 2, dim, last_only)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last_only", [False, True])
def test_prefix_attention_of_half_types(shim, dtype, last_only):
    check_attention(shim, torch.tensor([4, 5, 8, 15]), 4, 2, 64, last_only, dtype)


# Fewer, as many and more heads than a warp has groups.
@pytest.mark.parametrize("heads", [1, 3, 4, 5, 8])
def test_prefix_attention_of_any_number_of_heads(shim, heads):
    check_attention(shim, torch.tensor([5, 8, 12, 13, 18]), 5, heads, 16, False, torch.float16)


# In shared memory (20 KB) and too long for it; more keys than the warps of a block that sums their gradients.
@pytest.mark.parametrize(("prefix", "dtype"), [(0, torch.float16), (17, torch.float16), (17, torch.float32)])
@pytest.mark.parametrize("last_only", [False, True])
def test_prefix_attention_of_long_prefixes(shim, prefix, dtype, last_only):
    check_attention(shim, prefix + torch.tensor([0, 4, 5, 9]), prefix, 2, 64, last_only, dtype)


# One element off a vector's address, or rows that end between two vectors: one element at a time.
@pytest.mark.parametrize(("skipped", "spare"), [(1, 0), (0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prefix_attention_of_rows_no_vector_fits(shim, skipped, spare, dtype):
    check_attention(shim, torch.tensor([4, 5, 8, 15]), 4, 2, 64, False, dtype, skipped, spare)


def test_prefix_attention_of_many_blocks_of_classes(shim):
    lengths = torch.randint(1, 7, (50,), generator=torch.Generator().manual_seed(0))
    check_attention(shim, torch.cat([torch.tensor([4]), 4 + lengths.cumsum(0)]), 4, 2, 8, False)


def test_prefix_attention_of_no_classes(shim):
    check_attention(shim, torch.tensor([6]), 6, 2, 64, False)


# Heads that tensor cores can work on: classes that a warp shares, longer ones, and more than one block has; prefixes of
# more than one tile.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize(("prefix", "lengths"), [(5, [1, 2, 1] * 9), (0, [20, 1, 40, 16]), (35, [17])])
def test_prefix_attention_in_tiles(shim, prefix, lengths, last_only, dtype):
    offsets = prefix + torch.tensor([0, *lengths]).cumsum(0)
    check_attention(shim, offsets, prefix, 2, 64, last_only, dtype)


# float16 has nothing below 6e-8, yet a gradient whose own elements it can hold keeps its digits on the way.
def test_prefix_attention_of_small_gradients(shim):
    offsets = torch.tensor([4, 6, 9, 30])
    q, kv = torch.randn(1, 30, 128).half(), torch.randn(1, 30, 256).half()
    grad = (torch.randn(1, 30, 128) * 3e-5).half()
    got, want = ([torch.empty_like(q), torch.empty_like(kv)] for _ in range(2))
    ops.prefix_attention_backward(grad, q, kv, offsets, 4, 2, *got)
    reference_attention.prefix_attention_backward(
        *(t.double() for t in (grad, q, kv)), offsets, 4, 2, *(wide := [t.double() for t in want])
    )
    allowed = bounds.attention(grad, q, kv, offsets, 4, 2, q.dtype)[1:]
    for one, two, bound in zip(got, wide, allowed, strict=True):
        bounds.assert_rounded(one, two, bound)


# A query and a key that the classes' other rows do not see; queries of one suffix are computed together.
def test_prefix_attention_keeps_a_nan_to_the_rows_that_see_it(shim):
    offsets, width = torch.tensor([2, 8, 11]), 128
    q, kv = torch.randn(1, 11, width), torch.randn(1, 11, 2 * width)
    kv[0, 5] = torch.nan
    (out,) = in_every_order(shim, lambda: [ops.prefix_attention(q, kv, offsets, 2, 2)])
    seen = torch.zeros(11, dtype=torch.bool)
    seen[5:8] = True
    assert torch.equal(out[0].isnan().all(1), seen)
    assert torch.equal(out[0].isnan().any(1), seen)
    grads = torch.full_like(q, torch.nan), torch.full_like(kv, torch.nan)
    ops.prefix_attention_backward(q, q, kv, offsets, 2, 2, *grads)
    assert torch.equal(grads[0][0].isnan().any(1), seen)
    others = torch.tensor([8, 9, 10])
    assert grads[1][0, others].isfinite().all()


# Zero times NaN is NaN: in tiles it reaches the other rows of a warp's three classes, and no others.
def test_prefix_attention_in_tiles_keeps_a_nan_to_the_classes_of_a_warp(shim):
    offsets = torch.tensor([2, 8, 11, 12, 16])
    q, kv = torch.randn(1, 16, 128).half(), torch.randn(1, 16, 256).half()
    kv[0, 5] = torch.nan
    (out,) = in_every_order(shim, lambda: [ops.prefix_attention(q, kv, offsets, 2, 2)])
    assert out[0, 5:8].isnan().all()
    assert out[0, [0, 1, 12, 13, 14, 15]].isfinite().all()
    grads = torch.full_like(q, torch.nan), torch.full_like(kv, torch.nan)
    ops.prefix_attention_backward(q, q, kv, offsets, 2, 2, *grads)
    assert grads[0][0, 12:].isfinite().all()
    assert grads[1][0, 12:].isfinite().all()


def check_attention(shim, offsets, prefix, heads, dim, last_only, dtype=torch.float32, skipped=0, spare=0):
    """``skipped`` elements before the first row, ``spare`` ones between two rows."""
    rows, width = int(offsets[-1]), heads * dim

    def new_rows(values):
        room = torch.full((rows * (3 * width + spare) + skipped,), torch.nan, dtype=dtype)
        view = room[skipped:].view(1, rows, 3 * width + spare)[..., : 3 * width]
        return view if values is None else view.copy_(values)

    qkv = new_rows(torch.randn(1, rows, 3 * width))
    q, kv = qkv[..., :width], qkv[..., width:]
    q = q[:, offsets[1:] - 1] if last_only else q
    (out,) = in_every_order(shim, lambda: [ops.prefix_attention(q, kv, offsets, prefix, heads)])
    wide_q, wide_kv, grad = q.double(), kv.double(), torch.randn(q.shape).to(dtype)
    allowed = bounds.attention(grad, q, kv, offsets, prefix, heads, dtype)
    bounds.assert_rounded(
        out, reference_attention.prefix_attention(wide_q, wide_kv, offsets, prefix, heads), allowed[0]
    )

    def gradients():
        both = new_rows(None)  # halves of one tensor
        grad_q = torch.full(q.shape, torch.nan, dtype=dtype) if last_only else both[..., :width]
        ops.prefix_attention_backward(grad, q, kv, offsets, prefix, heads, grad_q, both[..., width:])
        return grad_q, both[..., width:]

    truth = torch.empty_like(wide_q), torch.empty_like(wide_kv)
    reference_attention.prefix_attention_backward(grad.double(), wide_q, wide_kv, offsets, prefix, heads, *truth)
    for got, want, bound in zip(in_every_order(shim, gradients), truth, allowed[1:], strict=True):
        bounds.assert_rounded(got, want, bound)


def test_prefix_attention_refuses_heads_over_128():
    q, kv = torch.randn(1, 2, 129), torch.randn(1, 2, 258)
    with pytest.raises(RuntimeError, match="invalid argument"):
        ops.prefix_attention(q, kv, torch.tensor([1, 2]), 1, 1)


def test_adamw_step(shim):
    context, grad = torch.randn(2, 3, 4, 700)
    grad[1, 2, 3] = torch.inf
    numbers = 5e-3, 0.9, 0.999, 1e-8, 0.01, True
    got = in_every_order(shim, lambda: ops.adamw_step(context, grad, None, None, None, *numbers))
    assert got[3].tolist() == [1, 0, 1]
    again = in_every_order(shim, lambda: ops.adamw_step(got[0], grad, *got[1:], *numbers))
    assert again[3].tolist() == [2, 0, 2]
    assert torch.equal(again[0][1], context[1])
