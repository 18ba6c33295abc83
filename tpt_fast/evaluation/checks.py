"""What is checked before the first image, and what is said where it does not hold."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

#: Test parts of torchvision that are other images than CoOp's, which the published figures are of.
OTHER_TEST_SET = "the data set's own test images, which are others than CoOp's: no published figure is of them"


def folder(argument: str, path: str | os.PathLike) -> Path:
    """``path``, which has to be a folder."""
    found = Path(path).expanduser()
    if not found.is_dir():
        what = "a file" if found.exists() else "nothing of that name"
        raise FileNotFoundError(f"{argument}: expected a folder, got {os.fspath(path)!r}, which is {what}")
    return found


def some(items: Iterable[object], most: int = 5) -> str:
    """The first of them, and how many more there are."""
    listed = list(items)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(map(str, listed[:most])) + more


def classes(name: str, found: Collection[str], expected: Collection[str], where: object) -> None:
    """Names against names: a count hides one that is missing beside one too many.

    Raises:
        ValueError: with both numbers, and up to five of the classes that are missing or surplus.
    """
    missing = sorted(set(expected) - set(found))
    surplus = sorted(set(found) - set(expected))
    if missing or surplus:
        parts = [f"missing: {some(missing)}"] * bool(missing) + [f"surplus: {some(surplus)}"] * bool(surplus)
        raise ValueError(
            f"{name}: expected {len(expected):,} classes, found {len(found):,} in {where}; {'; '.join(parts)}"
        )


def image_count(name: str, found: int, expected: int, where: object) -> None:
    if found != expected:
        raise ValueError(
            f"{name}: expected {expected:,} images, found {found:,} in {where}; "
            "with subset=True what is there is taken as another set"
        )


def files(name: str, missing: Sequence[str], total: int, where: object) -> None:
    """Of ``total`` files that are named somewhere, those that are not there."""
    if missing:
        raise FileNotFoundError(f"{name}: {len(missing):,} of {total:,} images are not in {where}: {some(missing, 3)}")


def empty(name: str, without_images: Sequence[str], where: object) -> None:
    if without_images:
        raise ValueError(f"{name}: no images in {len(without_images)} class folders of {where}: {some(without_images)}")


def digest(lines: Iterable[str]) -> str:
    """As the table of known sets has it."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def test_digest(rows: Iterable[tuple[str, int]]) -> str:
    """Of which image is of which class, whatever their order."""
    lines = "".join(sorted(f"{path}\t{label}\n" for path, label in rows))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def blob_id(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def names(name: str, found: Sequence[str], count: int, expected: str | None, where: object) -> None:
    """A class list against the digest of the published one."""
    if len(found) != count:
        raise ValueError(f"{name}: expected {count} classes, found {len(found)} in {where}")
    if expected is not None and digest(found) != expected:
        raise ValueError(
            f"{name}: the class names of {where} are not those of CoOp's file ({some(found, 3)}): "
            f"digest {digest(found)}, expected {expected}"
        )


def double_names(classnames: Sequence[str]) -> str | None:
    places: dict[str, list[int]] = defaultdict(list)
    for i, each in enumerate(classnames):
        places[each].append(i)
    double = [f"{each!r} ({', '.join(map(str, at))})" for each, at in places.items() if len(at) > 1]
    if not double:
        return None
    return f"classes of one name, whose logits are equal, so that the first of them is answered: {some(double)}"
