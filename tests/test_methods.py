"""All methods against plain formulas, one image after the other, on a small model; test_official_methods.py holds them
to their authors' answers."""

import math
from contextlib import nullcontext

import open_clip
import pytest
import torch
from fake_cuda import DEVICE, on_cuda
from method_cases import FEW, METHODS_HERE, NAMES, close, make, small_clip, view_features
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from tpt_fast import TuneConfig, Tuner
from tpt_fast._stages import Stages
from tpt_fast.demo import PHOTO_FOLDER
from tpt_fast.graphs.capturable import ObstacleFinder
from tpt_fast.methods import Ctpt, Otpt, Rtpt, Tda, Tps, Zero, method_class


@pytest.fixture(scope="module")
def model():
    return small_clip()


@pytest.fixture(scope="module")
def features():
    return view_features()


# --- everywhere


@pytest.mark.parametrize("name", METHODS_HERE)
def test_a_batch_is_one_after_the_other(model, features, name):
    many, single = make(model, name).tune_features(features), make(model, name)
    for got, given in zip(many, features, strict=True):
        want = single.tune_features(given)
        assert (got.status, got.method) == ("tuned", name)
        close(got.logits, want.logits, 1e-4)
        close(got.zero_shot_logits, want.zero_shot_logits)
        assert got.logits[1] == got.logits[4]
        assert got.extra.keys() == want.extra.keys()
    assert not torch.equal(many[0].logits, many[1].logits)


@pytest.mark.parametrize("name", METHODS_HERE)
def test_a_stream_and_its_unreadable_image(model, name):
    small = Image.open(PHOTO_FOLDER / "rocket.jpg").convert("RGB").resize((70, 130))
    images = [PHOTO_FOLDER / "cat.jpg", "nowhere.png", small]
    got, single = list(make(model, name).map(images)), make(model, name)
    assert [each.status for each in got] == ["tuned", "failed", "tuned"]
    for i in (0, 2):
        close(got[i].logits, single(images[i]).logits)
        assert set(got[i].to_dict()) >= {"logits", "label", "prob"}
        assert repr(got[i]).startswith("TuneResult(")
    figure = make(model, name)(images[0], keep_views=True).plot()
    assert len(figure.axes) >= 24


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", METHODS_HERE)
def test_towers_of_half_precision(model, features, name, precision):
    exact, half = (make(model, name, precision=p).tune_features(features[0]) for p in ("fp32", precision))
    assert half.status == "tuned"
    assert half.logits.dtype == torch.float32
    close(half.zero_shot_logits, exact.zero_shot_logits, 0.05)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", [name for name in METHODS_HERE if not method_class(name).online])
def test_a_cuda_graph_captures_it(model, name, images):
    tuner, mode = make(model, name), FakeTensorMode()
    assert tuner.method.capturable
    twin = on_cuda(tuner, mode)
    with mode, torch.no_grad(), ObstacleFinder() as finder:
        views = torch.empty(images, 24, 3, 32, 32, device=DEVICE)
        twin.run(twin.classes, views, Stages())
    assert finder.obstacle is None


def test_caches_stay_on_the_device(model):
    """An online method is not captured, but nothing in it waits for a value either."""
    tuner, mode = make(model, "tda"), FakeTensorMode()
    tuner.method._memory.lock = nullcontext()  # locks cannot be copied
    twin = on_cuda(tuner, mode)
    with mode, torch.no_grad(), ObstacleFinder() as finder:
        twin.method(torch.empty(2, 24, 32, device=DEVICE), twin.classes, Stages())
    assert finder.obstacle is None
    assert not tuner.method.capturable


def test_only_the_context_keeps_activations(model):
    """Of the initial prompt, for a backward pass that other methods do not have."""
    kept = {name: make(model, name).memory()["kept activations"].own for name in ("tpt", "zero", "tps", "tda")}
    assert kept["zero"] == kept["tps"] == kept["tda"] < kept["tpt"] / 4


# --- objectives and terms


def plain_term(name, features):
    if name == "ctpt":
        return (features - features.mean(0)).norm(dim=-1).mean()
    return ((features @ features.T).norm(dim=-1) - 1).mean()


@pytest.mark.parametrize("kind", [Ctpt, Otpt])
def test_terms_are_what_autograd_differentiates(kind):
    features = torch.nn.functional.normalize(torch.randn(2, 7, 5, dtype=torch.float64), dim=-1)
    value, grad = kind().term(features)
    for i, each in enumerate(features):
        leaf = each.clone().requires_grad_()
        want = plain_term(kind.name, leaf)
        torch.testing.assert_close(value[i], want.detach())
        torch.testing.assert_close(grad[i], torch.autograd.grad(want, leaf)[0])


