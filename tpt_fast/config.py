"""Everything that can be chosen about tuning, validated when it is made."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict

from ._checks import MAX_SEED, check_bool, check_choice, check_integer, check_number
from ._fields import described, document

if TYPE_CHECKING:  # torch is imported when a TuneConfig is made: the command line's help is made of its fields
    from torch import Tensor

    from .methods import Method
    from .methods.choice import Chosen
    from .prompting.cocoop import CoCoOp

STORED = ("fp32", "fp16", "bf16")  # what towers hold their weights in
PRECISIONS = (*STORED, "auto")
ENGINES = ("auto", "packed", "module")  # of the text tower
VIEWS = ("crops", "augmix")
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
    ctx: Tensor | CoCoOp | str | os.PathLike | None = described(
        "Context to start from, before ctx_init: a float tensor [n_ctx, width], class-specific [C, n_ctx, width],"
        " a tpt_fast.prompting.CoCoOp, or the path of a checkpoint of CoOp's or CoCoOp's.",
        None,
    )
    precision: str = described(
        'What the towers hold their weights in: "fp32", "fp16" or "bf16"; or "auto": bf16 on a CPU that is measured to '
        "be faster in it by a quarter, once, else fp32. Logits, loss and context are float32 "
        'always. "fp32" leaves it to PyTorch whether a GPU\'s products round to TF32: of convolutions, which '
        "ResNets have, they do unless torch.backends.cudnn.allow_tf32 is False.",
        "fp32",
    )
    seed: int = described(
        "Seed of the views (the same for every image, so results do not depend on the order) and of a random context.",
        0,
    )
    views: str = described(
        'The random views: "crops" (and flips), or "augmix", crops mixed with three chains of operations on them, as '
        "the published code has it for the fine-grained data sets.",
        "crops",
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
                from .methods.choice import whose

                close = difflib.get_close_matches(unknown, names, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
                raise TypeError(f"{unknown}: expected an option of TuneConfig; {whose(unknown) or hint}")
            return super().__new__(cls)

    @classmethod
    def of(cls, **options: Any) -> TuneConfig:
        """A TuneConfig of options of which some may be the method's own: ``TuneConfig.of(method="zero", gamma=0.1)``.

        Raises:
            TypeError: an option of another method, or of none.
            ValueError: as for TuneConfig.
        """
        from .methods import SHARED
        from .methods.choice import choose, make_with_own

        known = {each.name for each in fields(cls)}
        own = {name: options.pop(name) for name in [*options] if name not in known}
        if not own:
            return cls(**options)
        shared = {each.name: options.get(each.name, each.default) for each in fields(cls) if each.name in SHARED}
        made = make_with_own(choose(options.get("method", "tpt")), own, shared)
        return cls(**options | {"method": made if len(made) > 1 else next(iter(made.values()))})

    def __post_init__(self) -> None:
        from torch import Tensor

        from .prompting.cocoop import CoCoOp
        from .views.decode import DECODERS

        check_integer("n_views", self.n_views, 2)
        check_number("rho", self.rho, "a number in (0, 1]", lambda v: 0 < v <= 1)
        check_integer("steps", self.steps, 0)
        check_number("lr", self.lr, "a number of 0 or more", lambda v: v >= 0)
        check_number("weight_decay", self.weight_decay, "a number of 0 or more", lambda v: v >= 0)
        if not isinstance(self.ctx_init, str):
            raise TypeError(f"ctx_init: expected a string, got {type(self.ctx_init).__name__}")
        if self.n_ctx is not None:
            check_integer("n_ctx", self.n_ctx, 1)
        if self.ctx is not None and not isinstance(self.ctx, (Tensor, CoCoOp, str, os.PathLike)):
            raise TypeError(f"ctx: expected a tensor or the path of a CoOp checkpoint, got {type(self.ctx).__name__}")
        check_choice("precision", self.precision, PRECISIONS)
        check_integer("seed", self.seed, 0, MAX_SEED)
        check_choice("views", self.views, VIEWS)
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
        from .methods.choice import check_shared

        chosen = self._chosen()
        if not isinstance(self.method, str):
            one = len(chosen) == 1 and chosen[0][0] == getattr(chosen[0][1], "name", chosen[0][1])
            object.__setattr__(self, "method", chosen[0][1] if one else chosen)  # which can be hashed
        check_shared(chosen, vars(self), {each.name: each.default for each in fields(self)})
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
        from .methods.choice import make

        return make(self._chosen(), vars(self), **arguments)

    def _chosen(self) -> Chosen:
        from .methods.choice import choose

        return choose(self.method)

    @property
    def autocasts(self) -> bool:
        """Whether the published code's own precision is asked for."""
        return self.strict_official and self.precision == "fp16"

    def n_selected(self, n_views: int) -> int:
        """How many of ``n_views`` views are kept.

        Raises:
            ValueError: none, and ``strict_official`` (the published code fails there too).
        """
        from .methods import n_selected

        return n_selected(n_views, self.rho, strict=self.strict_official)


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
    ctx: Tensor | CoCoOp | str | os.PathLike | None
    precision: str
    seed: int
    views: str
    method: str | Method | Sequence[str | Method] | Mapping[str, Method]
    strict_official: bool
    engine: str
    activations: str
    decoder: str
    cuda_graphs: bool


document(TuneConfig)
