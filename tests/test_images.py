"""Whatever holds a picture becomes the bytes that the published loader would see, or a message says why not."""

import io
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from tpt_fast.views.decode import DECODERS, load_image

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8))


def jpeg(size=(64, 48), **options):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
        buffer, "JPEG", **options
    )
    return buffer.getvalue()


@pytest.mark.parametrize("as_path", [str, lambda path: path], ids=["str", "Path"])
def test_paths(tmp_path, as_path):
    path = tmp_path / "picture.png"
    Image.fromarray(PIXELS.numpy()).save(path)
    assert torch.equal(load_image(as_path(path)), PIXELS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "F"])
def test_pil_modes_equal_convert_rgb(mode):
    if mode == "I;16":
        picture = Image.fromarray(np.arange(30, dtype=np.uint16).reshape(6, 5) * 9)
    else:
        picture = Image.fromarray(PIXELS.numpy()).convert(mode)
    assert torch.equal(load_image(picture), torch.from_numpy(np.array(picture.convert("RGB"))))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_files_of_other_modes(tmp_path, mode):
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    picture = Image.fromarray(PIXELS.numpy()).convert(mode)
    picture.save(path)
    assert torch.equal(load_image(path), torch.from_numpy(np.array(picture.convert("RGB"))))


def test_exif_orientation_is_left_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    path.write_bytes(jpeg(exif=exif))
    assert load_image(path).shape == (48, 64, 3)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_torchvision_decodes_jpeg_files(tmp_path, options):
    path = tmp_path / "picture.jpg"
    path.write_bytes(jpeg(**options))
    got = load_image(path, "torchvision")
    assert (got.dtype, got.shape, got.is_contiguous()) == (torch.uint8, (48, 64, 3), True)
    assert torch.equal(got, decode_jpeg(read_file(str(path)), ImageReadMode.RGB).permute(1, 2, 0))
    assert (got.float() - load_image(path)).abs().mean() < 2  # they round differently


