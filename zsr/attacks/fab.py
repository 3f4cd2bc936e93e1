"""FAB-T: the closest adversarial image, by steps to the linearised boundary (Croce & Hein, ICML 2020, arXiv 1907.02044).

Targeted: the boundary towards each of the likeliest wrong classes in turn, as in AutoAttack. Each step projects the point and
the image onto the boundary's linearisation inside the pixel box, overshoots a little, and steps back when it has crossed.

Cost: 1 unit, then 3 a step for each target and restart, for samples that have survived so far. What differs from the authors'
code: a sample stops at its first adversarial image within eps (theirs goes on to the closest one; the verdict is the same), and
both projections are one solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from zsr.attacks.ascent import Ascended
from zsr.attacks.attempts import first_success, in_groups
from zsr.attacks.base import AttackResult, BoundedAttack, BoundedConfig, Logits
from zsr.attacks.losses import likely_targets
from zsr.attacks.noise import derived_seeds
from zsr.attacks.threat import Norm

Count = Annotated[int, Field(ge=1)]

_TINY = 1e-12
_MOST_PIECES = 50  # Newton steps; some five are taken
_CLOSE = 1e-6  # share of the rise that rounding may leave over
_SHORTEST = 1e-8  # of the two ways to the boundary, so that their ratio exists


class FABConfig(BoundedConfig):
    stops_early: ClassVar[bool] = True
    name: Literal["fab"] = "fab"
    steps: Annotated[int, Field(ge=0)] = 100
    restarts: Count = 1
    """The first starts at the image, others in the ball of half eps around it."""
    target_classes: Count = 9
    """How many wrong classes to try."""
    most_bias: Annotated[float, Field(ge=0, le=1)] = 0.1
    """alpha_max: how far at most a step leans towards the image's own projection."""
    overshoot: Annotated[float, Field(ge=1)] = 1.05
    """eta: how far beyond the linearised boundary a step goes."""
    backward: Annotated[float, Field(ge=0, le=1)] = 0.9
    """beta: what is left of the perturbation after a step back."""


class FAB(BoundedAttack[FABConfig]):
    """Walk along the decision boundary towards the image."""

    def attack_classifier(
        self, logits: Logits, image_BCHW: Tensor, label_B: Tensor, seeds: Sequence[int]
    ) -> AttackResult:
        with torch.no_grad():
            clean_BC = logits(image_BCHW)
        wrong_B = clean_BC.argmax(1) != label_B
        found_BCHW, zero_grad_B = image_BCHW.clone(), torch.zeros_like(wrong_B)
        targets_BK = likely_targets(clean_BC, label_B, self.config.target_classes)
        attempts = [*product(range(targets_BK.shape[1]), range(self.config.restarts))] if self.threat().eps else []
        for group in in_groups(attempts, self.rows, lambda: int((~wrong_B).sum())):
            left = (~wrong_B).nonzero().flatten()
            clean_BCHW, left_seeds = image_BCHW[left], [seeds[row] for row in left.tolist()]
            starts = [self._start(clean_BCHW, left_seeds, *attempt) for attempt in group]
            rows = left.repeat(len(group))
            ranks = torch.tensor([rank for rank, _ in group], device=left.device).repeat_interleave(len(left))
            walked = self._walk(logits, image_BCHW[rows], torch.cat(starts), label_B[rows], targets_BK[rows, ranks])
            found = first_success(walked, len(group))
            found_BCHW[left], wrong_B[left] = found.image_BCHW, found.success_B
            zero_grad_B[left] |= found.zero_grad_B
        return AttackResult(found_BCHW, zero_grad_B, wrong_B)

    def _start(self, image_BCHW: Tensor, seeds: Sequence[int], rank: int, restart: int) -> Tensor:
        if not restart:
            return image_BCHW
        own_seeds = derived_seeds(seeds, "fab", rank, restart)
        return image_BCHW + self.threat().random_start(image_BCHW, own_seeds) / 2

    def _walk(
        self, logits: Logits, image_BCHW: Tensor, start_BCHW: Tensor, label_B: Tensor, target_B: Tensor
    ) -> Ascended:
        """From one start towards one target each. Nothing is gained without crossing, so the loss is the same for all."""
        config, threat = self.config, self.threat()
        found_BCHW = image_BCHW.clone()
        success_B = torch.zeros(len(image_BCHW), dtype=torch.bool, device=image_BCHW.device)
        zero_grad_B = success_B.clone()
        row_B, at_BCHW, done_B = torch.arange(len(image_BCHW), device=image_BCHW.device), start_BCHW, success_B
        for step in range(config.steps):
            if step % 10 == 0 or step & (step - 1) == 0:
                keep = (~done_B).nonzero().flatten()
                row_B, at_BCHW, done_B = row_B[keep], at_BCHW[keep], done_B[keep]
                if not len(row_B):
                    break
                image, label, target = image_BCHW[row_B], label_B[row_B], target_B[row_B]
            gap_B, grad_BCHW = _towards(logits, at_BCHW, label, target)
            zero_grad_B[row_B] |= (grad_BCHW == 0).flatten(1).all(1) & ~done_B
            # The plane gap + <grad, x - at> = 0, seen from where we are and from the image.
            image_gap_B = gap_B + (grad_BCHW * (image - at_BCHW)).flatten(1).sum(1)
            here = to_plane(threat.norm, at_BCHW, grad_BCHW, -gap_B)
            there = to_plane(threat.norm, image, grad_BCHW, -image_gap_B)
            here_B, there_B = (threat.size(way).clamp_min(_SHORTEST) for way in (here, there))
            bias_B111 = (here_B / (here_B + there_B)).clamp(max=config.most_bias).view(-1, 1, 1, 1)
            stepped = (at_BCHW + config.overshoot * here) * (1 - bias_B111)
            stepped = (stepped + (image + config.overshoot * there) * bias_B111).clamp(0, 1)
            with torch.no_grad():
                crossed_B = logits(stepped).argmax(1) != label
            hit_B = crossed_B & (threat.size(stepped - image) <= threat.eps) & ~done_B
            found_BCHW[row_B] = torch.where(hit_B.view(-1, 1, 1, 1), stepped, found_BCHW[row_B])
            done_B = done_B | hit_B
            success_B[row_B] = done_B
            back = image + (stepped - image) * config.backward
            at_BCHW = torch.where(crossed_B.view(-1, 1, 1, 1), back, stepped)
        return Ascended(found_BCHW, torch.zeros_like(found_BCHW[:, 0, 0, 0]), success_B, zero_grad_B)


