"""From verdicts to shares: plain accuracy, or the mean over classes."""

from __future__ import annotations

import numpy as np

from zsr.eval.card import Share


def share_of(right: np.ndarray, label: np.ndarray, by_class: bool = False) -> Share:
    """The share of samples that are right.

    Args:
        right, label: bool and int [samples].
        by_class: the value is the mean of the shares of the classes that occur (``metric: mean_per_class``).
    """
    value = None
    if by_class:
        value = float(np.mean([right[label == one].mean() for one in np.unique(label)]))
    return Share.of(int(right.sum()), len(right), value)
