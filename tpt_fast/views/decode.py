"""Anything that holds one picture -> uint8 [H, W, 3]."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

#: What :func:`load_image` takes.
ImageLike: TypeAlias = "str | os.PathLike | Image | np.ndarray | Tensor"
DECODERS = ("pillow", "torchvision")
UNREADABLE = (TypeError, ValueError, OSError)  #: what :func:`load_image` says of an image, and not of the machine
_JPEG = b"\xff\xd8\xff"  # how every JPEG file begins


def load_image(image: Any, decoder: str = "pillow", device: torch.device | str = "cpu") -> Tensor:
    """The picture as bytes, as the published code loads it: converted to RGB, its EXIF orientation not applied.

    Args:
        image: one of

            - a path (``str`` or ``os.PathLike``) of a file that Pillow can read;
            - a PIL image of any mode;
            - a NumPy array or a tensor, [H, W, 3], [3, H, W], or [H, W] for grey. A last dimension of 3 is the colour,
              so [3, W, 3] is read as three rows of pixels. uint8 0..255, or floating point in [0, 1], which is rounded
              to the nearest of 256 levels.
        decoder: of JPEG files: "pillow", or "torchvision" on ``device``, which on a GPU is nvJPEG; that rounds
            differently. What torchvision cannot decode, and any other file, Pillow does.
        device: where "torchvision" decodes.

    Returns:
        uint8 [H, W, 3], contiguous, on the tensor's device or where it was decoded. It may share memory with ``image``.

    Raises:
        OSError: a path that cannot be read (FileNotFoundError, PermissionError ...).
        ValueError: a path of no regular file, an empty, truncated, too large or otherwise undecodable image, a wrong
            number of channels, no pixels, or floating point outside [0, 1]; another ``decoder``.
        TypeError: none of the types above.
        ImportError: "torchvision" was asked for and is missing.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder: expected one of {', '.join(DECODERS)}, got {decoder!r}")
    if isinstance(image, (str, os.PathLike)):
        decoded = _by_torchvision(Path(image), device) if decoder == "torchvision" else None
        return _from_file(Path(image)) if decoded is None else decoded
    if isinstance(image, np.ndarray):
        if image.dtype.kind == "f":
            image = image.astype(np.float64 if image.dtype.itemsize > 4 else np.float32)
        elif image.dtype != np.uint8:
            raise TypeError(f"image: expected uint8 or floating point, got {image.dtype}")
        # A copy also where torch would refuse: negative strides, read-only memory.
        return _from_tensor(torch.from_numpy(np.array(image, order="C")))
    if isinstance(image, Tensor):
        return _from_tensor(image.detach())
    if hasattr(image, "convert") and hasattr(image, "size"):  # a PIL image; Pillow itself is not imported for others
        return _from_pil(image, "the PIL image")
    raise TypeError(f"image: expected a path, a PIL image, an array or a tensor, got {type(image).__name__}")


def _from_file(path: Path) -> Tensor:
    from PIL import Image

    try:
        with _open(path) as file:
            if not file.read(1):
                raise ValueError(f"image: {path} is an empty file")
            file.seek(0)
            with _decoding(path):
                opened = Image.open(file)
            with opened:
                return _from_pil(opened, path)
    except OSError as error:
        raise OSError(error.errno, f"image: cannot read {path}: {error.strerror}") from error


def _open(path: Path) -> BinaryIO:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a FIFO waits for a writer; a folder says what it is
        raise ValueError(f"image: {path} is not a regular file")
    return open(path, "rb")


@contextmanager
def _decoding(name: str | Path) -> Iterator[None]:
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError:
        raise ValueError(f"image: {name} is not an image that Pillow can read") from None
    except Image.DecompressionBombError as error:
        size = str(error).partition(",")[0]  # what follows suspects an attack
        raise ValueError(f"image: {name} is too large ({size})") from error
    except Exception as error:  # the decoders raise anything, MemoryError too, which says nothing
        raise ValueError(f"image: {name} is damaged or truncated ({str(error) or type(error).__name__})") from error


def _by_torchvision(path: Path, device: torch.device | str) -> Tensor | None:
    """The JPEG file at ``path``; None where there is none that torchvision can decode."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError as error:
        raise ImportError(f"decoder: 'torchvision' needs torchvision.io.decode_jpeg ({error})") from error
    try:
        with _open(path) as file:
            content = file.read()
        if not content.startswith(_JPEG):
            return None
        pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB, device)
        return pixels.permute(1, 2, 0).contiguous()
    except (OSError, RuntimeError):  # Pillow says what is wrong with it, or reads it after all
        return None


def _from_pil(image: Any, name: str | Path) -> Tensor:
    if 0 in image.size:
        raise ValueError(f"image: expected at least one pixel, got {image.size[1]} x {image.size[0]} (height x width)")
    with _decoding(name):
        return torch.from_numpy(np.array(image.convert("RGB")))


def _from_tensor(image: Tensor) -> Tensor:
    if image.dim() == 2:
        image = image.unsqueeze(-1).expand(-1, -1, 3)
    elif image.dim() == 3 and image.shape[-1] != 3 and image.shape[0] == 3:
        image = image.permute(1, 2, 0)
    if image.dim() != 3 or image.shape[-1] != 3:
        raise ValueError(f"image: expected [H, W, 3], [3, H, W] or grey [H, W], got {list(image.shape)}")
    if image.numel() == 0:
        raise ValueError(
            f"image: expected at least one pixel, got {image.shape[0]} x {image.shape[1]} (height x width)"
        )
    if image.is_floating_point():
        low, high = (x.item() for x in image.aminmax())
        if not (low >= 0.0 and high <= 1.0):  # NaN is in neither
            raise ValueError(f"image: expected floating point values in [0, 1], got {low:g} to {high:g}")
        image = (image.to(torch.promote_types(image.dtype, torch.float32)) * 255.0).round().to(torch.uint8)
    elif image.dtype != torch.uint8:
        raise TypeError(f"image: expected uint8 or floating point, got {image.dtype}")
    return image.contiguous()
