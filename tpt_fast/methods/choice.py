"""Which methods are meant by an option, and whose options are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from ..config import TuneConfig
from . import METHODS, SHARED, Method, make_method, method_class, method_options
from .several import Several

#: Methods with the names that their results have; those given by name are made when their options are known.
Chosen = tuple[tuple[str, "str | Method"], ...]


def choose(method: Any) -> Chosen:
    """What is meant: a name, names with commas, a method, a sequence of such, or a mapping of names of one's own.

    Raises:
        TypeError, ValueError: something else, no method, or a name that comes twice.
    """
    given = method.split(",") if isinstance(method, str) else method
    if isinstance(given, Method):
        given = [given]
    elif isinstance(given, Mapping):
        given = list(given.items())
    elif not isinstance(given, Sequence):
        raise TypeError(f"method: expected a name or a tpt_fast.methods.Method, got {type(given).__name__}")
    chosen: list[tuple[str, str | Method]] = []
    for each in given:
        label, one = each if isinstance(each, tuple) else (getattr(each, "name", each), each)
        if not isinstance(one, (str, Method)) or not isinstance(label, str):
            raise TypeError(f"method: expected names or tpt_fast.methods.Method, got {type(one).__name__}")
        if isinstance(one, str):
            method_class(one.strip())
        chosen.append((label.strip(), one.strip() if isinstance(one, str) else one))
    labels = [label for label, _ in chosen]
    if not labels or len(set(labels)) < len(labels):
        raise ValueError(
            f"method: expected one or more of different names, got {', '.join(labels) or 'none'}; those of one "
            'name get others by a mapping: {"few": Zero(gamma=0.1), "many": Zero(gamma=0.5)}'
        )
    if len(chosen) > 1 and "official" in (one for _, one in chosen):
        raise ValueError("method: expected 'official' alone, for which views are drawn otherwise")
    return tuple(chosen)


def make(chosen: Chosen, shared: Mapping[str, Any], **arguments: Any) -> Method:
    """The method, or all of them as one, with those of the options ``shared`` that each has, and ``arguments``."""
    made = [(label, one if isinstance(one, Method) else make_method(one, shared, **arguments)) for label, one in chosen]
    alone = len(made) == 1 and made[0][0] == made[0][1].name
    return made[0][1] if alone else Several(tuple(made))


def make_with_own(chosen: Chosen, own: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Method]:
    """The methods by name, those that were given by name with options ``own`` of theirs.

    Raises:
        TypeError: an option that none of them has, naming whose it is.
    """
    has = {label: method_options(method_class(one)) for label, one in chosen if isinstance(one, str)}
    for name in own:
        if not any(name in options for options in has.values()):
            labels = ", ".join(repr(label) for label, _ in chosen)
            known = [*dict.fromkeys(option for options in has.values() for option in options)]
            close = get_close_matches(name, known + [each.name for each in fields(TuneConfig)], 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known) or 'what it was made with'}"
            hint = whose(name) or hint
            raise TypeError(f"{name}: expected an option of TuneConfig or of method {labels}; {hint}")
    return {
        label: one
        if isinstance(one, Method)
        else make_method(one, shared, **{name: own[name] for name in has[label] if name in own})
        for label, one in chosen
    }


def whose(option: str) -> str:
    """Which methods have ``option``, as a hint; "" if none has."""
    of = [name for name in METHODS if option in method_options(method_class(name))]
    if not of:
        return ""
    made = f"tpt_fast.methods.{method_class(of[0]).__name__}({option}=...)"
    return f"it is one of method {' and '.join(map(repr, of))}: method={made}"


def check_shared(chosen: Chosen, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse those of the :data:`~tpt_fast.methods.SHARED` options that were given, and that no method would read."""
    for name in (name for name in SHARED if given[name] != defaults[name]):
        classes = [method_class(one) if isinstance(one, str) else type(one) for _, one in chosen]
        options = [method_options(each) for each in classes]
        takes = [getattr(one, name, given[name]) for (_, one), has in zip(chosen, options, strict=True) if name in has]
        if not takes:
            labels = ", ".join(repr(label) for label, _ in chosen)
            known = ", ".join(dict.fromkeys(option for has in options for option in has)) or "no options"
            raise ValueError(
                f"{name}: expected {defaults[name]}, its default, with method {labels}, which has {known}; "
                f"got {given[name]}"
            )
        if given[name] not in takes:
            raise ValueError(f"{name}: expected {takes[0]}, which the given method has, or nothing, got {given[name]}")