def test_what_torchvision_cannot_decode_pillow_does(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(PIXELS.numpy()).save(path)
    assert torch.equal(load_image(path, "torchvision"), PIXELS)
    path = tmp_path / "grey.jpg"
    Image.fromarray(PIXELS.numpy()[..., 0]).save(path, quality=100)
    assert load_image(path, "torchvision").shape == (6, 5, 3)
    path.write_bytes(jpeg()[:900])
    with pytest.raises(ValueError, match=r"image: .*grey\.jpg is damaged or truncated"):
        load_image(path, "torchvision")
    with pytest.raises(FileNotFoundError, match="image: cannot read"):
        load_image(tmp_path / "nowhere.jpg", "torchvision")
    assert torch.equal(load_image(PIXELS, "torchvision"), PIXELS)


def test_a_decoder_that_is_missing_or_unknown(tmp_path, monkeypatch):
    path = tmp_path / "picture.jpg"
    path.write_bytes(jpeg())
    with pytest.raises(ValueError, match="decoder: expected one of pillow, torchvision, got 'nvjpeg'"):
        load_image(path, "nvjpeg")
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    with pytest.raises(ImportError, match=r"decoder: 'torchvision' needs torchvision\.io\.decode_jpeg"):
        load_image(path, "torchvision")


@pytest.mark.parametrize("kind", [torch.Tensor.numpy, lambda x: x], ids=["array", "tensor"])
def test_layouts(kind):
    assert torch.equal(load_image(kind(PIXELS)), PIXELS)
    assert torch.equal(load_image(kind(PIXELS.permute(2, 0, 1))), PIXELS)
    assert torch.equal(load_image(kind(PIXELS[..., 0])), PIXELS[..., :1].expand(-1, -1, 3))
    assert torch.equal(load_image(kind(PIXELS[:, ::2])), PIXELS[:, ::2])
    assert load_image(kind(PIXELS[:3])).shape == (3, 5, 3)  # the last dimension is the colour


def test_odd_arrays():
    array = PIXELS.numpy()
    assert torch.equal(load_image(array[::-1, ::-1]), PIXELS.flip(0, 1))
    frozen = array.copy()
    frozen.setflags(write=False)
    assert torch.equal(load_image(frozen), PIXELS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float_tensors_are_rounded(dtype):
    scaled = (PIXELS.double() / 255).to(dtype)
    expected = (scaled.double() * 255).round().to(torch.uint8)
    assert (load_image(scaled).int() - expected.int()).abs().max() <= (dtype != torch.float64)
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(load_image(scaled), PIXELS)
        assert torch.equal(load_image(scaled.permute(2, 0, 1).numpy()), PIXELS)


def test_result_is_contiguous_bytes():
    for image in (PIXELS.permute(2, 0, 1), PIXELS[..., 0], PIXELS.float() / 255, PIXELS.numpy()[:, ::-1]):
        got = load_image(image)
        assert got.dtype == torch.uint8
        assert got.is_contiguous()


# Messages


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image: cannot read .*absent\.jpg: No such file"):
        load_image(tmp_path / "absent.jpg")


def test_folder(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"image: cannot read .*: Is a directory"):
        load_image(tmp_path)


def test_unreadable_file(tmp_path, ordinary_user):
    path = tmp_path / "secret.jpg"
    path.write_bytes(jpeg())
    path.chmod(0)
    with pytest.raises(PermissionError, match=r"image: cannot read .*: Permission denied"):
        load_image(path)


def test_empty_file(tmp_path):
    path = tmp_path / "empty.jpg"
    path.touch()
    with pytest.raises(ValueError, match=r"image: .*empty\.jpg is an empty file"):
        load_image(path)


def test_not_an_image(tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("this is no picture")
    with pytest.raises(ValueError, match=r"image: .*notes\.jpg is not an image that Pillow can read"):
        load_image(path)


@pytest.mark.parametrize("part", [0.4, 0.7, 0.95])
def test_truncated_jpeg(tmp_path, part):
    data, path = jpeg(), tmp_path / "cut.jpg"
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match=r"image: .*cut\.jpg is damaged or truncated \(.*truncated"):
        load_image(path)


def test_damaged_png(tmp_path):
    path = tmp_path / "damaged.png"
    buffer = io.BytesIO()
    Image.fromarray(PIXELS.numpy()).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[45:60] = bytes(15)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"image: .*damaged\.png is damaged or truncated"):
        load_image(path)


def test_decoders_may_raise_anything(tmp_path, monkeypatch):
    path = tmp_path / "odd.dds"
    path.write_bytes(b"DDS " + (124).to_bytes(4, "little") + bytes(120))  # NotImplementedError as it is opened
    with pytest.raises(ValueError, match=r"image: .*odd\.dds is damaged or truncated \(Unknown pixel format"):
        load_image(path)

    def load(_image):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    path.write_bytes(jpeg())
    with pytest.raises(ValueError, match=r"image: .*odd\.dds is damaged or truncated \(MemoryError\)"):
        load_image(path)
    with pytest.raises(ValueError, match=r"image: the PIL image is damaged or truncated \(MemoryError\)"):
        load_image(Image.open(path))


@pytest.mark.parametrize("decoder", DECODERS)
def test_no_regular_file(decoder):
    with pytest.raises(ValueError, match="image: /dev/null is not a regular file"):
        load_image("/dev/null", decoder)


def test_picture_too_large_for_pillow(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("RGB", (64, 64)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"image: .* is too large \(.*4096 pixels.* limit of 200 pixels\)"):
        load_image(path)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (7, TypeError, "image: expected a path, a PIL image, an array or a tensor, got int"),
        (PIXELS.int(), TypeError, "image: expected uint8 or floating point, got torch.int32"),
        (PIXELS.numpy().astype(np.int64), TypeError, "image: expected uint8 or floating point, got int64"),
        (torch.zeros(6, 5, 4).byte(), ValueError, "image: expected [H, W, 3], [3, H, W] or grey [H, W], got [6, 5, 4]"),
        (torch.zeros(1, 6, 5), ValueError, "image: expected [H, W, 3], [3, H, W] or grey [H, W], got [1, 6, 5]"),
        (torch.zeros(2, 3, 6, 5), ValueError, "image: expected [H, W, 3], [3, H, W] or grey [H, W], got [2, 3, 6, 5]"),
        (np.zeros(3, np.uint8), ValueError, "image: expected [H, W, 3], [3, H, W] or grey [H, W], got [3]"),
        (torch.zeros(0, 5, 3), ValueError, "image: expected at least one pixel, got 0 x 5 (height x width)"),
        (np.zeros((4, 0), np.uint8), ValueError, "image: expected at least one pixel, got 4 x 0 (height x width)"),
        (Image.new("RGB", (0, 4)), ValueError, "image: expected at least one pixel, got 4 x 0 (height x width)"),
        (255 * torch.eye(4), ValueError, "image: expected floating point values in [0, 1], got 0 to 255"),
        (torch.full((4, 4, 3), -0.5), ValueError, "image: expected floating point values in [0, 1], got -0.5 to -0.5"),
        (torch.full((4, 4), torch.nan), ValueError, "image: expected floating point values in [0, 1], got nan to nan"),
        (np.full((4, 4), np.inf), ValueError, "image: expected floating point values in [0, 1], got inf to inf"),
    ],
)  # fmt: skip
def test_messages(image, error, message):
    with pytest.raises(error, match=re.escape(message)):
        load_image(image)
