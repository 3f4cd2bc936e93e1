"""Projected gradient descent (Madry et al. 2018) in pixel space, L-inf and L2, with per-sample random starts.

Source: METHODS.md 0.2. What differs from the code this field shares: the loss is summed, not averaged, over the batch;
there is no fp16; the gradient is taken with respect to the input alone. Cost: 2 units per step, plus 1 for each restart
when the best iterate is kept (its last loss has to be seen).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from zsr.attacks.base import Attack, AttackConfig, AttackResult, PerSampleLoss, check_pixel_units
from zsr.attacks.schedules import ConstantConfig, Schedule
from zsr.attacks.threat import Norm, ThreatModel
from zsr.config.base import PixelUnits
from zsr.config.plugins import PluginConfig, PluginField
from zsr.config.schema import SCHEDULES


class PGDConfig(AttackConfig):
    name: Literal["pgd"] = "pgd"
    norm: Norm = "linf"
    eps: PixelUnits = 1 / 255
    """Largest perturbation; pixels span [0, 1], so write 4/255."""
    step_size: PixelUnits = 1 / 255
    """Length of one step, in the same units; the schedule shortens it together with eps."""
    steps: Annotated[int, Field(ge=0)] = 2
    random_start: bool = True
    restarts: Annotated[int, Field(ge=1)] = 1
    """Independent starts; the one with the highest loss wins, per sample."""
    best_iterate: bool = False
    """Return the iterate with the highest loss seen, not the last one; on with several restarts."""
    schedule: Annotated[PluginConfig, PluginField(SCHEDULES)] = ConstantConfig()

    @model_validator(mode="after")
    def _in_pixel_units(self) -> PGDConfig:
        for setting in ("eps", "step_size"):
            check_pixel_units(setting, getattr(self, setting), self.norm)
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts={self.restarts} with random_start off would repeat one start; turn it on")
        return self


class PGD(Attack[PGDConfig]):
    """Ascend the loss step by step, projecting back into the threat model after each."""

    def __init__(self, config: PGDConfig) -> None:
        super().__init__(config)
        self.schedule: Schedule = SCHEDULES.build(config.schedule)  # type: ignore[type-arg]

    def threat(self, progress: float = 1.0) -> ThreatModel:
        """The ball at this point of training."""
        return ThreatModel(self.config.norm, self.config.eps * self.schedule.factor(progress))

    def perturb(
        self, loss: PerSampleLoss, image_BCHW: Tensor, seeds: Sequence[int], progress: float = 1.0
    ) -> AttackResult:
        threat = self.threat(progress)
        zero_grad_B = torch.zeros(len(image_BCHW), dtype=torch.bool, device=image_BCHW.device)
        if threat.eps == 0:
            return AttackResult(image_BCHW, zero_grad_B)
        step_size = self.config.step_size * self.schedule.factor(progress)
        keep_best = self.config.best_iterate or self.config.restarts > 1
        best_delta = best_loss = None
        for restart in range(self.config.restarts):
            delta = self._start(threat, image_BCHW, [seed + restart for seed in seeds])
            for _ in range(self.config.steps):
                attacked = (image_BCHW + delta).requires_grad_(True)
                loss_B = loss(attacked)
                (grad_BCHW,) = torch.autograd.grad(loss_B.sum(), attacked)
                zero_grad_B |= (grad_BCHW == 0).flatten(1).all(1)
                if keep_best:
                    best_delta, best_loss = _better(best_delta, best_loss, delta, loss_B.detach())
                delta = threat.project(delta + threat.ascend(grad_BCHW, step_size), image_BCHW)
            if keep_best:
                with torch.no_grad():
                    best_delta, best_loss = _better(best_delta, best_loss, delta, loss(image_BCHW + delta))
        final = delta if best_delta is None else best_delta
        # image + (attacked - image) may round to just outside the box.
        return AttackResult((image_BCHW + final).clamp(0, 1).detach(), zero_grad_B)

    def _start(self, threat: ThreatModel, image_BCHW: Tensor, seeds: Sequence[int]) -> Tensor:
        if self.config.random_start:
            return threat.random_start(image_BCHW, seeds)
        return torch.zeros_like(image_BCHW)


def _better(
    best_delta: Tensor | None, best_loss: Tensor | None, delta: Tensor, loss_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Per sample, the perturbation with the higher loss so far."""
    if best_delta is None or best_loss is None:
        return delta, loss_B
    higher = loss_B > best_loss
    return torch.where(higher.view(-1, 1, 1, 1), delta, best_delta), torch.where(higher, loss_B, best_loss)
