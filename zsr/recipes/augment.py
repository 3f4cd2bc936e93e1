"""Batched augmentation of uint8 drawings, cheap enough for a core that also trains: one warp and one colour matrix a batch.

The held-out style differs from the training styles in palette, outline, shading and crop, so those are what is varied here. No
pixel noise is added: the shipped model has to be an ordinary one, easily fooled, for robust fine-tuning to have work to do.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _uniform(shape: tuple[int, ...] | int, low: float, high: float, generator: torch.Generator) -> Tensor:
    shape = (shape,) if isinstance(shape, int) else shape
    return low + (high - low) * torch.rand(shape, generator=generator)


def _chance(count: int, probability: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) < probability


def warp(image_BCHW: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Rotation, scale per axis, shear, shift and mirror; what comes in from outside is white."""
    count = len(image_BCHW)
    angle = _uniform(count, -0.45, 0.45, generator) * strength
    zoom = torch.exp(_uniform(count, -0.25, 0.35, generator) * strength)
    stretch = torch.exp(_uniform(count, -0.2, 0.2, generator) * strength)
    shear = _uniform(count, -0.2, 0.2, generator) * strength
    mirror = torch.where(_chance(count, 0.5, generator), -1.0, 1.0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = torch.stack([
        torch.stack([cos * zoom * stretch * mirror, (-sin + shear) * zoom], 1),
        torch.stack([sin * zoom * mirror, cos * zoom / stretch], 1),
    ], 1)  # fmt: skip
    shift = _uniform((count, 2, 1), -0.15, 0.15, generator) * strength
    grid = F.affine_grid(torch.cat([rows, shift], 2), list(image_BCHW.shape), align_corners=False)
    # Sampling the inverse makes the zero padding white.
    return 1 - F.grid_sample(1 - image_BCHW, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def recolour(image_BCHW: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Hue rotation, saturation, gain per channel, contrast and gamma on most images; a few lose their colour altogether."""
    count = len(image_BCHW)
    jittered = _chance(count, 0.8, generator).float()
    hue = _uniform(count, -1.0, 1.0, generator).pow(3) * math.pi * 0.6 * strength * jittered
    saturation = torch.exp(_uniform(count, -0.7, 0.5, generator) * strength * jittered)
    saturation = torch.where(_chance(count, 0.08, generator), 0.0, saturation)
    gain = torch.exp(_uniform((count, 3), -0.15, 0.15, generator) * strength * jittered[:, None])
    # Rotation about the grey axis (Rodrigues), scaled off that axis, then the gains: one 3x3 matrix an image.
    grey = torch.full((3, 3), 1 / 3)
    turn = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    cos, sin = torch.cos(hue)[:, None, None], torch.sin(hue)[:, None, None]
    matrix = grey + saturation[:, None, None] * (cos * (torch.eye(3) - grey) + sin * turn)
    matrix = gain[:, :, None] * matrix
    # White stays white through a hue turn but not through the gains, as paper under another light would not.
    coloured = torch.einsum("bij,bjhw->bihw", matrix, image_BCHW).clamp(0, 1)
    contrast = torch.exp(_uniform(count, -0.4, 0.3, generator) * strength * jittered)[:, None, None, None]
    gamma = torch.exp(_uniform(count, -0.4, 0.4, generator) * strength * jittered)[:, None, None, None]
    return (1 - (1 - coloured) * contrast).clamp(1e-4, 1).pow(gamma)


def soften(image_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Blur a quarter of the images, as coarser drawing would; erase a rectangle in another quarter."""
    count, _, height, width = image_BCHW.shape
    blurred = _chance(count, 0.25, generator)
    out = image_BCHW.clone()
    if blurred.any():
        out[blurred] = F.avg_pool2d(F.pad(image_BCHW[blurred], (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    for index in _chance(count, 0.25, generator).nonzero().flatten().tolist():
        box_h, box_w = (int(_uniform(1, 8, 28, generator)) for _ in range(2))
        top, left = int(_uniform(1, 0, height - box_h, generator)), int(_uniform(1, 0, width - box_w, generator))
        out[index, :, top : top + box_h, left : left + box_w] = torch.rand(3, 1, 1, generator=generator)
    return out


def augment(image_BCHW: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """uint8 or float pixels in, float pixels in [0, 1] out."""
    pixels = image_BCHW.float() / 255 if image_BCHW.dtype == torch.uint8 else image_BCHW
    return soften(recolour(warp(pixels, strength, generator), strength, generator), generator).clamp(0, 1)
