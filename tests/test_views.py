"""The views op against PIL and torchvision, bit for bit; the draws against torchvision's; the messages."""

import math
import re

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import ResizeKeepRatio
from PIL import Image
from torch.nn.functional import unfold
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from tpt_fast._checks import check_size
from tpt_fast.ops.views import views
from tpt_fast.reference.views import views as reference
from tpt_fast.views.crops import draw_boxes, draw_specs, view_specs
from tpt_fast.views.make import CLIP_MEAN, CLIP_STD, make_views, normalisation_table, pass_order

pytestmark = pytest.mark.numerics

BYTES = torch.arange(256, dtype=torch.uint8).expand(3, 256).contiguous()
INSTALLED_IS_13 = pass_order() == "pillow-13"


def noise(height, width, seed=0, contrast=1.0):
    """Random pixels; a large contrast leaves only 0 and 255, which makes bicubic weights over- and undershoot."""
    pixels = np.random.default_rng(seed).random((height, width, 3))
    return torch.from_numpy(((pixels - 0.5) * contrast + 0.5).clip(0, 1).__mul__(255).round().astype(np.uint8))


def as_published(image, boxes, size):
    """[N, 3, H, W] uint8: the published pipeline on PIL images, of views of ``size``, or (H, W)."""
    picture = Image.fromarray(image.numpy())
    sides = list(size) if isinstance(size, tuple) else [size, size]
    plain = (
        ResizeKeepRatio(sides)(picture) if sides[0] != sides[1] else F.resize(picture, size, InterpolationMode.BICUBIC)
    )
    out = [F.center_crop(plain, sides)]
    for top, left, height, width, flip in boxes.tolist():
        view = F.resized_crop(picture, top, left, height, width, sides, InterpolationMode.BILINEAR)
        out.append(F.hflip(view) if flip else view)
    return torch.stack([F.pil_to_tensor(view) for view in out])


def random_boxes(height, width, n, seed=0):
    rng = np.random.default_rng(seed)
    sides = np.stack([rng.integers(1, height + 1, n), rng.integers(1, width + 1, n)], 1)
    corners = np.stack([rng.integers(0, height - sides[:, 0] + 1), rng.integers(0, width - sides[:, 1] + 1)], 1)
    return torch.from_numpy(np.concatenate([corners, sides, rng.integers(0, 2, (n, 1))], 1).astype(np.int32))


def assert_equals_pil(image, boxes, size):
    height, width, _ = image.shape
    specs = view_specs(height, width, boxes, size)
    expected = as_published(image, boxes, size)
    assert torch.equal(views(image, specs, BYTES, size, INSTALLED_IS_13), expected)
    return specs, expected


SIZES = [
    (375, 500, 224), (500, 375, 224), (333, 500, 97), (224, 224, 224), (1, 1, 8), (1, 40, 16), (40, 1, 16), (2, 3, 5),
    (700, 90, 64), (90, 700, 64), (200, 300, (256, 128)), (300, 200, (40, 130)), (31, 33, (7, 1)), (90, 700, (1, 65)),
     (31, 33, 224), (17, 16, 15), (64, 64, 1), (800, 300, 65), (640, 6, 3),
]  # fmt: skip


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
@pytest.mark.parametrize("contrast", [1.0, 100.0])
def test_equals_pil_and_reference(height, width, size, contrast):
    image = noise(height, width, contrast=contrast)
    specs, expected = assert_equals_pil(image, random_boxes(height, width, 6), size)
    assert torch.equal(reference(image, specs, BYTES, *check_size("size", size), INSTALLED_IS_13), expected)


@pytest.mark.long
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 130), st.integers(0, 2**32 - 1))
def test_equals_pil_on_any_size(height, width, size, seed):
    if max(height, width) / min(height, width) * size > 10_000:
        return  # Pillow itself would need gigabytes for the resized image that is then cut
    assert_equals_pil(noise(height, width, seed), random_boxes(height, width, 3, seed), size)


