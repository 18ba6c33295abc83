"""Anything that holds one picture -> uint8 [H, W, 3]."""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, cast
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from torch import Tensor

from .._checks import check_choice

if TYPE_CHECKING:
    from PIL.Image import Image

#: What :func:`load_image` takes.
ImageLike: TypeAlias = "str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | Image | np.ndarray | Tensor"
DECODERS = ("pillow", "torchvision")
UNREADABLE = (TypeError, ValueError, OSError)  #: what :func:`load_image` says of an image, and not of the machine

#: The formats that photographs come in, by Pillow's names, and no others: what looks like one may be EPS, which Pillow
#: hands to Ghostscript, a program of its own language. HEIF and JXL where a plugin has registered them.
FORMATS: tuple[str, ...] = ("AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "JXL", "MPO", "PNG", "PPM")
FORMATS += ("QOI", "TIFF", "WEBP", "TGA")  # TGA last, for a file does not begin by saying that it is one
_JPEG = b"\xff\xd8\xff"  # how every JPEG file begins


def load_image(image: ImageLike, decoder: str = "pillow", device: torch.device | str = "cpu") -> Tensor:
    """The picture as bytes, as the published code loads it: converted to RGB, its EXIF orientation not applied.

    Args:
        image: one of

            - a path (``str`` or ``os.PathLike``) or a ``file:`` URL of a file in one of :data:`FORMATS`;
            - such a file's content: bytes, or a file object opened in binary mode, read from where it is;
            - a PIL image of any mode;
            - a NumPy array or a tensor, [H, W, C] or [C, H, W] of 3 channels, 1 (grey) or 4 (RGBA, whose alpha is
              dropped), or [H, W] for grey. Where both ends could be the channels, 3 goes before 1 and 4, and then the
              last dimension before the first: [3, W, 3] is three rows of pixels. uint8 0..255, or floating point in
              [0, 1], which is rounded to the nearest of 256 levels.
        decoder: of JPEG files: "pillow", or "torchvision" on ``device``, which on a GPU is nvJPEG; that rounds
            differently. What torchvision cannot decode, and any other file, Pillow does.
        device: where "torchvision" decodes.

    Returns:
        uint8 [H, W, 3], contiguous, on the tensor's device or where it was decoded. It may share memory with ``image``.

    Warns:
        UserWarning: pixels of other than 8 bits, sixteen or floating point, that are clipped or become one flat level.

    Raises:
        OSError: a path that cannot be read (FileNotFoundError, PermissionError ...).
        ValueError: a path of no regular file, another URL, an empty, truncated, too large or otherwise undecodable
            image or one in another format, a wrong number of channels, no pixels, or floating point outside [0, 1];
            another ``decoder``.
        TypeError: none of the types above.
        ImportError: "torchvision" was asked for and is missing.
    """
    check_choice("decoder", decoder, DECODERS)
    if isinstance(image, (str, os.PathLike)):
        return _from_path(local_path(image), decoder, device)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decoded(io.BytesIO(image), f"the {type(image).__name__} object", decoder, device)
    if isinstance(image, np.ndarray):
        if image.dtype.kind == "f":
            image = image.astype(np.float64 if image.dtype.itemsize > 4 else np.float32)
        elif image.dtype != np.uint8:
            raise TypeError(f"image: expected uint8 or floating point, got {image.dtype}")
        # A copy also where torch would refuse: negative strides, read-only memory.
        return _from_tensor(torch.from_numpy(np.array(image, order="C")), "the array")
    if isinstance(image, Tensor):
        return _from_tensor(image.detach(), "the tensor")
    if hasattr(image, "convert") and hasattr(image, "size"):  # a PIL image; Pillow itself is not imported for others
        return _from_pil(cast("Image", image), "the PIL image")
    if hasattr(image, "read"):
        content, name = image.read(), str(getattr(image, "name", "the file object"))
        if not isinstance(content, bytes):
            raise TypeError(f"image: expected {name} opened in binary mode, got {type(content).__name__} from it")
        return _decoded(io.BytesIO(content), name, decoder, device)
    raise TypeError(
        f"image: expected a path, bytes, a file object, a PIL image, an array or a tensor, got {type(image).__name__}"
    )


def local_path(path: str | os.PathLike) -> Path:
    """``path``, or the one that a ``file:`` URL names.

    Raises:
        ValueError: another URL.
    """
    name = os.fspath(path)
    if not isinstance(name, str) or not re.match(r"file:/|[a-z][a-z0-9+.-]+://", name) or os.path.exists(name):
        return Path(path)
    url = urlsplit(name)
    if url.scheme != "file" or url.netloc not in ("", "localhost"):
        raise ValueError(f"image: expected a path or the file: URL of a local file, got {name!r}")
    return Path(unquote(url.path))


@lru_cache
def endings() -> frozenset[str]:
    """How the names of files in :data:`FORMATS` end, in small letters, as far as the installed Pillow knows them."""
    from PIL import Image

    Image.init()
    return frozenset(ending for ending, kind in Image.EXTENSION.items() if kind in FORMATS)


def _from_path(path: Path, decoder: str, device: torch.device | str) -> Tensor:
    try:
        with _open(path) as file:
            return _decoded(file, str(path), decoder, device)
    except OSError as error:
        raise OSError(error.errno, f"image: cannot read {path}: {error.strerror}") from error


def _decoded(file: BinaryIO, name: str, decoder: str, device: torch.device | str) -> Tensor:
    if not file.read(1):
        raise ValueError(f"image: {name} is an empty file")
    file.seek(0)
    if decoder == "torchvision" and (pixels := _by_torchvision(file.read(), device)) is not None:
        return pixels
    with _decoding(name):
        opened = _opened(file)
    with opened:
        return _from_pil(opened, name)


def _opened(file: BinaryIO) -> Image:
    """As ``PIL.Image.open``, which knows the common formats first and imports the others where it has to."""
    from PIL import Image, UnidentifiedImageError

    for register in (Image.preinit, Image.init):
        register()
        try:
            return Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])
        except UnidentifiedImageError as error:
            unidentified = error
    raise unidentified