def _towards(logits: Logits, at_BCHW: Tensor, label_B: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
    """The target's logit less the true one's, and its gradient."""
    at_BCHW = at_BCHW.detach().requires_grad_(True)
    with torch.enable_grad():
        logits_BC = logits(at_BCHW)
        gap_B = (logits_BC.gather(1, target_B[:, None]) - logits_BC.gather(1, label_B[:, None])).squeeze(1)
    return gap_B.detach(), torch.autograd.grad(gap_B.sum(), at_BCHW)[0]


def to_plane(norm: Norm, at_BCHW: Tensor, normal_BCHW: Tensor, rise_B: Tensor) -> Tensor:
    """The shortest move d with <normal, d> = rise that stays in the pixel box; to the box's corner if there is none.

    Along sign(rise * normal), pixel i goes min(lambda, room_i) in L-inf and min(lambda |n_i|, room_i) in L2. Both times
    |rise| = sum_i v_i min(lambda, q_i), which rises in lambda along a concave line of straight pieces. Newton's steps from 0
    stay left of the solution and end on its piece, after a handful of passes where a sort would look at every pixel's piece.
    """
    at, normal = at_BCHW.flatten(1), normal_BCHW.flatten(1) * torch.where(rise_B < 0, -1.0, 1.0)[:, None]
    steepest = normal.abs().amax(1, keepdim=True).clamp_min(torch.finfo(normal.dtype).tiny)
    slope, left_B1 = normal.abs() / steepest, rise_B.abs()[:, None] / steepest  # else squares underflow
    room = torch.where(normal > 0, 1 - at, at).clamp_min(0)
    value, limit = (slope, room) if norm == "linf" else (slope.square(), room / slope.clamp_min(_TINY))
    value = value.masked_fill(limit <= 0, 0)
    lam, rise_B1 = torch.zeros_like(left_B1), left_B1
    for _ in range(_MOST_PIECES):
        free_B1 = (value * (limit > lam)).sum(1, keepdim=True)
        onward = lam + left_B1 / free_B1.clamp_min(_TINY)
        left_B1 = (rise_B1 - (value * torch.minimum(limit, onward)).sum(1, keepdim=True)).clamp_min(0)
        moved, lam = onward > lam, onward
        if not (moved & (left_B1 > _CLOSE * rise_B1) & (free_B1 > 0)).any():
            break
    length = torch.minimum(lam if norm == "linf" else lam * slope, room)
    return (normal.sign() * length).view_as(at_BCHW)