@pytest.mark.parametrize("name", ["ctpt", "otpt"])
def test_a_term_is_an_objective_of_the_class_features(model, features, name):
    """Also where names repeat, which count as often as they come."""

    def objective(logits, text_features):
        assert text_features.shape == (5, 32)
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        mean = logits[entropy.argsort(stable=True)[:6]].softmax(-1).mean(0)
        return -(mean * mean.log()).sum() + {"ctpt": -3, "otpt": 3}[name] * plain_term(name, text_features)

    ours = make(model, {"ctpt": Ctpt, "otpt": Otpt}[name](rho=0.25, lambda_term=3.0)).tune_features(features)
    own = Tuner(model, NAMES, TuneConfig(**FEW), objective=objective).tune_features(features)
    plain = make(model, "tpt").tune_features(features)
    for got, want, without in zip(ours, own, plain, strict=True):
        close(got.grad, want.grad, 1e-4)
        assert got.loss == pytest.approx(want.loss, rel=1e-4)
        assert (got.grad - without.grad).abs().max() > 1e-3 * without.grad.abs().max()


def test_the_first_term_is_computed_once(model, features, monkeypatch):
    tuner, calls = make(model, "ctpt"), []
    term = Ctpt.term
    monkeypatch.setattr(Ctpt, "term", lambda self, features: calls.append(features.dim()) or term(self, features))
    tuner.tune_features(features)
    tuner.tune_features(features[0])
    assert calls == [3, 3]  # after the update, for loss_after


def test_an_objective_of_all_three(model, features):
    """Logits that it computes itself are as good as ours."""
    scale = model.logit_scale.exp().detach()

    def ours(logits):
        return logits.logsumexp(-1).mean()

    def own(logits, text_features, image_features):
        return (scale * image_features @ text_features.T).logsumexp(-1).mean()

    def both(logits, text_features, image_features):
        return 0.25 * ours(logits) + 0.75 * own(logits, text_features, image_features)

    found = [
        Tuner(model, NAMES, TuneConfig(**FEW), objective=each).tune_features(features[0]) for each in (ours, own, both)
    ]
    for other in found[1:]:
        close(other.grad, found[0].grad, 1e-5)
        assert other.loss == pytest.approx(found[0].loss, rel=1e-5)


def test_how_many_arguments_an_objective_has(model, features):
    class Module(torch.nn.Module):
        def forward(self, logits, text_features):
            return logits.sum() * text_features.square().sum()

    for fine in (Module(), lambda logits, temperature=2.0: (logits / temperature).sum(), lambda *given: given[0].sum()):
        assert Tuner(model, NAMES, TuneConfig(**FEW), objective=fine).tune_features(features[0]).status == "tuned"
    for bad in (lambda: 0, lambda a, b, c, d: a):
        with pytest.raises(
            TypeError, match=r"objective: expected a function of the logits, or \(logits, text_features\)"
        ):
            Tuner(model, NAMES, objective=bad)
    constant = Tuner(model, NAMES, TuneConfig(**FEW), objective=lambda a, b: torch.ones(()))
    with pytest.raises(ValueError, match="expected it to depend on the logits or the class features"):
        constant.tune_features(features[0])
    with pytest.raises(ValueError, match="objective: expected None with method 'zero'"):
        Tuner(model, NAMES, TuneConfig(method="zero"), objective=lambda logits: logits.sum())


def test_two_steps_of_ctpt(model, features):
    """The entropy's, and then the term's, through one optimizer."""
    tuner = make(model, Ctpt(rho=0.25, two_step=True))
    result, text = tuner.tune_features(features[0]), tuner.classes.text
    ctx = torch.nn.Parameter(text.ctx_init.clone())
    optimizer = torch.optim.AdamW([ctx], lr=5e-3)
    for part in range(2):
        encoded = text.encode(ctx)[tuner.classes.inverse]
        if part == 0:
            mean = (model.logit_scale.exp().detach() * features[0][result.selected] @ encoded.T).softmax(-1).mean(0)
            loss = -(mean * mean.log()).sum()
        else:
            loss = -50 * plain_term("ctpt", encoded)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((result.ctx - ctx.detach()).abs() > 1e-5).float().mean() < 0.02
    with pytest.raises(ValueError, match="steps: expected 1 or 2"):
        Ctpt(steps=3, two_step=True)


# --- each against its plain formula