@pytest.mark.parametrize("vertical_first", [False, True])
def test_both_pass_orders_equal_the_reference(vertical_first):
    image = noise(300, 200)
    specs = view_specs(300, 200, torch.cat([draw_boxes(300, 200, 12), random_boxes(300, 200, 12)]), 50)
    got = views(image, specs, BYTES, 50, vertical_first)
    assert torch.equal(got, reference(image, specs, BYTES, 50, 50, vertical_first))
    assert not torch.equal(got, views(image, specs, BYTES, 50, not vertical_first))


@pytest.mark.long
def test_slivers_change_the_order_before_pillow_13():
    image = noise(400, 3, contrast=100.0)
    specs = torch.tensor([[0, 0, 400, 3, 398, 2, top, 0, 0, 0] for top in range(0, 396, 2)]).int()
    expected = torch.from_numpy(np.array(Image.fromarray(image.numpy()).resize((2, 398), Image.BILINEAR)))
    strip = {order: views(image, specs, BYTES, 2, order) for order in (False, True)}
    assert not torch.equal(strip[False], strip[True])
    assert torch.equal(strip[INSTALLED_IS_13].permute(0, 2, 3, 1).flatten(0, 1), expected[:396])
    for order, got in strip.items():
        assert torch.equal(got, reference(image, specs, BYTES, 2, 2, order))


def test_bicubic_boxes_with_windows_equal_the_reference():
    image = noise(120, 150, contrast=100.0)
    specs = torch.tensor([[5, 7, 100, 90, 70, 66, 9, 3, 1, 1], [0, 0, 120, 150, 300, 333, 250, 280, 0, 0]])
    specs = specs.int()
    for order in (False, True):
        assert torch.equal(views(image, specs, BYTES, 48, order), reference(image, specs, BYTES, 48, 48, order))


@pytest.mark.parametrize("patch", [1, 7, 14, 16, 112])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [112, (112, 224), (336, 112)])
def test_patches_are_cut_from_the_views(patch, dtype, size):
    image = noise(130, 150)
    specs = view_specs(130, 150, random_boxes(130, 150, 3), size)
    assert specs[:, 8].any()  # mirrored
    table, sides = BYTES.to(dtype), check_size("size", size)
    whole = views(image, specs, table, size, INSTALLED_IS_13)
    got = views(image, specs, table, size, INSTALLED_IS_13, patch)
    assert got.shape == (4, sides[0] // patch * (sides[1] // patch), 3 * patch**2)
    # torch's own unfold has the channels first in each patch too.
    assert torch.equal(got.float(), unfold(whole.float(), patch, stride=patch).transpose(1, 2))
    assert torch.equal(got, reference(image, specs, table, *sides, INSTALLED_IS_13, patch))


@pytest.mark.long
def test_twelve_megapixels():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8))
    assert_equals_pil(image, random_boxes(3000, 4000, 2), 224)


@pytest.mark.long
def test_golden_views(golden_dir):
    boxes = np.load(golden_dir / "boxes.npy")
    pixels = torch.from_numpy(np.load(golden_dir / "views_u8.npy"))
    table = normalisation_table()
    expected = torch.stack([table[c][pixels[:, c].long()] for c in range(3)], 1)
    got = make_views(golden_dir / "photo.jpg", size=96, boxes=boxes, order="pillow-13")
    assert torch.equal(got, expected)
    assert not torch.equal(make_views(golden_dir / "photo.jpg", size=96, boxes=boxes, order="pillow-12"), expected)


@pytest.mark.host
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_pil_modes_are_converted_first(mode):
    picture = Image.fromarray(noise(60, 80).numpy()).convert(mode)
    boxes = random_boxes(60, 80, 3)
    expected = as_published(torch.from_numpy(np.array(picture.convert("RGB"))), boxes, 32)
    got = make_views(picture, size=32, boxes=boxes)
    assert torch.equal(got, normalise(expected))


def normalise(pixels, mean=CLIP_MEAN, std=CLIP_STD):
    """torchvision's ToTensor and Normalize."""
    to_tensor = [F.to_tensor(Image.fromarray(view.permute(1, 2, 0).numpy())) for view in pixels]
    return torch.stack([F.normalize(view, mean, std) for view in to_tensor])


