"""Whatever holds a picture becomes the bytes that the published loader would see, or a message says why not."""

import io
import re
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageFile
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from tpt_fast.views.crops import draw_specs
from tpt_fast.views.decode import DECODERS, endings, load_image
from tpt_fast.views.make import make_views

SHAPES = "image: expected [H, W, C] or [C, H, W] of 1 (grey), 3 or 4 (RGBA) channels, or grey [H, W]"
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


def test_eps_is_not_handed_to_ghostscript(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    path = tmp_path / "photo.jpg"
    Image.fromarray(PIXELS.numpy()).save(path, "EPS")
    assert Image.open(path).format == "EPS"
    for image in (path, path.read_bytes()):
        with pytest.raises(ValueError, match=r"is in none of the formats that are read: .*JPEG, JPEG2000"):
            load_image(image)


@pytest.mark.parametrize("name", ["a.jfif", "a.pgm", "a.tga", "a.jp2", "a.avif", "a.webp", "a.tiff", "a.ico", "a.qoi"])
def test_formats_of_photographs(tmp_path, name):
    if name.removeprefix("a") not in Image.registered_extensions():
        pytest.skip("this Pillow does not know it")
    path = tmp_path / name
    picture = Image.fromarray(np.zeros((16, 16, 3), np.uint8) + np.uint8(200))
    try:
        picture.convert("L" if name == "a.pgm" else "RGB").save(path)
    except (OSError, KeyError) as error:  # it was built without
        pytest.skip(str(error))
    assert path.suffix in endings()
    assert (load_image(path.read_bytes()).int() - 200).abs().max() <= 3


def test_endings_are_of_photographs_alone():
    assert endings() >= {".jpg", ".jpeg", ".png", ".pgm", ".tiff", ".jfif"}
    assert not endings() & {".eps", ".ps", ".pdf", ".psd", ".wmf", ".mpg", ".h5", ".txt"}


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_files_of_other_modes(tmp_path, mode):
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    picture = Image.fromarray(PIXELS.numpy()).convert(mode)
    picture.save(path)
    assert torch.equal(load_image(path), torch.from_numpy(np.array(picture.convert("RGB"))))


@pytest.mark.parametrize("decoder", DECODERS)
def test_content_of_files(tmp_path, decoder):
    path = tmp_path / "with space.jpg"
    path.write_bytes(b"before" + jpeg())
    expected = load_image(io.BytesIO(jpeg()), decoder)
    assert expected.shape == (48, 64, 3)
    for encoded in (jpeg(), bytearray(jpeg()), memoryview(jpeg())):
        assert torch.equal(load_image(encoded, decoder), expected)
    with open(path, "rb") as file:
        file.seek(6)  # a file object is read from where it is
        assert torch.equal(load_image(file, decoder), expected)
    path.write_bytes(jpeg())
    for url in (path.as_uri(), path.as_uri().replace("file://", "file:"), path.as_uri().replace("///", "//localhost/")):
        assert "%20" in url
        assert torch.equal(load_image(url, decoder), expected)


@pytest.mark.parametrize("scale", [9, 1000])
def test_values_that_clip(tmp_path, scale):
    """A camera's sixteen bits become white all over, as in the published code: with a warning that names the image."""
    path = tmp_path / "deep.png"
    Image.fromarray((np.arange(30, dtype=np.uint16).reshape(6, 5) + 1) * scale).save(path)
    with pytest.warns(UserWarning, match=rf"image: .*deep\.png holds values from {scale} to {30 * scale}, which clip"):
        pixels = load_image(path)
    assert pixels.float().std() == 0 or scale == 9


def test_values_that_become_one_level():
    flat = Image.fromarray(np.linspace(0, 1, 30, dtype=np.float32).reshape(6, 5))
    with pytest.warns(UserWarning, match="image: the PIL image holds values from 0 to 1, which clipped"):
        load_image(flat)
    for image in (PIXELS.double() / 255**3, (PIXELS.double() / 255**3).numpy()):
        with pytest.warns(
            UserWarning, match=r"the (array|tensor) holds values .* become one flat level, 0 of 0\.\.255"
        ):
            load_image(image)


def test_nothing_to_warn_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(PIXELS.float() / 255)
        load_image(torch.zeros(5, 6))
        load_image(Image.new("F", (4, 4), 0.5))
        load_image(Image.fromarray(PIXELS[..., 0].numpy().astype(np.uint16)))


def test_a_sliver_whose_resized_side_is_no_int32():
    for height, width in ((1, 10_000_000), (10_000_000, 1)):
        with pytest.raises(ValueError, match=f"image: {height} x {width} .* is too long and narrow: .*224.*2240000000"):
            make_views(torch.zeros(height, width, 3, dtype=torch.uint8), 2, 224)
    with pytest.raises(ValueError, match=r"image: 1 x 10000000 .* is too long"):
        draw_specs(1, 10_000_000, 2, 224, generator=torch.Generator())


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
    assert torch.equal(load_image(kind(PIXELS[..., :1])), PIXELS[..., :1].expand(-1, -1, 3))
    assert torch.equal(load_image(kind(PIXELS[None, ..., 0])), PIXELS[..., :1].expand(-1, -1, 3))
    rgba = torch.cat([PIXELS, PIXELS[..., :1]], -1)
    assert torch.equal(load_image(kind(rgba)), PIXELS)
    assert torch.equal(load_image(kind(rgba.permute(2, 0, 1))), PIXELS)
    assert load_image(kind(PIXELS.permute(2, 0, 1)[:, :, :4])).shape == (6, 4, 3)
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
    with pytest.raises(ValueError, match=r"image: .*notes\.jpg is in none of the formats that are read: AVIF, BMP"):
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
    path = tmp_path / "odd.jpg"

    def load(_image):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    path.write_bytes(jpeg())
    with pytest.raises(ValueError, match=r"image: .*odd\.jpg is damaged or truncated \(MemoryError\)"):
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
        (7, TypeError, "image: expected a path, bytes, a file object, a PIL image, an array or a tensor, got int"),
        (io.StringIO("text"), TypeError, "image: expected the file object opened in binary mode, got str from it"),
        (b"", ValueError, "image: the bytes object is an empty file"),
        (jpeg()[:900], ValueError, "image: the bytes object is damaged or truncated"),
        ("https://a.org/b.jpg", ValueError, "image: expected a path or the file: URL of a local file, got 'https://a"),
        ("file://far/b.jpg", ValueError, "image: expected a path or the file: URL of a local file, got 'file://far"),
        (PIXELS.int(), TypeError, "image: expected uint8 or floating point, got torch.int32"),
        (PIXELS.numpy().astype(np.int64), TypeError, "image: expected uint8 or floating point, got int64"),
        (torch.zeros(6, 5, 2).byte(), ValueError, f"{SHAPES}, got [6, 5, 2]"),
        (torch.zeros(2, 6, 5), ValueError, f"{SHAPES}, got [2, 6, 5]"),
        (torch.zeros(2, 3, 6, 5), ValueError, f"{SHAPES}, got [2, 3, 6, 5]"),
        (np.zeros(3, np.uint8), ValueError, f"{SHAPES}, got [3]"),
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
