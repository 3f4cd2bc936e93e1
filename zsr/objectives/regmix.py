"""RegMix: mutual divergence of the attack's first and last prediction as a regulariser (Liu & Ojha, TrustCom 2025,
arXiv 2510.05317).

    L = CE(p_2, y) + w_main KL(p_1 || p_2) + w_auxiliary KL(p_2 || p_1) + w_clean KL(p_clean || p_2)
    p_1 = softmax at the attack's starting point, a constant;  p_2 = softmax at the attacked image

Cost: 2 units per attack step + 3, one more for a constant clean target or three more for a trained one; PGD-2 takes 8.
p_1 is the attack's own first forward pass and costs nothing.

Carried over: the regulariser of (fast) adversarial training that replaces a squared difference of logits by two
divergences of unequal weight between the outputs at the initial and at the final perturbation, and a clean target.

**Uncertain**: only the abstract was available. The formula is METHODS.md section 9's reconstruction, the weights are our
choice (the abstract says only that main and auxiliary differ). The paper speaks of *decomposed* divergence: probably Cui et
al. 2023 (arXiv 2305.13948), where KL has the gradient of a weighted squared difference of pairwise logit margins plus a
cross-entropy with soft labels, each with a weight of its own. That decomposition is not implemented; with its published
weights it has plain KL's gradient. The frozen model as clean target is CLIP's addition: the paper trains from scratch and
has none.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from zsr.config.base import Weight
from zsr.objectives.base import (
    LossOutput,
    Objective,
    ObjectiveConfig,
    StepContext,
    View,
    kl_divergence,
    kl_per_sample,
    weighted_sum,
)

_CLEAN_VIEW: dict[str, View] = {"frozen": "frozen_clean", "live": "clean_fixed", "trained": "clean"}


class RegmixConfig(ObjectiveConfig):
    name: Literal["regmix"] = "regmix"
    weight_main: Weight = 1.0
    """Of KL(p_1 || p_2)."""
    weight_auxiliary: Weight = 0.5
    """Of KL(p_2 || p_1)."""
    weight_clean: Weight = 1.0
    """Of KL(p_clean || p_2)."""
    clean_target: Literal["frozen", "live", "trained"] = "frozen"
    """p_clean: the pre-trained model's prediction of the clean image; this model's own, as a constant; or this model's own
    with its gradient, as in TRADES (Zhang et al., ICML 2019)."""


class Regmix(Objective[RegmixConfig]):
    tecoa_settings: ClassVar[dict[str, Any] | None] = {
        "weight_main": 0.0,
        "weight_auxiliary": 0.0,
        "weight_clean": 0.0,
    }

    @property
    def views(self) -> frozenset[View]:
        views: set[View] = {"adv"}
        if self.config.weight_main or self.config.weight_auxiliary:
            views.add("start")
        if self.config.weight_clean:
            views.add(_CLEAN_VIEW[self.config.clean_target])
        return frozenset(views)

    def loss(self, ctx: StepContext) -> LossOutput:
        config = self.config
        logits_BC = ctx.logits(ctx.adv.embed_BD)
        terms = {"ce": F.cross_entropy(logits_BC, ctx.label_B)}
        if config.weight_main:
            terms["main"] = kl_divergence(ctx.logits(ctx.start.embed_BD), logits_BC)
        if config.weight_auxiliary:
            terms["auxiliary"] = kl_per_sample(logits_BC, ctx.logits(ctx.start.embed_BD)).mean()
        if config.weight_clean:
            terms["clean"] = self._clean_divergence(ctx, logits_BC)
        weights = {
            "ce": 1.0,
            "main": config.weight_main,
            "auxiliary": config.weight_auxiliary,
            "clean": config.weight_clean,
        }
        return LossOutput(weighted_sum(weights, terms), terms)

    def _clean_divergence(self, ctx: StepContext, logits_BC: Tensor) -> Tensor:
        if self.config.clean_target == "frozen":
            return kl_divergence(ctx.logits(ctx.frozen_clean_embed_BD), logits_BC)
        if self.config.clean_target == "live":
            return kl_divergence(ctx.logits(ctx.clean_fixed.embed_BD), logits_BC)
        return kl_per_sample(ctx.logits(ctx.clean.embed_BD), logits_BC).mean()
