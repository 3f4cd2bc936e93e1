"""One run of Auto-PGD's ascent (Croce & Hein, ICML 2020, arXiv 2003.01690, algorithm 1) on any per-sample objective.

Shapes: B images still climbing, C channels, H x W pixels.

Momentum 0.75; steps start at 2 eps and are halved, sample by sample, at checkpoints that come closer together; a halved
sample goes back to its best point. A sample that an attack is done with stops: it leaves the batch at the next checkpoint, or
sooner (steps 0, 1, 2, 4, 8, 16 look too, since a weak model is lost there). Leaving costs a look from the host, a step none.

What differs from the authors' code: the first comparison of losses is with the start (theirs reads an entry that is not
written yet); a fooled sample keeps its first adversarial image and stops (theirs runs on and keeps the last); the gradient of
the last point is not computed; starts are uniform in the ball (theirs lie on its surface).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zsr.attacks.threat import ThreatModel

Look = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Images ``[B, C, H, W]`` and their rows in the batch given, to losses ``[B]`` and whether each is a success (or None)."""

MOMENTUM = 0.75


@dataclass(frozen=True)
class Ascended:
    """Where an ascent ended: the first success of each sample, else its image of highest loss."""

    image_BCHW: Tensor
    loss_B: Tensor
    success_B: Tensor
    zero_grad_B: Tensor


@dataclass
class _Climb:
    """Where each climbing sample stands: every field has a row for each."""

    row_B: Tensor
    image_BCHW: Tensor
    attacked_BCHW: Tensor
    previous_BCHW: Tensor
    grad_BCHW: Tensor
    loss_B: Tensor
    best_BCHW: Tensor
    best_grad_BCHW: Tensor
    best_loss_B: Tensor
    success_B: Tensor
    zero_grad_B: Tensor
    step_B111: Tensor
    num_rises_B: Tensor  # since the last checkpoint
    checkpoint_loss_B: Tensor  # best loss at the last checkpoint
    halved_B: Tensor  # whether the last checkpoint halved the step

    def take(self, rows: Tensor) -> _Climb:
        return _Climb(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})


def ascend(
    look: Look,
    threat: ThreatModel,
    image_BCHW: Tensor,
    start_BCHW: Tensor,
    *,
    steps: int,
    rho: float = 0.75,
    eot: int = 1,
) -> Ascended:
    """Climb from ``start_BCHW``, perturbations; 2 units a step and 1 more, ``eot`` times that.

    Args:
        rho: halve the step where the loss rose in at most this share of the steps since the last checkpoint.
        eot: looks averaged for each loss and gradient, for models with randomness of their own.
    """
    climb, can_succeed = _set_out(
        look, image_BCHW, (image_BCHW + start_BCHW).clamp(0, 1), 2 * threat.eps, steps > 0, eot
    )
    end = Ascended(*(x.clone() for x in (climb.best_BCHW, climb.best_loss_B, climb.success_B, climb.zero_grad_B)))
    due = checkpoints(steps)
    for step in range(1, steps + 1):
        if can_succeed and (step - 1 in due or _zero_or_power_of_two(step - 1)):
            _write(climb, end)
            climb = climb.take((~climb.success_B).nonzero().flatten())
            if not len(climb.row_B):
                return end
        _move(climb, threat, MOMENTUM if step > 1 else 1.0)
        _see(look, climb, step < steps, eot)
        if step in due:
            _review(climb, due[step], rho)
    _write(climb, end)
    return end


def checkpoints(steps: int) -> dict[int, int]:
    """Steps after which step sizes are reviewed, with the length of the period that each ends.

    The first period is 0.22 of all steps; each is 0.03 of all steps shorter than the one before, at least 0.06 of them.
    """
    period, shorter, shortest = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    ends, step = {}, period
    while step <= steps:
        ends[step] = period
        period = max(period - shorter, shortest)
        step += period
    return ends


def _set_out(
    look: Look, image_BCHW: Tensor, attacked_BCHW: Tensor, step_size: float, with_grad: bool, eot: int
) -> tuple[_Climb, bool]:
    num, device = len(image_BCHW), image_BCHW.device
    row_B = torch.arange(num, device=device)
    loss_B, success_B, grad_BCHW = _average(look, attacked_BCHW, row_B, with_grad, eot)
    no_B = torch.zeros(num, dtype=torch.bool, device=device)
    done_B = no_B if success_B is None else success_B
    climb = _Climb(
        row_B=row_B,
        image_BCHW=image_BCHW,
        attacked_BCHW=attacked_BCHW,
        previous_BCHW=attacked_BCHW,
        grad_BCHW=grad_BCHW,
        loss_B=loss_B,
        best_BCHW=attacked_BCHW,
        best_grad_BCHW=grad_BCHW,
        best_loss_B=loss_B,
        success_B=done_B,
        zero_grad_B=_all_zero(grad_BCHW) & ~done_B & with_grad,
        step_B111=torch.full((num, 1, 1, 1), step_size, dtype=image_BCHW.dtype, device=device),
        num_rises_B=torch.zeros(num, dtype=torch.long, device=device),
        checkpoint_loss_B=loss_B,
        halved_B=~no_B,  # the second condition for halving looks back at two periods: it cannot hold after the first
    )
    return climb, success_B is not None


