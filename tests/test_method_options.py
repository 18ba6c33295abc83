"""Options of methods: whose they are, what they may be, and what is said of others."""

from dataclasses import dataclass

import pytest
from method_cases import NAMES, close, make, small_clip, view_features

from tpt_fast import TuneConfig, tune
from tpt_fast.demo import PHOTO_FOLDER
from tpt_fast.methods import METHODS, Answer, Ctpt, Method, Zero, method_class, method_options
from tpt_fast.methods.published_settings import DATA_SETS, SETTINGS, published_settings, published_views


@pytest.fixture(scope="module")
def model():
    return small_clip()


@pytest.fixture(scope="module")
def features():
    return view_features()


def test_options_find_their_method(model):
    image = PHOTO_FOLDER / "cat.jpg"
    few = tune(model, image, NAMES, n_views=20, method="zero", gamma=0.1)
    assert len(few.selected) == 2
    assert tune(model, image, NAMES, n_views=8, method="ctpt", lambda_term=20, lr=1e-3, steps=2).status == "tuned"
    config = TuneConfig.of(method="ctpt", lambda_term=20, rho=0.5)
    assert config.make_method() == Ctpt(rho=0.5, lambda_term=20)
    tune.cache_clear()


def test_a_method_that_cannot_be_hashed_beside_another(model):
    @dataclass
    class Mine(Method):
        weights: list

        def __call__(self, images, classes, stages):
            logits = classes.logits(classes.scaled(images), classes.text.initial()[0])[:, 0]
            return Answer(self.weights[0] * logits, logits)

    result = tune(model, PHOTO_FOLDER / "cat.jpg", NAMES, n_views=8, method=["zero_shot", Mine([2.0])])
    close(result.by_method["own"].logits, 2 * result.logits)
    tune.cache_clear()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "zeor"}, ValueError, "method: expected one of tpt, .* got 'zeor'; did you mean 'zero'"),
        (
            {"method": "zero", "steps": 2},
            ValueError,
            "steps: expected 1, its default, with method 'zero', which has gamma",
        ),
        ({"method": "mta", "gamma": 0.1}, TypeError, "gamma: .* method 'mta'; it is one of method 'zero'"),
        ({"lambda_term": 1}, TypeError, "lambda_term: .* method 'tpt'; it is one of method 'ctpt' and 'otpt'"),
        ({"method": "zero", "gama": 0.1}, TypeError, "gama: .* did you mean 'gamma'"),
        ({"n_view": 4}, TypeError, "n_view: .* did you mean 'n_views'"),
        ({"method": "zero", "seeds": 1}, TypeError, "seeds: .* did you mean 'seed'"),
        ({"method": "zero", "gamma": 0}, ValueError, r"gamma: expected a number in \(0, 1\], got 0"),
        ({"method": Zero(), "gamma": 0.1}, TypeError, "gamma: expected"),
        (
            {"method": Ctpt(steps=2), "steps": 3},
            ValueError,
            "steps: expected 2, which the given method has, or nothing",
        ),
        ({"method": 3}, TypeError, "method: expected a name or a tpt_fast.methods.Method, got int"),
        ({"method": [3]}, TypeError, "method: expected names or tpt_fast.methods.Method, got int"),
        ({"method": "rtpt", "n_views": 20}, ValueError, "n_views: expected more than the 20 neighbours"),
        ({"method": "mta", "n_views": 4}, ValueError, "n_views: expected 5 or more with method 'mta', got 4"),
        ({"method": "ensemble", "templates": "a {}"}, ValueError, "templates: expected a list .* a list of one"),
        ({"method": "ensemble", "templates": ["a"]}, ValueError, r'templates\[0\]: expected "{}" once'),
        ({"method": "ensemble", "templates": []}, ValueError, "templates: expected one or more"),
        ({"method": "ensemble", "templates": [1]}, TypeError, r"templates\[0\]: expected a string, got int"),
        ({"method": "ensemble", "templates": 1}, TypeError, "templates: expected a list of strings, got int"),
        ({"method": "tda", "negative_mask": 1}, TypeError, "negative_mask: expected two ascending numbers, got int"),
        ({"method": "tda", "negative_mask": (1, 0)}, ValueError, "negative_mask: expected two ascending numbers"),
        ({"method": "zero", "strict": True, "gamma": 1}, ValueError, "gamma: expected a view of 64 left to break ties"),
    ],
)
def test_messages(options, error, message):
    with pytest.raises(error, match=message):
        TuneConfig.of(**options)


def test_an_option_of_a_method_is_pointed_at():
    with pytest.raises(TypeError, match=r"gamma: .* one of method 'zero': method=tpt_fast.methods.Zero\(gamma=...\)"):
        TuneConfig(gamma=0.1)


@pytest.mark.parametrize(("method", "names"), [("otpt", ["cat"]), ("ctpt", ["cat"]), ("tda", ["cat", "cat"])])
def test_a_class_list_that_is_too_short(model, method, names):
    with pytest.raises(ValueError, match=f"classnames: expected two or more .*method '{method}'"):
        make(model, method, names)


def test_views_of_a_call_are_checked(model, features):
    with pytest.raises(ValueError, match="n_views: expected more than the 20 neighbours of method 'rtpt', got 8"):
        make(model, "rtpt").tune_features(features[0, :8])


def test_a_prompt_that_is_too_long(model):
    with pytest.raises(ValueError, match=r"templates: 'word .* has 83 tokens; the model takes 77"):
        make(model, Zero(templates=["word " * 80 + "{}"]), ["cat"])


def test_every_option_is_described_and_typed():
    from tpt_fast.config import MethodOptions

    own = {name for each in METHODS for name in method_options(method_class(each))}
    assert own - {"rho", "steps", "lr", "weight_decay"} == set(MethodOptions.__annotations__)
    for name in METHODS:
        of = method_class(name)
        assert of.name == name
        assert all((of.paper, of.tunes, of.__doc__))


def test_published_views():
    assert [published_views("tpt", name) for name in ("imagenet", "imagenet_a", "dtd")] == ["crops", "crops", "augmix"]
    assert [published_views("tda", name) for name in ("imagenet", "imagenet_a", "dtd")] == ["crops", "augmix", "crops"]
    assert {published_views("zero", name) for name in DATA_SETS} == {"crops"}
    for name in DATA_SETS:
        TuneConfig(views=published_views("ctpt", name))
    with pytest.raises(ValueError, match="data_set: expected one of imagenet, "):
        published_views("ctpt", "imagenetv2")


def test_published_settings():
    assert published_settings("ctpt", "imagenet_a") == {"lambda_term": 20.0}
    assert published_settings("ctpt", "dtd") == {}
    assert set(SETTINGS["tda"]) == set(DATA_SETS)
    for method, of in SETTINGS.items():
        for data_set in of:
            TuneConfig.of(method=method, **published_settings(method, data_set))
    with pytest.raises(ValueError, match=r"data_set: expected one of imagenet, .* got 'imagenetv2'"):
        published_settings("tda", "imagenetv2")
