"""Permuted labels and exchanged classes are found by what a model answers; a weak model's answers are neither."""

import numpy as np
import pytest

from tpt_fast.evaluation.preflight import find_permutation, preflight
from tpt_fast.evaluation.sets import Rows


def a_set(classes, each=30, names=None):
    """Rows sorted by class, as most sets are."""
    rows = Rows()
    for label in range(classes):
        for i in range(each):
            rows.add(f"{label}/{i}.jpg", label, 1)
    return rows.to_set("made", names or [f"class {i}" for i in range(classes)], lambda i, id: b"")


class Model:
    """Right with a probability, otherwise any class; of images whose true classes are a function of their labels."""

    def __init__(self, images, truth, right=0.6, seed=1):
        rng, n = np.random.default_rng(seed), len(images.classnames)
        true = np.asarray(truth)[images.labels]
        self.answers = np.where(rng.random(len(true)) < right, true, rng.integers(0, n, len(true)))
        self.n, self.asked = n, []

    def __call__(self, places):
        self.asked.extend(places.tolist())
        return self.answers[places]


@pytest.mark.parametrize("classes", [10, 37, 101, 200, 1000])
@pytest.mark.parametrize("right", [0.65, 0.95])
def test_labels_in_the_order_of_strings(classes, right):
    """PromptAlign's issue 10: rank in the sorted list of "0", "1", "10", "100" ..."""
    truth = [int(each) for each in sorted(map(str, range(classes)))]
    if truth == list(range(classes)):
        truth = [*truth[1:], 0]
    images = a_set(classes)
    model = Model(images, truth, right)
    found = preflight(images, model)
    assert len(found.permuted) >= 3
    assert all(truth[i] == j for i, j in found.permuted.items())
    assert found.accuracy < 0.2
    assert len(model.asked) == len(set(model.asked)) == found.images <= 404 + 2 * 16 * 101
    with pytest.raises(
        ValueError, match=r"^made: zero-shot, .* but the labels are permuted:\n  label \d+ \(class \d+\)"
    ):
        found.check()
    lines = found.message.splitlines()
    assert len(lines) == 1 + min(20, len(found.permuted)) + (len(found.permuted) > 20)


@pytest.mark.parametrize("right", [0.65, 0.95])
@pytest.mark.parametrize("missing", [0, 30, 60])
def test_a_class_that_is_missing(missing, right):
    """Those behind it are shifted, and those before it are right."""
    truth = [i + (i >= missing) for i in range(100)]
    images = a_set(100, names=[f"class {i}" for i in range(101)])
    found = preflight(images, Model(images, truth, right))
    assert len(found.permuted) > (100 - missing) / 2
    assert all(i >= missing and j == i + 1 for i, j in found.permuted.items())


def test_classes_that_are_alike():
    """Variants of aircraft: of families of ten, one is answered for most, one for a neighbour that is answered for
    another. These are confused, and no label is wrong."""
    truth = [label // 10 * 10 if label % 10 in (1, 2, 3, 4) else label for label in range(100)]
    for family in range(0, 40, 10):
        truth[family + 5], truth[family + 6] = family + 6, family + 7
    images = a_set(100)
    assert preflight(images, Model(images, truth, 0.9)).message is None


@pytest.mark.parametrize(("classes", "pair"), [(101, (16, 17)), (101, (34, 35)), (10, (0, 9))])
def test_an_exchanged_pair(classes, pair):
    truth = list(range(classes))
    i, j = pair
    truth[i], truth[j] = j, i
    images = a_set(classes)
    found = preflight(images, Model(images, truth, 0.8))
    assert (found.permuted, found.exchanged) == ({}, (pair,))
    assert found.message.endswith(f"but classes are exchanged: {i} (class {i}) and {j} (class {j})")
    found.check()  # told, and no reason to stop


@pytest.mark.parametrize("classes", [10, 101, 1000])
@pytest.mark.parametrize("right", [0.15, 0.4, 0.9])
def test_right_labels(classes, right):
    for seed in range(5):
        images = a_set(classes)
        found = preflight(images, Model(images, range(classes), right, seed), seed=seed)
        assert (found.permuted, found.exchanged, found.message) == ({}, (), None)


def test_a_model_that_answers_few_classes():
    """A weak one does so for most labels, half of them or more: no permutation, for several labels claim one class."""
    images = a_set(47)
    truth = [label // 5 * 5 for label in range(47)]
    found = preflight(images, Model(images, truth, 0.9))
    assert found.message is None


def test_logits_and_what_is_refused():
    images = a_set(10)
    model = Model(images, range(10), 1.0)
    assert preflight(images, lambda places: np.eye(10)[model(places)]).accuracy == 1
    for answer, message in (
        (lambda places: np.zeros((len(places), 9)), r"predict: expected logits \[\d+, 10\], got \[\d+, 9\]"),
        (lambda places: np.zeros(len(places)), r"predict: expected \d+ integers, got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            preflight(images, answer)


def test_classes_of_one_name_are_one():
    """Equal logits: the first of them is answered for both."""
    labels = np.repeat([0, 1, 2, 3], 8)
    assert find_permutation(labels, np.repeat([0, 0, 2, 3], 8), ["missile", "missile", "cat", "dog"]) == ({}, ())


def test_few_images_say_nothing():
    labels = np.repeat(np.arange(9), 3)
    assert find_permutation(labels, (labels + 1) % 9) == ({}, ())
    labels = np.repeat(np.arange(9), 4)
    assert find_permutation(labels, (labels + 1) % 9) == ({i: (i + 1) % 9 for i in range(9)}, ())


def test_a_weak_model_of_few_classes():
    """Three look like others, one of them in a row, and three like nothing: not enough to stop a run."""
    seen = {0: 0, 1: 1, 2: 2, 3: 3, 4: 5, 5: 6, 7: 8}
    labels = np.repeat(np.arange(10), 8)
    answers = np.array([seen.get(label, (label + place) % 10) for place, label in enumerate(labels)])
    assert find_permutation(labels, answers) == ({}, ())
