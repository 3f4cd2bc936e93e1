"""The threat model: what an attacker may do to an image, in pixel space [0, 1].

Shapes: B images, C channels, H x W pixels. ``delta`` is the perturbation, ``image + delta`` is what the model sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zsr.attacks.noise import fill_normal, fill_uniform

Norm = Literal["linf", "l2"]
_TINY = 1e-12  # below any gradient that fp32 can tell from zero; keeps a zero gradient's direction zero instead of NaN
_RADIUS = 0x5DEECE66D  # sets the seed of a start's length apart from that of its direction


@dataclass(frozen=True)
class ThreatModel:
    """All perturbations of at most ``eps`` in ``norm`` that keep pixels in [0, 1]."""

    norm: Norm
    eps: float

    def project(self, delta_BCHW: Tensor, image_BCHW: Tensor) -> Tensor:
        """The allowed perturbation nearest to ``delta`` in the norm, then cut to the pixel box.

        The cut moves each pixel towards the image, so it cannot leave the ball again.
        """
        if self.norm == "linf":
            delta_BCHW = delta_BCHW.clamp(-self.eps, self.eps)
        else:
            delta_BCHW = delta_BCHW * (self.eps / _lengths(delta_BCHW)).clamp(max=1.0)
        return (image_BCHW + delta_BCHW).clamp(0, 1) - image_BCHW

    def random_start(self, image_BCHW: Tensor, seeds: Sequence[int]) -> Tensor:
        """Uniform in the ball, one stream per sample, cut to the pixel box."""
        if self.norm == "linf":
            delta = fill_uniform(image_BCHW, seeds) * self.eps
        else:
            direction = fill_normal(image_BCHW, seeds)
            # Radius of a uniform point in a d-dimensional ball is u^(1/d).
            # From seeds of its own: the stream that made the direction would tie the two together.
            radius_seeds = [seed ^ _RADIUS for seed in seeds]
            radius = (fill_uniform(image_BCHW[:, :1, :1, :1], radius_seeds) / 2 + 0.5) ** (
                1 / image_BCHW.shape[1:].numel()
            )
            delta = direction / _lengths(direction) * radius * self.eps
        return self.project(delta, image_BCHW)

    def ascend(self, grad_BCHW: Tensor, step_size: float | Tensor) -> Tensor:
        """The step of length ``step_size`` in the norm that raises a loss with this gradient fastest.

        Args:
            step_size: one for all samples, or ``[B, 1, 1, 1]``.
        """
        if self.norm == "linf":
            return grad_BCHW.sign() * step_size
        return grad_BCHW / _lengths(grad_BCHW) * step_size

    def size(self, delta_BCHW: Tensor) -> Tensor:
        """The norm of each perturbation, ``[B]``."""
        flat = delta_BCHW.flatten(1)
        return flat.abs().amax(1) if self.norm == "linf" else flat.norm(dim=1)


def _lengths(delta_BCHW: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(delta_BCHW, dim=(1, 2, 3), keepdim=True)
    return lengths.clamp_min(_TINY)
