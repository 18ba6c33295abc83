"""CoOp's contexts, as its trainer saves them and as its own code answers with them (golden/methods)."""

import numpy as np
import pytest
import torch
from test_official import model  # noqa: F401 (a fixture)
from test_official_methods import assert_close, assert_tuned, case, family, folder, views  # noqa: F401 (some fixtures)

from tpt_fast import TuneConfig, Tuner
from tpt_fast.methods import Tpt
from tpt_fast.prompting.coop import load_ctx

pytestmark = pytest.mark.numerics
WHERE = {"end": "X X X X", "middle": "X X [CLS] X X", "front": "[CLS] X X X X"}


@pytest.mark.parametrize("name", ["coop_1", "coop_2", "coop_3", "coop_4"])
def test_tpt_from_coops_context(model, case, name):  # noqa: F811
    found, given = case(name)
    start = WHERE[str(found["position"])]
    config = TuneConfig(ctx_init=start, ctx=torch.from_numpy(found["ctx_start"]), method=family(found, Tpt))
    result = Tuner(model, [str(each) for each in found["classnames"]], config).tune_views(given)
    assert_close("zero_shot_logits", result.zero_shot_logits, found["logits_own_view0"][0])
    assert result.selected.tolist() == found["selected"].tolist()
    assert_close("entropies", result.entropies, found["entropies"])
    assert_close("loss", torch.tensor(result.loss), found["step_loss"][0])
    assert_tuned(found, result, "ctx", int(found["steps"]))
    assert_close("logits", result.logits, found["logits"][0])


@pytest.mark.parametrize(("file", "name"), [("coop_generic16", "coop_1"), ("coop_csc4", "coop_4")])
def test_checkpoints_with_their_schedulers(folder, case, file, name):  # noqa: F811
    found, _ = case(name)
    ctx = load_ctx(folder / "checkpoints" / f"{file}.pth.tar", found["ctx_start"].shape[-1])
    assert np.array_equal(ctx.numpy(), found["ctx_start"].astype(np.float16).astype(np.float32))


def test_cocoops_checkpoint_is_not_coops(folder):  # noqa: F811
    with pytest.raises(ValueError, match=r"holds 'meta_net\..*': it is CoCoOp's, .* expected CoOp's"):
        load_ctx(folder / "checkpoints" / "cocoop.pth.tar", 128)
