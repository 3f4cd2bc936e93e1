"""How class embeddings lie on the sphere: TIMA's energy, its semantic consistency, and the margin that distances give.

Shapes: C classes, D embedding width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from zsr.objectives.base import pairs_of_different_classes

MarginShape = Literal["identity", "sqrt", "square"]

_CLOSEST = 1e-6  # squared distance below which two embeddings count as one: keeps the energy and its gradient finite
_LEAST_VARIANCE = 1e-12  # of similarities: below, all classes are equally similar and there is no order to keep


def hyperspherical_energy(text_CD: Tensor, pairs_CC: Tensor, form: str, power: float) -> Tensor:
    """Mean energy of class embeddings on the unit sphere (Liu et al., NeurIPS 2018); small when they are spread out.

    Args:
        text_CD: unit embeddings; the Gram matrix is taken in their precision, float32 in training.
        pairs_CC: ordered pairs to count; the diagonal and duplicated prompts left out.
        form: "bounded", 1 / (1 + r^a), or "riesz", r^-a with -log r at a = 0.
        power: a.

    Returns:
        Scalar; 0 if there is no pair.
    """
    squared_CC = (2 - 2 * text_CD @ text_CD.T).clamp_min(_CLOSEST)
    if form == "bounded":
        energy_CC = 1 / (1 + squared_CC ** (power / 2))
    elif power == 0:
        energy_CC = -squared_CC.log() / 2
    else:
        energy_CC = squared_CC ** (-power / 2)
    return energy_CC.masked_fill(~pairs_CC, 0).sum() / pairs_CC.sum().clamp_min(1)


def centred_similarity(text_CD: Tensor, pairs_CC: Tensor) -> Tensor:
    """Cosines of class embeddings less their mean over the counted pairs, ``[C, C]``; 0 on pairs not counted."""
    similarity_CC = text_CD @ text_CD.T
    mean = _mean(similarity_CC, pairs_CC)
    return (similarity_CC - mean).masked_fill(~pairs_CC, 0)


def semantic_consistency(text_CD: Tensor, original_CC: Tensor, pairs_CC: Tensor, form: str) -> Tensor:
    """How far the similarities of classes have left their original pattern; their mean may move freely.

    With y the similarities now, x the original ones, both less their means over the counted pairs:

        "affine":       min over a >= 0 of mean (y - a x)^2, in squared cosines; the free offset b is in the means
        "correlation":  1 - corr(x, y), in [0, 2], which shrinking all differences does not lower

    The best a is <x, y> / <x, x>, and 0 where that is negative: a reversed order is no agreement. It is held constant in
    the backward pass. At its minimum the residual's slope in a is zero, so the gradient is that of the minimum itself
    (envelope theorem).

    Args:
        text_CD: unit embeddings.
        original_CC: :func:`centred_similarity` of the original embeddings.
        pairs_CC: ordered pairs to count.
        form: "affine" or "correlation".

    Returns:
        Scalar. Where all original similarities are equal, as with two classes, x is 0: "affine" then asks the same of y,
        "correlation" is 1 without a gradient.
    """
    now_CC = centred_similarity(text_CD, pairs_CC)
    original_variance, together = _mean(original_CC.square(), pairs_CC), _mean(original_CC * now_CC, pairs_CC)
    if form == "correlation":
        both = original_variance * _mean(now_CC.square(), pairs_CC)
        return 1 - together / both.clamp_min(_LEAST_VARIANCE**2).sqrt()
    slope = (together / original_variance.clamp_min(_LEAST_VARIANCE)).clamp_min(0).detach()
    return _mean((now_CC - slope * original_CC).square(), pairs_CC)


def adaptive_margin(
    text_CD: Tensor, duplicate_CC: Tensor, base: float, scale: float, shape: MarginShape = "identity"
) -> Tensor:
    """Cosine margins ``[C, C]``, row y for images of class y: ``base + scale * phi(d)`` off the diagonal, 0 on it.

    d is the cosine distance of the class embeddings, rescaled to [0, 1] over the row's other classes; phi is the identity,
    the square root or the square. A class with the same prompt as y gets no margin: nothing could tell the two apart.
    """
    counted_CC = pairs_of_different_classes(duplicate_CC)
    distance_CC = 1 - text_CD @ text_CD.T
    low_C1 = distance_CC.masked_fill(~counted_CC, torch.inf).amin(1, keepdim=True)
    high_C1 = distance_CC.masked_fill(~counted_CC, -torch.inf).amax(1, keepdim=True)
    shaped_CC = (distance_CC - low_C1) / (high_C1 - low_C1).clamp_min(1e-12)
    if shape != "identity":
        shaped_CC = shaped_CC.clamp(0, 1) ** (0.5 if shape == "sqrt" else 2)
    return (base + scale * shaped_CC).masked_fill(~counted_CC, 0)


def _mean(value_CC: Tensor, pairs_CC: Tensor) -> Tensor:
    return value_CC.masked_fill(~pairs_CC, 0).sum() / pairs_CC.sum().clamp_min(1)