def encoded(model, names, template="a photo of a {}."):
    tokens = open_clip.tokenizer.SimpleTokenizer()([template.replace("{}", name) for name in names])
    with torch.no_grad():
        return torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)


def test_ensemble(model, features):
    templates = ["a {} in a video game.", "itap of my {}.", "{}"]
    for engine in ("packed", "module"):
        tuner = Tuner(model, NAMES, TuneConfig.of(method="ensemble", templates=templates, engine=engine))
        mean = torch.nn.functional.normalize(sum(encoded(model, NAMES, each) for each in templates), dim=-1)
        want = model.logit_scale.exp().detach() * features[0, 0] @ mean.T
        close(tuner.tune_features(features[0]).logits, want)


def test_zero(model, features):
    text, scale = encoded(model, NAMES[:4]), model.logit_scale.exp().detach()
    tuner = make(model, Zero(gamma=0.5), NAMES[:4])
    for given in features:
        z = given @ text.T
        order = torch.distributions.Categorical(logits=z * scale).entropy().argsort(stable=True)
        votes = torch.nn.functional.one_hot(z[order[:12]].argmax(-1), 4).sum(0)
        result = tuner.tune_features(given)
        close(result.votes, votes.float(), 1e-6)
        winners = (votes == votes.max()).nonzero().flatten().tolist()
        deciders = [c for c in z[order[12:]].argmax(-1).tolist() if c in winners]
        assert result.index == (winners[0] if len(winners) == 1 else deciders[0])
        close(result.probs.sum(), torch.ones(()))


def test_a_tie_of_zero():
    eye = torch.eye(3)
    cosines = torch.stack([eye[1], 0.9 * eye[0] + 0.8 * eye[1], eye[2], eye[0]])[None]
    entropies = torch.tensor([[0.1, 0.2, 0.4, 0.3]])
    assert Zero(gamma=0.5).vote(cosines, entropies)["decided"].tolist() == [[2, 1, 0]]  # view 3 comes before view 2
    cosines[0, 3] = eye[2]
    assert Zero(gamma=0.5).vote(cosines, entropies)["decided"].tolist() == [[1, 2, 0]]  # the most confident view
    # As published, classes C - 1 - t are left out: here 2 and 1, so 0 is the best of view 3.
    assert Zero(gamma=0.5, strict=True).vote(cosines, entropies)["decided"].tolist() == [[2, 1, 0]]


def test_zero_with_names_that_repeat(model, features):
    """A name's votes are not shared out, as they are in the published code."""
    ours, strict = (make(model, Zero(0.9, strict=strict)).tune_features(features[2]) for strict in (False, True))
    votes = torch.nn.functional.one_hot((features[2][ours.selected] @ encoded(model, NAMES[:4]).T).argmax(-1), 4).sum(0)
    assert votes[1] > 0
    close(ours.votes, votes[[0, 1, 2, 3, 1]].float(), 1e-6)
    assert strict.selected.tolist() == ours.selected.tolist()
    close(strict.votes[1] + strict.votes[4], votes[1].float(), 1e-6)  # in which parts depends on a rounding


def plain_mta(f, t, s, lambda_y=0.2, lambda_q=4.0):
    n = len(f)
    distance = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist").square()
    h2 = 0.5 * distance.sort(-1).values[:, 1 : 1 + int(0.3 * (n - 1))].mean(-1)
    p = (s * f @ t.T).softmax(-1)
    y, m = torch.full((n,), 1 / n, dtype=f.dtype), f[0]
    for _ in range(5):
        k = torch.exp(-(f - m).square().sum(-1) / (2 * h2))
        for _ in range(5):
            old, y = y, ((k + lambda_q * p @ p.T @ y) / lambda_y).softmax(-1)
            if (y - old).norm() < 1e-6:
                break
        for _ in range(5):
            w = torch.exp(-(f - m).square().sum(-1) / (2 * h2)) * y
            old, m = m, torch.nn.functional.normalize(w @ f / w.sum(), dim=0)
            if (m - old).norm() < 1e-6:
                break
    return s * m @ t.T, y


def test_mta(model, features):
    results, text = make(model, "mta").tune_features(features), encoded(model, NAMES)
    for result, given in zip(results, features, strict=True):
        logits, y = plain_mta(given.double(), text.double(), model.logit_scale.exp().detach().double())
        close(result.logits, logits.float(), 1e-4)
        close(result.inlierness, y.float(), 1e-4)
    same = features[0, :1].expand(24, -1)  # a bandwidth of zero
    assert make(model, "mta").tune_features(same).status == "skipped"
    assert torch.equal(
        *(getattr(make(model, "mta").tune_features(same), f"{part}logits") for part in ("", "zero_shot_"))
    )


