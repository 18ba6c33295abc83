"""The published code's own answers (golden/), on a small seeded CLIP."""

import json
from types import SimpleNamespace

import bounds
import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from golden.make import published

from tpt_fast import TextEncoder, TuneConfig, Tuner, load_image, make_views
from tpt_fast.reference.objective import objective
from tpt_fast.views.make import CLIP_MEAN, CLIP_STD

pytestmark = pytest.mark.numerics

CASES = ["end1", "end3", "coop1", "middle1"]


@pytest.fixture(scope="module")
def model(golden_dir):
    model = open_clip.model.CLIP(**json.loads((golden_dir / "config.json").read_text()))
    state = safetensors.torch.load_file(golden_dir / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    assert not [name for name, _ in model.named_parameters() if name not in state]
    return model


@pytest.fixture(scope="module")
def boxes(golden_dir):
    return torch.from_numpy(np.load(golden_dir / "boxes.npy"))


@pytest.fixture(scope="module")
def views(golden_dir):
    pixels = torch.from_numpy(np.load(golden_dir / "views_u8.npy")).float() / 255
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


@pytest.fixture(scope="module", params=CASES)
def case(request, golden_dir, model, views):
    """What the published code answered, and what rounding in float32 does to it."""
    case = np.load(golden_dir / "cases" / f"{request.param}.npz")
    template = template_of(case)
    words = np.array_equal(case["ctx_init"], initial_words(model, template))
    given = None if words else torch.from_numpy(case["ctx_init"])
    arguments = (
        [str(name).replace("_", " ") for name in case["classnames"]],
        template,
        int(case["steps"]),
        float(case["rho"]),
    )
    arguments = *arguments, float(case["lr"]), given
    allowed = bounds.moved(model, lambda model: published(model, views.double(), *arguments))
    fields = {name: torch.from_numpy(case[name]) for name in ("entropies", "selected", "ctx_init", "ctx")}
    grad = torch.from_numpy(case["grad"]).view(case["ctx"].shape)
    fields |= {"grad": grad, "logits": torch.from_numpy(case["logits"])[0], "loss": float(case["loss"])}
    before = torch.from_numpy(case["logits_before"])
    fields |= {"logits_before": before, "zero_shot_logits": before[0], "arguments": arguments}
    return SimpleNamespace(**fields, allowed=allowed | {"zero_shot_logits": allowed["logits_before"]})


def template_of(case):
    template = str(case["ctx_template"]).replace("_", " ")
    template = "a photo of a" if template.startswith("<") else template  # a given context in place of the words'
    return template if "[CLS]" in template else f"{template} [CLS]"


def initial_words(model, template):
    ids = open_clip.tokenizer.SimpleTokenizer()([template.replace("[CLS]", "")])[0]
    words = ids[1 : int(ids.argmax())]
    return model.token_embedding(words).detach().numpy()


def tuner_of(case, model, engine):
    names, template, steps, rho, lr, given = case.arguments
    options = {} if given is None else {"ctx": given}
    return Tuner(model, names, TuneConfig(rho=rho, steps=steps, lr=lr, ctx_init=template, engine=engine, **options))


def assert_equal_to(case, result):
    assert result.status == "tuned"
    assert result.selected.tolist() == case.selected.tolist()
    bounds.assert_same_answer(result, case, case.allowed, case.arguments[4], case.arguments[2])


@pytest.mark.parametrize("engine", ["module", "auto"])
def test_from_the_published_views(case, engine, model, views):
    assert_equal_to(case, tuner_of(case, model, engine).tune_views(views))


def test_from_the_photograph(case, golden_dir, model, boxes):
    assert_equal_to(case, tuner_of(case, model, "auto")(golden_dir / "photo.jpg", boxes=boxes))


def test_views_of_the_photograph_bit_for_bit(golden_dir, boxes, views):
    assert torch.equal(make_views(load_image(golden_dir / "photo.jpg"), size=96, boxes=boxes), views)


@pytest.mark.parametrize("engine", ["packed", "module"])
def test_the_text_tower_alone(case, engine, model, views):
    """The published code's logits of all views, and its context gradient from the kept ones."""
    names, template, steps, *_, given = case.arguments
    encoder = TextEncoder(model.eval(), names, template, engine=engine, ctx=given)
    assert torch.equal(encoder.ctx_init, case.ctx_init)
    with torch.no_grad():
        images, scale = model.encode_image(views, normalize=True), model.logit_scale.exp()
        text, tape = encoder.initial()
        logits = scale * images @ text.T
        kept = objective(logits, len(case.selected))
        slope = encoder.backward(tape, scale * kept[3].T @ images[kept[1]])
    bounds.assert_within(logits, case.logits_before, 2 * case.allowed["logits_before"])
    if steps == 1:  # else it is the last step's
        bounds.assert_within(slope, case.grad, 2 * 4 * case.allowed["grad"])
