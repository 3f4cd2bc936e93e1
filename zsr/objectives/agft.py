"""AGFT: alignment-guided fine-tuning (Cui et al., CVPR 2026, arXiv 2603.29410).

    L = CE(softmax(k s <v(x_a), t>), q),   q = softmax(g k s <v_0(x), t>),   x_a = argmax of the same CE

TeCoA with the label replaced by what the frozen model predicts of the original image, in the loss and in the attack. The
target's temperature is that of the trained prediction divided by g < 1, which makes it softer: the paper's calibration of
the confidence that fine-tuning changes. No label is read, only class names.

Cost: 2 units per attack step + 4; PGD-2 takes 8, and 7 once frozen predictions are kept by sample.

From the authors' code (YuboCui/AGFT, commit 90a4114; METHODS.md 10.1): training uses a logit scale of its own, 180 on
either side, against CLIP's 100 in evaluation, and g = 0.4, so that targets are made at a scale of 72. Here k is a factor on
the model's scale, 1.8, which is the same for CLIP and suits models of another scale. What differs: their attack
ascends the batch's mean under fp16, where small input gradients vanish; here it ascends the sum, in the run's precision.
The paper's text was not at hand: that its calibration is g alone is read from the abstract and the code.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from zsr.config.base import Positive
from zsr.models.tower import ImageFeatures
from zsr.objectives.base import LossOutput, Objective, ObjectiveConfig, StepContext, View


class AgftConfig(ObjectiveConfig):
    name: Literal["agft"] = "agft"
    scale_factor: Positive = 1.8
    """k: logit scale of training, loss and attack and target, in units of the model's; 180 for CLIP's 100."""
    target_ratio: Positive = 0.4
    """g: logit scale of the target in units of training's; 1 gives both one temperature."""


class Agft(Objective[AgftConfig]):
    @property
    def views(self) -> frozenset[View]:
        return frozenset({"adv", "frozen_clean"})

    def attack_loss(self, ctx: StepContext, features: ImageFeatures) -> Tensor:
        return self._cross_entropy_B(ctx, features)

    def loss(self, ctx: StepContext) -> LossOutput:
        soft = self._cross_entropy_B(ctx, ctx.adv).mean()
        return LossOutput(soft, {"soft_ce": soft})

    def _cross_entropy_B(self, ctx: StepContext, features: ImageFeatures) -> Tensor:
        """Cross-entropy with the frozen model's prediction of the original image, per sample."""
        config = self.config
        target_BC = (
            config.target_ratio * config.scale_factor * ctx.logits(ctx.frozen_clean_embed_BD.detach())
        ).softmax(-1)
        return F.cross_entropy(config.scale_factor * ctx.logits(features.embed_BD), target_BC, reduction="none")
