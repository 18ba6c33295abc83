"""A run: each image is read and encoded once for all methods, and what is there already is not done again.

An image's views are drawn from a seed of its own, made of the run's seed and the image's id. So neither the order of
the images nor how they are shared out changes an answer, and images of one size do not all share their crops, as under
one seed they would.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .._checks import MAX_SEED, check_integer
from .._files import atomic_write
from .._machine import peak_resident_bytes
from ..clip import Clip
from ..config import TuneConfig
from ..methods import SHARED
from ..methods.choice import make
from ..result import TuneResult
from ..stream import Prepared, Steps, stream
from ..tuner import Tuner
from ..views.decode import load_image
from ..views.make import pass_order
from . import rows
from .answers import ZERO_SHOT, Outcome, answers
from .features import SHARD_BYTES, Features, weights_digest
from .folder import note_down, set_folder
from .place import Place
from .several import forgetful, methods_of, parts_of

if TYPE_CHECKING:
    from .sets import ImageSet

_MOST_ROWS = 20_000  # that wait to be written

#: Options that views and their features depend on, beside weights, preprocessing and images.
_OF_VIEWS = ("n_views", "seed", "views", "precision", "decoder", "autocasts")


@dataclass
class Progress:
    """What this process has done of one set and seed, for whoever shows it."""

    set: str
    seed: int
    methods: tuple[str, ...]
    total: int  #: images that it has to do
    done: int = 0
    failed: int = 0
    right: dict[str, int] = field(default_factory=dict)  #: by method


def evaluate(
    images: ImageSet,
    model: nn.Module | Clip,
    config: TuneConfig | None = None,
    *,
    out: str | Path,
    seeds: Sequence[int] | None = None,
    features: str | Path | None = None,
    tokenizer: Callable[..., Tensor] | None = None,
    workers: int = 2,
    every: float = 30.0,
    about: Mapping[str, Any] | None = None,
    seen: Callable[[Progress], Any] = lambda _: None,
) -> Path:
    """Run methods over a set of images; answers are rows in a folder of ``out`` (:mod:`tpt_fast.evaluation.rows`).

    What ``out`` has already is not done again: a run that was killed goes on, another method or seed is added. In a
    process group of torch.distributed the images are shared out, and the rows are those of one process to the bit.

    Args:
        images: an image set, of :func:`tpt_fast.evaluation.sets.open_set`.
        model, tokenizer: as for :class:`tpt_fast.Tuner`.
        config: what to do; its ``method`` may be several.
        out: folder of results, of any number of sets; made if it is missing.
        seeds: of the views, one after the other; default: that of ``config``.
        features: folder where the features of all views are kept, and looked for first.
        workers: threads that decode ahead.
        every: seconds after which rows are written, which is what a killed run loses at most.
        about: what to write down of the model beside the digest of its weights, as JSON holds it.
        seen: called after each image.

    Returns:
        The set's folder in ``out``.

    Raises:
        TypeError, ValueError: an argument that does not fit; rows that were made with other options, naming them; a
            method that learns from each image, in several processes.
        OSError: a folder that cannot be read or written. An image that cannot be is a row with its error.
    """
    config, place = config or TuneConfig(), Place.here()
    seeds = [config.seed] if seeds is None else list(seeds)
    for seed in seeds:
        check_integer("seeds", seed, 0, MAX_SEED)
    if len(set(seeds)) < len(seeds) or not seeds:
        raise ValueError(f"seeds: expected one or more different ones, got {', '.join(map(str, seeds)) or 'none'}")
    check_integer("workers", workers, 1)
    config.make_method().check_shards(place.processes)
    if not isinstance(model, Clip):
        model = Clip.of(model, config, tokenizer)
    digest = weights_digest(model.model)
    folder = set_folder(out, images.name)
    if place.rank == 0:
        prepared = model.preprocessing._asdict()
        made_with = {"weights": digest, "preprocessing": prepared, **(about or {})}
        note_down(folder, images, config, methods_of(config), made_with)
    for seed in seeds:
        run = _Run(images, model, replace(config, seed=seed), folder, place, digest, workers, every, seen)
        if features is not None:
            run.kept = Features(Path(features), run.key(), len(images))
        run.all()
    return folder


def zero_shot_predictor(images: ImageSet, clip: Clip, config: TuneConfig) -> Callable[[np.ndarray], np.ndarray]:
    """From places of images, int64 [n], to their classes by the plain image, for a look before a run."""
    defaults: Any = {each.name: each.default for each in fields(config) if each.name in SHARED}
    plain = replace(config, method=ZERO_SHOT, strict_official=False, n_views=2, **defaults)
    tuner = Tuner(clip, images.classnames, plain)

    def predict(places: np.ndarray) -> np.ndarray:
        results = tuner.map(images.image(int(i)) for i in places)
        return np.array([0 if each.error is not None else each.index for each in results], np.int64)

    return predict


def image_seed(seed: int, id: str) -> int:
    """Of the views of one image: ``tuner.prepare(path, seed=image_seed(0, id))`` are those of a run with seed 0."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{id}".encode()).digest()[:8], "big") >> 1


