"""The mean over classes, and the interval that belongs to it."""

from __future__ import annotations

import numpy as np
import pytest

from zsr.eval.shares import share_of


def test_the_interval_of_a_mean_over_classes_covers_that_mean():
    # One class of many samples, some of few: the share of all samples is far from the mean over classes.
    sizes, truth = np.array([200, 50, 20, 5, 2]), np.array([0.9, 0.6, 0.3, 0.2, 0.5])
    label, rng = np.repeat(np.arange(5), sizes), np.random.default_rng(0)
    shares = [share_of(rng.random(len(label)) < truth[label], label, by_class=True) for _ in range(300)]
    assert 0.91 < np.mean([share.low <= truth.mean() <= share.high for share in shares]) < 0.99
    assert all(share.low <= share.value <= share.high for share in shares)
    # Classes alike in size, with one share in all, are as certain as so many samples; few samples are never certain.
    even = np.repeat(np.arange(10), 40)
    half = np.tile([True, False], 200)
    pairs = [(share_of(half, even, by_class=True), share_of(half, even))]
    one_each = np.arange(100)
    mean, plain = share_of(half[:100], one_each, by_class=True), share_of(half[:100], one_each)
    assert mean.high - mean.low == pytest.approx(plain.high - plain.low, rel=0.05)
    pairs += [
        (share_of(same, one_each, True), share_of(same, one_each)) for same in (np.zeros(100, bool), np.ones(100, bool))
    ]
    for mean, plain in pairs:
        assert (mean.value, mean.low, mean.high) == pytest.approx((plain.value, plain.low, plain.high))
