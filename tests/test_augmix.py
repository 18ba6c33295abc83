"""AugMix against Pillow's own operations, bit for bit; its draws against NumPy's; the published code's answers."""

import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_views import noise, normalise, random_boxes
from torchvision import transforms

from tpt_fast import TuneConfig, make_views
from tpt_fast._checks import check_size
from tpt_fast.ops import augmix
from tpt_fast.reference.augmix import AFFINE, NOTHING, POSTERIZE, SOLARIZE
from tpt_fast.reference.augmix import augmix as reference
from tpt_fast.reference.views import patches
from tpt_fast.views.augmix import OPERATIONS, AugMix, augmix_steps, draw_augmix
from tpt_fast.views.make import CLIP_MEAN, CLIP_STD, normalisation_table

pytestmark = pytest.mark.numerics

PLAIN = normalisation_table((0.0,) * 3, (1 / 255,) * 3)  # bytes again, once they are rounded


def by_pillow(picture, operation, level, negative):
    """One published operation on a picture, whose thirds are the most that it is moved by."""

    def signed(value):
        return -value if negative else value

    def affine(*matrix):
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)

    level = np.nan_to_num(level)  # of an operation that has none
    shear = signed(level * 0.3 / 10)
    right, down = (signed(int(level * (side / 3) / 10)) for side in picture.size)
    return {
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "posterize": lambda: ImageOps.posterize(picture, 4 - int(level * 4 / 10)),
        "rotate": lambda: picture.rotate(signed(int(level * 30 / 10)), resample=Image.Resampling.BILINEAR),
        "solarize": lambda: ImageOps.solarize(picture, 256 - int(level * 256 / 10)),
        "shear_x": lambda: affine(1, shear, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, shear, 1, 0),
        "translate_x": lambda: affine(1, 0, right, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, down),
    }[operation]()


def mixed_by_pillow(crop, draws, view):
    """[3, H, W]: what the published code makes of a crop uint8 [H, W, 3] and the draws of one view."""
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)])
    picture = Image.fromarray(crop)
    mixture = torch.zeros(3, *crop.shape[:2])
    for chain in range(3):
        changed = picture.copy()
        for operation, level, sign in zip(*(each[view, chain] for each in draws[1:]), strict=True):
            if operation >= 0:
                changed = by_pillow(changed, OPERATIONS[operation], level, sign > 0.5)
        mixture += draws.weights[view, 1 + chain] * to_tensor(changed)
    own = draws.weights[view, 0]
    return own * to_tensor(picture) + (1 - own) * mixture


def crops_of(size, n, seed=0, contrast=1.0):
    """uint8 [n, 3, S, S] or, of a pair, [n, 3, H, W]: smooth ones, as crops are; noise; few levels; one colour."""
    made, (height, width) = [], check_size("size", size)
    for i in range(n):
        pixels = noise(height, width, seed + i, contrast)
        if i % 4 == 0:
            small = Image.fromarray(noise(3, 3, seed + i, 3.0).numpy())
            pixels = torch.from_numpy(np.array(small.resize((width, height), Image.Resampling.BICUBIC)))
        elif i % 4 == 2:
            pixels = pixels // 60 * 40 + 17
        elif i % 4 == 3:
            pixels = pixels[:1, :1].expand(height, width, 3)
        made.append(pixels.permute(2, 0, 1))
    return torch.stack(made).contiguous()


def one_step(kind, values=()):
    """``steps``, ``parameters`` and ``weights`` of one view whose first chain is this step and nothing else of it."""
    steps, parameters = torch.zeros(1, 3, 1, dtype=torch.int32), torch.zeros(1, 3, 1, 6, dtype=torch.float64)
    steps[0, 0, 0] = kind
    parameters[0, 0, 0, : len(values)] = torch.tensor(values, dtype=torch.float64)
    return steps, parameters, torch.tensor([[0.0, 1.0, 0.0, 0.0]])


