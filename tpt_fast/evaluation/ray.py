"""Tuning in Ray Data: a class for ``map_batches``, from rows with images to the same rows with answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .spec import TunerSpec

if TYPE_CHECKING:
    from ..views.decode import ImageLike


class TuneBatch:
    """Called with a batch, a mapping of columns, it adds columns of answers: all others stay, and so does the order.

    ::

        from tpt_fast.evaluation.ray import TuneBatch
        from tpt_fast.evaluation.spec import TunerSpec

        spec = TunerSpec("ViT-B-16-quickgelu", "openai", names, TuneConfig(method="tpt,zero"))
        answers = ray.data.read_parquet("images").map_batches(
            TuneBatch, fn_constructor_kwargs={"spec": spec, "column": "bytes"},
            batch_size=64, concurrency=4, num_gpus=1,
        )
        answers.write_parquet("answers")

    For each method there are ``NAME_label`` (string), ``NAME_index`` (int32) and ``NAME_prob`` (float32), and for all
    of them ``error`` (string). An image that cannot be read, or classified, has its reason there, labels are "" and
    indices -1 then, and nothing is raised; where all is well ``error`` is "". How rows are batched does not count.

    Args:
        spec: of the Tuner, which each actor makes once.
        column: with encoded images (bytes) or their paths (strings).
        prefix: of all columns that are added.
        device: where the Tuner runs; default: a GPU if the actor has one, else the CPU.

    Raises:
        ValueError: a column is missing, or one that would be added is there already; or a method that learns from each
            image, which has no order to go by here.
    """

    def __init__(self, spec: TunerSpec, column: str = "bytes", prefix: str = "", device: str | None = None) -> None:
        spec.config.make_method().check_shards(2)
        self._tuner = spec.build(device)
        self._column, self._prefix = column, prefix
        made = spec.config.make_method()
        self._methods = (made.name, *getattr(made, "others", ()))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Columns in, the same and those of the answers out; strings are arrays of objects, as Ray has them."""
        if self._column not in batch:
            raise ValueError(f"column: expected one of {', '.join(batch)}, got {self._column!r}")
        answers = self._answers(batch[self._column])
        if taken := answers.keys() & batch.keys():
            raise ValueError(f"prefix: expected one with which no column is there twice, got {min(taken)!r}")
        return {**batch, **answers}

    def _answers(self, images: Iterable[Any]) -> dict[str, np.ndarray]:
        columns: dict[str, list[Any]] = {f"{name}_{what}": [] for name in self._methods for what in _EMPTY}
        errors = []
        for image in images:
            found, error = self._one(image)
            errors.append(error)
            for name, values in columns.items():
                values.append(found.get(name, _EMPTY[name.rpartition("_")[2]]))
        made = {name: np.array(values, _TYPES[name.rpartition("_")[2]]) for name, values in columns.items()}
        made["error"] = np.array(errors, object)
        return {f"{self._prefix}{name}": column for name, column in made.items()}

    def _one(self, image: ImageLike) -> tuple[dict[str, Any], str]:
        try:
            result = self._tuner(image)
            best = {name: each.topk(1)[0] for name, each in result.by_method.items()}
        except Exception as error:  # whatever is the matter with one image, the others go on
            return {}, str(error) or type(error).__name__
        return {f"{name}_{what}": getattr(top, what) for name, top in best.items() for what in _EMPTY}, ""


_EMPTY: dict[str, Any] = {"label": "", "index": -1, "prob": float("nan")}
_TYPES: dict[str, Any] = {"label": object, "index": np.int32, "prob": np.float32}
