"""From verdicts to shares: plain accuracy, or the mean over classes."""

from __future__ import annotations

import numpy as np

from zsr.eval.card import Z95, Share


def share_of(right: np.ndarray, label: np.ndarray, by_class: bool = False) -> Share:
    """The share of samples that are right.

    Args:
        right, label: bool and int [samples].
        by_class: the value is the mean of the shares of the classes that occur (``metric: mean_per_class``).
    """
    if not by_class:
        return Share.of(int(right.sum()), len(right))
    found = [right[label == one] for one in np.unique(label)]
    hits, sizes = np.array([one.sum() for one in found]), np.array([len(one) for one in found])
    value = float((hits / sizes).mean())
    return Share.of(int(right.sum()), len(right), value, _worth(hits, sizes, value))


def _worth(hits: np.ndarray, sizes: np.ndarray, value: float) -> float:
    """Number of samples whose plain share would be as certain as the mean of the classes' shares.

    The variance of that mean is a stratified sample's, ``sum_c p_c (1 - p_c) / n_c / classes^2``. A class's share p_c is drawn
    towards the mean by ``z^2`` samples, as Wilson draws a share towards one half: a class of few samples, all right or
    all wrong, is not certain.
    """
    if not 0 < value < 1:
        return float(len(sizes) ** 2 / (1 / sizes).sum())  # all classes alike
    prior = Z95**2
    share = (hits + prior * value) / (sizes + prior)
    variance = (share * (1 - share) / sizes).sum() / len(sizes) ** 2
    return float(value * (1 - value) / variance)