@pytest.mark.parametrize("size", [1, 2, 7, 33, 64, 224, (9, 40), (50, 3)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_equals_pillows(operation, size):
    rng = np.random.default_rng(size)
    for crop in crops_of(size, 4, seed=9):
        for level, sign in zip(rng.uniform(0.1, 1.0, 3), (0.2, 0.5, 0.9), strict=True):
            operations = np.full((1, 3, 3), -1)
            operations[0, 0, 0] = OPERATIONS.index(operation)
            draws = AugMix(np.array([[0, 1, 0, 0]], np.float32), operations, *np.full((2, 1, 3, 3), [level, 0, 0]))
            draws.sign[0, 0, 0] = sign
            steps, parameters, weights = (each[1:] for each in augmix_steps(draws, size))
            got = augmix(crop[None], steps, parameters, weights, PLAIN)[0].round().byte().permute(1, 2, 0)
            picture = Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
            want = by_pillow(picture, operation, level, sign > 0.5)
            assert torch.equal(got, torch.from_numpy(np.array(want)))


@pytest.mark.parametrize("size", [5, 48, 224, (30, 7), (64, 128)])
@pytest.mark.parametrize("patch", [None, 1])
def test_mixtures_equal_the_published_pipeline_and_the_reference(size, patch):
    crops, draws = crops_of(size, 7, seed=1), draw_augmix(6, seed=5)
    steps, parameters, weights = augmix_steps(draws, size)
    table = normalisation_table()
    got = augmix(crops, steps, parameters, weights, table, patch=patch)
    expected = torch.empty_like(got)
    reference(crops, steps, parameters, weights, table, expected, patch)
    assert torch.equal(got, expected)
    if patch is None:
        pixels = crops.permute(0, 2, 3, 1).numpy()
        assert torch.equal(got[0], normalise(crops[:1])[0])
        for view in range(6):
            assert torch.equal(got[1 + view], mixed_by_pillow(pixels[1 + view], draws, view))


@pytest.mark.parametrize(
    "matrix",
    [
        (0.7, 0.7, -10, -0.7, 0.7, 20), (-1, 0, 33, 0, -1, 33), (3, 0, 0, 0, 0.2, 5), (0, 1, 0, 1, 0, 0),
        (1, 0, 1e9, 0, 1, 0), (1, 0, -0.5, 0, 1, 0.5), (0, 0, 1e-300, 0, 0, 32.999), (1, 0, np.nan, 0, 1, 0),
        (np.inf, 0, 0, 0, 1, 0), (1, 0, 1e300, 0, 1, -1e300),
    ],
)  # fmt: skip
def test_any_affine_step_equals_pillows_and_the_reference(matrix):
    crop, table = crops_of(33, 2)[1:], normalisation_table()
    call = crop, *one_step(AFFINE, matrix), table
    expected = torch.empty(1, 3, 33, 33)
    reference(*call, expected)
    assert torch.equal(augmix(*call), expected)
    if np.isfinite(matrix).all() and max(map(abs, matrix)) < 1e6:
        picture = Image.fromarray(crop[0].permute(1, 2, 0).contiguous().numpy())
        turned = picture.transform((33, 33), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)
        assert torch.equal(expected[0], normalise(torch.from_numpy(np.array(turned)).permute(2, 0, 1)[None])[0])


def test_long_chains_and_their_order():
    crops = crops_of(40, 3, seed=5)
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(0, 6, (3, 3, 9), generator=generator, dtype=torch.int32)
    parameters = torch.zeros(3, 3, 9, 6, dtype=torch.float64)
    parameters[steps == POSTERIZE] = torch.tensor([5.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    parameters[steps == SOLARIZE] = torch.tensor([100.5, 0, 0, 0, 0, 0], dtype=torch.float64)
    parameters[steps == AFFINE] = torch.tensor([0.99, 0.02, 1.0, -0.01, 1.01, -2.0], dtype=torch.float64)
    call = parameters, torch.rand(3, 4, generator=generator), normalisation_table()
    expected = torch.empty(3, 3, 40, 40)
    reference(crops, steps, *call, expected)
    assert torch.equal(augmix(crops, steps, *call), expected)
    assert not torch.equal(augmix(crops, steps.flip(2), parameters.flip(2), *call[1:]), expected)
    assert augmix(crops[:0], steps[:0], parameters[:0], call[1][:0], call[2]).shape == (0, 3, 40, 40)
    nothing = augmix(crops, steps[:, :, :0], parameters[:, :, :0], torch.tensor([[1.0, 0, 0, 0]] * 3), call[2])
    assert torch.equal(nothing, normalise(crops))


@pytest.mark.parametrize("bits", [0, 1, 8, 3.9])
def test_bits_of_posterize(bits):
    crop = crops_of(20, 2)[1:]
    got = augmix(crop, *one_step(POSTERIZE, (bits,)), PLAIN).round().byte()
    assert torch.equal(got, crop & (0xFF00 >> int(bits) & 0xFF))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("patch", [None, 8])
def test_half_types_are_rounded_float32(dtype, patch):
    call = crops_of(24, 4), *augmix_steps(draw_augmix(3), 24), normalisation_table()
    assert torch.equal(augmix(*call, dtype, patch), augmix(*call, patch=patch).to(dtype))


@pytest.mark.host
def test_threads_do_not_change_the_result(threads):
    call = crops_of(224, 9), *augmix_steps(draw_augmix(8), 224), normalisation_table()
    expected = augmix(*call)
    for n in (2, 3):
        threads(n)
        assert torch.equal(augmix(*call), expected)


@pytest.mark.host
def test_opcheck():
    call = [crops_of(8, 2), *augmix_steps(draw_augmix(1), 8), normalisation_table()]
    for patch, shape in ((None, (2, 3, 8, 8)), (4, (2, 4, 48))):
        torch.library.opcheck(torch.ops.tpt_fast.augmix, (*call, torch.empty(shape), patch))


# Drawing, and views of a whole photograph


@pytest.mark.host
def test_draws_are_numpys():
    np.random.seed(11)
    weights, own = np.float32(np.random.dirichlet([1.0] * 3)), np.float32(np.random.beta(1.0, 1.0))
    np.random.seed(11)
    before = np.random.get_state()[2]
    global_draws, seeded = draw_augmix(5, seed=None), draw_augmix(5, seed=11)
    assert np.random.get_state()[2] != before
    for one, other in zip(global_draws, seeded, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (seeded.weights[0] == [own, *weights]).all()
    assert (seeded.operation[:, :, 0] >= 0).all()
    assert np.isnan(seeded.level).sum() == np.isin(seeded.operation, [-1, 0, 1]).sum()
    assert not np.array_equal(seeded.weights, draw_augmix(5, seed=2**32 + 11).weights)
    assert len(draw_augmix(0).weights) == 0


def test_views_of_a_photograph():
    image, boxes = noise(60, 80, contrast=3.0), random_boxes(60, 80, 3)
    crops = make_views(image, size=32, boxes=boxes, mean=(0.0,) * 3, std=(1 / 255,) * 3).round().byte()
    expected = augmix(crops, *augmix_steps(draw_augmix(3, seed=4), 32), normalisation_table())
    assert torch.equal(make_views(image, size=32, seed=4, boxes=boxes, views="augmix"), expected)
    assert torch.equal(make_views(image, size=32, boxes=boxes, views=draw_augmix(3, seed=4)), expected)
    assert torch.equal(expected[0], make_views(image, size=32, boxes=boxes)[0])
    cut = make_views(image, size=32, seed=4, boxes=boxes, views="augmix", patch=8, dtype=torch.float16)
    assert torch.equal(cut, patches(expected, 8, 8).half())
    drawn = make_views(image, 4, 32, seed=4, views="augmix")
    torch.manual_seed(4)
    np.random.seed(4)
    assert torch.equal(make_views(image, 4, 32, seed=None, views="augmix"), drawn)
    assert not torch.equal(make_views(image, 4, 32, seed=5, views="augmix")[1:], drawn[1:])


def golden(golden_dir, name):
    file = golden_dir / "methods" / "augmix" / f"{name}.npz"
    if not file.is_file():
        pytest.skip("no golden answers of AugMix")
    return np.load(file)


@pytest.mark.parametrize("case", ["augmix_1", "augmix_2", "augmix_3"])
def test_published_views(golden_dir, case):
    """The published code with the same seeds: its crops, its draws, its views, and the generators' next numbers."""
    found = golden(golden_dir, case)
    n, size, stride = len(found["m"]), found["crop"].shape[1], int(found["view_stride"])
    draws = draw_augmix(n, seed=int(found["numpy_seed"]))
    assert (draws.weights == np.concatenate([found["m"][:, None], found["weights"]], 1)).all()
    assert ((draws.operation >= 0).sum(2) == found["depth"]).all()
    applied = draws.operation >= 0
    for name, of in (("op", "operation"), ("level", "level"), ("sign", "sign")):
        np.testing.assert_array_equal(getattr(draws, of)[applied], found[name])
    torch.manual_seed(int(found["torch_seed"]))
    np.random.seed(int(found["numpy_seed"]))
    views = make_views(found["photo"], n + 1, size, seed=None, views="augmix", order="pillow-13")[1:]
    assert torch.equal(views[:, :, ::stride, ::stride], torch.from_numpy(found["views"]))
    assert np.random.random() == found["next_numpy_random"]
    assert torch.rand(1).item() == found["next_torch_rand"]
    ends = np.random.default_rng(0).integers(0, 3, n)  # one chain of each view by itself
    weights = np.zeros((n, 4), np.float32)
    weights[np.arange(n), 1 + ends] = 1
    crops = torch.from_numpy(found["crop"]).permute(0, 3, 1, 2).contiguous()
    steps, parameters, alone = (each[1:] for each in augmix_steps(draws._replace(weights=weights), size))
    got = augmix(crops, steps, parameters, alone, PLAIN).round().byte().permute(0, 2, 3, 1)
    assert torch.equal(got, torch.from_numpy(found["chain"][np.arange(n), ends]))


def test_published_operations(golden_dir):
    found = golden(golden_dir, "augmix_ops")
    images = np.stack([found["image_photo"], found["image_few_levels"]])[found["image"]]
    rows = len(images)
    operation, level, sign = np.full((rows, 3, 3), -1), *np.zeros((2, rows, 3, 3))
    operation[:, 0, 0], level[:, 0, 0], sign[:, 0, 0] = found["op"], found["level"], found["sign"]
    weights = np.tile(np.array([0, 1, 0, 0], np.float32), (rows, 1))
    steps, parameters, weights = (each[1:] for each in augmix_steps(AugMix(weights, operation, level, sign), 64))
    crops = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    got = augmix(crops, steps, parameters, weights, PLAIN).round().byte().permute(0, 2, 3, 1)
    assert torch.equal(got, torch.from_numpy(found["output"]))


# Messages

CALL = dict(zip(("steps", "parameters", "weights"), one_step(NOTHING), strict=True))
CALL |= {"crops": torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "table": normalisation_table()}


@pytest.mark.host
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"crops": CALL["crops"].float()}, TypeError, "crops: expected torch.uint8, got torch.float32"),
        ({"crops": CALL["crops"][:, :2]}, ValueError, "crops: expected shape [N, 3, H, W], got [1, 2, 4, 4]"),
        ({"crops": CALL["crops"][:, :, :0]}, ValueError, "crops: expected 1 to 32768 pixels a side, got 0 x 4"),
        ({"steps": CALL["steps"].long()}, TypeError, "steps: expected torch.int32, got torch.int64"),
        ({"steps": CALL["steps"][:, :2]}, ValueError, "steps: expected shape [1, 3, D], got [1, 2, 1]"),
        ({"parameters": CALL["parameters"].float()}, TypeError, "parameters: expected torch.float64"),
        ({"parameters": CALL["parameters"][..., :5]}, ValueError, "parameters: expected shape [1, 3, 1, 6]"),
        ({"weights": torch.zeros(1, 3)}, ValueError, "weights: expected shape [1, 4], got [1, 3]"),
        ({"table": torch.zeros(3, 255)}, ValueError, "table: expected shape [3, 256], got [3, 255]"),
        ({"dtype": torch.float64}, TypeError, "dtype: expected torch.float32 or torch.float16 or torch.bfloat16"),
        ({"patch": 3}, ValueError, "patch: expected a divisor of the size 4, got 3"),
    ],
)
def test_arguments_of_another_kind(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        augmix(**CALL | arguments)


@pytest.mark.host
@pytest.mark.parametrize("op", [augmix, reference], ids=["op", "reference"])
@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (6, (), "steps: expected 0 to 5, got 6 in step 0 of chain 0 of view 0"),
        (-1, (), "steps: expected 0 to 5, got -1"),
        (POSTERIZE, (9,), "parameters: expected 0 to 8 bits to posterize to, got 9 in step 0 of chain 0 of view 0"),
        (POSTERIZE, (np.nan,), "parameters: expected 0 to 8 bits to posterize to, got "),
    ],
)
def test_steps_out_of_range(op, kind, values, message):
    out = [] if op is augmix else [torch.empty(1, 3, 4, 4)]
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        op(CALL["crops"], *one_step(kind, values), CALL["table"], *out)