def _move(climb: _Climb, threat: ThreatModel, weight: float) -> None:
    """A projected step, then the weighted mean of it and the step before, projected again."""
    image, here = climb.image_BCHW, climb.attacked_BCHW
    onward = image + threat.project(here - image + threat.ascend(climb.grad_BCHW, climb.step_B111), image)
    mixed = here + weight * (onward - here) + (1 - weight) * (here - climb.previous_BCHW)
    climb.previous_BCHW = here
    # image + (attacked - image) may round to just outside the box.
    climb.attacked_BCHW = (image + threat.project(mixed - image, image)).clamp(0, 1)


def _see(look: Look, climb: _Climb, with_grad: bool, eot: int) -> None:
    """Loss and gradient where the samples are now; for each, the best point so far. A success moves no more."""
    loss_B, success_B, grad_BCHW = _average(look, climb.attacked_BCHW, climb.row_B, with_grad, eot)
    better_B = (loss_B > climb.best_loss_B) & ~climb.success_B
    if success_B is not None:
        better_B |= success_B & ~climb.success_B  # the image to hand back, whatever its loss
        climb.success_B = climb.success_B | success_B
    better_B111 = better_B.view(-1, 1, 1, 1)
    climb.num_rises_B = climb.num_rises_B + (loss_B > climb.loss_B)
    climb.loss_B, climb.grad_BCHW = loss_B, grad_BCHW
    climb.best_BCHW = torch.where(better_B111, climb.attacked_BCHW, climb.best_BCHW)
    climb.best_grad_BCHW = torch.where(better_B111, grad_BCHW, climb.best_grad_BCHW)
    climb.best_loss_B = torch.where(better_B, loss_B, climb.best_loss_B)
    if with_grad:
        climb.zero_grad_B = climb.zero_grad_B | (_all_zero(grad_BCHW) & ~climb.success_B)


def _review(climb: _Climb, period: int, rho: float) -> None:
    """Halve the step of samples that oscillate or do not improve, and send them back to their best point."""
    oscillates_B = climb.num_rises_B <= rho * period
    stalls_B = ~climb.halved_B & (climb.checkpoint_loss_B >= climb.best_loss_B)
    climb.halved_B = oscillates_B | stalls_B
    halved_B111 = climb.halved_B.view(-1, 1, 1, 1)
    climb.step_B111 = torch.where(halved_B111, climb.step_B111 / 2, climb.step_B111)
    climb.attacked_BCHW = torch.where(halved_B111, climb.best_BCHW, climb.attacked_BCHW)
    climb.grad_BCHW = torch.where(halved_B111, climb.best_grad_BCHW, climb.grad_BCHW)
    climb.checkpoint_loss_B = climb.best_loss_B
    climb.num_rises_B = torch.zeros_like(climb.num_rises_B)


def _average(
    look: Look, attacked_BCHW: Tensor, row_B: Tensor, with_grad: bool, eot: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Mean loss and gradient over ``eot`` looks, and whether most of them are successes."""
    loss_B = torch.zeros(len(row_B), dtype=attacked_BCHW.dtype, device=row_B.device)
    grad_BCHW, wins_B = torch.zeros_like(attacked_BCHW), None
    for _ in range(eot):
        attacked_BCHW = attacked_BCHW.detach().requires_grad_(with_grad)
        with torch.set_grad_enabled(with_grad):
            once_B, success_B = look(attacked_BCHW, row_B)
        if with_grad:
            grad_BCHW = grad_BCHW + torch.autograd.grad(once_B.sum(), attacked_BCHW)[0] / eot
        loss_B = loss_B + once_B.detach() / eot
        if success_B is not None:
            wins_B = success_B.long() if wins_B is None else wins_B + success_B
    return loss_B, None if wins_B is None else 2 * wins_B > eot, grad_BCHW


def _write(climb: _Climb, end: Ascended) -> None:
    end.image_BCHW[climb.row_B] = climb.best_BCHW
    end.loss_B[climb.row_B] = climb.best_loss_B
    end.success_B[climb.row_B] = climb.success_B
    end.zero_grad_B[climb.row_B] = climb.zero_grad_B


def _all_zero(grad_BCHW: Tensor) -> Tensor:
    return (grad_BCHW == 0).flatten(1).all(1)


def _zero_or_power_of_two(step: int) -> bool:
    return step & (step - 1) == 0
