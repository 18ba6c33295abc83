"""Class names and an initial context -> token ids, and where in them the context vectors stand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.family import Tokenizer


@dataclass(frozen=True)
class Prompts:
    """Prompts ``[SOS] ctx_1..ctx_lead <name> ctx_lead+1..ctx_n . [EOT]``; L is the model's context length."""

    classnames: tuple[str, ...]
    ids: Tensor  #: int64 [C, L]; the ids at context positions are those of the initial words (or of "X")
    lengths: Tensor  #: int64 [C], tokens up to and including EOT
    positions: Tensor  #: int64 [C, n_ctx], where each context vector stands
    first: int  #: position of the first prompt token: 1 after SOS, 0 for a tokenizer without SOS
    lead: int  #: context vectors before the name: all (position "end"), some ("middle") or none ("front")

    @property
    def n_ctx(self) -> int:
        return self.positions.shape[1]

    @property
    def ends(self) -> Tensor:
        """int64 [C], the place behind all context vectors."""
        return self.positions.amax(-1) + 1 if self.n_ctx else torch.full_like(self.lengths, self.first)


def check_classnames(classnames: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple. Duplicates are legal.

    Raises:
        TypeError: not a sequence of strings.
        ValueError: no names, or an empty one.
    """
    if isinstance(classnames, (str, bytes)) or not hasattr(classnames, "__iter__"):
        raise TypeError(
            f"classnames: expected a sequence of strings, got {type(classnames).__name__} {classnames!r:.60}"
        )
    if isinstance(classnames, (set, frozenset)):
        raise TypeError("classnames: expected a sequence, got a set, whose order changes from run to run; sort it")
    names = tuple(classnames)
    if not names:
        raise ValueError("classnames: expected at least one name, got an empty sequence")
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"classnames[{i}]: expected a string, got {type(name).__name__} {name!r:.60}")
        if not name.replace("_", " ").strip():
            raise ValueError(f"classnames[{i}]: expected a name, got {name!r}")
    return tuple(str(name) for name in names)


def build_prompts(
    classnames: Sequence[str], ctx_init: str, n_ctx: int | None, tokenizer: Tokenizer, context_length: int
) -> Prompts:
    """Tokenise ``ctx_init + " " + name + "."`` for every name, underscores read as spaces.

    "[CLS]" inside ``ctx_init`` puts the name there; the words after it are context too and stand between the name and
    the full stop, as in the published code. With ``n_ctx`` the words' embeddings will not be used, and "X" stands for
    every vector unless ``ctx_init`` has exactly ``n_ctx`` tokens; "[CLS]" then still says where the name goes.

    Raises:
        TypeError, ValueError: a bad name or context, or a prompt over the context length (which, and by how much).
    """
    names = check_classnames(classnames)
    if not isinstance(ctx_init, str):
        raise TypeError(f"ctx_init: expected a string, got {type(ctx_init).__name__} {ctx_init!r:.60}")
    if n_ctx is not None and (not isinstance(n_ctx, int) or isinstance(n_ctx, bool)):
        raise TypeError(f"n_ctx: expected an int, got {type(n_ctx).__name__} {n_ctx!r:.60}")
    if n_ctx is not None and not 1 <= n_ctx <= context_length - 3:
        raise ValueError(f"n_ctx: expected 1 to {context_length - 3} (context length {context_length}), got {n_ctx}")
    tokens = _Tokens(tokenizer, context_length)

    if "{" in ctx_init or "}" in ctx_init:
        raise ValueError(
            'ctx_init: expected words, with "[CLS]" where the name goes and no full stop, '
            f"got the template {ctx_init!r}; write {_without_braces(ctx_init)!r}"
        )
    template = " ".join(ctx_init.replace("_", " ").split())
    before, mark, after = template.partition("[CLS]")
    if "[CLS]" in after:
        raise ValueError(f"ctx_init: expected [CLS] at most once, got {ctx_init!r}")
    words = f"{before.strip()} {after.strip()}".strip()
    content = len(tokens.content(words)) if words else 0
    lead = content if not mark else (len(tokens.content(before)) if before.strip() else 0)
    if n_ctx is not None and n_ctx != content:
        inside = bool(before.strip()) and bool(after.strip())
        lead = n_ctx if not mark or (before.strip() and not inside) else n_ctx // 2 if inside else 0
        words, content = " ".join(["X"] * n_ctx), n_ctx
        if len(tokens.content(words)) != n_ctx:
            raise ValueError(f"ctx_init: this tokenizer needs a text of {n_ctx} tokens here, got {ctx_init!r}")
    if content == 0:
        raise ValueError(f"ctx_init: expected at least one word besides [CLS], got {ctx_init!r}")

    spaced = [name.replace("_", " ") for name in names]
    ids, lengths = tokens(f"{words} {name}." for name in spaced)
    for name, length in zip(names, lengths.tolist(), strict=True):
        if length > context_length:
            raise ValueError(
                f"classnames: the prompt of {name!r:.80} has {length} tokens with its {content} of context; "
                f"the model takes {context_length}"
            )
    ids = ids[:, :context_length].clone()
    first = tokens.first
    positions = torch.arange(first, first + content, device="cpu").repeat(len(names), 1)
    if lead < content:
        # The published code counts the tokens of the name alone, without the full stop.
        name_lengths = tokens(spaced)[1] - first - tokens.last
        behind = ids[:, first + lead : first + content].clone()
        for row, n, rest in zip(ids, name_lengths.tolist(), behind, strict=True):
            at = first + lead
            row[at : at + n] = row[first + content : first + content + n].clone()
            row[at + n : at + n + len(rest)] = rest
        positions[:, lead:] += name_lengths[:, None]
    return Prompts(names, ids, lengths, positions, first, lead)


def _without_braces(template: str) -> str:
    """The same prompt as ``ctx_init`` says it."""
    words = re.sub(r"\{[^}]*\}", "[CLS]", template).strip().removesuffix(".").strip()
    return words.removesuffix("[CLS]").strip() or words


def plain_prompts(texts: Sequence[str], tokenizer: Tokenizer, context_length: int) -> Prompts:
    """Whole texts, without context vectors. What they all begin with stands before :attr:`Prompts.first`, so that it is
    computed once, as the context is.

    Raises:
        ValueError: a text over the context length (which, and by how much).
    """
    ids, lengths = _Tokens(tokenizer, context_length)(texts)
    for text, length in zip(texts, lengths.tolist(), strict=True):
        if length > context_length:
            raise ValueError(f"templates: {text!r:.80} has {length} tokens; the model takes {context_length}")
    ids = ids[:, :context_length]
    alike = (ids == ids[0]).all(0)[: int(lengths.min()) - 1]  # the token that is read stands behind it
    first = int(alike.long().cumprod(0).sum())
    return Prompts(tuple(texts), ids, lengths, ids.new_empty(len(ids), 0), first, 0)


class _Tokens:
    """A tokenizer, with what it puts around a text found out by asking it."""

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self._tokenizer, self._context_length = tokenizer, context_length
        self._padding, self._hidden = int(self._ids(["a"])[0, -1]), 0
        ids, lengths = self(["a", "b"])
        one, two = (row[:n].tolist() for row, n in zip(ids, lengths.tolist(), strict=True))
        self.first = int(one[0] == two[0])  # SOS
        self.last = int(one[-1] == two[-1])  # EOT
        if not self.last:  # where padding is the same token, it shows behind a text that has been cut off
            full = self._ids(["a " * 4 * context_length], context_length)[0]
            self._hidden = self.last = int(full[-1] == self._padding)

    def __call__(self, texts: Iterable[str]) -> tuple[Tensor, Tensor]:
        """ids [n, >= context length] and how many of each row are not padding, or EOT."""
        ids = self._ids(list(texts))
        place = torch.arange(1, ids.shape[1] + 1, device="cpu")
        return ids, ((ids != self._padding) * place).amax(1) + self._hidden

    def _ids(self, texts: list[str], length: int | None = None) -> Tensor:
        with torch.device("cpu"):
            try:  # room to see what a tokenizer would otherwise cut off silently
                ids = self._tokenizer(texts, context_length=length or 4 * self._context_length)
            except TypeError:
                ids = self._tokenizer(texts)
        if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != len(texts):
            raise TypeError(
                f"tokenizer: expected it to return a tensor [{len(texts)}, length], got {type(ids).__name__}"
            )
        if ids.shape[1] < self._context_length:
            raise ValueError(
                f"tokenizer: expected rows of at least {self._context_length} tokens (the model's), got {ids.shape[1]}"
            )
        return ids.long().cpu()

    def content(self, text: str) -> list[int]:
        ids, lengths = self([text])
        return ids[0, self.first : int(lengths[0]) - self.last].tolist()
