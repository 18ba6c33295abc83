"""The other methods' published code, its own answers (golden/methods), on the model of test_official.py."""

import numpy as np
import pytest
import torch
from test_official import model  # noqa: F401 (a fixture)

from tpt_fast import TuneConfig, Tuner
from tpt_fast.methods import Ctpt, Ensemble, Mta, Otpt, Rtpt, Tda, Tps, Zero
from tpt_fast.methods.mta import bandwidths
from tpt_fast.text.classes import Classes
from tpt_fast.text.encoder import TextEncoder
from tpt_fast.views.make import CLIP_MEAN, CLIP_STD

pytestmark = pytest.mark.numerics


@pytest.fixture(scope="module")
def folder(golden_dir):
    if not (golden_dir / "methods").is_dir():
        pytest.skip("no golden answers of the other methods")
    return golden_dir / "methods"


@pytest.fixture(scope="module")
def views(golden_dir, folder):
    """Normalised views of a photograph by the name of its set."""
    inputs = np.load(folder / "inputs.npz")
    plain = np.load(golden_dir / "views_u8.npy")
    stream = [
        plain[:20],
        inputs["tda_fresh_u8"][0],
        inputs["views2_u8"][:20],
        plain[20:40],
        *inputs["tda_fresh_u8"][1:],
    ]
    pixels = {"views": plain, "views2": inputs["views2_u8"], "tda_single": inputs["tda_single_u8"][:, None]}
    pixels["tda_multi"] = np.stack(stream)
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return {name: (torch.from_numpy(each).float() / 255 - mean) / std for name, each in pixels.items()}


@pytest.fixture(scope="module")
def case(folder, views):
    """A case by its name, with its views."""

    def load(name):
        path = folder / "cases" / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"these golden answers have no {name}")
        found = dict(np.load(path))
        given = views[str(found["view_set"])]
        return found, given[: int(found.get("n_views", len(given)))]

    return load


def assert_close(name, got, want):
    """As the README of golden/methods has it."""
    want = torch.as_tensor(np.asarray(want)).float()
    error = (got - want).abs().max() / want.abs().max()
    assert error < 1e-4, f"{name}: off by {error:.1e} of the largest value"


def tuner_of(model, case, method):  # noqa: F811
    names = [str(name) for name in case["classnames"]]
    return Tuner(model, names, TuneConfig(ctx_init=str(case["ctx_template"]), method=method))


def family(case, kind, **options):
    return kind(rho=float(case["rho"]), steps=int(case["steps"]), lr=float(case["lr"]), **options)


def templates(case):
    return [str(each) for each in case["templates"]]


def features_of(encoded):
    return torch.nn.functional.normalize(torch.as_tensor(encoded).float(), dim=-1)


def assert_tuned(case, result, name, steps):
    """Gradient and value of the last step; a first AdamW step goes by the sign, so where that is rounding it may not
    agree."""
    grad, value = (torch.as_tensor(case[each][-1]) for each in ("step_grad", f"step_{name}"))
    assert_close("grad", result.grad, grad)
    clear = torch.ones_like(grad, dtype=torch.bool)
    for each in torch.as_tensor(case["step_grad"]):
        clear &= each.abs() > 1e-5 * each.abs().max()
    off = (getattr(result, name) - value).abs()
    assert off[clear].max() < 1e-5
    assert off.max() <= 2.001 * float(case["lr"]) * steps
    assert clear.float().mean() > 0.5


@pytest.mark.parametrize("name", ["ctpt_1", "ctpt_2", "ctpt_3", "otpt_1", "otpt_2"])
def test_ctpt_and_otpt(model, case, name):  # noqa: F811
    found, views = case(name)
    kind, term = (Ctpt, "step_atfd") if name.startswith("c") else (Otpt, "step_ortho")
    options = {"two_step": bool(found["two_step"])} if kind is Ctpt else {}
    method = family(found, kind, lambda_term=float(found["lambda"]), **options)
    result = tuner_of(model, found, method).tune_views(views)
    assert result.selected.tolist() == found["selected"].tolist()
    assert_close("entropies", result.entropies, found["entropies"])
    assert_close("loss", torch.tensor(result.loss), found["step_loss"][0])
    assert_close("term", torch.tensor(result.term), found[term][0])
    assert_tuned(found, result, "ctx", method.steps)
    assert_close("logits", result.logits, found["logits"][0])
    assert_close("zero_shot_logits", result.zero_shot_logits, found["logits_before"][0])


