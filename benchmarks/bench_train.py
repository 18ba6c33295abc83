"""A step of training a prompt, ViT-B/16: on kept features through the packed tower, against the published way.

That runs the images of the batch and all 77 tokens of every prompt; "text alone" leaves its images out. CoOp: 100
classes, 32 images, 16 vectors. CoCoOp: 20 classes, one image, 4 vectors. ``--text-sizes`` also measures a step of CoOp
with ImageNet's 1000 classes, and how far it raises the memory in use.
"""

from statistics import median

import open_clip
import pytest
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from torch.nn.functional import cross_entropy, normalize

from tpt_fast.bench import rows
from tpt_fast.bench.peak import Peak
from tpt_fast.bench.turns import take_turns
from tpt_fast.clip import Clip
from tpt_fast.methods.published import context_in_place
from tpt_fast.prompting import train

REPEATS, SECONDS = 5, 20
CASES = {"coop": (100, 32, 16), "cocoop": (20, 1, 4)}  # classes, images a step, vectors


def prepared(kind, classes, n_ctx):
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16").eval().requires_grad_(False)
    clip = Clip(model)
    names = tuple(IMAGENET_CLASSNAMES[:: len(IMAGENET_CLASSNAMES) // classes][:classes])
    listed = train._classes(clip, names, "a photo of a", n_ctx, seed=1)
    ctx, features = listed.text.ctx_init, normalize(torch.randn(64, 1, 512), dim=-1)
    learner = train._Coop(ctx) if kind == "coop" else train._Cocoop(ctx, 512, seed=1)
    labels = torch.arange(64) % classes
    return model, names, train._Run(listed, learner, train.Recipe(), features, labels), features[:, 0], labels


@pytest.mark.parametrize("kind", CASES)
def test_step(kind, keep):
    classes, batch, n_ctx = CASES[kind]
    model, names, run, features, labels = prepared(kind, classes, n_ctx)
    ids = open_clip.get_tokenizer("ViT-B-16")(
        [f"{' '.join(['X'] * n_ctx)} {name.replace('_', ' ')}." for name in names]
    )
    twin = train._Coop(run.classes.text.ctx_init) if kind == "coop" else train._Cocoop(run.learner.ctx.detach(), 512, 1)
    optimizer = torch.optim.SGD(twin.parameters(), lr=2e-3, momentum=0.9, weight_decay=5e-4)
    images, targets = torch.randn(batch, 3, 224, 224), labels[:batch]

    def logits(x):
        contexts = twin(x)
        found = []
        for ctx, rows_of in [(contexts, x)] if kind == "coop" else zip(contexts, x.split(1), strict=True):
            with context_in_place(model.token_embedding, ctx):
                found.append(model.logit_scale.exp() * rows_of @ normalize(model.encode_text(ids), dim=-1).T)
        return torch.cat(found)

    def text_alone(x=features[:batch]):
        optimizer.zero_grad()
        loss = cross_entropy(logits(x), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def published():
        with torch.no_grad():
            x = normalize(model.encode_image(images), dim=-1)
        return text_alone(x)

    def ours():
        return run.step(features[:batch], targets)[0]

    losses = []
    runs = {"tpt_fast": ours, "text alone": text_alone, "published": published}
    taken = take_turns({name: lambda run=run: losses.append(run()) for name, run in runs.items()}, REPEATS, SECONDS)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3)  # from the same start
    case = f"{kind}, ViT-B-16, {classes} classes, {batch} images a step, {n_ctx} vectors"
    keep([rows.row("train", case, backend, seconds) for backend, seconds in taken.items()])
    ratios = {backend: median(seconds) / median(taken["tpt_fast"]) for backend, seconds in taken.items()}
    print({backend: f"{ratio:.1f} times tpt_fast's" for backend, ratio in ratios.items()})
    if kind == "coop":
        assert ratios["published"] > 10


def test_memory_of_a_thousand_classes(keep, request):
    if not request.config.getoption("--text-sizes"):
        pytest.skip("--text-sizes")
    _, _, run, features, labels = prepared("coop", 1000, 16)
    peak, taken = Peak(features.device), []
    for _ in range(2):
        taken += take_turns({"step": lambda: peak.of(lambda: run.step(features[:32], labels[:32]))}, 1)["step"]
    estimate = run.classes.text.describe()["kept_bytes"]
    case = "coop, ViT-B-16, 1000 classes, 32 images a step, 16 vectors"
    keep([rows.row("train", case, "tpt_fast", taken, peak_mb=peak.mb, kept_mb=round(estimate / 1e6))])
    assert peak.bytes is None or peak.bytes < 4e9
