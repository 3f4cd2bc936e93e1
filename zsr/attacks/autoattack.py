"""AutoAttack: several attacks in turn on what is still standing (Croce & Hein, ICML 2020, arXiv 2003.01690).

The versions are the authors' for L-inf and L2: ``standard`` is apgd-ce, apgd-t, fab-t, square; ``rand``, for models with
randomness of their own, is apgd-ce and apgd-dlr with 20 looks a gradient; ``custom`` runs the stages you list.

A stage gets the samples that survived the stages before it, and no others. What happens to a sample depends on its seed alone,
so the verdicts do not change with the batch (but for the rounding of batched products).

Cost for a sample that survives, in units: 202 for apgd-ce and apgd-dlr each, 1810 for apgd-t, 2701 for fab-t (both 9 targets),
5002 for square; 20 times the APGD ones under rand. What differs from the authors' code: as the attacks' own files say; a loss
with too few classes steps aside (theirs warns and fails).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from zsr.attacks.apgd import APGDConfig
from zsr.attacks.base import Attack, AttackResult, BoundedAttack, BoundedConfig, Logits
from zsr.attacks.fab import FABConfig
from zsr.attacks.losses import LossName
from zsr.attacks.square import SquareConfig
from zsr.config.schema import ATTACKS

Stage = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"]
Count = Annotated[int, Field(ge=1)]

_VERSIONS: dict[str, tuple[Stage, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
_LOSSES: dict[str, LossName] = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-targeted"}


class AutoAttackConfig(BoundedConfig):
    stops_early: ClassVar[bool] = True
    name: Literal["autoattack"] = "autoattack"
    version: Literal["standard", "rand", "custom"] = "standard"
    attacks: tuple[Stage, ...] = ()
    """Stages of the custom version, in order."""
    steps: Count = 100
    """Of each gradient stage."""
    restarts: Count = 1
    """Of each stage."""
    target_classes: Count = 9
    """Wrong classes that a targeted stage tries."""
    queries: Annotated[int, Field(ge=0)] = 5000
    """Of square."""
    eot: Count = 20
    """Looks averaged for each gradient; the rand version only."""

    @model_validator(mode="after")
    def _lists_stages(self) -> AutoAttackConfig:
        if self.version == "custom" and not self.attacks:
            raise ValueError("attacks: the custom version needs stages, such as [apgd-ce, apgd-t]")
        if self.version != "custom" and self.attacks:
            raise ValueError(f"attacks: version={self.version} has its own; set version=custom to choose")
        return self


class AutoAttack(BoundedAttack[AutoAttackConfig]):
    """The cascade on one batch. ``AttackResult.stage_B`` says which stage broke a sample.

    Over a whole set the runner (zsr/eval/runner.py) runs :attr:`parts` one after the other, with full batches of survivors;
    the verdicts are the same.
    """

    def __init__(self, config: AutoAttackConfig) -> None:
        super().__init__(config)
        self._attacks: tuple[Attack[Any], ...] = tuple(
            ATTACKS.build(_stage_config(config, name)) for name in self.stages
        )

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.config.attacks or _VERSIONS[self.config.version]

    @property
    def parts(self) -> tuple[Attack[Any], ...]:
        return self._attacks

    def attack_classifier(
        self, logits: Logits, image_BCHW: Tensor, label_B: Tensor, seeds: Sequence[int]
    ) -> AttackResult:
        image_BCHW, num, device = image_BCHW.clone(), len(image_BCHW), image_BCHW.device
        clean_BCHW = image_BCHW.clone()
        stage_B = torch.full((num,), len(self.stages), device=device)
        zero_grad_B = torch.zeros(num, dtype=torch.bool, device=device)
        for index, attack in enumerate(self._attacks):
            left = (stage_B == len(self.stages)).nonzero().flatten()
            if not len(left):
                break
            own_seeds = [seeds[row] for row in left.tolist()]
            found = attack.attack_classifier(logits, clean_BCHW[left], label_B[left], own_seeds)
            assert found.success_B is not None
            # A survivor keeps what the first stage made of it.
            take_B = found.success_B if index else torch.ones_like(found.success_B)
            image_BCHW[left[take_B]] = found.image_BCHW[take_B]
            zero_grad_B[left] |= found.zero_grad_B
            stage_B[left[found.success_B]] = index
        return AttackResult(image_BCHW, zero_grad_B, stage_B < len(self.stages), stage_B)


def _stage_config(config: AutoAttackConfig, stage: Stage) -> BoundedConfig:
    shared: dict[str, Any] = {"norm": config.norm, "eps": config.eps, "schedule": config.schedule}
    if stage == "square":
        return SquareConfig(**shared, queries=config.queries, restarts=config.restarts)
    shared |= {"steps": config.steps, "restarts": config.restarts, "target_classes": config.target_classes}
    if stage == "fab-t":
        return FABConfig(**shared)
    return APGDConfig(**shared, loss=_LOSSES[stage], eot=config.eot if config.version == "rand" else 1)