@pytest.mark.parametrize("name", ["rtpt_1", "rtpt_2"])
def test_rtpt(model, case, name):  # noqa: F811
    found, views = case(name)
    method = family(found, Rtpt)
    result = tuner_of(model, found, method).tune_views(views)
    assert result.selected.tolist() == found["selected"].tolist()
    assert_close("loss", torch.tensor(result.loss), found["step_loss"][0])
    assert_tuned(found, result, "ctx", method.steps)
    # The published weights, of the views whose squares rounded to 1 on the machine that made them.
    weight = method.view_weights(torch.as_tensor(found["similarity"])[None])[0]
    assert_close("weight", weight, found["weight"])
    assert_close("logits", weight @ torch.as_tensor(found["logits_tuned"]), found["logits"][0])
    # Ours: no view is its own neighbour.
    similarity = torch.as_tensor(found["image_features"]) @ torch.as_tensor(found["image_features"]).T
    nearest = similarity.fill_diagonal_(-torch.inf).sort(descending=True).values[:, :20].mean(1)
    weight = (nearest / 0.01).softmax(0)
    assert_close("view_weights", result.view_weights, weight)
    assert_close("answer", result.logits, weight @ torch.as_tensor(found["logits_tuned"]))
    assert_close("zero_shot_logits", result.zero_shot_logits, found["logits_before"][0])


@pytest.mark.parametrize("name", ["tps_1", "tps_2"])
def test_tps(model, case, name):  # noqa: F811
    found, views = case(name)
    method = family(found, Tps, templates=templates(found) if "templates" in found else None)
    tuner = tuner_of(model, found, method)
    result = tuner.tune_views(views)
    prototypes = tuner.classes.prototypes(method.templates)
    assert_close("prototypes", prototypes, features_of(found["prototypes"]))
    assert result.selected.tolist() == found["step_selected"][0].tolist()
    assert_close("loss", torch.tensor(result.loss), found["step_loss"][0])
    assert_tuned(found, result, "shift", method.steps)
    assert_close("logits", result.logits, found["logits"][0])
    assert_close("zero_shot_logits", result.zero_shot_logits, found["logits_before"][0]) if name == "tps_1" else None


@pytest.mark.parametrize("name", ["zero_1", "zero_2", "zero_4", "zero_5"])
def test_zero(model, case, name):  # noqa: F811
    found, views = case(name)
    method = Zero(gamma=float(found["gamma"]), templates="simple" if found["templates"] else None, strict=True)
    result = tuner_of(model, found, method).tune_views(views)
    order = found["order"][: int(found["kept"])]
    assert result.selected.tolist() == order.tolist()
    assert_close("entropies", result.entropies, found["entropies"])
    assert_close("votes", result.votes, found["votes"])
    assert_close("shares", result.probs, found["result"][0] / found["result"][0].sum())
    assert result.index == int(found["argmax_result"])
    if name != "zero_5":  # else a tie that nothing decides
        ours = tuner_of(model, found, Zero(gamma=method.gamma, templates=method.templates)).tune_views(views)
        assert torch.equal(ours.logits, result.logits)


@pytest.mark.parametrize("name", ["zero_1", "zero_3", "zero_4", "zero_5"])
def test_zero_from_the_published_cosines(case, name):
    found, _ = case(name)
    cosines, entropies = (torch.as_tensor(found[each])[None] for each in ("cosine", "entropies"))
    got = Zero(gamma=float(found["gamma"]), half=bool(found["half"]), strict=True).vote(cosines, entropies)
    assert_close("votes", got["votes"][0], found["votes"])
    assert_close("result", got["decided"], found["result"])
    assert got["decided"].argmax() == int(found["argmax_result"])
    tied = (got["votes"][0] == got["votes"].max()).nonzero().flatten()
    assert tied.tolist() == sorted(found["ties"].tolist())
    if len(tied) > 1:
        won = (got["decided"] - got["votes"])[0].argmax()
        assert won == int(found["prediction"])


def test_zero_in_half_precision(model, case):  # noqa: F811
    found, views = case("zero_3")
    method = Zero(gamma=float(found["gamma"]), half=True, strict=True)
    tuner = tuner_of(model, found, method)
    classes = Classes((), tuner.classes.text, tuner.clip.scale)
    entropies = method.entropies(torch.as_tensor(found["cosine"])[None], classes)
    assert_close("entropies", entropies[0], found["entropies"])
    result = tuner.tune_views(views)
    assert result.votes.frac().abs().max() > 0.01
    assert result.index == int(found["argmax_result"])


