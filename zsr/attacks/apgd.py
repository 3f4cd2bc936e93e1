"""APGD: Auto-PGD without a step size to tune (Croce & Hein, ICML 2020, arXiv 2003.01690), L-inf and L2.

Maximises cross-entropy, DLR (equation 6) or targeted DLR (equation 7, each of the likeliest wrong classes in turn). On a
classifier it stops a sample at its first adversarial image; in training it maximises the objective's own loss.

Cost: 1 unit to see what is right without an attack, then (2 steps + 1) eot units for each restart and target, for samples that
have survived so far. What differs from the authors' code: zsr/attacks/ascent.py, and under EOT an image counts as adversarial
where most looks are wrong (theirs asks the last one); a survivor comes back at its highest loss, not unperturbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from zsr.attacks.ascent import Ascended, ascend
from zsr.attacks.attempts import first_success, in_groups
from zsr.attacks.base import AttackResult, BoundedAttack, BoundedConfig, Logits, PerSampleLoss
from zsr.attacks.losses import LossName, classifier_loss, likely_targets, steps_aside
from zsr.attacks.noise import derived_seeds

Count = Annotated[int, Field(ge=1)]


class APGDConfig(BoundedConfig):
    stops_early: ClassVar[bool] = True
    name: Literal["apgd"] = "apgd"
    loss: LossName = "ce"
    """Of a classifier: ce, dlr (needs 3 classes), dlr-targeted (needs 4) or margin. Training maximises the objective's own."""
    steps: Annotated[int, Field(ge=0)] = 100
    restarts: Count = 1
    target_classes: Count = 9
    """Targeted loss only: how many wrong classes to try."""
    rho: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Halve the step where the loss rose in at most this share of a period's steps."""
    eot: Count = 1
    """Looks averaged for each gradient, for models with randomness of their own."""


class APGD(BoundedAttack[APGDConfig]):
    """Ascend with momentum and step sizes that adapt sample by sample; keep the best point."""

    def perturb(
        self, loss: PerSampleLoss, image_BCHW: Tensor, seeds: Sequence[int], progress: float = 1.0
    ) -> AttackResult:
        threat = self.threat(progress)
        if threat.eps == 0:
            return AttackResult(image_BCHW, _no(image_BCHW))
        best: Ascended | None = None
        for restart in range(self.config.restarts):
            start_BCHW = threat.random_start(image_BCHW, derived_seeds(seeds, "apgd", restart))
            found = ascend(
                lambda x, rows: (loss(x), None), threat, image_BCHW, start_BCHW,
                steps=self.config.steps, rho=self.config.rho, eot=self.config.eot,
            )  # fmt: skip
            best = found if best is None else _higher(best, found)
        assert best is not None
        return AttackResult(best.image_BCHW, best.zero_grad_B)

    def attack_classifier(
        self, logits: Logits, image_BCHW: Tensor, label_B: Tensor, seeds: Sequence[int]
    ) -> AttackResult:
        config, threat = self.config, self.threat()
        with torch.no_grad():
            clean_BC = logits(image_BCHW)
        wrong_B = clean_BC.argmax(1) != label_B
        image_BCHW, zero_grad_B = image_BCHW.clone(), _no(image_BCHW)
        if threat.eps == 0 or steps_aside(config.loss, clean_BC.shape[1]):
            return AttackResult(image_BCHW, zero_grad_B, wrong_B)
        clean_BCHW, highest_B = image_BCHW.clone(), torch.full_like(clean_BC[:, 0], -torch.inf)
        targets_BK = (
            likely_targets(clean_BC, label_B, config.target_classes)
            if config.loss == "dlr-targeted"
            else label_B[:, None]
        )
        attempts = [*product(range(targets_BK.shape[1]), range(config.restarts))]
        for group in in_groups(attempts, self.rows, lambda: int((~wrong_B).sum())):
            left = (~wrong_B).nonzero().flatten()
            all_rows = left.repeat(len(group))
            ranks = torch.tensor([rank for rank, _ in group], device=left.device).repeat_interleave(len(left))
            labels_B, targets_B = label_B[all_rows], targets_BK[all_rows, ranks]
            left_seeds = [seeds[row] for row in left.tolist()]
            own_seeds = [seed for attempt in group for seed in derived_seeds(left_seeds, "apgd", config.loss, *attempt)]

            def look(
                x: Tensor, rows: Tensor, labels_B: Tensor = labels_B, targets_B: Tensor = targets_B
            ) -> tuple[Tensor, Tensor]:
                logits_BC = logits(x)
                loss_B = classifier_loss(config.loss, logits_BC, labels_B[rows], targets_B[rows])
                return loss_B, logits_BC.argmax(1) != labels_B[rows]

            start_BCHW = threat.random_start(clean_BCHW[all_rows], own_seeds)
            ascended = ascend(
                look, threat, clean_BCHW[all_rows], start_BCHW, steps=config.steps, rho=config.rho, eot=config.eot
            )
            found = first_success(ascended, len(group))
            take_B = found.success_B | (found.loss_B > highest_B[left])
            image_BCHW[left[take_B]] = found.image_BCHW[take_B]
            highest_B[left] = torch.maximum(highest_B[left], found.loss_B)
            zero_grad_B[left] |= found.zero_grad_B
            wrong_B[left] = found.success_B
        return AttackResult(image_BCHW, zero_grad_B, wrong_B)


def _higher(one: Ascended, other: Ascended) -> Ascended:
    """Per sample, the ascent that ended higher."""
    higher_B = other.loss_B > one.loss_B
    return Ascended(
        torch.where(higher_B.view(-1, 1, 1, 1), other.image_BCHW, one.image_BCHW),
        torch.where(higher_B, other.loss_B, one.loss_B),
        one.success_B,
        one.zero_grad_B | other.zero_grad_B,
    )


def _no(image_BCHW: Tensor) -> Tensor:
    return torch.zeros(len(image_BCHW), dtype=torch.bool, device=image_BCHW.device)