@pytest.mark.host
@pytest.mark.parametrize(("mean", "std"), [(CLIP_MEAN, CLIP_STD), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
def test_normalised_bits_are_torchvisions(mean, std):
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    assert torch.equal(normalisation_table(mean, std)[None, :, None], normalise(levels, mean, std))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_float32(dtype):
    image = noise(50, 70)
    assert torch.equal(make_views(image, 9, 33, dtype=dtype), make_views(image, 9, 33).to(dtype))


def test_strided_images_and_repeated_calls():
    image = noise(90, 80)
    transposed = image.transpose(0, 1).contiguous().transpose(0, 1)
    assert not transposed.is_contiguous()
    first = make_views(image, 5, 48)
    for again in (make_views(transposed, 5, 48), make_views(image.permute(2, 0, 1), 5, 48), make_views(image, 5, 48)):
        assert torch.equal(first, again)


@pytest.mark.host
def test_threads_do_not_change_the_result(threads):
    image = noise(300, 400)
    expected = make_views(image, 9, 224)
    for n in (2, 3):
        threads(n)
        assert torch.equal(make_views(image, 9, 224), expected)


def test_no_views():
    assert views(noise(4, 4), torch.empty(0, 10, dtype=torch.int32), BYTES, 8).shape == (0, 3, 8, 8)


@pytest.mark.host
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_opcheck(dtype):
    specs = view_specs(40, 30, draw_boxes(40, 30, 2), 16)
    for patch in (None, 4):
        torch.library.opcheck(torch.ops.tpt_fast.views, (noise(40, 30), specs, BYTES.to(dtype), 16, 16, True, patch))


# Drawing


def torchvision_boxes(height, width, n, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    picture = Image.new("RGB", (width, height))
    rows = []
    for _ in range(n):
        box = RandomResizedCrop.get_params(picture, scale, ratio)
        rows.append([*box, int((torch.rand(1) < 0.5).item())])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.host
@pytest.mark.parametrize(
    ("height", "width", "n"),
    [
        (375, 500, 63),
        (500, 375, 63),
        (1, 1, 5),
        (2, 3, 20),
        (90, 700, 63),
        (700, 90, 63),
        (3000, 4000, 300),
        (1, 900, 9),
    ],
)
def test_boxes_and_generator_are_torchvisions(height, width, n):
    for seed in range(5):
        torch.manual_seed(seed)
        expected = torchvision_boxes(height, width, n)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(draw_boxes(height, width, n, seed=None), expected)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(draw_boxes(height, width, n, seed=seed), expected)


@pytest.mark.host
def test_boxes_continue_a_stream_at_an_odd_position():
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    for _ in range(3):
        torch.rand(1, generator=generator), torch.rand(1)
        assert torch.equal(draw_boxes(80, 90, 2, generator=generator), torchvision_boxes(80, 90, 2))


@pytest.mark.host
@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.5, 1.0), (0.2, 5.0)), ((0.9, 1.0), (1.5, 4.0)), ((1e-4, 1e-3), (1, 1))]
)
def test_boxes_of_other_ranges(scale, ratio):
    torch.manual_seed(0)
    expected = torchvision_boxes(120, 100, 200, scale, ratio)
    assert torch.equal(draw_boxes(120, 100, 200, scale=scale, ratio=ratio), expected)


def test_seeds_differ_and_repeat():
    image = noise(60, 60)
    assert torch.equal(make_views(image, 8, 32, seed=1), make_views(image, 8, 32, seed=1))
    assert not torch.equal(make_views(image, 8, 32, seed=1), make_views(image, 8, 32, seed=2))
    assert torch.equal(make_views(image, 8, 32, seed=1)[0], make_views(image, 8, 32, seed=2)[0])


