"""From a photograph in memory to 63 normalised random views: Pillow as published, torchvision v2 and kornia on tensors.

Every peer draws its own crops, as its users do; ours draws them too, but for "boxes given", which is the op by itself.
Only the published pipeline's pixels are also checked, since the tensor ones round differently. On a GPU the photograph
lies there already, but for PIL.
"""

import pytest
import torch
from PIL import Image
from timing import DEVICE, measure
from torchvision import transforms
from torchvision.transforms import v2

from tpt_fast import make_views
from tpt_fast.demo import PHOTO_FOLDER
from tpt_fast.ops import views
from tpt_fast.reference.views import patches
from tpt_fast.views.crops import draw_boxes, view_specs
from tpt_fast.views.decode import load_image
from tpt_fast.views.make import CLIP_MEAN, CLIP_STD, normalisation_table

VIEWS, SIZE = 63, 224
PHOTO = Image.open(PHOTO_FOLDER / "temple.jpg").convert("RGB").resize((500, 375))


def tpt_fast():
    pixels = load_image(PHOTO).to(DEVICE)
    return lambda: make_views(pixels, VIEWS + 1, SIZE, seed=None)[1:]  # the plain view comes on top


def boxes_given():
    pixels, table = load_image(PHOTO).to(DEVICE), normalisation_table(device=DEVICE)
    specs = view_specs(375, 500, draw_boxes(375, 500, VIEWS), SIZE).to(DEVICE)
    return lambda: views(pixels, specs, table, SIZE)[1:]


def published():
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)])
    augment = transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()])
    return lambda: torch.stack([normalise(augment(PHOTO)) for _ in range(VIEWS)])


def torchvision_v2():
    pixels = load_image(PHOTO).to(DEVICE).permute(2, 0, 1).contiguous()
    crop = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])
    finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(CLIP_MEAN, CLIP_STD)])
    return lambda: finish(torch.stack([crop(pixels) for _ in range(VIEWS)]))


def with_kornia(mode):
    kornia = pytest.importorskip("kornia.augmentation")
    pixels = load_image(PHOTO).to(DEVICE).permute(2, 0, 1).contiguous()[None]
    augment = torch.nn.Sequential(
        kornia.RandomResizedCrop((SIZE, SIZE), cropping_mode=mode),
        kornia.RandomHorizontalFlip(),
        kornia.Normalize(torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)),
    ).to(DEVICE)
    return lambda: augment((pixels.float() / 255).expand(VIEWS, -1, -1, -1))


BACKENDS = {
    "tpt_fast": tpt_fast,
    "tpt_fast, boxes given": boxes_given,
    "PIL as published": published,
    "torchvision v2": torchvision_v2,
    "kornia slice": lambda: with_kornia("slice"),
    "kornia resample": lambda: with_kornia("resample"),
}


def test_pixels_are_the_published_ones():
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)])
    boxes = draw_boxes(375, 500, 4, seed=1)
    for box, view in zip(boxes.tolist(), make_views(PHOTO, size=SIZE, boxes=boxes)[1:], strict=True):
        crop = transforms.functional.resized_crop(PHOTO, *box[:4], [SIZE, SIZE])
        assert torch.equal(view, normalise(transforms.functional.hflip(crop) if box[4] else crop))


@pytest.mark.parametrize("backend", ["tpt_fast", "cut by PyTorch"])
def test_patches(benchmark, backend):
    """The rows of a vision transformer's first matrix product, written at once or cut from the views."""
    pixels = load_image(PHOTO).to(DEVICE)
    run = {
        "tpt_fast": lambda: make_views(pixels, VIEWS + 1, SIZE, patch=16),
        "cut by PyTorch": lambda: patches(make_views(pixels, VIEWS + 1, SIZE), 16, 16),
    }[backend]
    assert run().shape == (VIEWS + 1, (SIZE // 16) ** 2, 3 * 16**2)
    benchmark.extra_info.update(op="views", case=f"{VIEWS + 1} in patches of 16", backend=backend)
    measure(benchmark, run, rounds=15, warmup_rounds=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views(benchmark, backend):
    run = BACKENDS[backend]()
    assert run().shape == (VIEWS, 3, SIZE, SIZE)
    benchmark.extra_info.update(op="views", case=f"{VIEWS} of 500x375 at {SIZE}", backend=backend)
    # The photograph, and the views that are written: the plain one comes on top.
    moved = 3 * (500 * 375 + 4 * (VIEWS + 1) * SIZE**2) if backend.startswith("tpt_fast") else 0
    measure(benchmark, run, rounds=15, warmup_rounds=3, moved=moved)
