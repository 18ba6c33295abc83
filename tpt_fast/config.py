"""Everything that can be chosen about tuning, validated when it is made."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from ._checks import MAX_SEED, check_bool, check_choice, check_integer, check_number
from ._fields import described, document
from .methods import METHODS, SHARED, Method, make_method, method_class, method_options, n_selected
from .views.decode import DECODERS

PRECISIONS = ("fp32", "fp16", "bf16")
ENGINES = ("auto", "packed", "module")  # of the text tower
ACTIVATIONS = ("keep", "recompute")


@dataclass(frozen=True)
class TuneConfig:
    """Options of :class:`tpt_fast.Tuner`. The defaults are the paper's (Shu et al., NeurIPS 2022, section 4.1).

    Raises:
        TypeError, ValueError: naming the option, what was expected and what came.
    """

    n_views: int = described("Views of the image, 2 or more; the first is the plain image. Paper: 64.", 64)
    rho: float = described(
        "Part of the views that is kept, in (0, 1]: the int(n_views * rho) most confident, at least one. Paper: 0.1.",
        0.1,
    )
    steps: int = described("AdamW steps, 0 or more; 0 is zero-shot classification. Paper: 1.", 1)
    lr: float = described("Learning rate, 0 or more. Paper: 5e-3.", 5e-3)
    weight_decay: float = described(
        "AdamW's decoupled weight decay, 0 or more. Published code: 0.01, torch's default.", 0.01
    )
    ctx_init: str = described(
        'Words whose embeddings the context starts from. "[CLS]" marks the place of the class name, which '
        'otherwise comes last. Paper: "a photo of a".',
        "a photo of a",
    )
    n_ctx: int | None = described(
        "Number of context vectors for a random start (normal, deviation 0.02, from the seed) instead of ctx_init.",
        None,
    )
    ctx: Tensor | str | os.PathLike | None = described(
        "Context to start from, before ctx_init: a float tensor [n_ctx, width], class-specific [C, n_ctx, width],"
        " or the path of a CoOp checkpoint.",
        None,
    )
    precision: str = described(
        'What the towers hold their weights in: "fp32", "fp16" or "bf16". Logits, loss and context are float32 '
        'always. "fp32" leaves it to PyTorch whether a GPU\'s products round to TF32: of convolutions, which '
        "ResNets have, they do unless torch.backends.cudnn.allow_tf32 is False.",
        "fp32",
    )
    seed: int = described(
        "Seed of the views (the same for every image, so results do not depend on the order) and of a random context.",
        0,
    )
    method: str | Method | Sequence[str | Method] | Mapping[str, Method] = described(
        "What is done with the views: a name (`tpt-fast methods` shows them), a tpt_fast.methods.Method such as "
        "tpt_fast.methods.Zero(gamma=0.1) or one of your own; or several of them, as a list, as names with commas "
        '("tpt,zero") or by names of your own: the views are encoded once, and the first is the result.',
        "tpt",
    )
    strict_official: bool = described(
        'The old name of method="official": follow the published code where the defaults are better. Views are '
        'drawn from torch\'s global generator, and fewer than one kept view is an error. With precision "fp16" '
        "also its precision, and its speed: float32 weights under autocast, fp16 logits, and a GradScaler that "
        "all images share.",
        False,
    )
    engine: str = described(
        'How the text tower runs: "packed" computes what the classes share once, "module" is the model\'s own '
        'code, "auto" takes "packed" where it is exact.',
        "auto",
    )
    activations: str = described(
        '"keep" the text tower\'s activations for the backward pass, as far as memory allows, or "recompute" them.',
        "keep",
    )
    decoder: str = described(
        'What decodes JPEG files: "pillow", as published, or "torchvision" on the model\'s device, which on a GPU '
        "is faster and rounds differently.",
        "pillow",
    )
    cuda_graphs: bool = described(
        "On CUDA, capture the loop once for each number of images at a time and replay it; not with an own objective.",
        True,
    )

    if not TYPE_CHECKING:  # whose checkers know the names

        def __new__(cls, *values, **options):
            names = [each.name for each in fields(cls)]
            for unknown in options.keys() - set(names):
                close = difflib.get_close_matches(unknown, names, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
                of = [each for each in METHODS if unknown in method_options(method_class(each))]
                if of:
                    made = f"tpt_fast.methods.{method_class(of[0]).__name__}({unknown}=...)"
                    hint = f"it is one of method {' and '.join(map(repr, of))}: method={made}"
                raise TypeError(f"{unknown}: expected an option of TuneConfig; {hint}")
            return super().__new__(cls)

    @classmethod
    def of(cls, **options: Any) -> TuneConfig:
        """A TuneConfig of options of which some may be the method's own: ``TuneConfig.of(method="zero", gamma=0.1)``.

        Raises:
            TypeError: an option of another method, or of none.
            ValueError: as for TuneConfig.
        """
        own = {name: options.pop(name) for name in [*options] if name not in {each.name for each in fields(cls)}}
        named = cls(**options)._named() if own else ()  # without them, to say first what is wrong with the method
        chosen = {each: method_options(each if isinstance(each, Method) else method_class(each)) for _, each in named}
        for name in own:
            if not any(name in has for each, has in chosen.items() if isinstance(each, str)):
                known = [each for each in METHODS if name in method_options(method_class(each))]
                has = [*dict.fromkeys(option for each in chosen.values() for option in each)]
                close = difflib.get_close_matches(name, [*has, *(each.name for each in fields(cls))], 1)
                hint = f"it is one of method {' and '.join(map(repr, known))}" if known else f"it has {', '.join(has)}"
                hint = hint if known or not close else f"did you mean {close[0]!r}?"
                methods = ", ".join(repr(label) for label, _ in named)
                raise TypeError(f"{name}: expected an option of TuneConfig or of method {methods}; {hint}")
        if own:
            shared = {name: options[name] for name in SHARED if name in options}
            options["method"] = {
                label: each
                if isinstance(each, Method)
                else make_method(each, shared, **{name: own[name] for name in chosen[each] if name in own})
                for label, each in named
            }
            if len(named) == 1:
                options["method"] = options["method"][named[0][0]]
        return cls(**options)

    def __post_init__(self) -> None:
        check_integer("n_views", self.n_views, 2)
        check_number("rho", self.rho, "a number in (0, 1]", lambda v: 0 < v <= 1)
        check_integer("steps", self.steps, 0)
        check_number("lr", self.lr, "a number of 0 or more", lambda v: v >= 0)
        check_number("weight_decay", self.weight_decay, "a number of 0 or more", lambda v: v >= 0)
        if not isinstance(self.ctx_init, str):
            raise TypeError(f"ctx_init: expected a string, got {type(self.ctx_init).__name__}")
        if self.n_ctx is not None:
            check_integer("n_ctx", self.n_ctx, 1)
        if self.ctx is not None and not isinstance(self.ctx, (Tensor, str, os.PathLike)):
            raise TypeError(f"ctx: expected a tensor or the path of a CoOp checkpoint, got {type(self.ctx).__name__}")
        check_choice("precision", self.precision, PRECISIONS)
        check_integer("seed", self.seed, 0, MAX_SEED)
        check_choice("engine", self.engine, ENGINES)
        check_choice("activations", self.activations, ACTIVATIONS)
        check_choice("decoder", self.decoder, DECODERS)
        check_bool("strict_official", self.strict_official)
        check_bool("cuda_graphs", self.cuda_graphs)
        self._settle_method()
        if self.autocasts and self.engine == "packed":
            raise ValueError("engine: expected 'auto' or 'module' with strict_official and fp16, got 'packed'")
        self.make_method().check(self.n_views)

    def _settle_method(self) -> None:
        """``method`` and its old name say the same, and it has the options that were given."""
        if isinstance(self.method, (list, Mapping)) or (isinstance(self.method, str) and "," in self.method):
            object.__setattr__(self, "method", self._named())  # which can be hashed
        named = self._named()
        for name in SHARED:
            given, default = getattr(self, name), next(each.default for each in fields(self) if each.name == name)
            has = [getattr(each, name, given) for _, each in named if name in method_options(_class_of(each))]
            if given != default and not has:
                options = ", ".join(option for _, each in named for option in method_options(_class_of(each)))
                methods = ", ".join(repr(label) for label, _ in named)
                hint = f"which has {options}" if options else "which has no options"
                raise ValueError(f"{name}: expected {default}, its default, with method {methods}, {hint}; got {given}")
            if given != default and given not in has:
                raise ValueError(f"{name}: expected {has[0]}, which the given method has, or nothing, got {given}")
        if self.strict_official and self.method not in ("tpt", "official"):
            raise ValueError(f"strict_official: expected False with method {self.method!r}")
        official = self.strict_official or self.method == "official"
        object.__setattr__(self, "strict_official", official)
        if official:
            object.__setattr__(self, "method", "official")

    def make_method(self, **arguments: Any) -> Method:
        """The method, with those of these options that it has.

        Args:
            arguments: further ones of the method's own.
        """
        given = {name: getattr(self, name) for name in SHARED}
        made = [
            (name, each if isinstance(each, Method) else make_method(each, given, **arguments))
            for name, each in self._named()
        ]
        if len(made) == 1:
            return made[0][1]
        from .methods.several import Several

        return Several(tuple(made))

    def _named(self) -> tuple[tuple[str, str | Method], ...]:
        """The methods, each with a name that its result has.

        Raises:
            TypeError, ValueError: something else than methods and names of such; no method; a name that comes twice.
        """
        given = self.method.split(",") if isinstance(self.method, str) else self.method
        if isinstance(given, Method):
            return ((given.name, given),)
        if isinstance(given, Mapping):
            given = tuple(given.items())
        elif not isinstance(given, Sequence):
            raise TypeError(f"method: expected a name or a tpt_fast.methods.Method, got {type(given).__name__}")
        pairs = [each if isinstance(each, tuple) else (getattr(each, "name", each), each) for each in given]
        for i, (name, each) in enumerate(pairs):
            if not isinstance(each, (str, Method)) or not isinstance(name, str):
                raise TypeError(f"method: expected names or tpt_fast.methods.Method, got {type(each).__name__}")
            if isinstance(each, str):
                pairs[i] = name.strip(), each.strip()
                method_class(each.strip())
        names = [name for name, _ in pairs]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"method: expected one or more of different names, got {', '.join(names) or 'none'}; those of one "
                'name get others by a mapping: {"few": Zero(gamma=0.1), "many": Zero(gamma=0.5)}'
            )
        return tuple(pairs)

    @property
    def autocasts(self) -> bool:
        """Whether the published code's own precision is asked for."""
        return self.strict_official and self.precision == "fp16"

    def n_selected(self, n_views: int) -> int:
        """How many of ``n_views`` views are kept.

        Raises:
            ValueError: none, and ``strict_official`` (the published code fails there too).
        """
        return n_selected(n_views, self.rho, strict=self.strict_official)