@pytest.mark.parametrize("options", [{}, {"per_class": False}, {"steps": 2}])
def test_tps(model, features, options):
    method = Tps(rho=0.25, templates=["a {}.", "the {}."], **options)
    results = make(model, method, NAMES[:4]).tune_features(features)
    prototypes = torch.nn.functional.normalize(
        sum(encoded(model, NAMES[:4], each) for each in method.templates), dim=-1
    )
    for result, given in zip(results, features, strict=True):
        shift = torch.zeros_like(prototypes[: None if method.per_class else 1], requires_grad=True)
        optimizer = torch.optim.AdamW([shift], lr=5e-3)

        def logits(shift=shift, given=given):
            moved = torch.nn.functional.normalize(prototypes + shift, dim=-1)
            return model.logit_scale.exp().detach() * given @ moved.T

        for _ in range(method.steps):
            entropy = torch.distributions.Categorical(logits=logits()).entropy()
            mean = logits()[entropy.argsort(stable=True)[:6]].softmax(-1).mean(0)
            optimizer.zero_grad()
            (-(mean * mean.log()).sum()).backward()
            optimizer.step()
        close(result.grad, shift.grad, 1e-4)
        close(result.logits, logits()[0].detach(), 1e-3)


def test_rtpt(model, features):
    result = make(model, "rtpt").tune_features(features[0])
    tuner = make(model, "rtpt")
    entropies, z = result.entropies, model.logit_scale.exp().detach() * features[0]
    assert result.loss == pytest.approx(float(entropies.sort().values[:6].mean()), rel=1e-5)
    tuned = z @ tuner.classes.text.forward(result.ctx)[0].T
    similarity = (features[0] @ features[0].T).fill_diagonal_(-torch.inf)
    weights = (similarity.sort(descending=True).values[:, :20].mean(-1) / 0.01).softmax(-1)
    close(result.logits, (weights @ tuned)[tuner.classes.inverse], 1e-4)
    leaf = z.new_zeros(6, 5).add_((z @ encoded(model, NAMES).T)[result.selected]).requires_grad_()
    torch.distributions.Categorical(logits=leaf).entropy().mean().backward()
    close(Rtpt(rho=0.25).entropy((z @ encoded(model, NAMES).T)[None], 6, None).grad[0], leaf.grad, 1e-4)


# --- online


class PlainTda:
    """Lists, as the paper has them."""

    def __init__(self, text, scale, rho=0.25, capacities=(3, 2)):
        self.text, self.scale, self.rho, self.capacities = text, scale, rho, capacities
        self.caches = {}, {}

    def add(self, cache, capacity, label, item):
        items = cache.setdefault(label, [])
        if len(items) < capacity:
            items.append(item)
        elif items and item[0] < items[-1][0]:
            items[-1] = item
        items.sort(key=lambda item: item[0])

    def __call__(self, views):
        z = self.scale * views @ self.text.T
        kept = torch.distributions.Categorical(logits=z).entropy().argsort(stable=True)[: int(len(z) * self.rho)]
        x, z, p = views[kept].mean(0), z[kept].mean(0), z[kept].softmax(-1).mean(0)
        entropy = float(-(p * p.log()).sum())
        for cache, capacity, alright in zip(
            self.caches, self.capacities, (True, 0.2 < entropy / math.log2(len(self.text)) < 0.5), strict=True
        ):
            if alright:
                self.add(cache, capacity, int(z.argmax()), (entropy, x, p))
        answer = z.clone()
        for label, items in self.caches[0].items():
            answer[label] += sum(2 * torch.exp(-5 * (1 - x @ item[1])) for item in items)
        for items in self.caches[1].values():
            for item in items:
                answer -= 0.117 * torch.exp(-(1 - x @ item[1])) * ((item[2] > 0.03) & (item[2] < 1))
        return answer


@pytest.fixture(scope="module")
def stream():
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(6, 1, 32, generator=generator).repeat(5, 1, 1)
    views = centres + torch.rand(30, 1, 1, generator=generator) * torch.randn(30, 24, 32, generator=generator)
    return torch.nn.functional.normalize(views, dim=-1)


