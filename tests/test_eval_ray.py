"""TunerSpec travels; TuneBatch answers as a Tuner does, batch by batch and in Ray."""

import os
import pickle
import signal
import sys

import numpy as np
import pytest
from eval_sets import jpegs

from tpt_fast import TuneConfig, demo
from tpt_fast.evaluation.ray import TuneBatch
from tpt_fast.evaluation.spec import TunerSpec

SPEC = TunerSpec(config=TuneConfig(n_views=6, rho=0.4, method="tpt,zero"))


@pytest.fixture(scope="module")
def tuned():
    return TuneBatch(SPEC, "jpeg")


def batch_of(count):
    images = [*jpegs(count)]
    images[2] = b"no image"
    return {"id": np.arange(count), "jpeg": np.array(images, object), "note": np.array(["x"] * count, object)}


def test_a_spec_is_small_and_travels():
    spec = TunerSpec("ViT-B-16", "openai", ["a", "b"], TuneConfig(lr=0.1))
    content = pickle.dumps(spec)
    assert len(content) < 2000
    assert pickle.loads(content) == spec
    assert pickle.loads(pickle.dumps(SPEC)).build("cpu").classnames == demo.CLASSNAMES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "ViT-B-16", "classnames": ["a"]}, "pretrained: expected a tag"),
        ({"model": "ViT-B-16", "pretrained": "openai"}, "classnames: expected names"),
        ({"pretrained": "openai"}, "pretrained: expected None with the demo"),
        ({"classnames": []}, "classnames"),
    ],
)
def test_a_spec_is_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        TunerSpec(**arguments)


def test_columns_stay_and_answers_are_the_tuners(tuned):
    given = batch_of(5)
    found = tuned(given)
    assert [*found] == [
        *given, "tpt_label", "tpt_index", "tpt_prob", "zero_label", "zero_index", "zero_prob", "error",
    ]  # fmt: skip
    for name, column in given.items():
        assert found[name] is column
    assert found["tpt_index"].dtype == found["zero_index"].dtype == np.int32
    assert found["tpt_prob"].dtype == np.float32
    tuner = SPEC.build("cpu")
    for i, image in enumerate(given["jpeg"]):
        if i == 2:
            assert "formats" in found["error"][i]
            assert (found["tpt_label"][i], found["tpt_index"][i]) == ("", -1)
            assert np.isnan(found["tpt_prob"][i])
            continue
        for name, result in tuner(image).by_method.items():
            best = result.topk(1)[0]
            assert (found[f"{name}_label"][i], found[f"{name}_index"][i]) == (best.label, best.index)
            assert found[f"{name}_prob"][i] == np.float32(best.prob)
            assert found["error"][i] == ""


def test_batches_do_not_count(tuned):
    given = batch_of(5)
    whole = tuned(given)
    for i in range(5):
        one = tuned({name: column[i : i + 1] for name, column in given.items()})
        for name in ("tpt_index", "tpt_prob", "error"):
            assert np.array_equal(one[name], whole[name][i : i + 1], equal_nan=name == "tpt_prob")


def test_paths_and_an_empty_batch(tuned, tmp_path):
    file = tmp_path / "a.jpg"
    file.write_bytes(jpegs(1)[0])
    found = TuneBatch.__call__(tuned, {"jpeg": np.array([str(file), str(tmp_path / "gone.jpg")], object)})
    assert found["error"][0] == ""
    assert "gone.jpg" in found["error"][1]
    assert tuned({"jpeg": np.array([], object)})["tpt_index"].dtype == np.int32


def test_bad_usage(tuned):
    with pytest.raises(ValueError, match="column: expected one of id, image, got 'jpeg'"):
        tuned({"id": [1], "image": [b""]})
    with pytest.raises(ValueError, match="prefix: expected one with which no column is there twice, got 'error'"):
        tuned({"jpeg": np.array([b""], object), "error": [""]})
    with pytest.raises(ValueError, match="shards: expected 1 with method 'tda'"):
        TuneBatch(TunerSpec(config=TuneConfig(method="tda")))


class KilledOnce(TuneBatch):
    """Its process is killed in the second batch that it sees, once in all."""

    def __init__(self, mark: str, **arguments):
        super().__init__(**arguments)
        self._mark, self._seen = mark, 0

    def __call__(self, batch):
        self._seen += 1
        if self._seen == 2:
            try:
                os.close(os.open(self._mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


@pytest.mark.slow
def test_from_parquet_to_parquet_with_an_actor_killed_half_way(tuned, tmp_path):
    ray = pytest.importorskip("ray")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("ray.data")
    given = batch_of(12)
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({name: column.tolist() for name, column in given.items()}), tmp_path / "in" / "a.parquet")
    path = os.pathsep.join([*filter(None, sys.path)])
    ray.init(
        num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}}
    )
    try:
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        answers = ray.data.read_parquet(str(tmp_path / "in"), override_num_blocks=1).map_batches(
            KilledOnce,
            fn_constructor_kwargs={"mark": str(tmp_path / "killed"), "spec": SPEC, "column": "jpeg", "device": "cpu"},
            batch_size=3,
            concurrency=1,
            num_cpus=1,
        )
        answers.write_parquet(str(tmp_path / "out"))
    finally:
        ray.shutdown()
    assert (tmp_path / "killed").exists()
    found = pq.read_table(tmp_path / "out")
    expected = tuned(given)
    assert found.schema.names == [*expected]
    assert found.schema.field("tpt_index").type == pa.int32()
    assert found.schema.field("tpt_prob").type == pa.float32()
    for name, column in expected.items():
        assert str(found[name].to_pylist()) == str(column.tolist())
