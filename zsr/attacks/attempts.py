"""Several attempts at each sample in one batch: an attack's targets and restarts, with the outcome of taking them in turn.

Where a handful of samples is left, calls of the classifier take the time and not their arithmetic, on a GPU most of all. What
an attempt finds depends on the sample and the attempt alone, so trying many at once changes nothing but the time.

Shapes: B samples, A attempts; rows of a batch of both are attempt by attempt, ``[A * B]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from zsr.attacks.ascent import Ascended

Item = TypeVar("Item")


def in_groups(attempts: Sequence[Item], rows: int, num_left: Callable[[], int]) -> Iterator[Sequence[Item]]:
    """Attempts to make next: the first alone, since most samples fall to it, then as many at once as there is room for.

    Args:
        attempts: in the order in which they count.
        rows: most images of a batch; 0 is one attempt at a time.
        num_left: samples that are left, asked before each group; none ends it.
    """
    made = 0
    while made < len(attempts) and (num := num_left()):
        count = max(1, rows // num) if made else 1
        yield attempts[made : made + count]
        made += count


def first_success(found: Ascended, num_attempts: int) -> Ascended:
    """What taking the attempts in turn would have given, from all of them, ``[A * B]`` rows: ``[B]`` rows.

    For each sample its first success, else its highest loss, and whether a gradient was all zero up to there.
    """
    success_AB, zero_grad_AB, loss_AB = (
        x.view(num_attempts, -1) for x in (found.success_B, found.zero_grad_B, found.loss_B)
    )
    number_A1 = torch.arange(num_attempts, device=success_AB.device)[:, None]
    # Not argmax: of equal values it may take any.
    highest_B = torch.where(loss_AB == loss_AB.amax(0), number_A1, num_attempts - 1).amin(0)
    first_B = torch.where(success_AB, number_A1, num_attempts).amin(0)
    success_B = first_B < num_attempts
    taken_B = torch.where(success_B, first_B, highest_B)
    rows = taken_B * success_AB.shape[1] + torch.arange(success_AB.shape[1], device=taken_B.device)
    zero_grad_B = (zero_grad_AB & (number_A1 <= first_B)).any(0)
    return Ascended(found.image_BCHW[rows], found.loss_B[rows], success_B, zero_grad_B)