def test_tda_in_order_and_resumed(model, stream):
    names = NAMES[:4]
    plain = PlainTda(encoded(model, names), model.logit_scale.exp().detach())
    want = [plain(views) for views in stream]
    assert all(len(cache) > 1 for cache in plain.caches)
    tuner = make(model, "tda", names)
    for got, expected in zip(tuner.tune_features(stream[:13]), want, strict=False):
        close(got.logits, expected, 1e-4)
    assert not torch.equal(got.logits, got.zero_shot_logits)
    later = make(model, "tda", names)
    later.method.load_state(tuner.method.state())
    for resumed in (later, tuner):
        for views, expected in zip(stream[13:], want[13:], strict=True):
            close(resumed.tune_features(views).logits, expected, 1e-4)
    other = make(model, "tda", names).tune_features(stream.flip(0))[-1]
    assert not torch.equal(other.logits, want[0])


def test_what_an_online_method_refuses(model, stream):
    tuner = make(model, "tda")
    assert not tuner.method.capturable
    tuner.tune_features(stream[0])
    with pytest.raises(ValueError, match="shards: expected 1 with method 'tda', which learns from each image, got 4"):
        tuner.method.check_shards(4)
    make(model, "zero").method.check_shards(4)
    with pytest.raises(ValueError, match="has learned from 1 images of another Tuner: make a new one"):
        Tuner(model, NAMES, TuneConfig(method=tuner.method))
    with pytest.raises(ValueError, match="has learned from 1 images"):
        tuner.set_classnames(NAMES[:3])
    state = tuner.method.state()
    with pytest.raises(ValueError, match="state: expected one of the same class names"):
        make(model, "tda", NAMES[:4]).method.load_state(state)
    with pytest.raises(ValueError, match=r"state: expected positive.entropies \[4, 1\], got \[4, 3\]"):
        make(model, Tda(positive_capacity=1)).method.load_state(state)
    with pytest.raises(ValueError, match="state: expected nothing, which method 'zero' remembers"):
        make(model, "zero").method.load_state(state)
    with pytest.raises(ValueError, match="state: expected a method that a Tuner has"):
        Tda().load_state(state)


def test_tda_of_an_image_that_is_not_finite_learns_nothing(model, stream):
    tuner, views = make(model, "tda"), torch.full((1, 24, 32), torch.nan)
    answer = tuner.method(views, tuner.classes, Stages())
    assert not answer.logits.isfinite().any()
    assert tuner.method.state()["positive.entropies"].isinf().all()


# --- several


def test_several_at_once(model, features):
    tuner = make(model, ["tpt", "zero", "tda"])
    results = tuner.tune_features(features)
    for name in ("tpt", "zero", "tda"):
        for got, want in zip(results, make(model, name).tune_features(features), strict=True):
            close(got.by_method[name].logits, want.logits, 1e-6)
            assert got.by_method[name].method == name
            assert got.by_method[name].extra.keys() == want.extra.keys()
    first = results[0]
    assert first.by_method["tpt"] is first
    assert list(first.by_method) == ["tpt", "zero", "tda"]
    assert first.to_dict()["others"]["zero"]["label"] == first.by_method["zero"].label
    assert torch.equal(first.by_method["zero"].votes, first.to_dict()["others"]["zero"]["votes"])
    with pytest.raises(AttributeError, match="a result of method 'tpt' has no 'votes'"):
        _ = first.votes
    assert "zero '" in repr(first)
    *_, broken = tuner.map([PHOTO_FOLDER / "cat.jpg", "nowhere.png"])
    assert {each.status for each in broken.by_method.values()} == {"failed"}
    assert make(model, "tpt").tune_features(features[0]).by_method.keys() == {"tpt"}


def test_several_names_and_settings(model, features):
    many = {"few": Zero(gamma=0.1), "many": Zero(gamma=0.9)}
    result = make(model, many).tune_features(features[0])
    assert {name: len(each.selected) for name, each in result.by_method.items()} == {"few": 2, "many": 21}
    assert list(make(model, "zero, mta").tune_features(features[0]).by_method) == ["zero", "mta"]
    config = TuneConfig.of(method=["tpt", "zero"], rho=0.5, gamma=0.1)
    assert [type(each).__name__ for _, each in config.make_method().methods] == ["Tpt", "Zero"]
    assert (config.make_method().methods[0][1].rho, config.make_method().methods[1][1].gamma) == (0.5, 0.1)
    assert hash(config) == hash(TuneConfig.of(method=["tpt", "zero"], rho=0.5, gamma=0.1))
    for bad in (["zero", "zero"], [Zero(), Zero(gamma=0.1)], []):
        with pytest.raises(ValueError, match="method: expected one or more of different names"):
            TuneConfig(method=bad)
