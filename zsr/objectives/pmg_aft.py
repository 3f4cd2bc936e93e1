"""PMG-AFT: adversarial fine-tuning guided by the pre-trained model (Wang et al., CVPR 2024, arXiv 2401.04350).

    L = CE(p(x_a), y) + w_pretrained KL(p_0(x_a) || p(x_a)) + w_clean KL(p(x) || p(x_a)),   p = softmax(s <v, t>)

The model is held, on the attacked image, to what the pre-trained model p_0 says there and to what it says itself of the
original image. The attack is plain cross-entropy.

Cost: 2 units per attack step + 3, and 1 more for each of p_0(x_a) and p(x); PGD-2 takes 9. Without ``detach_clean`` the
clean pass is trained and takes 3; PGD-2 then takes 11. p_0(x_a) changes with the attack and cannot be kept by sample.

What differs from the authors' code, and why (METHODS.md 7): logits keep CLIP's scale s; theirs normalise the text features
after scaling them and so lose it, which leaves a softmax of bare cosines, nearly uniform, and weak gradients in training
and attack alike. Divergences are averaged over the batch; theirs sum it, so that their weight grows with the batch size
(``reduction``). Targets are constants; theirs let gradients flow into both targets (``detach_clean`` for the one that can
matter). Pixels are normalised as CLIP's are, not as ImageNet's.

**Uncertain**: the order of the two distributions. The authors' first release computed KL(p(x_a) || target), the code since
2024-05-29 KL(target || p(x_a)), the default here; re-implementations by others differ as well (``kl_order``). The paper's
text was not at hand.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from zsr.config.base import Weight
from zsr.objectives.base import LossOutput, Objective, ObjectiveConfig, StepContext, View, kl_per_sample, weighted_sum


class PmgAftConfig(ObjectiveConfig):
    name: Literal["pmg_aft"] = "pmg_aft"
    weight_pretrained: Weight = 1.0
    """Of the divergence from the pre-trained model on the attacked image."""
    weight_clean: Weight = 1.0
    """Of the divergence from the model's own prediction on the original image."""
    kl_order: Literal["target_adv", "adv_target"] = "target_adv"
    """KL(target || adversarial), as the authors' code has it now, or KL(adversarial || target), as it first had."""
    reduction: Literal["batchmean", "sum", "mean"] = "batchmean"
    """Of both divergences: mean over the batch; sum over it (the authors' code; grows with ``train.batch_size``, whatever the
    number of workers); or the mean over batch and classes."""
    detach_clean: bool = True
    """Whether the clean prediction is a constant; false trains it too, as the authors' code does."""


class PmgAft(Objective[PmgAftConfig]):
    tecoa_settings: ClassVar[dict[str, Any] | None] = {"weight_pretrained": 0.0, "weight_clean": 0.0}

    @property
    def views(self) -> frozenset[View]:
        config = self.config
        views: set[View] = {"adv"}
        if config.weight_pretrained:
            views.add("frozen_adv")
        if config.weight_clean:
            views.add("clean_fixed" if config.detach_clean else "clean")
        return frozenset(views)

    def loss(self, ctx: StepContext) -> LossOutput:
        config = self.config
        logits_BC = ctx.logits(ctx.adv.embed_BD)
        terms = {"ce": F.cross_entropy(logits_BC, ctx.label_B)}
        if config.weight_pretrained:
            terms["pretrained"] = self._divergence(ctx, ctx.logits(ctx.frozen_adv.embed_BD.detach()), logits_BC)
        if config.weight_clean:
            clean_BD = ctx.clean_fixed.embed_BD.detach() if config.detach_clean else ctx.clean.embed_BD
            terms["clean"] = self._divergence(ctx, ctx.logits(clean_BD), logits_BC)
        weights = {"ce": 1.0, "pretrained": config.weight_pretrained, "clean": config.weight_clean}
        return LossOutput(weighted_sum(weights, terms), terms)

    def _divergence(self, ctx: StepContext, target_BC: Tensor, logits_BC: Tensor) -> Tensor:
        """The divergence of two sets of logits in the configured order and reduction."""
        pair = (target_BC, logits_BC) if self.config.kl_order == "target_adv" else (logits_BC, target_BC)
        mean = kl_per_sample(*pair).mean()
        num_samples, num_classes = target_BC.shape
        if self.config.reduction == "sum":
            # Workers' gradients are averaged: a sum over this one's share would shrink with it.
            return mean * (ctx.global_batch or num_samples)
        return mean / num_classes if self.config.reduction == "mean" else mean
