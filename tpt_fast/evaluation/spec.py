"""A Tuner by what it is made of: small, picklable, and made where it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..config import TuneConfig
from ..text.prompts import check_classnames

if TYPE_CHECKING:
    import torch

    from ..tuner import Tuner

DEMO = "demo"  #: the model that ships with the package


@dataclass(frozen=True)
class TunerSpec:
    """What :meth:`build` makes a :class:`tpt_fast.Tuner` of, in another process or on another machine.

    Args:
        model: an open_clip name, or "demo".
        pretrained: open_clip's tag, or a file that is there wherever the Tuner is built; None for the demo.
        classnames: C names; None for the demo's own.
        config: :class:`~tpt_fast.TuneConfig`; its ``ctx`` travels with it, a path has to lead somewhere there.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    model: str = DEMO
    pretrained: str | None = None
    classnames: tuple[str, ...] | None = None
    config: TuneConfig = field(default_factory=TuneConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.model, str):
            raise TypeError(f"model: expected an open_clip name or {DEMO!r}, got {type(self.model).__name__}")
        if not isinstance(self.config, TuneConfig):
            raise TypeError(f"config: expected a TuneConfig, got {type(self.config).__name__}")
        if self.model == DEMO and self.pretrained is not None:
            raise ValueError(f"pretrained: expected None with the demo model, got {self.pretrained!r}")
        if self.model != DEMO and self.pretrained is None:
            raise ValueError(f"pretrained: expected a tag or a file for {self.model}, got None")
        if self.classnames is None and self.model != DEMO:
            raise ValueError(f"classnames: expected names for {self.model}, got None")
        if self.classnames is not None:
            object.__setattr__(self, "classnames", check_classnames(self.classnames))

    def build(self, device: str | torch.device | None = None) -> Tuner:
        """The Tuner.

        Args:
            device: default: a GPU if there is one, else the CPU.
        """
        import torch

        from ..tuner import Tuner

        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.model == DEMO:
            from .. import demo

            loaded = demo.load()
            names = loaded.classnames if self.classnames is None else self.classnames
            return Tuner(loaded.model.to(place), names, self.config, tokenizer=loaded.tokenizer)
        import open_clip

        assert self.classnames is not None
        # OpenAI's weights, and some others, want QuickGELU: without it open_clip only warns, and accuracy drops.
        cfg = open_clip.get_pretrained_cfg(self.model, self.pretrained) or {}
        model = open_clip.create_model(
            self.model, pretrained=self.pretrained, device=place, force_quick_gelu=bool(cfg.get("quick_gelu"))
        )
        return Tuner(model.eval(), self.classnames, self.config, tokenizer=open_clip.get_tokenizer(self.model))
