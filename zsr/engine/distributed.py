"""The few collectives that training needs, each the identity for a single process.

Gradients are averaged in buckets of fixed layout rather than by DistributedDataParallel: that one re-arranges its buckets
after the first step, so a resumed run would add in another order and differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_ELEMENTS = 8 * 2**20  # 32 MiB of fp32: large enough to fill a network, small enough to overlap a few


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average_gradients(parameters: Sequence[nn.Parameter], share: float | None = None) -> None:
    """Replace each gradient by its weighted mean over ranks, which is the gradient of the joined batch.

    A parameter that has no gradient here counts as zero, so that every rank sends the same buckets.

    Args:
        parameters: the same on every rank.
        share: this rank's part of the global batch, 0 to 1; an equal part when None.
    """
    if not is_distributed():
        return
    weight = 1 / dist.get_world_size() if share is None else share
    buckets = [_flatten(bucket).mul_(weight) for bucket in _buckets(parameters)]
    pending = [dist.all_reduce(flat, async_op=True) for flat in buckets]
    for bucket, flat, work in zip(_buckets(parameters), buckets, pending, strict=True):
        work.wait()
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum over ranks, the same tensor on each."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def same_on_all_ranks(values: Sequence[nn.Parameter]) -> None:
    """Give every rank rank 0's values, in place: they start equal whatever each loaded."""
    if is_distributed():
        for value in values:
            dist.broadcast(value.data, src=0)


def _flatten(bucket: Sequence[nn.Parameter]) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        if size and size + parameter.numel() > _BUCKET_ELEMENTS:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel()
    return buckets
