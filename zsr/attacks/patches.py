"""Patterns of the Square attack (arXiv 1912.00049, algorithms 2 and 3): where squares go and what they are painted with.

Shapes: B images, C channels, H x W pixels, S x S a square; ``random_BK`` holds, for each sample, numbers in [-1, 1) that decide
one query: C signs, then two places (row, column) and an orientation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from zsr.attacks.noise import fill_uniform

_TINY = 1e-12
_GRID = 5  # tiles a side in the L2 start


def stripes(image_BCHW: Tensor, seeds: Sequence[int]) -> Tensor:
    """The L-inf start: columns of +1 or -1, for each channel."""
    return _signs(fill_uniform(image_BCHW[:, :, :1], seeds)).expand_as(image_BCHW)


def tiles(image_BCHW: Tensor, seeds: Sequence[int]) -> Tensor:
    """The L2 start: a grid of patches with random signs and orientations, of length 1."""
    num, channels, height, width = image_BCHW.shape
    side = max(min(height, width) // _GRID, 1)
    rows, columns = height // side, width // side
    random_BNK = fill_uniform(image_BCHW.new_empty(num, rows * columns, channels + 1), seeds)
    pattern_BNCSS = (
        _signs(random_BNK[..., :channels])[..., None, None] * _oriented(random_BNK[..., -1], side)[:, :, None]
    )
    delta_BCHW = torch.zeros_like(image_BCHW)
    above, left = (height - rows * side) // 2, (width - columns * side) // 2
    grid = pattern_BNCSS.view(num, rows, columns, channels, side, side).permute(0, 3, 1, 4, 2, 5)
    delta_BCHW[:, :, above : above + rows * side, left : left + columns * side] = grid.reshape(
        num, channels, rows * side, columns * side
    )
    return delta_BCHW / _length(delta_BCHW, (1, 2, 3))


def repainted_linf(delta_BCHW: Tensor, eps: float, side: int, random_BK: Tensor, edges: bool) -> Tensor:
    """One square set to +eps or -eps, for each channel."""
    channels = delta_BCHW.shape[1]
    inside_B1HW = _inside(delta_BCHW, side, random_BK[:, channels : channels + 2], edges)
    return torch.where(inside_B1HW, eps * _signs(random_BK[:, :channels])[:, :, None, None], delta_BCHW)


def repainted_l2(delta_BCHW: Tensor, eps: float, side: int, random_BK: Tensor, edges: bool) -> Tensor:
    """One square wiped, its length and what the budget leaves given to another; the whole brought to length eps."""
    num, channels, height, width = delta_BCHW.shape
    side = min(max(side, 3) | 1, height, width)  # odd, so that the pattern has a middle
    to_B2, from_B2 = random_BK[:, channels : channels + 2], random_BK[:, channels + 2 : channels + 4]
    wiped_B1HW = _inside(delta_BCHW, side, from_B2, edges)
    either_B1HW = _inside(delta_BCHW, side, to_B2, edges) | wiped_B1HW
    freed_BC11 = (delta_BCHW * either_B1HW).square().sum((2, 3), keepdim=True)
    spare_B111 = (eps**2 - delta_BCHW.square().sum((1, 2, 3), keepdim=True)).clamp_min(0)

    row_BS, column_BS = (
        start_B[:, None] + torch.arange(side, device=delta_BCHW.device)
        for start_B in _place(delta_BCHW, side, to_B2, edges)
    )
    index = (
        torch.arange(num, device=delta_BCHW.device)[:, None, None, None],
        torch.arange(channels, device=delta_BCHW.device)[None, :, None, None],
        row_BS[:, None, :, None],
        column_BS[:, None, None, :],
    )
    old_BCSS = delta_BCHW[index]
    pattern_BCSS = _signs(random_BK[:, :channels])[:, :, None, None] * _oriented(random_BK[:, -1], side)[:, None]
    new_BCSS = pattern_BCSS + old_BCSS / _length(old_BCSS, (2, 3))
    new_BCSS = new_BCSS / _length(new_BCSS, (2, 3)) * (spare_B111 / channels + freed_BC11).sqrt()
    repainted_BCHW = delta_BCHW.masked_fill(wiped_B1HW, 0)
    repainted_BCHW[index] = new_BCSS
    return repainted_BCHW / _length(repainted_BCHW, (1, 2, 3)) * eps


def _place(delta_BCHW: Tensor, side: int, random_B2: Tensor, edges: bool) -> list[Tensor]:
    """Top row and left column of each sample's square; without ``edges`` it never ends at the last row or column."""
    room = [max(size - side - (not edges), 0) for size in delta_BCHW.shape[2:]]
    return [
        ((number_B / 2 + 0.5) * (most + 1)).long().clamp(max=most)
        for number_B, most in zip(random_B2.T, room, strict=True)
    ]


def _inside(delta_BCHW: Tensor, side: int, random_B2: Tensor, edges: bool) -> Tensor:
    """Bool ``[B, 1, H, W]``: each sample's square."""
    top_B, left_B = _place(delta_BCHW, side, random_B2, edges)
    row_H, column_W = (torch.arange(size, device=delta_BCHW.device) for size in delta_BCHW.shape[2:])
    in_rows_BH = (row_H >= top_B[:, None]) & (row_H < top_B[:, None] + side)
    in_columns_BW = (column_W >= left_B[:, None]) & (column_W < left_B[:, None] + side)
    return (in_rows_BH[:, :, None] & in_columns_BW[:, None, :])[:, None]


def _oriented(random: Tensor, side: int) -> Tensor:
    """The pattern for each random number, upright or lying: ``[..., S, S]``."""
    upright_SS = _pattern(side, random.dtype, random.device)
    return torch.where((random > 0)[..., None, None], upright_SS.T, upright_SS)


@cache
def _pattern(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A hill above and a dip below, each a sum of nested rectangles of falling weight; of length 1."""
    pattern_SS = torch.zeros(side, side, dtype=torch.float64)
    pattern_SS[: side // 2] = _hill(side // 2, side)
    pattern_SS[side // 2 :] = -_hill(side - side // 2, side)
    return (pattern_SS / pattern_SS.norm()).to(device, dtype)


def _hill(height: int, width: int) -> Tensor:
    hill_HW = torch.zeros(height, width, dtype=torch.float64)
    top, left = height // 2, width // 2
    for ring in range(max(height // 2, width // 2) + 1):
        hill_HW[max(top - ring, 0) : top + ring + 1, max(left - ring, 0) : left + ring + 1] += 1 / (ring + 1) ** 2
    return hill_HW / hill_HW.norm().clamp_min(_TINY)


def _signs(random: Tensor) -> Tensor:
    return torch.where(random < 0, -1.0, 1.0).to(random.dtype)


def _length(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=True).clamp_min(_TINY)