@pytest.mark.host
@pytest.mark.parametrize(("height", "width"), [(375, 500), (90, 300), (40, 900), (900, 40), (1, 1)])
def test_specs_drawn_on_a_device_have_torchvisions_distribution(height, width):
    n = 4000
    drawn = draw_specs(height, width, n + 1, 64, generator=torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int32
    truth = view_specs(height, width, draw_boxes(height, width, n, seed=1), 64)
    assert torch.equal(drawn[0], truth[0])
    assert torch.equal(drawn[1:, 4:8], truth[1:, 4:8])
    assert (drawn[1:, :2] >= 0).all()
    assert (drawn[1:, :2] + drawn[1:, 2:4] <= torch.tensor([height, width])).all()
    assert (drawn[1:, 9] == 0).all()

    def statistics(specs):  # top, left, height, width, flip, area, aspect
        top, left, tall, wide, flip = specs[1:, [0, 1, 2, 3, 8]].double().T
        return torch.stack([top, left, tall, wide, flip, tall * wide, (wide / tall).log()])

    for got, want in zip(statistics(drawn), statistics(truth), strict=True):
        both = torch.cat([got, want]).unique()
        shares = [torch.searchsorted(one.sort().values, both, right=True) / n for one in (got, want)]
        assert (shares[0] - shares[1]).abs().max() < 1.95 * math.sqrt(2 / n)  # Kolmogorov-Smirnov, 0.1 %


@pytest.mark.host
def test_specs_drawn_on_a_device_repeat_and_make_views():
    image = noise(60, 80)
    one, two, other = (draw_specs(60, 80, 9, 32, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    made = views(image, one, BYTES, 32, INSTALLED_IS_13)
    boxes = one[1:][:, [0, 1, 2, 3, 8]]
    assert torch.equal(made, as_published(image, boxes, 32))
    with pytest.raises(ValueError, match="n: expected 0 or more, got -1"):
        draw_specs(8, 8, 0, 4, generator=torch.Generator())


def test_make_views_equals_the_published_pipeline():
    image = noise(375, 500, contrast=3.0)
    torch.manual_seed(7)
    expected = normalise(as_published(image, torchvision_boxes(375, 500, 7), 96))
    assert torch.equal(make_views(image, 8, 96, seed=7), expected)


def test_pass_order_follows_the_installed_pillow(monkeypatch):
    monkeypatch.setattr(PIL, "__version__", "12.2.0")
    assert pass_order() == "pillow-12"
    monkeypatch.setattr(PIL, "__version__", "13.0.0")
    assert pass_order() == "pillow-13"


# Messages

SPEC = [0, 0, 8, 8, 4, 4, 0, 0, 0, 0]


def changed(column, value):
    return torch.tensor([SPEC, [*SPEC[:column], value, *SPEC[column + 1 :]]], dtype=torch.int32)


@pytest.mark.host
@pytest.mark.parametrize(("op", "sides"), [(views, [4]), (reference, [4, 4])], ids=["op", "reference"])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, 1, "specs: expected boxes inside the image of 8 x 9 (height x width), got 8 x 8 at (1, 0) in row 1"),
        (1, -1, "got 8 x 8 at (0, -1) in row 1"),
        (2, 0, "got 0 x 8 at (0, 0) in row 1"),
        (3, 2**31 - 1, "got 8 x 2147483647 at (0, 0) in row 1"),
        (5, 3, "specs: expected windows of 4 x 4 inside the resized box of 4 x 3, got one at (0, 0) in row 1"),
        (6, 1, "got one at (1, 0) in row 1"),
        (9, 2, "specs: expected filter 0 or 1, got 2 in row 1"),
    ],
)
def test_specs_out_of_range(op, sides, column, value, message):
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        op(noise(8, 9), changed(column, value), BYTES, *sides, True)


