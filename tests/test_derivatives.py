"""Derivatives that the ops do not have raise: none is zero without a word."""

import pytest
import torch
from torch.autograd import forward_ad

from tpt_fast import ops
from tpt_fast.ops.add_layer_norm import add_layer_norm_backward
from tpt_fast.ops.bias_act import bias_act_backward

OFFSETS = torch.tensor([2, 3, 5])
KV, ONES = torch.randn(1, 5, 8), torch.ones(7)
ONCE = {
    "objective": (lambda x: ops.objective(x, 2).loss, (5, 7)),
    "objective's entropies": (lambda x: ops.objective(x, 2).entropy.square().sum(), (5, 7)),
    "bias_act": (lambda x: ops.bias_act(x).square().sum(), (5, 7)),
    "add_layer_norm": (lambda x: ops.add_layer_norm(x, None, ONES, ONES).normed.square().sum(), (5, 7)),
    "prefix_attention": (lambda x: ops.prefix_attention(x, KV, OFFSETS, 2, 2).square().sum(), (1, 5, 4)),
}
NEVER = {
    "linear": (lambda x: ops.linear(x, ops.panels(torch.ones(3, 7)), width=3), (5, 7)),
    "bias_act_": (lambda x: ops.bias_act_(x), (5, 7)),
    "bias_act_backward": (lambda x: bias_act_backward(torch.ones(5, 7), x), (5, 7)),
    "add_layer_norm_backward": (
        lambda x: add_layer_norm_backward(x, None, torch.ones(5, 7), torch.ones(5), torch.ones(5), ONES),
        (5, 7),
    ),
    "adamw_step": (lambda x: ops.adamw_step(x, torch.ones(1, 5, 7)), (1, 5, 7)),
}


@pytest.mark.parametrize("op", ONCE)
def test_a_second_derivative_raises(op):
    """Also where another term of the loss has a gradient, beside which a zero would not be noticed."""
    function, shape = ONCE[op]
    x = torch.randn(shape).requires_grad_()
    (grad,) = torch.autograd.grad(function(x), x, create_graph=True)
    assert grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match=rf"{op.partition(chr(39))[0]} can be differentiated once only"):
        (grad.square().sum() + x.square().sum()).backward()


@pytest.mark.parametrize("op", ONCE | NEVER)
def test_forward_mode_raises(op):
    function, shape = (ONCE | NEVER)[op]
    x = torch.randn(shape)
    with pytest.raises(RuntimeError, match="has no forward-mode derivative, and this tensor has a tangent"):
        torch.func.jvp(function, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        function(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("op", sorted(NEVER.keys() - {"adamw_step"}))  # which takes parameters, as optimisers do
def test_a_gradient_of_an_op_without_one_raises(op):
    function, shape = NEVER[op]
    x = torch.randn(shape).requires_grad_()
    with pytest.raises(RuntimeError, match=rf"{op} has no derivative, and this tensor requires a gradient; detach it"):
        function(x)
    with torch.no_grad():
        function(x)
