"""GSB: from generalisation to specialisation, by an annealed weight (after BGSNet, Li et al., TMM 2023, arXiv 2201.01961).

    L = (1 - r) w_kd KL(softmax(s v_0(x) T / tau) || softmax(s v(x_a) T / tau)) tau^2  +  r CE(s <v(x_a), t>, y)
    r = schedule(progress), a line from 0 to 1 unless set otherwise

Cost: 2 units per attack step + 3, one more for the frozen model's clean prediction; PGD-2 takes 8.

Carried over to CLIP: the balance of a generalisation and a specialisation branch, annealed over training. Distillation
from the frozen model is the branch that generalises to classes never seen, adversarial cross-entropy the one that
specialises in the training classes. r is a schedule as the attack's epsilon has one (zsr/attacks/schedules.py), so
``objective.schedule.start`` and ``.end`` turn the direction around or keep both branches alive.

Not carried over: the diversity loss across attentive extractors (CLIP has one embedding head, and a penalty between heads
has nothing to compare), episodic meta-learning (the generalisation branch is the frozen model, not a network to be
trained for it), the balance learned by gradient over the data set (the schedule replaces it), attributes.

**Uncertain**: only the abstract was available, and BGSNet is not adversarial. This whole objective is METHODS.md section
9's transfer of its idea; the weight and the temperature are our choice.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field, model_validator

from zsr.attacks.schedules import Schedule
from zsr.config.base import Positive, Weight
from zsr.config.plugins import PluginConfig, PluginField
from zsr.config.schema import SCHEDULES
from zsr.objectives.base import (
    LossOutput,
    Objective,
    ObjectiveConfig,
    StepContext,
    View,
    kl_divergence,
    weighted_sum,
)


class GsbConfig(ObjectiveConfig):
    name: Literal["gsb"] = "gsb"
    weight_kd: Weight = 1.0
    """Of distillation while r = 0."""
    schedule: Annotated[PluginConfig, PluginField(SCHEDULES)] = Field(default="linear", validate_default=True)
    """r, cross-entropy's weight, over training. ``constant`` is r = 1 throughout."""
    temperature: Positive = 1.0
    """tau of the distillation, on top of the logit scale."""

    @model_validator(mode="after")
    def _distillation_has_its_time(self) -> GsbConfig:
        if self.schedule.name == "constant" and self.weight_kd:
            raise ValueError(
                f"weight_kd={self.weight_kd:g} never counts with schedule=constant, which is r = 1 throughout; "
                "set weight_kd=0, or schedule=linear"
            )
        return self


class Gsb(Objective[GsbConfig]):
    tecoa_settings: ClassVar[dict[str, Any] | None] = {"weight_kd": 0.0, "schedule": "constant"}

    def __init__(self, config: GsbConfig) -> None:
        super().__init__(config)
        self.schedule: Schedule = SCHEDULES.build(config.schedule)  # type: ignore[type-arg]

    @property
    def views(self) -> frozenset[View]:
        return frozenset({"adv", "frozen_clean"} if self.config.weight_kd else {"adv"})

    def loss(self, ctx: StepContext) -> LossOutput:
        ratio = self.schedule.factor(ctx.progress)  # a Python number: no device is asked
        logits_BC = ctx.logits(ctx.adv.embed_BD)
        terms = {"ce": F.cross_entropy(logits_BC, ctx.label_B)}
        if self.config.weight_kd:
            target_BC = ctx.logits(ctx.frozen_clean_embed_BD)
            terms["kd"] = kl_divergence(target_BC, logits_BC, self.config.temperature)
        return LossOutput(weighted_sum({"ce": ratio, "kd": (1 - ratio) * self.config.weight_kd}, terms), terms)
