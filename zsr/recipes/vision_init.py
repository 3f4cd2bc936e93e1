"""A start for a small ViT that has minutes, not days: what the first epochs would only rediscover is written in beforehand.

A plain ViT on two thousand drawings spends most of a short run finding out that pixels have neighbours. Three changes to its
initial weights take that away; none touches the architecture, so the result is an ordinary open_clip model:

* positions start as two-dimensional sines and cosines, so that near patches look near;
* the patch projection starts as the data's own principal components, whitened, so that all directions get a gradient of
  similar size;
* attention starts as "mimetic initialisation" (Trockman and Kolter 2023, https://arxiv.org/abs/2305.09828): query-key products
  near a multiple of the identity, value-output products near a negative one, as trained transformers have them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def sines(grid: int, width: int) -> Tensor:
    """[grid * grid, width] position codes, row by row."""
    frequency = 10_000 ** -(torch.arange(width // 4) / (width / 4))
    rows, columns = torch.meshgrid(torch.arange(grid).float(), torch.arange(grid).float(), indexing="ij")
    angle_x, angle_y = columns.flatten()[:, None] * frequency, rows.flatten()[:, None] * frequency
    return torch.cat([angle_x.sin(), angle_x.cos(), angle_y.sin(), angle_y.cos()], 1)


def whitened_patches(image_BCHW: Tensor, patch: int, width: int, generator: torch.Generator) -> Tensor:
    """[width, 3 * patch * patch] projection onto the leading components of normalised patches, unit output variance."""
    patches = F.unfold(image_BCHW, patch, stride=patch).transpose(1, 2).flatten(0, 1)
    patches = patches[torch.randperm(len(patches), generator=generator)[:20_000]]
    _, values, components = torch.linalg.svd(patches - patches.mean(0), full_matrices=False)
    deviation = values / len(patches) ** 0.5
    count = min(width, len(components))
    weight = torch.zeros(width, patches.shape[1])
    # The floor keeps the last components, which are almost noise, from being blown up to full size.
    weight[:count] = components[:count] / (deviation[:count, None] + 0.1 * deviation[0])
    return weight / (patches @ weight.T).std()


def _factors(identity: float, width: int, generator: torch.Generator, noise: float) -> tuple[Tensor, Tensor]:
    """Two square factors whose product is `identity` times I plus noise."""
    product = identity * torch.eye(width) + noise * torch.randn(width, width, generator=generator) * width**-0.5
    left, values, right = torch.linalg.svd(product)
    return left * values.sqrt(), values.sqrt()[:, None] * right


@torch.no_grad()
def initialise(visual: Any, image_BCHW: Tensor, generator: torch.Generator) -> None:
    """Write the three starts into an open_clip VisionTransformer; `image_BCHW` are normalised training images."""
    patch, width = visual.patch_size[0], visual.conv1.out_channels
    weight = whitened_patches(image_BCHW, patch, width, generator)
    visual.conv1.weight.copy_(weight.view_as(visual.conv1.weight))
    visual.positional_embedding.zero_()
    visual.positional_embedding[1:] = 0.5 * sines(visual.grid_size[0], width)
    for block in visual.transformer.resblocks:
        attention = block.attn
        size = attention.head_dim
        for head in range(attention.num_heads):
            # Of each factor only the leading columns fit into one head.
            query, key = _factors(0.7, width, generator, noise=0.7)
            rows = slice(head * size, (head + 1) * size)
            attention.in_proj_weight[:width][rows] = query[:, :size].T
            attention.in_proj_weight[width : 2 * width][rows] = key[:size]
        output, value = _factors(-0.4, width, generator, noise=0.4)
        attention.in_proj_weight[2 * width :] = value
        attention.out_proj.weight.copy_(output)
