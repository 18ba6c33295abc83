"""A run and its rows: with kept features and without, stopped and resumed, whole and in shares: the same answers."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from eval_sets import Photos

from tpt_fast import TuneConfig, Tuner, demo
from tpt_fast.clip import Clip
from tpt_fast.evaluation import rows
from tpt_fast.evaluation.features import Features, weights_digest
from tpt_fast.evaluation.place import Place
from tpt_fast.evaluation.run import evaluate, image_seed, order
from tpt_fast.methods import Tda, Zero

FEW = {"n_views": 6, "rho": 0.4}


@pytest.fixture(scope="module")
def clip():
    loaded = demo.load()
    return Clip(loaded.model, tokenizer=loaded.tokenizer)


def config(method="tpt,zero", **options):
    return TuneConfig(method=method, **{**({"n_views": 6} | ({"rho": 0.4} if "tpt" in method else {})), **options})


def table(folder):
    """All rows but what says how long they took."""
    tables = [each.drop_columns([*rows.OF_THE_RUN]) for each in rows.merged(folder / "rows")]
    return [row for each in tables for row in each.to_pylist()]


class Stop(Exception):
    pass


def stop_after(count):
    def seen(progress):
        if progress.done == count:
            raise Stop

    return seen


def run(images, clip, out, cfg=None, **options):
    return evaluate(images, clip, cfg or config(), out=out, **options)


def same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        assert str(a) == str(b)  # NaN too


def test_rows_are_what_the_tuner_says(clip, tmp_path):
    images = Photos(9, broken=(4,))
    folder = run(images, clip, tmp_path, seeds=[3])
    assert rows.runs(folder / "rows") == [("tpt", 3), ("zero", 3), ("zero_shot", 3)]
    tuner = Tuner(clip, images.classnames, config())
    zero_shot = Tuner(clip, images.classnames, config("zero_shot"))
    found = {(row["method"], row["image"]): row for row in table(folder)}
    assert len(found) == 27
    for i in set(range(9)) - {4}:
        prepared = tuner.prepare(images.image(i), seed=image_seed(3, images.id(i)))
        result = tuner.finish([prepared])[0]
        for method, each in result.by_method.items():
            row = found[method, i]
            best = each.topk(1)[0]
            assert (row["prediction"], row["confidence"]) == (best.index, best.prob)
            places = [p.index for p in each.topk(100)]
            assert places.index(row["label"]) == row["rank"]
            assert row["label"] == images.label(i)
            assert row["id"] == images.id(i)
            assert row["status"] == each.status
            assert row["error"] is None
            if method == "tpt":
                assert row["entropy_before"] == np.float32(each.loss)
            changed = best.label != result.zero_shot_label
            assert (row["entropies"] is not None) == (changed and "entropies" in each.extra)
        assert found["zero_shot", i]["confidence"] == zero_shot(images.image(i)).topk(1)[0].prob
    for method in ("tpt", "zero", "zero_shot"):
        row = found[method, 4]
        assert (row["prediction"], row["rank"], row["status"]) == (-1, -1, "failed")
        assert "formats" in row["error"]
    assert rows.errors(folder / "rows") == {"0004.jpg": found["tpt", 4]["error"]}


def test_each_image_is_read_once_for_all_methods(clip, tmp_path):
    images = Photos(5)
    run(images, clip, tmp_path, config("tpt,zero,mta"))
    assert sorted(images.read) == list(range(5))


@pytest.mark.parametrize("kept", [False, True])
def test_a_run_that_was_stopped_goes_on_where_it_was(clip, tmp_path, kept):
    images = Photos(10, broken=(2,))
    whole = table(run(images, clip, tmp_path / "whole"))
    features = tmp_path / "features" if kept else None
    images.read.clear()
    for count in (3, 1, 4):
        with pytest.raises(Stop):
            run(images, clip, tmp_path / "parts", features=features, seen=stop_after(count))
    folder = run(images, clip, tmp_path / "parts", features=features, every=0)
    same(table(folder), whole)
    # Some were decoded ahead when the run stopped, and are read again; rows are made once.
    assert sum(pq_rows(folder)) == len(whole)
    before = [*images.read]
    run(images, clip, tmp_path / "parts", features=features)
    assert images.read == before


def pq_rows(folder):
    import pyarrow.parquet as pq

    return [pq.read_metadata(part).num_rows for part in rows.parts(folder / "rows")]


def test_kept_features_are_read_in_place_of_images(clip, tmp_path, monkeypatch):
    images = Photos(6, broken=(1,))
    plain = table(run(images, clip, tmp_path / "plain"))
    first = run(images, clip, tmp_path / "first", features=tmp_path / "features")
    same(table(first), plain)
    images.read.clear()
    monkeypatch.setattr(Clip, "encode", None)
    again = run(images, clip, tmp_path / "again", features=tmp_path / "features")
    assert not images.read
    same(table(again), plain)
    assert rows.read(again / "rows", "tpt", 0).kept.sum() == 5
    # another method and another learning rate
    other = run(images, clip, tmp_path / "other", config("tpt,mta", lr=0.02), features=tmp_path / "features")
    assert not images.read
    assert not np.array_equal(
        rows.read(other / "rows", "tpt", 0).confidence, rows.read(again / "rows", "tpt", 0).confidence, equal_nan=True
    )


def test_features_have_a_key_of_all_that_they_depend_on(clip, tmp_path):
    images = Photos(3)
    run(images, clip, tmp_path / "a", features=tmp_path / "features", seeds=[0, 1])
    run(images, clip, tmp_path / "b", config(n_views=5, rho=0.5), features=tmp_path / "features")
    run(Photos(3, broken=(0,)), clip, tmp_path / "c", features=tmp_path / "features")
    keys = [json.loads(path.read_text()) for path in (tmp_path / "features").glob("*/key.json")]
    assert len(keys) == 4
    assert all(key["weights"] == weights_digest(clip.model) for key in keys)


def test_the_digest_of_weights_sees_one_bit(clip):
    other = deepcopy(clip.model)
    before = weights_digest(other)
    assert before == weights_digest(clip.model)
    weight = next(iter(other.visual.parameters())).detach().view(-1)
    weight[5] = torch.nextafter(weight[5], torch.tensor(9.0))
    assert weights_digest(other) != before


def test_a_damaged_shard_is_named(tmp_path):
    features = Features(tmp_path, {"a": 1}, 4)
    features.add(2, torch.randn(3, 5))
    features.write()
    shard = next(features.folder.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"features: {shard} holds no features"):
        Features(tmp_path, {"a": 1}, 4)


def test_shares_of_two_processes_are_the_rows_of_one(clip, tmp_path, monkeypatch):
    images = Photos(7)
    whole = table(run(images, clip, tmp_path / "whole", seeds=[0, 1]))
    monkeypatch.setattr(Place, "agreed", lambda self, value: order_of[self.rank] if value is None else value)
    order_of = {}
    original = evaluate.__globals__["_Run"]._todo

    def todo(self):  # what the first process would have sent
        order_of[1] = original(self)
        return order_of[1]

    monkeypatch.setattr(evaluate.__globals__["_Run"], "_todo", todo)
    images.read.clear()
    for seed in (0, 1):
        for rank in (0, 1):
            monkeypatch.setattr(Place, "here", lambda rank=rank: Place(rank, 2))
            folder = run(images, clip, tmp_path / "shared", seeds=[seed])
    assert sorted(images.read) == sorted([*range(7)] * 2)
    same(table(folder), whole)


def test_another_method_and_seed_are_added(clip, tmp_path):
    images = Photos(4)
    run(images, clip, tmp_path, config("tpt"))
    folder = run(images, clip, tmp_path, config("tpt,mta"), seeds=[0, 5])
    assert rows.runs(folder / "rows") == [(m, s) for m in ("mta", "tpt", "zero_shot") for s in (0, 5)]
    same(table(folder), table(run(images, clip, tmp_path / "at once", config("mta,tpt"), seeds=[5, 0])))


def test_rows_of_other_options_are_refused_by_name(clip, tmp_path):
    run(Photos(2), clip, tmp_path)
    for other, name in (
        (config(n_views=7), "n_views"),
        (config(lr=0.1), "lr"),
        (TuneConfig(method={"zero": Zero(gamma=0.9)}, n_views=6), "gamma"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            run(Photos(2), clip, tmp_path, other)
    with pytest.raises(ValueError, match="rows of another set: its digest was"):
        run(Photos(3), clip, tmp_path)
    model = deepcopy(clip.model)
    model.logit_scale.zero_()
    with pytest.raises(ValueError, match="weights: expected"):
        run(Photos(2), model, tmp_path, tokenizer=clip.text.tokenizer)


@pytest.mark.parametrize("seeds", [[], [1, 1], [-1], [2**64]])
def test_seeds_are_checked(clip, tmp_path, seeds):
    with pytest.raises(ValueError, match="seeds: expected"):
        run(Photos(2), clip, tmp_path, seeds=seeds)


def test_what_learns_from_a_stream_goes_on_from_its_memory(clip, tmp_path):
    images, method = Photos(12, broken=(3,)), {"tda": Tda(rho=0.4), "tpt": TuneConfig(**FEW).make_method()}
    cfg = TuneConfig(method=method, n_views=6)
    whole = table(run(images, clip, tmp_path / "whole", cfg, seeds=[0, 1]))
    reads = len(images.read)
    images.read.clear()
    with pytest.raises(Stop):
        run(images, clip, tmp_path / "parts", cfg, seeds=[0, 1], every=0, seen=stop_after(5))
    memory = [*(tmp_path / "parts" / "photos" / "memory").iterdir()]
    assert [path.name for path in memory] == ["tda-0-5.safetensors"]
    folder = run(images, clip, tmp_path / "parts", cfg, seeds=[0, 1])
    same(table(folder), whole)
    assert len(images.read) <= reads + 3  # those decoded ahead
    # without its memory it begins anew
    with pytest.raises(Stop):
        run(images, clip, tmp_path / "lost", cfg, seeds=[0, 1], every=0, seen=stop_after(5))
    for path in (tmp_path / "lost" / "photos" / "memory").iterdir():
        path.unlink()
    same(table(run(images, clip, tmp_path / "lost", cfg, seeds=[0, 1])), whole)


def test_what_learns_from_a_stream_wants_one_process(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(Place, "here", lambda: Place(0, 2))
    with pytest.raises(ValueError, match="shards: expected 1 with method 'tda'"):
        run(Photos(3), clip, tmp_path, TuneConfig(method="tda"))


def test_the_order_is_mixed_and_stays():
    assert sorted(order(1000, 3)) == list(range(1000))
    assert order(6, 0).tolist() == order(6, 0).tolist()
    assert not np.array_equal(order(50, 0), order(50, 1))
    assert order(8, 2**64 - 1).tolist() == [*order(8, 2**64 - 1)]


def test_official_draws_by_image_too(clip, tmp_path):
    images, cfg = Photos(4), TuneConfig(method="official", n_views=12)
    one = table(run(images, clip, tmp_path / "one", cfg))
    torch.manual_seed(99)
    with pytest.raises(Stop):
        run(images, clip, tmp_path / "two", cfg, seen=stop_after(2))
    same(table(run(images, clip, tmp_path / "two", cfg)), one)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kept_features_on_a_gpu(tmp_path):
    loaded = demo.load()
    clip = Clip(loaded.model.cuda(), tokenizer=loaded.tokenizer)
    images, features = Photos(6, broken=(1,)), tmp_path / "features"
    first = run(images, clip, tmp_path / "first", features=features)
    images.read.clear()
    again = run(images, clip, tmp_path / "again", features=features)
    assert not images.read
    same(table(again), table(first))
