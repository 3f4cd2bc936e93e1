"""CAW: confidence-aware weighting (NeurIPS 2025 workshop, arXiv 2510.02913).

    L = CE(p(x_a), y) + w_confidence L_CA + w_features L_Reg,   p = softmax(s <v, t>)

    L_CA  = mean_i (1 - p_y(x_a)) KL(p(x_a) || p_0(x))   the less sure of the class, the more it is held to the frozen model
    L_Reg = mean_i |v(x_a) - v_0(x_a)|_2                 not squared; the attacked image in both models

The attack is plain cross-entropy.

Cost: 2 units per attack step + 3, 1 more for L_CA (frozen clean predictions, nothing once they are kept by sample) and 1
for L_Reg (the frozen model on the attacked image, in every step). PGD-2 takes 9.

No code was released, so there is none to differ from. **Uncertain**: the formulas are those of a third-party note of the
paper (METHODS.md 5), which agrees with its abstract. Neither says what the two weights are - 1 is the choice made here, not
the published value - whether the confidence weight is a constant (``detach_weight``), or whether the features of L_Reg are
normalised (``normalize_features``). KL(adversarial || clean) is reported to do better than the reverse (``kl_order``).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zsr.config.base import Weight
from zsr.objectives.base import LossOutput, Objective, ObjectiveConfig, StepContext, View, kl_per_sample, weighted_sum


class CawConfig(ObjectiveConfig):
    name: Literal["caw"] = "caw"
    weight_confidence: Weight = 1.0
    """Of L_CA; the published value is not known."""
    weight_features: Weight = 1.0
    """Of L_Reg; the published value is not known."""
    kl_order: Literal["adv_target", "target_adv"] = "adv_target"
    """KL(adversarial || frozen clean), the reported choice, or the reverse."""
    detach_weight: bool = True
    """Whether 1 - p_y is a constant; a trained weight could shrink the loss by confidence alone."""
    normalize_features: bool = True
    """Whether L_Reg compares unit embeddings, at most 2 apart, or the embeddings before normalisation."""


class Caw(Objective[CawConfig]):
    tecoa_settings: ClassVar[dict[str, Any] | None] = {"weight_confidence": 0.0, "weight_features": 0.0}

    @property
    def views(self) -> frozenset[View]:
        views: set[View] = {"adv"}
        if self.config.weight_confidence:
            views.add("frozen_clean")
        if self.config.weight_features:
            views.add("frozen_adv")
        return frozenset(views)

    def loss(self, ctx: StepContext) -> LossOutput:
        config = self.config
        logits_BC = ctx.logits(ctx.adv.embed_BD)
        terms = {"ce": F.cross_entropy(logits_BC, ctx.label_B)}
        if config.weight_confidence:
            terms["confidence"] = self._confidence_loss(ctx, logits_BC)
        if config.weight_features:
            adv, frozen = ctx.adv, ctx.frozen_adv
            difference_BD = adv.raw_BD - frozen.raw_BD.detach()
            if config.normalize_features:
                difference_BD = adv.embed_BD - frozen.embed_BD.detach()
            # Its slope is 0 where the two are equal, as they are before the first update.
            terms["features"] = torch.linalg.vector_norm(difference_BD, dim=-1).mean()
        weights = {"ce": 1.0, "confidence": config.weight_confidence, "features": config.weight_features}
        return LossOutput(weighted_sum(weights, terms), terms)

    def _confidence_loss(self, ctx: StepContext, logits_BC: Tensor) -> Tensor:
        clean_BC = ctx.logits(ctx.frozen_clean_embed_BD.detach())
        pair = (logits_BC, clean_BC) if self.config.kl_order == "adv_target" else (clean_BC, logits_BC)
        divergence_B = kl_per_sample(*pair)
        doubt_B = -torch.expm1(logits_BC.log_softmax(-1).gather(1, ctx.label_B[:, None])[:, 0])
        return ((doubt_B.detach() if self.config.detach_weight else doubt_B) * divergence_B).mean()