def _class_of(method: str | Method) -> type[Method]:
    return method_class(method) if isinstance(method, str) else type(method)


class MethodOptions(TypedDict, total=False):
    """Options of single methods, for type checkers; `tpt-fast methods` says whose they are and what they mean."""

    lambda_term: float
    two_step: bool
    neighbours: int
    temperature: float
    strict: bool
    half: bool
    gamma: float
    templates: str | Sequence[str] | None
    per_class: bool
    lambda_y: float
    lambda_q: float
    rounds: int
    plain_view: bool
    positive_capacity: int
    positive_alpha: float
    positive_beta: float
    negative_capacity: int
    negative_alpha: float
    negative_beta: float
    negative_entropy: tuple[float, float]
    negative_mask: tuple[float, float]


class TuneOptions(MethodOptions, total=False):
    """The fields of :class:`TuneConfig` as keyword options, for type checkers."""

    n_views: int
    rho: float
    steps: int
    lr: float
    weight_decay: float
    ctx_init: str
    n_ctx: int | None
    ctx: Tensor | str | os.PathLike | None
    precision: str
    seed: int
    method: str | Method | Sequence[str | Method] | Mapping[str, Method]
    strict_official: bool
    engine: str
    activations: str
    decoder: str
    cuda_graphs: bool


document(TuneConfig)
