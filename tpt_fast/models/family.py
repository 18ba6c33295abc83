"""What the towers ask of a model, whatever library it comes from."""

from __future__ import annotations

import copy
import io
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .preprocessing import Preprocessing
from .weights import Foreign, ImageWeights, TextWeights

Tokenizer = Callable[..., Tensor]
CLIP_VOCABULARY = 49408


class Family(ABC):
    """A model of one library. Nothing is read before it is asked for, and the model stays as it is.

    What reads weights raises :class:`~tpt_fast.models.weights.Unsupported`, with the reason, where the towers that are
    made of them could not represent the model's own code exactly; then that code runs, by :meth:`for_text`,
    :meth:`encode_text` and :meth:`for_images`.
    """

    def __init__(self, model: Foreign) -> None:
        self.model = model

    # --- for copies

    def __getstate__(self) -> dict[str, Any]:
        check_picklable(self.model)
        return vars(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Family:
        made = copy.copy(self)
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def __copy__(self) -> Family:
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        return made

    # --- both towers

    @property
    def scale(self) -> Tensor:
        """[] float32, exp(logit scale)."""
        return self.model.logit_scale.detach().float().exp().reshape(())

    @property
    def bias(self) -> Tensor | None:
        """[] float32, the logit bias of models trained by a sigmoid loss."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.detach().float().reshape(())

    # --- the text tower

    @property
    @abstractmethod
    def text(self) -> nn.Module:
        """What owns the text tower.

        Raises:
            TypeError: the model has none.
        """

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """Of token ids."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """How many tokens the text tower takes."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The model's own.

        Raises:
            ValueError: it cannot be told from the model.
        """

    @abstractmethod
    def not_causal(self) -> str | None:
        """None if nothing after a prompt's EOT token can reach its feature; otherwise what can."""

    @abstractmethod
    def read_lengths(self, ids: Tensor) -> Tensor | None:
        """How many tokens of each row of ``ids`` [C, L] its feature depends on, int64 [C]; None where it may be all."""

    @abstractmethod
    def text_weights(self, dtype: torch.dtype) -> TextWeights:
        """Of a causal EOT tower, in storage type ``dtype`` (shared with the model where the type is the same)."""

    @abstractmethod
    def for_text(self, dtype: torch.dtype) -> Family:
        """Second modules around the text tower's weights, see :func:`~tpt_fast.models.module.replica`; what follows may
        change them."""

    @abstractmethod
    def cut(self, length: int) -> None:
        """Have a causal tower take ``length`` tokens, where its own code takes just so many."""

    @abstractmethod
    def replace_embedding(self, embedding: nn.Module) -> None:
        """Have the tower embed its tokens by another module."""

    @abstractmethod
    def encode_text(self, ids: Tensor) -> Tensor:
        """Features [C, D], not normalised, of ids [C, L], by the model's own code."""

    @property
    def depth(self) -> int:
        """Blocks of the text tower, about."""
        return 12

    # --- the image tower

    @property
    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """What the model expects of its images.

        Raises:
            TypeError: it has no image tower, or one in a wrapper.
            ValueError: it does not say the size of its images, or they are prepared in a way that is not known here:
                they would be classified from other pixels than the model was trained on.
        """

    @abstractmethod
    def image_weights(self, dtype: torch.dtype) -> ImageWeights | nn.Module:
        """Of a vision transformer that is read at its class token; of CLIP's ResNet, its modules."""

    @abstractmethod
    def for_images(self, dtype: torch.dtype) -> nn.Module:
        """Second modules around the image tower's weights: views [N, 3, H, W] -> [N, D], by the model's own code."""


class _Dry(pickle.Pickler):
    """Goes through everything but the numbers."""

    def persistent_id(self, value: Any) -> str | None:
        return "numbers" if isinstance(value, (Tensor, torch.UntypedStorage)) else None


def check_picklable(model: Foreign) -> None:
    """
    Raises:
        PicklingError: ``model`` cannot be pickled, with the way out.
    """
    try:
        _Dry(io.BytesIO()).dump(model)
    except Exception as error:  # what a module's own __reduce__ raises may be anything
        raise pickle.PicklingError(
            f"model: expected one that can be pickled, and {type(model).__module__}.{type(model).__qualname__} cannot "
            f"({error}); make the Tuner in the other process, of a TunerSpec, which names the model"
        ) from error


class Calls(nn.Module):
    """The features that ``module``, or its function ``name``, returns."""

    def __init__(self, module: Foreign, name: str = "forward") -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, x: Tensor) -> Tensor:
        run = self.module if self.name == "forward" else getattr(self.module, self.name)
        return features_of(run(x))


def features_of(output: Foreign) -> Tensor:
    """The features among what a library's tower returns."""
    if isinstance(output, tuple):
        return output[0]
    return output if isinstance(output, Tensor) else output.pooler_output


@lru_cache(maxsize=1)
def clip_tokenizer() -> Tokenizer:
    """CLIP's byte pairs."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()
