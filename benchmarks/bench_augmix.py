"""From a photograph in memory to 63 of AugMix's views: the published pipeline of PIL operations, and ours.

Both draw as their users have it, ours from the same generators. Pixels are checked against each other first.
"""

import numpy as np
import pytest
import torch
from bench_views import PHOTO, SIZE, VIEWS
from PIL import Image, ImageOps
from timing import DEVICE, measure
from torchvision import transforms

from tpt_fast.views.decode import load_image
from tpt_fast.views.make import CLIP_MEAN, CLIP_STD, make_views

CROP = transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()])
NORMALISE = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)])


def level():
    return np.random.uniform(0.1, 1.0)


def signed(value):
    return -value if np.random.uniform() > 0.5 else value


def affine(image, matrix):
    return image.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)


OPERATIONS = (
    ImageOps.autocontrast,
    ImageOps.equalize,
    lambda image: ImageOps.posterize(image, 4 - int(level() * 4 / 10)),
    lambda image: image.rotate(signed(int(level() * 30 / 10)), resample=Image.Resampling.BILINEAR),
    lambda image: ImageOps.solarize(image, 256 - int(level() * 256 / 10)),
    lambda image: affine(image, (1, signed(level() * 0.3 / 10), 0, 0, 1, 0)),
    lambda image: affine(image, (1, 0, 0, signed(level() * 0.3 / 10), 1, 0)),
    lambda image: affine(image, (1, 0, signed(int(level() * (SIZE / 3) / 10)), 0, 1, 0)),
    lambda image: affine(image, (1, 0, 0, 0, 1, signed(int(level() * (SIZE / 3) / 10)))),
)


def published_view():
    crop = CROP(PHOTO)
    plain = NORMALISE(crop)
    weights = np.float32(np.random.dirichlet([1.0, 1.0, 1.0]))
    own = np.float32(np.random.beta(1.0, 1.0))
    mixture = torch.zeros_like(plain)
    for weight in weights:
        image = crop.copy()
        for _ in range(np.random.randint(1, 4)):
            image = np.random.choice(OPERATIONS)(image)
        mixture += weight * NORMALISE(image)
    return own * plain + (1 - own) * mixture


def published():
    return lambda: torch.stack([published_view() for _ in range(VIEWS)])


def tpt_fast():
    pixels = load_image(PHOTO).to(DEVICE)
    return lambda: make_views(pixels, VIEWS + 1, SIZE, seed=None, views="augmix")[1:]  # the plain view comes on top


BACKENDS = {"tpt_fast": tpt_fast, "PIL as published": published}


def test_pixels_are_the_published_ones():
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.stack([published_view() for _ in range(4)])
    assert torch.equal(make_views(PHOTO, 5, SIZE, seed=3, views="augmix")[1:], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_augmix(benchmark, backend):
    run = BACKENDS[backend]()
    assert run().shape == (VIEWS, 3, SIZE, SIZE)
    benchmark.extra_info.update(op="augmix", case=f"{VIEWS} of 500x375 at {SIZE}", backend=backend)
    measure(benchmark, run, rounds=15 if backend == "tpt_fast" else 7, warmup_rounds=1)