def order(images: int, seed: int) -> np.ndarray:
    """int64 [images]: the order in which they are done. Mixed, so that running accuracies mean something and a stream
    that is learned from is not sorted by class; by arithmetic, so that it stays the same wherever a run goes on."""
    with np.errstate(over="ignore"):
        z = (np.arange(1, images + 1, dtype=np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)  # splitmix64
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


class _Loaded(NamedTuple):
    """An image's pixels."""

    image: int
    pixels: Tensor


@dataclass
class _Run:
    """One set with one seed."""

    images: ImageSet
    clip: Clip
    config: TuneConfig
    folder: Path
    place: Place
    weights: str
    workers: int
    every: float
    seen: Callable[[Progress], Any]
    kept: Features | None = None

    def key(self) -> dict[str, Any]:
        """What features depend on. Of the device only their rounding does, so a GPU's may be read elsewhere."""
        options = {name: getattr(self.config, name) for name in _OF_VIEWS if hasattr(self.config, name)}
        return {
            "set": self.images.digest,
            "images": len(self.images),
            "weights": self.weights,
            "image tower": self.clip.image.engine,
            "preprocessing": self.clip.preprocessing._asdict(),
            "resampling": pass_order(),
            **options,
        }

    def all(self) -> None:
        """Whatever is missing. Methods that miss the same images go over them together."""
        together: dict[bytes, list[str]] = {}
        todo = self.place.agreed(self._todo() if self.place.rank == 0 else None)
        for label, missing in todo.items():
            together.setdefault(missing.tobytes(), []).append(label)
        for labels in together.values():
            missing = todo[labels[0]][self.place.rank :: self.place.processes]
            if len(missing):
                self._pass(labels, missing)

    def _todo(self) -> dict[str, np.ndarray]:
        """Of each method, the images that it has to do, in their order."""
        n, seed = len(self.images), self.config.seed
        in_order, todo = order(n, seed), {}
        for label, method in methods_of(self.config).items():
            done = rows.done(self.folder / "rows", label, seed, n)
            missing = in_order[~done[in_order]]
            if method.online and 0 < len(missing) < n:  # it goes on from its memory of all images before, or anew
                begin = n - len(missing)
                prefix = np.array_equal(missing, in_order[begin:])
                if not prefix or not self._state_file(label, begin).exists():
                    missing = in_order
            todo[label] = missing
        return todo

    def _tuner(self, labels: Sequence[str]) -> Tuner:
        config = self.config
        if not config.strict_official:
            chosen = {label: forgetful(each) for label, each in methods_of(config).items() if label in labels}
            defaults: Any = {each.name: each.default for each in fields(config) if each.name in SHARED}
            return Tuner(self.clip, self.images.classnames, replace(config, method=chosen, **defaults))
        tuner = Tuner(self.clip, self.images.classnames, config)
        tuner.method = make((("official", tuner.method), (ZERO_SHOT, ZERO_SHOT)), {})  # which a TuneConfig has alone
        return tuner

    def _pass(self, labels: Sequence[str], todo: np.ndarray) -> None:
        tuner, n = self._tuner(labels), len(self.images)
        online = {label: each for label, each in parts_of(tuner.method).items() if each.online}
        begin = n - len(todo) if online else 0
        for label, method in online.items():
            if begin:
                method.load_state(load_file(self._state_file(label, begin)))
        writer = rows.RowWriter(self.folder / "rows", self._about(tuner))
        progress = Progress(self.images.name, self.config.seed, tuple(labels), len(todo))

        def save(done: int) -> None:
            """Features and memories first: where there are rows, there is what they were made of."""
            if self.kept is not None:
                self.kept.write()
            files = {label: self._state_file(label, begin + done) for label in online}
            for label, file in files.items():
                if state := online[label].state():  # without one it begins anew, if it has to go on
                    file.parent.mkdir(exist_ok=True)
                    with atomic_write(file) as aside:
                        save_file(state, aside)
            writer.write(**_peaks(tuner.device))
            for file in files.values():
                for old in file.parent.glob(f"{file.name.rpartition('-')[0]}-*"):
                    if old != file:
                        old.unlink()

        started = time.monotonic()
        try:
            with closing(self._outcomes(tuner, todo)) as outcomes:
                for image, outcome in zip(todo.tolist(), outcomes):
                    now = time.monotonic()
                    took, started = now - started, now
                    if self.kept is not None and image not in self.kept:
                        self.kept.add(image, outcome.error if outcome.features is None else outcome.features)
                    self._write_rows(writer, image, outcome, took, progress)
                    waiting = self.kept.waiting_bytes if self.kept is not None else 0
                    late = now - writer.written_at >= self.every
                    if late or len(writer) >= _MOST_ROWS or waiting >= SHARD_BYTES:
                        save(progress.done)
                    self.seen(progress)
        except BaseException:
            if not online:  # whose memory may be an image ahead of its rows
                save(progress.done)
            elif self.kept is not None:
                self.kept.write()
            raise
        save(progress.done)

    def _outcomes(self, tuner: Tuner, todo: np.ndarray) -> Generator[Outcome, None, None]:
        """One for each image, in order, with the next ones decoded ahead."""
        cuda, kept = tuner.device.type == "cuda", self.kept

        def load(image: int) -> _Loaded | Prepared:
            found = None if kept is None else kept.get(image)
            if isinstance(found, str):
                raise ValueError(found)
            if found is not None:
                return Prepared(found.to(tuner.device), {})
            return _Loaded(image, load_image(self.images.image(image), tuner.config.decoder, tuner.device))

        def views(loaded: _Loaded | Prepared) -> Prepared:
            if isinstance(loaded, Prepared):
                return loaded
            return tuner.prepare(loaded.pixels, seed=image_seed(self.config.seed, self.images.id(loaded.image)))

        def finish(prepared: Prepared) -> Outcome:
            encoded = prepared.views.dim() == 2  # features [N, D], that were kept
            features = prepared.views if encoded else tuner.encode(prepared)
            if not features.isfinite().all():
                return Outcome(error="features: expected finite values, got NaN or infinity")
            result = tuner.tune_features(features)
            assert isinstance(result, TuneResult)
            return Outcome(result, features, kept=encoded)

        steps: Steps[Any, Outcome] = Steps(
            ahead=(lambda image: views(load(image))) if cuda else load,
            prepare=views,
            finish=finish,
            fail=lambda error: Outcome(error=str(error)),
        )
        return stream(steps, todo.tolist(), tuner.device, self.workers)

    def _write_rows(
        self, writer: rows.RowWriter, image: int, outcome: Outcome, seconds: float, progress: Progress
    ) -> None:
        label = self.images.label(image)
        common = {"image": image, "id": self.images.id(image), "seed": self.config.seed, "label": label}
        common |= {"seconds": seconds, "kept": outcome.kept}
        for method, answer in answers(outcome, progress.methods, label).items():
            writer.add(common | {"method": method} | answer)
            progress.right[method] = progress.right.get(method, 0) + (answer["rank"] == 0)
        progress.done += 1
        progress.failed += outcome.result is None

    def _about(self, tuner: Tuner) -> dict[str, Any]:
        device = torch.cuda.get_device_name(tuner.device) if tuner.device.type == "cuda" else "cpu"
        return {"device": device, "torch": torch.__version__, "processes": self.place.processes}

    def _state_file(self, label: str, seen: int) -> Path:
        return self.folder / "memory" / f"{quote(label, safe='')}-{self.config.seed}-{seen}.safetensors"


def _peaks(device: torch.device) -> dict[str, int]:
    """The most memory that this process has held, in bytes."""
    found = {}
    with suppress(OSError):  # where the system does not tell
        found["peak_bytes"] = peak_resident_bytes()
    if device.type == "cuda":
        found["peak_gpu_bytes"] = torch.cuda.max_memory_reserved(device)
    return found
