"""torch.compile takes every op as it stands, in one graph, also where nothing has loaded the kernels yet."""

import pytest
import torch

from tpt_fast import ops
from tpt_fast.extension import load
from tpt_fast.views.augmix import augmix_steps, draw_augmix

pytestmark = pytest.mark.numerics

ROWS = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
VECTOR = torch.linspace(0.5, 2, 8)
IMAGE = torch.arange(300, dtype=torch.int32).remainder(251).to(torch.uint8).view(10, 10, 3)
SPEC = torch.tensor([[1, 2, 6, 5, 4, 4, 0, 0, 1, 0]], dtype=torch.int32)
CROPS, STEPS = IMAGE.permute(2, 0, 1)[None, :, :4, :4].contiguous(), augmix_steps(draw_augmix(0), 4)
TABLE = torch.arange(256.0).expand(3, 256).contiguous()

DIFFERENTIABLE = {
    "add_layer_norm": lambda x: ops.add_layer_norm(x, x * 2, VECTOR, VECTOR, delta_bias=VECTOR).normed,
    "bias_act": lambda x: ops.bias_act(x, VECTOR, "quick_gelu"),
    "objective": lambda x: ops.objective(x, 2).loss,
    "prefix_attention": lambda x: ops.prefix_attention(
        x[None], torch.cat([x, x], -1)[None], torch.tensor([2, 4, 6]), prefix=2, heads=2
    ),
}
OTHERS = {
    "adamw_step": lambda x: ops.adamw_step(x[None], x[None] * 2).context,
    "augmix": lambda x: ops.augmix(CROPS, *STEPS, TABLE) * x[0, 0],
    "bias_act_": lambda x: ops.bias_act_(x.clone(), VECTOR),
    "linear": lambda x: ops.linear(x, ops.panels(ROWS), VECTOR[:6], width=6, activation="gelu"),
    "views": lambda x: ops.views(IMAGE, SPEC, TABLE, 4) * x[0, 0],
}


def gradient(of):
    def run(x):
        x = x.detach().requires_grad_()
        y = of(x)
        (y * torch.arange(1.0, 1 + y.numel()).view(y.shape)).sum().backward()
        return x.grad

    return run


def test_every_op_is_here():
    plain = {name for name, op in vars(ops).items() if callable(op) and name[0].islower()} - {"build_info", "panels"}
    assert plain == DIFFERENTIABLE.keys() | OTHERS.keys()


@pytest.mark.parametrize("op", [*DIFFERENTIABLE, *OTHERS])
def test_one_graph(monkeypatch, op):
    monkeypatch.setattr(load, "_decided", {})
    torch.compiler.reset()
    run = (DIFFERENTIABLE | OTHERS)[op]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ROWS), run(ROWS), rtol=0, atol=0)
    assert "cpu" in load._decided
    if op in DIFFERENTIABLE:
        torch.testing.assert_close(gradient(compiled)(ROWS), gradient(run)(ROWS), rtol=0, atol=0)
