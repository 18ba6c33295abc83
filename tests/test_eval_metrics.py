"""Metrics are what their definitions say, and what the published code prints."""

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpt_fast.evaluation import metrics


def test_ece_is_the_published_codes(golden_dir):
    case = np.load(golden_dir / "methods" / "cases" / "ece_1.npz")
    found = metrics.calibration(case["confidence"], case["correct"], 20)
    assert found.images.tolist() == case["bin_count"].tolist()
    there = found.images > 0
    # float64 means of at most 486 numbers below 1, summed in another order: 486 roundings of 2^-53 each.
    bound = 486 * 2**-53
    assert np.abs(found.accuracy - case["bin_accuracy"])[there].max() <= bound
    assert np.abs(found.confidence - case["bin_confidence"])[there].max() <= bound
    assert abs(metrics.ece(case["confidence"], case["correct"], 20) - case["ece"]) <= 4 * bound


def test_edges_are_torchs():
    """Whose kernels have fused multiply-adds wherever there is AVX2."""
    for bins in range(1, 101):
        assert np.array_equal(metrics.edges(bins), torch.linspace(0, 1, bins + 1).numpy())


def test_bins_hold_their_upper_edge_and_nothing_holds_zero():
    found = metrics.calibration(np.float32([0, 0.25, 0.5, np.nextafter(np.float32(0.5), 1), 1]), np.ones(5, bool), 4)
    assert found.images.tolist() == [1, 1, 1, 1]
    assert np.isnan(metrics.calibration(np.float32([0.9]), np.ones(1, bool), 4).accuracy[:3]).all()


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
def test_ece_by_its_definition(rows, bins):
    confidence, right = np.float32([c for c, _ in rows]), np.array([r for _, r in rows])
    edges = metrics.edges(bins)
    expected = 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += abs(right[inside].mean() - confidence[inside].mean(dtype=np.float64)) * inside.mean()
    assert metrics.ece(confidence, right, bins) == pytest.approx(expected, abs=1e-13)


def test_aurc_by_its_definition_without_ties():
    random = np.random.default_rng(0)
    confidence, right = random.permutation(200) / 200, random.random(200) < 0.6
    order = np.argsort(-confidence)
    errors = [float((~right[order[: k + 1]]).mean()) for k in range(200)]
    assert metrics.aurc(confidence, right) == pytest.approx(np.mean(errors), abs=1e-13)


def test_aurc_of_ties_is_the_mean_over_their_orders():
    right = np.array([True, False, True, False])
    means = [np.mean([(~right[list(order[: k + 1])]).mean() for k in range(4)]) for order in permutations(range(4))]
    assert metrics.aurc(np.full(4, 0.5), right) == pytest.approx(np.mean(means), abs=1e-14)


def test_top_per_class_and_seeds():
    rank = np.array([0, 4, 5, -1])
    assert (metrics.top(rank, 1), metrics.top(rank, 5)) == (0.25, 0.5)
    count, share = metrics.per_class(np.array([0, 0, 2]), np.array([True, False, True]), 4)
    assert count.tolist() == [2, 0, 1, 0]
    assert share[[0, 2]].tolist() == [0.5, 1.0]
    assert np.isnan(share[[1, 3]]).all()
    assert metrics.over_seeds([1.0, 3.0]) == (2.0, math.sqrt(2))
    assert math.isnan(metrics.over_seeds([1.0])[1])
    assert all(math.isnan(f(np.zeros(0), np.zeros(0, bool))) for f in (metrics.ece, metrics.aurc))


def test_the_paired_interval_covers_the_truth_about_as_often_as_it_says():
    """Of 200 pairs of methods that differ by 2 points: 95 % of a binomial is 180 to 199 at four deviations."""
    random, held = np.random.default_rng(1), 0
    for _ in range(200):
        gains = random.random(1000)
        one, other = gains < 0.07, (gains > 0.95)  # 7 % gained, 5 % lost
        found = metrics.paired(one, other)
        held += found.low <= 0.02 <= found.high
        assert found.difference == pytest.approx((found.gained - found.lost) / 1000)
    assert held >= 190 - 4 * math.sqrt(200 * 0.95 * 0.05)


def test_an_image_is_drawn_with_all_its_seeds():
    """Three seeds that agree tell no more than one."""
    random = np.random.default_rng(2)
    one, other = random.random(500) < 0.6, random.random(500) < 0.5
    alone = metrics.paired(one, other)
    thrice = metrics.paired(np.stack([one] * 3, 1), np.stack([other] * 3, 1))
    assert thrice[:3] == pytest.approx(alone[:3], abs=1e-12)
    assert (thrice.gained, thrice.images) == (3 * alone.gained, 500)


def test_metrics_as_scikit_learn_has_them():
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(3)
    logits, label = random.normal(size=(300, 10)), random.integers(0, 10, 300)
    rank = (logits > np.take_along_axis(logits, label[:, None], 1)).sum(1)
    assert metrics.top(rank, 5) == pytest.approx(sklearn.top_k_accuracy_score(label, logits, k=5))
