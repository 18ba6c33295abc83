"""adamw_step: against torch.optim.AdamW, kernel against reference, skipping, determinism, messages."""

import math

import bounds
import pytest
import torch

from tpt_fast.ops.adamw_step import AdamWState, adamw_step
from tpt_fast.reference.adamw_step import adamw_step_or_skip as reference

pytestmark = pytest.mark.numerics

DTYPES = [torch.float32, torch.float64]
SETTINGS = [{}, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3}, {"weight_decay": 0.0, "lr": 1.0}]


def allowed(dtype, context, largest, squares, steps=1, lr=5e-3):
    """Of the context and the moments after so many steps: each rounds the context, a mean of gradients that are at most
    ``largest`` (whose terms may cancel), and a mean of their squares (which do not). A step is at most some 10 lr."""
    u = bounds.roundoff(dtype)
    return 16 * steps * u * (context.abs() + 10 * lr), 6 * steps * u * largest, 6 * steps * u * squares


def draw(batch, dtype, seed=0, shape=(4, 33)):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def steps(context, grads, **settings):
    """The states after each of the gradients."""
    states = [AdamWState(context, None, None, None)]
    for grad in grads:
        last = states[-1]
        states.append(adamw_step(last.context, grad, *last[1:], **settings))
    return states[1:]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torch_over_several_steps(dtype, batch, settings):
    context = draw(batch, dtype)
    grads = [10.0**i * draw(batch, dtype, seed=i) for i in range(-2, 3)]
    parameter = context.double().requires_grad_()
    optimizer = torch.optim.AdamW([parameter], **{"lr": 5e-3, "weight_decay": 0.01, **settings})
    largest = torch.zeros_like(parameter)
    for number, (grad, state) in enumerate(zip(grads, steps(context, grads, **settings), strict=True), 1):
        parameter.grad = grad.double()
        optimizer.step()
        inside = optimizer.state[parameter]
        largest = torch.maximum(largest, grad.double().abs())
        truth = parameter.detach(), inside["exp_avg"], inside["exp_avg_sq"]
        bound = allowed(dtype, truth[0], largest, truth[2], number, settings.get("lr", 5e-3))
        for got, want, limit, name in zip(state, truth, bound, state._fields, strict=False):
            bounds.assert_within(got, want, limit, name)
        assert state.step.tolist() == [number] * batch


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_left_of_the_past_without_betas(dtype):
    settings = {"lr": 1.0, "betas": (0.0, 0.0), "weight_decay": 0.0}
    context, large, small = (torch.full((1, 2, 3), value, dtype=dtype) for value in (0.0, 1e5, 1e-3))
    last = steps(context, [large, small], **settings)[-1]
    assert torch.equal(last.exp_avg, small)
    want = torch.full((1, 2, 3), -1 / (1 + 1e-8 / 1e5) - 1 / (1 + 1e-8 / 1e-3), dtype=torch.float64)
    bounds.assert_within(last.context, want, 32 * bounds.roundoff(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_equals_the_reference(dtype, fresh, skip):
    context, grad = draw(3, dtype), draw(3, dtype, seed=1)
    grad[1, 2, 5] = math.nan
    state = None, None, None
    if not fresh:
        state = draw(3, dtype, seed=2), draw(3, dtype, seed=3).square(), torch.tensor([1, 7, 1000])
    got = adamw_step(context, grad, *state, skip_nonfinite=skip)
    wide = (t if t is None or not t.is_floating_point() else t.double() for t in (context, grad, *state))
    want = reference(*wide, 5e-3, 0.9, 0.999, 1e-8, 0.01, skip)
    largest = grad.double().abs() + (0 if fresh else state[0].double().abs())
    for one, two, bound in zip(got, want, allowed(dtype, want[0], largest, want[2]), strict=False):
        assert one.dtype == dtype
        bounds.assert_within(one, two, bound.nan_to_num(0))
    assert torch.equal(got.step, want[3])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_only_the_image_with_a_broken_gradient_is_skipped(bad):
    first = adamw_step(draw(3, torch.float32), draw(3, torch.float32, seed=1))
    grad = draw(3, torch.float32, seed=2)
    sound = adamw_step(first.context, grad, *first[1:])
    grad = grad.clone()
    grad[1, 3, 32] = bad
    got = adamw_step(first.context, grad, *first[1:])
    assert got.step.tolist() == [2, 1, 2]
    for after, before, other in zip(got, first, sound, strict=True):
        assert torch.equal(after[1], before[1])
        assert torch.equal(after[::2], other[::2])
    broken = adamw_step(first.context, grad, *first[1:], skip_nonfinite=False)
    assert broken.step.tolist() == [2, 2, 2]
    assert not broken.context[1, 3, 32].isfinite()
    assert broken.context[1].isfinite().sum() == 4 * 33 - 1


def test_a_skipped_first_step_leaves_a_fresh_state():
    context = draw(1, torch.float32)
    got = adamw_step(context, torch.full_like(context, math.nan))
    assert torch.equal(got.context, context)
    assert got.step.tolist() == [0]
    assert not got.exp_avg.any()
    assert not got.exp_avg_sq.any()


def test_repeats_bit_for_bit_and_writes_nothing_in_place():
    context, grads = draw(3, torch.float32), [draw(3, torch.float32, seed=i) for i in (1, 2)]
    kept = [t.clone() for t in (context, *grads)]
    for one, two in zip(steps(context, grads)[-1], steps(context, grads)[-1], strict=True):
        assert torch.equal(one, two)
    assert all(torch.equal(t, old) for t, old in zip((context, *grads), kept, strict=True))


def test_a_batch_equals_one_at_a_time():
    context, grad = draw(3, torch.float32), draw(3, torch.float32, seed=1)
    together = adamw_step(context, grad)
    for i in range(3):
        for whole, one in zip(together, adamw_step(context[i : i + 1], grad[i : i + 1]), strict=True):
            assert torch.equal(whole[i : i + 1], one)


def test_non_contiguous_and_empty():
    context, grad = draw(2, torch.float32, shape=(33, 4)).mT, draw(2, torch.float32, seed=1)
    for one, two in zip(adamw_step(context, grad), adamw_step(context.contiguous(), grad), strict=True):
        assert torch.equal(one, two)
    none = torch.empty(0, 4, 8)
    assert [list(t.shape) for t in adamw_step(none, none)] == [[0, 4, 8]] * 3 + [[0]]


@pytest.mark.host
def test_opcheck():
    op, context = torch.ops.tpt_fast.adamw_step.default, draw(2, torch.float32)
    numbers = 5e-3, 0.9, 0.999, 1e-8, 0.01, True
    torch.library.opcheck(op, (context, context + 1, None, None, None, *numbers))
    state = context + 2, context.square(), torch.tensor([1, 2])
    torch.library.opcheck(op, (context, context + 1, *state, *numbers))


@pytest.mark.host
def test_messages():
    context = draw(2, torch.float32)
    step = torch.tensor([1, 1])
    with pytest.raises(ValueError, match=r"context: expected \[B, n_ctx, width\], got \[4, 33\]"):
        adamw_step(context[0], context[0])
    with pytest.raises(TypeError, match=r"context: expected float32 or float64, got torch.float16"):
        adamw_step(context.half(), context.half())
    with pytest.raises(ValueError, match=r"grad: expected \[2, 4, 33\], got \[1, 4, 33\]"):
        adamw_step(context, context[:1])
    with pytest.raises(TypeError, match=r"exp_avg_sq: expected torch.float32, got torch.float64"):
        adamw_step(context, context, context, context.double(), step)
    with pytest.raises(ValueError, match=r"exp_avg: expected .* together or not at all, got \['exp_avg', 'step'\]"):
        adamw_step(context, context, context, None, step)
    with pytest.raises(ValueError, match=r"step: expected int64 \[2\], got torch.int32 \[2\]"):
        adamw_step(context, context, context, context, step.int())


def test_the_binding_checks_too():
    from tpt_fast.extension import load

    if load.ensure().name != "native":
        pytest.skip("the reference checks nothing")
    op, context = torch.ops.tpt_fast.adamw_step, draw(2, torch.float32)
    numbers = 5e-3, 0.9, 0.999, 1e-8, 0.01, True
    with pytest.raises(RuntimeError, match=r"grad: expected shape \[2, 4, 33\], got \[1, 4, 33\]"):
        op(context, context[:1], None, None, None, *numbers)
    with pytest.raises(RuntimeError, match="expected exp_avg, exp_avg_sq and step together or not at all"):
        op(context, context, context, None, None, *numbers)