def _open(path: Path) -> BinaryIO:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a FIFO waits for a writer; a folder says what it is
        raise ValueError(f"image: {path} is not a regular file")
    return open(path, "rb")


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError:
        raise ValueError(f"image: {name} is in none of the formats that are read: {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        size = str(error).partition(",")[0]  # what follows suspects an attack
        raise ValueError(f"image: {name} is too large ({size})") from error
    except Exception as error:  # the decoders raise anything, MemoryError too, which says nothing
        raise ValueError(f"image: {name} is damaged or truncated ({str(error) or type(error).__name__})") from error


def _by_torchvision(content: bytes, device: torch.device | str) -> Tensor | None:
    """None for what is no JPEG file that torchvision can decode: Pillow says what is wrong with it, or reads it."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError as error:
        raise ImportError(f"decoder: 'torchvision' needs torchvision.io.decode_jpeg ({error})") from error
    if not content.startswith(_JPEG):
        return None
    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB, device)
    except RuntimeError:
        return None
    return pixels.permute(1, 2, 0).contiguous()


def _from_pil(image: Image, name: str) -> Tensor:
    if 0 in image.size:
        raise ValueError(f"image: expected at least one pixel, got {image.size[1]} x {image.size[0]} (height x width)")
    with _decoding(name):
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if low != high and not (low >= 0 and 1 < high <= 255):
            became = f"clipped to 0..255, as the published code does, leave {int(pixels.min())} to {int(pixels.max())}"
            warnings.warn(f"image: {name} holds values from {low:g} to {high:g}, which {became}", stacklevel=3)
    return pixels


def _from_tensor(image: Tensor, name: str) -> Tensor:
    if image.dim() == 2:
        image = image.unsqueeze(-1)
    elif image.dim() == 3:
        places = ((-1, (3,)), (0, (3,)), (-1, (1, 4)), (0, (1, 4)))
        place = next((place for place, channels in places if image.shape[place] in channels), None)
        image = image if place is None else image.movedim(place, -1)
    if image.dim() != 3 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(
            "image: expected [H, W, C] or [C, H, W] of 1 (grey), 3 or 4 (RGBA) channels, or grey [H, W], "
            f"got {list(image.shape)}"
        )
    if image.numel() == 0:
        raise ValueError(
            f"image: expected at least one pixel, got {image.shape[0]} x {image.shape[1]} (height x width)"
        )
    image = image[..., :3].expand(-1, -1, 3)
    if image.is_floating_point():
        low, high = (x.item() for x in image.aminmax())
        if not (low >= 0.0 and high <= 1.0):  # NaN is in neither
            raise ValueError(f"image: expected floating point values in [0, 1], got {low:g} to {high:g}")
        if low != high and round(255 * low) == round(255 * high):
            level = round(255 * low)
            warnings.warn(
                f"image: {name} holds values from {low:g} to {high:g}, which become one flat level, {level} of 0..255",
                stacklevel=3,
            )
        image = (image.to(torch.promote_types(image.dtype, torch.float32)) * 255.0).round().to(torch.uint8)
    elif image.dtype != torch.uint8:
        raise TypeError(f"image: expected uint8 or floating point, got {image.dtype}")
    return image.contiguous()