@pytest.mark.host
def test_messages_of_draws():
    image, draws = noise(8, 8), draw_augmix(2)
    for views, error, message in (
        ("mixup", ValueError, "views: expected one of crops, augmix, got 'mixup'"),
        (draws, ValueError, "views: expected draws of AugMix for 3 views, got 2"),
        (
            draw_augmix(3)._replace(level=np.full((3, 3, 3), 1.5)),
            ValueError,
            "augmix.level: expected numbers from 0 to 1",
        ),
        (draw_augmix(3)._replace(operation=np.full((3, 3, 3), 9)), ValueError, "augmix.operation: expected -1 to 8"),
        (draw_augmix(3)._replace(sign=np.zeros((3, 3))), ValueError, "augmix.sign: expected floating point [3, 3, 3]"),
        (
            draw_augmix(3)._replace(weights=np.full((3, 4), 2.0)),
            ValueError,
            "augmix.weights: expected numbers from 0 to",
        ),
    ):
        with pytest.raises(error, match=re.escape(message)):
            make_views(image, 4, 8, views=views)
    with pytest.raises(ValueError, match="generator: expected None with views='augmix'"):
        make_views(image, 4, 8, views="augmix", generator=torch.Generator())
    with pytest.raises(ValueError, match="views: expected one of crops, augmix, got 'mixup'"):
        TuneConfig(views="mixup")
    with pytest.raises(ValueError, match="n: expected 0 or more, got -1"):
        draw_augmix(-1)
