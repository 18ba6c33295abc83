"""What must hold of every op wherever it runs: repeats are the same bits; on CUDA a graph's replays are the eager bits,
nothing waits for the device, and work queues on the caller's stream."""

import pytest
import torch

from tpt_fast.ops import objective
from tpt_fast.ops.adamw_step import adamw_step
from tpt_fast.ops.add_layer_norm import add_layer_norm, add_layer_norm_backward
from tpt_fast.ops.bias_act import bias_act, bias_act_backward
from tpt_fast.ops.prefix_attention import prefix_attention, prefix_attention_backward
from tpt_fast.ops.views import views
from tpt_fast.views.crops import draw_boxes, draw_specs, view_specs
from tpt_fast.views.make import normalisation_table

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def attention(q, kv, grad, offsets):
    out, grads = prefix_attention(q, kv, offsets, 5, 8), torch.empty_like(torch.cat([q, kv], -1))
    width = q.shape[-1]
    prefix_attention_backward(grad, q, kv, offsets, 5, 8, grads[..., :width], grads[..., width:])
    return out, grads


def normalised(x, delta, weight, bias, grad):
    total, normed, mean, rstd = add_layer_norm(x, delta, weight, bias)
    return total, normed, add_layer_norm_backward(grad, x, total, mean, rstd, weight)


def _offsets():
    return 5 + torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(1, 9, (150,)).cumsum(0)])


def _attention_inputs():
    offsets = _offsets()
    qkv = torch.randn(1, int(offsets[-1]), 3 * 512)
    return qkv[..., :512], qkv[..., 512:], torch.randn(1, len(qkv[0]), 512), offsets


# name: (function of tensors, its tensors)
CASES = {
    "views": (
        lambda image, specs, table: views(image, specs, table, 96),
        lambda: (
            torch.randint(0, 256, (300, 400, 3), dtype=torch.uint8),
            view_specs(300, 400, draw_boxes(300, 400, 15), 96),
            normalisation_table(),
        ),
    ),
    "objective": (lambda logits: objective(logits, 6), lambda: (5 * torch.randn(2, 64, 1000),)),
    "objective of many classes": (lambda logits: objective(logits, 12), lambda: (5 * torch.randn(128, 32_000),)),
    "prefix_attention": (attention, _attention_inputs),
    "add_layer_norm": (normalised, lambda: (*torch.randn(2, 700, 512), *torch.randn(2, 512), torch.randn(700, 512))),
    "bias_act": (
        lambda x, bias, grad: (bias_act(x, bias), bias_act_backward(grad, x, bias)),
        lambda: (torch.randn(700, 2048), torch.randn(2048), torch.randn(700, 2048)),
    ),
    "views in patches": (
        lambda image, specs, table: views(image, specs, table, 96, patch=16),
        lambda: (
            torch.randint(0, 256, (300, 400, 3), dtype=torch.uint8),
            view_specs(300, 400, draw_boxes(300, 400, 15), 96),
            normalisation_table(dtype=torch.float16),
        ),
    ),
    "adamw_step": (lambda ctx, grad: adamw_step(ctx, grad), lambda: tuple(torch.randn(2, 3, 4, 512))),
}
for name in ("prefix_attention", "add_layer_norm", "bias_act"):
    CASES[f"{name} in half"] = (CASES[name][0], lambda make=CASES[name][1]: halved(*make()))


def halved(*tensors):
    """Rows in float16; what belongs to all rows, such as a bias, stays in float32."""
    return tuple(t.half() if t.dim() > 1 and t.is_floating_point() else t for t in tensors)


def prepared(case, device):
    """The op as a function of nothing that returns a flat list of tensors, and its inputs."""
    function, make = CASES[case]
    inputs = [t.to(device) for t in make()]

    def run():
        results = function(*inputs)
        return [results] if isinstance(results, torch.Tensor) else list(results)

    return run, inputs


def assert_same_bits(got, want):
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_repeats_are_the_same_bits(case, device):
    run, _ = prepared(case, device)
    first = run()
    for _ in range(3):
        assert_same_bits(run(), first)


def captured(run):
    """A graph of ``run`` and the results that its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@needs_gpu
@pytest.mark.parametrize("case", CASES)
def test_a_graphs_replays_are_the_eager_bits(case):
    run, inputs = prepared(case, "cuda")
    graph, results = captured(run)
    for _ in range(3):
        for t in inputs:
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, device="cuda").to(t.dtype))
        for t in results:
            t.zero_()
        graph.replay()
        assert_same_bits(results, run())


@needs_gpu
@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_for_the_device(case):
    run, _ = prepared(case, "cuda")
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("case", CASES)
def test_work_queues_on_the_callers_stream(case):
    run, inputs = prepared(case, "cuda")
    for t in inputs:
        if t.is_floating_point() and t.numel() > 1:
            final = torch.randn_like(t)
            break
    else:
        pytest.skip("no floating point input")
    t.copy_(final)
    want = run()
    t.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms, in which a launch elsewhere would read zeros
        t.copy_(final)
        got = run()
    stream.synchronize()
    assert_same_bits(got, want)


@needs_gpu
def test_crops_are_drawn_anew_by_each_replay():
    generator = torch.Generator("cuda").manual_seed(0)
    image = torch.randint(0, 256, (300, 400, 3), dtype=torch.uint8, device="cuda")
    table = normalisation_table(device="cuda")
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    views(image, draw_specs(300, 400, 16, 96, generator=generator), table, 96)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        specs = draw_specs(300, 400, 16, 96, generator=generator)
        made = views(image, specs, table, 96)
    seen = []
    for _ in range(2):
        graph.replay()
        assert torch.equal(made, views(image, specs, table, 96))
        seen.append(specs.clone())
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0], seen[1])
