"""Prompt features to class embeddings, and LAAT's expansion of them (Li et al., CVPR 2024, arXiv 2301.13096).

CLIP's class embeddings sit in a narrow cone. With mu their normalised mean, theta_c the angle between a_c and mu, and
theta_max the largest such angle over the *training* classes,

    theta'_c = (pi/2) theta_c / theta_max
    a'_c = cos(theta'_c) mu + sin(theta'_c) (a_c - cos(theta_c) mu) / sin(theta_c)

The published code rotates mu onto an axis, scales the polar angle and rotates back; this geodesic form is the same map
without matrices of D x D (METHODS.md 6.1). New classes keep mu and theta_max of the training classes, so their angle may
exceed a right angle; they need no training, which is what zero-shot use asks for. Beyond 2 theta_max the stretched angle
passes pi and comes back round the other side, as it does in the published form.

Shapes: C classes, K templates, E text width before projection, D embedding width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_SINE = 1e-6  # an embedding on the mean itself has no azimuth; it stays where it is


def class_embeddings(features_CKE: Tensor, projection_ED: Tensor) -> Tensor:
    """Unit class embeddings ``[C, D]``: each prompt projected and normalised, templates averaged, normalised again.

    This is CLIP's prompt ensemble; with one template it is the plain unit embedding. Float32 whatever comes in, and
    float64 stays float64 (the numerics tests use it).
    """
    prompt_CKD = F.normalize(features_CKE @ projection_ED, dim=-1)
    if prompt_CKD.shape[1] == 1:
        return prompt_CKD[:, 0]
    return F.normalize(prompt_CKD.mean(dim=1), dim=-1)


def fit_expansion(text_CD: Tensor) -> tuple[Tensor, Tensor]:
    """The mean direction ``[D]`` and the largest angle to it (radians, scalar) of unit class embeddings.

    Raises:
        ValueError: one class, or all classes alike: there is nothing to spread out.
    """
    mean_D = F.normalize(text_CD.mean(0), dim=-1)
    angle = (text_CD @ mean_D).clamp(-1, 1).arccos().amax()
    if len(text_CD) < 2 or angle < 1e-3:
        raise ValueError(
            f"model.expand_text (or objective.expand): the {len(text_CD)} training class(es) have one embedding between "
            "them; expansion needs two different classes, so add one or turn it off"
        )
    return mean_D, angle


def expand(text_CD: Tensor, mean_D: Tensor, angle: Tensor) -> Tensor:
    """Unit class embeddings with every angle to ``mean_D`` stretched by ``(pi/2) / angle``; differentiable."""
    cosine_C1 = (text_CD @ mean_D).unsqueeze(1)
    across_CD = text_CD - cosine_C1 * mean_D
    sine_C1 = across_CD.norm(dim=1, keepdim=True).clamp_min(_LEAST_SINE)
    # atan2 has a finite gradient at the mean direction, where arccos has none.
    stretched_C1 = torch.atan2(sine_C1, cosine_C1) * (math.pi / 2 / angle)
    expanded_CD = stretched_C1.cos() * mean_D + stretched_C1.sin() * across_CD / sine_C1
    return F.normalize(expanded_CD, dim=-1)
