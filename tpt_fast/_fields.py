"""Fields of dataclasses that say what they mean, to ``help()`` and to the command line."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, field, fields
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)


def described(meaning: str, default: Any = MISSING, *, factory: Any = MISSING) -> Any:
    """A dataclass's field with its meaning, which :func:`meanings` gives back."""
    if factory is not MISSING:
        return field(default_factory=factory, metadata={"help": meaning})
    return field(default=default, metadata={"help": meaning})


def meanings(of: Any) -> dict[str, str]:
    """Field -> what it means."""
    return {each.name: each.metadata["help"] for each in fields(of)}


def document(of: type, more: dict[str, str] | None = None) -> None:
    """Add an "Attributes" section to the docstring of ``of``: its fields, and ``more``."""
    lines = [
        textwrap.fill(f"{name}: {meaning}", 116, initial_indent=" " * 8, subsequent_indent=" " * 12)
        for name, meaning in {**meanings(of), **(more or {})}.items()
    ]
    of.__doc__ = "\n".join([(of.__doc__ or "").rstrip(), "", "    Attributes:", *lines, "    "])