@pytest.mark.host
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image": torch.zeros(8, 8, dtype=torch.uint8)}, ValueError, "image: expected shape [H, W, 3], got [8, 8]"),
        ({"image": torch.zeros(8, 8, 3)}, TypeError, "image: expected torch.uint8, got torch.float32"),
        ({"specs": torch.tensor([SPEC])}, TypeError, "specs: expected torch.int32, got torch.int64"),
        ({"specs": torch.zeros(2, 9).int()}, ValueError, "specs: expected shape [N, 10], got [2, 9]"),
        ({"table": BYTES[:2]}, ValueError, "table: expected shape [3, 256], got [2, 256]"),
        ({"table": BYTES.double()}, TypeError, "table: expected torch.float32 or"),
        ({"size": 0}, ValueError, "size: expected 1 to 32768, got 0"),
        ({"patch": 3}, ValueError, "patch: expected a divisor of the size 4, got 3"),
        ({"patch": 0}, ValueError, "patch: expected a divisor of the size 4, got 0"),
    ],
)
def test_arguments_of_another_kind(arguments, error, message):
    good = {"image": noise(8, 8), "specs": torch.tensor([SPEC]).int(), "table": BYTES, "size": 4}
    with pytest.raises(error, match=re.escape(message)):
        views(**good | arguments)


@pytest.mark.host
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_views": 0}, ValueError, "n_views: expected 1 or more, got 0"),
        ({"n_views": 2.0}, TypeError, "n_views: expected an int, got float 2.0"),
        ({"size": 224.0}, TypeError, "size: expected an int or (height, width), got float 224.0"),
        ({"size": b"ab"}, TypeError, "size: expected an int or (height, width), got bytes b'ab'"),
        ({"size": (8,)}, TypeError, "size: expected an int or (height, width), got tuple (8,)"),
        ({"size": (8, 0)}, ValueError, "size: expected 1 to 32768, got 0"),
        ({"seed": 1.5}, TypeError, "seed: expected an int, got float 1.5"),
        ({"size": 0}, ValueError, "size: expected 1 to 32768, got 0"),
        ({"dtype": torch.float64}, TypeError, "dtype: expected torch.float32, float16 or bfloat16, got torch.float64"),
        ({"order": "pillow-9"}, ValueError, "order: expected one of pillow-12, pillow-13, got 'pillow-9'"),
        ({"mean": (0.5,)}, ValueError, "mean: expected 3 numbers, got (0.5,)"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, "std: expected 3 numbers other than 0, got (1.0, 0.0, 1.0)"),
        ({"boxes": np.zeros((2, 4), np.int32)}, ValueError, "boxes: expected [N-1, 5]"),
        ({"boxes": np.zeros((1, 5))}, ValueError, "boxes: expected integers, got float64"),
        (
            {"boxes": [[0, 0, 4, 4, 0], [0, 5, 4, 4, 0]]},
            ValueError,
            "boxes: expected boxes (top, left, height, width, flip) inside the image of 8 x 8 (height x width), "
            "got [0, 5, 4, 4, 0] in row 1",
        ),
    ],
)
def test_make_views_messages(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make_views(noise(8, 8), **arguments)


@pytest.mark.host
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 0}, "height: expected 1 to 2147483647, got 0"),
        ({"n": -1}, "n: expected 0 or more, got -1"),
        ({"scale": (0.0, 1.0)}, "scale: expected 0 < low <= high, got (0.0, 1.0)"),
        ({"ratio": (2.0, 1.0)}, "ratio: expected 0 < low <= high, got (2.0, 1.0)"),
        ({"ratio": (math.nan, 1.0)}, "ratio: expected 2 finite numbers, got nan"),
    ],
)
def test_draw_boxes_messages(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_boxes(**{"height": 8, "width": 8, "n": 3} | arguments)


@pytest.mark.parametrize(
    "box",
    [
        np.array([2**63 - 1, 0, 2, 2, 0], np.int64),
        np.array([0, 2**63 - 1, 2, 2, 1], np.int64),
        np.array([1, 1, 2**63 - 1, 2, 1], np.int64),
        np.array([2**64 - 1, 0, 2, 2, 0], np.uint64),
        np.array([0, 0, 2, 2**64 - 2, 0], np.uint64),
        np.array([200, 0, 100, 2, 0], np.uint8),
    ],
    ids=str,
)
def test_boxes_whose_ends_wrap_are_refused(box):
    """The ends are sums; the CUDA kernel would read where they lead."""
    with pytest.raises(ValueError, match=r"boxes: expected boxes .* inside the image of 40 x 50"):
        view_specs(40, 50, torch.from_numpy(box[None]), 16)
