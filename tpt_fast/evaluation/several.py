"""The methods of a run."""

from __future__ import annotations

from ..config import TuneConfig
from ..methods import Method, method_options
from ..methods.several import Several
from ..methods.zero_shot import ZeroShot
from .answers import ZERO_SHOT


def methods_of(config: TuneConfig) -> dict[str, Method]:
    """The methods by the names that their results have, and zero-shot, which all are held against."""
    given = parts_of(config.make_method())
    return {**given, ZERO_SHOT: given.get(ZERO_SHOT) or ZeroShot()}


def parts_of(method: Method) -> dict[str, Method]:
    """The methods that one may be several of, by the names that their results have."""
    return dict(method.methods) if isinstance(method, Several) else {method.name: method}


def forgetful(method: Method) -> Method:
    """Without what it remembers of an earlier set or seed."""
    own = method_options(method)
    return type(method)(**{name: getattr(method, name) for name in own}) if method.online and own else method
