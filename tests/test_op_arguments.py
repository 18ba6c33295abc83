"""What every op says of a tensor that no op takes, and the drawing of crops of arguments of another type: the message
starts with the argument's name."""

import numpy as np
import pytest
import torch

from tpt_fast import ops
from tpt_fast.ops.add_layer_norm import add_layer_norm_backward
from tpt_fast.ops.bias_act import bias_act_backward
from tpt_fast.ops.prefix_attention import prefix_attention_backward
from tpt_fast.views import draw_augmix, draw_boxes, make_views, normalisation_table, view_specs
from tpt_fast.views.augmix import augmix_steps

ONES, ROWS, OFFSETS = torch.ones(8), torch.ones(5, 8), torch.tensor([2, 3, 5])
Q, KV = torch.ones(1, 5, 8), torch.ones(1, 5, 16)
STATISTICS = torch.ones(5)
IMAGE, SPECS = torch.zeros(9, 9, 3, dtype=torch.uint8), view_specs(9, 9, torch.zeros(0, 5, dtype=torch.int32), 4)
CONTEXT = torch.ones(1, 5, 8)
AUGMIX = {
    "crops": torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
    **dict(zip(("steps", "parameters", "weights"), augmix_steps(draw_augmix(0), 4), strict=True)),
    "table": normalisation_table(),
}
CALLS = {
    "objective": (ops.objective, {"logits": ROWS}, {"n_selected": 2}),
    "bias_act": (ops.bias_act, {"x": ROWS, "bias": ONES}, {}),
    "bias_act_": (ops.bias_act_, {"x": ROWS.clone(), "bias": ONES}, {}),
    "bias_act_backward": (bias_act_backward, {"grad": ROWS, "x": ROWS, "bias": ONES}, {}),
    "linear": (ops.linear, {"x": ROWS, "panels": ops.panels(torch.ones(3, 8)), "bias": torch.ones(3)}, {"width": 3}),
    "add_layer_norm": (
        ops.add_layer_norm,
        {"x": ROWS, "delta": ROWS, "weight": ONES, "bias": ONES, "delta_bias": ONES},
        {},
    ),
    "add_layer_norm_backward": (
        add_layer_norm_backward,
        {"grad_normed": ROWS, "grad_sum": ROWS, "sum": ROWS, "mean": STATISTICS, "rstd": STATISTICS, "weight": ONES},
        {},
    ),
    "prefix_attention": (ops.prefix_attention, {"q": Q, "kv": KV, "offsets": OFFSETS}, {"prefix": 2, "heads": 2}),
    "prefix_attention_backward": (
        prefix_attention_backward,
        {"grad": Q, "q": Q, "kv": KV, "offsets": OFFSETS, "grad_q": Q.clone(), "grad_kv": KV.clone()},
        {"prefix": 2, "heads": 2},
    ),
    "adamw_step": (
        ops.adamw_step,
        {
            "context": CONTEXT,
            "grad": CONTEXT,
            "exp_avg": CONTEXT,
            "exp_avg_sq": CONTEXT,
            "step": torch.ones(1, dtype=torch.int64),
        },
        {},
    ),
    "augmix": (ops.augmix, AUGMIX, {}),
    "views": (ops.views, {"image": IMAGE, "specs": SPECS, "table": normalisation_table()}, {"size": 4}),
}
ARGUMENTS = [(op, name) for op, (_, tensors, _) in CALLS.items() for name in tensors]


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
@pytest.mark.parametrize("kind", ["float8", "complex", "sparse", "meta", "array"])
def test_a_tensor_that_no_op_takes_is_named(op, name, kind):
    call, tensors, options = CALLS[op]
    change = {
        "float8": lambda t: t.to(torch.float8_e4m3fn),
        "complex": lambda t: t.to(torch.complex64),
        "sparse": lambda t: t.to_sparse(),
        "meta": lambda t: t.to("meta"),
        "array": lambda t: t.numpy(),
    }[kind]
    call(**tensors, **options)
    first = next(iter(tensors))
    if kind == "meta" and name == first:  # of the others it is then said that they are elsewhere
        expected = rf"{[*tensors, first][1]}: expected a tensor on meta, as {first} is"
        if len(tensors) == 1:
            pytest.skip("nothing is on another device")
    else:
        expected = rf"(q, kv|{name}): expected "
    with pytest.raises((TypeError, ValueError), match=rf"^{expected}"):
        call(**{**tensors, name: change(tensors[name])}, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mean": 0.5}, "mean: expected 3 numbers, got float"),
        ({"mean": (0.5, 0.5)}, "mean: expected 3 numbers"),
        ({"mean": ("a", 0, 0)}, "mean: expected 3 finite numbers, got str"),
        ({"std": None}, "std: expected 3 numbers, got NoneType"),
        ({"std": (1, 1, float("nan"))}, "std: expected 3 finite numbers, got nan"),
        ({"std": (1, 1, 0)}, "std: expected 3 numbers other than 0"),
        ({"patch": 2.0}, "patch: expected an int, got float"),
        ({"patch": 3}, "patch: expected a divisor of the size 4"),
        ({"patch": 0}, "patch: expected 1 or more"),
        ({"generator": 7}, "generator: expected a torch.Generator or None, got int"),
        ({"generator": np.random.default_rng(0)}, "generator: expected a torch.Generator"),
    ],
)
def test_make_views_names_the_argument(options, expected):
    with pytest.raises((TypeError, ValueError), match=f"^{expected}"):
        make_views(IMAGE, 2, 4, **options)


def test_make_views_takes_numpy_numbers_and_tensors():
    mean, std = np.float64([0.5, 0.25, 0.125]), torch.tensor([0.5, 0.25, 2])
    got = make_views(IMAGE, 2, 4, mean=mean, std=std)
    assert torch.equal(got, make_views(IMAGE, 2, 4, mean=mean.tolist(), std=std.tolist()))


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ((9.0, 9, 2), {}, "height: expected an int"),
        ((9, "9", 2), {}, "width: expected an int"),
        ((0, 9, 2), {}, "height: expected 1 to"),
        ((9, 9, -1), {}, "n: expected 0 or more"),
        ((9, 9, 2), {"scale": 0.5}, "scale: expected 2 numbers, got float"),
        ((9, 9, 2), {"scale": (1, 0.5)}, "scale: expected 0 < low <= high"),
        ((9, 9, 2), {"ratio": (1, 2, 3)}, "ratio: expected 2 numbers"),
        ((9, 9, 2), {"ratio": (1, float("inf"))}, "ratio: expected 2 finite numbers, got inf"),
        ((9, 9, 2), {"generator": "cpu"}, "generator: expected a torch.Generator or None, got str"),
    ],
)
def test_draw_boxes_names_the_argument(arguments, options, expected):
    with pytest.raises((TypeError, ValueError), match=f"^{expected}"):
        draw_boxes(*arguments, **options)


def test_view_specs_refuses_boxes_that_are_no_tensor_and_images_too_long():
    with pytest.raises(TypeError, match="boxes: expected a tensor, got list"):
        view_specs(9, 9, [[0, 0, 2, 2, 0]], 4)
    none = torch.zeros(0, 5, dtype=torch.int64)
    assert view_specs(1, (2**31 - 1) // 224, none, 224)[0, 5] == 224 * ((2**31 - 1) // 224)
    with pytest.raises(ValueError, match=r"^image: 1 x 10000000 \(height x width\) is too long"):
        view_specs(1, 10_000_000, none, 224)
