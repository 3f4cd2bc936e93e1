"""Projected gradient descent (Madry et al. 2018) in pixel space, L-inf and L2, with per-sample random starts.

Source: METHODS.md 0.2. What differs from the code this field shares: the loss is summed, not averaged, over the batch;
there is no fp16; the gradient is taken with respect to the input alone. Cost: 2 units per step, plus 1 for each restart
when the best iterate is kept (its last loss has to be seen).

The best iterate of a training loss is the one of highest loss. Against a classifier an iterate that is misclassified comes
first: with three classes or more, cross-entropy may be higher where the true class still leads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from zsr.attacks.base import Attack, AttackConfig, AttackResult, Logits, PerSampleLoss, check_pixel_units
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
    """Independent starts; the best one wins, per sample."""
    best_iterate: bool = False
    """Return the best iterate seen, not the last one; on with several restarts."""
    schedule: Annotated[PluginConfig, PluginField(SCHEDULES)] = ConstantConfig()

    @model_validator(mode="after")
    def _in_pixel_units(self) -> PGDConfig:
        for setting in ("eps", "step_size"):
            check_pixel_units(setting, getattr(self, setting), self.norm)
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts={self.restarts} with random_start off would repeat one start; turn it on")
        return self


@dataclass(frozen=True)
class Seen:
    """What an attacker saw at some perturbation, sample by sample.

    Attributes:
        wrong_B: whether, or how often, the image was misclassified; the same everywhere for a loss that classifies nothing.
    """

    delta_BCHW: Tensor
    wrong_B: Tensor
    loss_B: Tensor

    def or_better(self, other: Seen) -> Seen:
        """Per sample, the other where it is more often wrong, or as often and with a higher loss."""
        better_B = (other.wrong_B > self.wrong_B) | ((other.wrong_B == self.wrong_B) & (other.loss_B > self.loss_B))
        return Seen(
            torch.where(better_B.view(-1, 1, 1, 1), other.delta_BCHW, self.delta_BCHW),
            torch.where(better_B, other.wrong_B, self.wrong_B),
            torch.where(better_B, other.loss_B, self.loss_B),
        )


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
        def look(attacked_BCHW: Tensor) -> tuple[Tensor, Tensor]:
            loss_B = loss(attacked_BCHW)
            return loss_B, torch.zeros_like(loss_B, dtype=torch.bool)

        return self._ascend(look, image_BCHW, seeds, progress)

    def attack_classifier(
        self, logits: Logits, image_BCHW: Tensor, label_B: Tensor, seeds: Sequence[int]
    ) -> AttackResult:
        def cross_entropy(logits_BC: Tensor) -> Tensor:
            return F.cross_entropy(logits_BC, label_B, reduction="none")

        return self.attack_logits(cross_entropy, logits, image_BCHW, label_B, seeds)

    def attack_logits(
        self,
        loss_of: Callable[[Tensor], Tensor],
        logits: Logits,
        image_BCHW: Tensor,
        label_B: Tensor,
        seeds: Sequence[int],
    ) -> AttackResult:
        """``attack_classifier`` with another loss: ``loss_of`` takes logits ``[B, C]`` to losses ``[B]``."""

        def look(attacked_BCHW: Tensor) -> tuple[Tensor, Tensor]:
            logits_BC = logits(attacked_BCHW)
            return loss_of(logits_BC), logits_BC.detach().argmax(1) != label_B

        return self._ascend(look, image_BCHW, seeds, 1.0)

    def _ascend(
        self,
        look: Callable[[Tensor], tuple[Tensor, Tensor]],
        image_BCHW: Tensor,
        seeds: Sequence[int],
        progress: float,
    ) -> AttackResult:
        """``look`` takes images to losses ``[B]``, differentiable, and to which are misclassified."""
        threat = self.threat(progress)
        zero_grad_B = torch.zeros(len(image_BCHW), dtype=torch.bool, device=image_BCHW.device)
        if threat.eps == 0:
            return AttackResult(image_BCHW, zero_grad_B)
        step_size = self.config.step_size * self.schedule.factor(progress)
        keep_best = self.config.best_iterate or self.config.restarts > 1
        best: Seen | None = None
        for restart in range(self.config.restarts):
            delta = self._start(threat, image_BCHW, [seed + restart for seed in seeds])
            for _ in range(self.config.steps):
                attacked = (image_BCHW + delta).requires_grad_(True)
                loss_B, wrong_B = look(attacked)
                (grad_BCHW,) = torch.autograd.grad(loss_B.sum(), attacked)
                zero_grad_B |= (grad_BCHW == 0).flatten(1).all(1)
                if keep_best:
                    seen = Seen(delta, wrong_B, loss_B.detach())
                    best = seen if best is None else best.or_better(seen)
                delta = threat.project(delta + threat.ascend(grad_BCHW, step_size), image_BCHW)
            if keep_best:
                with torch.no_grad():
                    loss_B, wrong_B = look(image_BCHW + delta)
                seen = Seen(delta, wrong_B, loss_B)
                best = seen if best is None else best.or_better(seen)
        final = delta if best is None else best.delta_BCHW
        # image + (attacked - image) may round to just outside the box.
        return AttackResult((image_BCHW + final).clamp(0, 1).detach(), zero_grad_B)

    def _start(self, threat: ThreatModel, image_BCHW: Tensor, seeds: Sequence[int]) -> Tensor:
        if self.config.random_start:
            return threat.random_start(image_BCHW, seeds)
        return torch.zeros_like(image_BCHW)
