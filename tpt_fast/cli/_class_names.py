"""Class names from the command line and from files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import typer

from . import _shared

_FORMS = 'expected a JSON list of names, {"0": "cat", "1": "dog"} or {"cat": 0, "dog": 1}'


def class_names(classes: str | None, file: Path | None) -> list[str] | None:
    """The names that one of both options gives, None where neither is given; what would shift labels is bad usage."""
    if classes is not None and file is not None:
        raise typer.BadParameter("give --classes or --classes-file, not both", param_hint="--classes")
    if classes is not None:
        names = _without_gaps(classes.split(","), "--classes", f"{classes!r}", "name")
        if len(names) == 1:
            words = names[0].split()
            hint = f": write --classes '{','.join(words)}' for {len(words)}" if len(words) > 1 else ""
            _warn_of_one(names[0], hint)
        return names
    if file is None:
        return None
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is not UTF-8 text: {error}", param_hint="--classes-file") from error
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}", param_hint="--classes-file") from error
    if text.lstrip().startswith(("[", "{")) or file.suffix.lower() == ".json":
        names, unit = _from_json(text, file), "class"
    else:
        names, unit = text.split("\n"), "line"
    names = _without_gaps(names, "--classes-file", f"'{file}'", unit)
    if len(names) == 1:
        _warn_of_one(names[0], f": {file} has one a line")
    return names


def _without_gaps(parts: list[str], option: str, given: str, unit: str) -> list[str]:
    names = [part.strip() for part in parts]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise typer.BadParameter(f"there are no class names in {given}", param_hint=option)
    if "" in names:
        raise typer.BadParameter(
            f"{unit} {names.index('') + 1} of {given} is blank: every label behind it would be another class's; "
            "give it a name, or take it out where the labels do too",
            param_hint=option,
        )
    _warn_of_repeated(names)
    return names


def _warn_of_repeated(names: list[str]) -> None:
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        more = f" and {len(repeated) - 1} more" if len(repeated) > 1 else ""
        _shared.remark(f"warning: {repeated[0]!r}{more} stands there several times, as several classes")


def _warn_of_one(name: str, hint: str) -> None:
    _shared.remark(f"warning: {name!r} is one class, so every image is that with 100 %{hint}")


def _from_json(text: str, file: Path) -> list[str]:
    try:
        found: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{file} begins as JSON and is none ({error})", param_hint="--classes-file") from error
    if isinstance(found, dict):
        if found and all(type(value) is int for value in found.values()):  # name -> index
            found = {str(index): name for name, index in found.items()} if _all_different(found) else None
        if found is not None and set(found) == {str(index) for index in range(len(found))}:
            found = [found[str(index)] for index in range(len(found))]
            if found and all(
                isinstance(each, list) and len(each) == 2 for each in found
            ):  # ImageNet's [WordNet id, name]
                found = [each[1] for each in found]
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise typer.BadParameter(f"{_FORMS} in {file}", param_hint="--classes-file")
    return found


def _all_different(found: dict[str, int]) -> bool:
    return len(set(found.values())) == len(found)