@pytest.mark.parametrize("name", ["mta_1", "mta_2"])
def test_mta(model, case, name):  # noqa: F811
    found, views = case(name)
    options = {each: float(found[each]) for each in ("lambda_y", "lambda_q")}
    result = tuner_of(model, found, Mta(**options)).tune_views(views)
    assert_close("inlierness", result.inlierness, found["inlierness"][-1])
    assert_close("mode", result.mode, found["mode"][-1])
    assert_close("logits", result.logits, found["logits"][0])
    images, affinity = (torch.as_tensor(found[each])[None] for each in ("image_features", "affinity"))
    assert_close("bandwidth", bandwidths(images)[0].sqrt(), found["bandwidth"])
    for rounds in range(1, 6):
        got = Mta(**options, rounds=rounds).shift(images, torch.as_tensor(found["bandwidth"])[None].square(), affinity)
        assert_close("inlierness", got.inlierness[0], found["inlierness"][rounds - 1])
        assert_close("mode", got.mode[0], found["mode"][rounds - 1])


@pytest.mark.parametrize("name", ["tda_1", "tda_2"])
def test_tda(model, folder, views, name):  # noqa: F811
    found = dict(np.load(folder / "cases" / f"{name}.npz"))
    method = Tda(
        plain_view=str(found["view_set"]) == "tda_single",
        templates=templates(found),
        positive_capacity=int(found["positive_shot_capacity"]),
        positive_alpha=float(found["positive_alpha"]),
        positive_beta=float(found["positive_beta"]),
        negative_capacity=int(found["negative_shot_capacity"]),
        negative_alpha=float(found["negative_alpha"]),
        negative_beta=float(found["negative_beta"]),
        negative_entropy=tuple(float(found[f"negative_entropy_threshold_{end}"]) for end in ("lower", "upper")),
        negative_mask=tuple(float(found[f"negative_mask_threshold_{end}"]) for end in ("lower", "upper")),
        strict=True,
    )
    names = [str(each) for each in found["classnames"]]
    tuner = Tuner(model, names, TuneConfig(method=method))
    assert_close("text_features", tuner.classes.prototypes(method.templates), found["text_features"])
    for i, given in enumerate(views[str(found["view_set"])]):
        if len(given) == 1:
            given = given.expand(2, -1, -1, -1)  # of which plain_view reads the first
        result = tuner.tune_views(given)
        assert_close("logits", result.logits, found["final_logits"][i])
        assert_close("entropy", torch.tensor(result.entropy), found["entropy"][i])
        state = method.state()
        for of, short in (("positive", "pos"), ("negative", "neg")):
            held = state[f"{of}.entropies"].isfinite()
            order = np.argsort(found[f"{short}_class_{i}"], kind="stable")  # by class, as ours lie
            assert held.nonzero()[:, 0].tolist() == found[f"{short}_class_{i}"][order].tolist()
            assert state[f"{of}.images"][held].tolist() == found[f"{short}_image_{i}"][order].tolist()
            if held.any():
                assert_close("entropies", state[f"{of}.entropies"][held], found[f"{short}_entropy_{i}"][order])


@pytest.mark.parametrize("name", ["ensemble_1", "ensemble_2"])
@pytest.mark.parametrize("engine", ["auto", "module"])
def test_ensemble(model, case, name, engine):  # noqa: F811
    found, views = case(name)
    method = Ensemble("openai" if name == "ensemble_1" else "simple")
    assert sorted(method.templates) == sorted(templates(found))
    names = [str(each) for each in found["classnames"]]
    if engine == "module":  # some classes and templates: it is slow
        encoder = TextEncoder(model, names[:3], engine="module")
        some = Classes.of(tuple(names[:3]), encoder, torch.ones(()), None).prototypes(templates(found)[:7])
        want = Tuner(model, names[:3]).classes.prototypes(templates(found)[:7])
        assert_close("text_features", some, want)
        return
    tuner = Tuner(model, names, TuneConfig(method=method))
    assert_close("text_features", tuner.classes.prototypes(method.templates), found["text_features"])
    assert_close("logits", tuner.tune_views(views).logits, found["logits"][0])
