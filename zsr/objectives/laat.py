"""LAAT: language-driven anchors for adversarial training (Li et al., CVPR 2024, arXiv 2301.13096).

    L = CE(<v(x_a), a'> / tau, y) - w_trades mean_i <v(x), v(x_a)>,   x_a = argmax of the same CE

a' are the class embeddings spread out around their mean (zsr/models/anchors.py), so that a cosine tells classes further
apart; evaluation uses them too. With tau = 1 the logits are bare cosines, the paper's alignment cross-entropy. The second
term, "TRADES-cos", draws the two embeddings of one image together; both are trained.

Cost: 2 units per attack step + 6; PGD-2 takes 10, the published PGD-7 takes 20; 3 less without ``weight_trades``.

What differs from the authors' code, and why (METHODS.md 6): they train small networks from scratch against the anchors of
CLIP's ViT-B/16, here the anchors are the fine-tuned model's own. Their expansion rotates the mean onto an axis and back with
dense matrices; here it is the same map along geodesics. Epochs are not chosen on test classes. No adversarial weight
perturbation, an option of theirs.

The expansion without the rest, for other objectives: ``model.expand_text=true``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from zsr.config.base import Positive, Weight
from zsr.models.tower import ImageFeatures
from zsr.objectives.base import LossOutput, Objective, ObjectiveConfig, StepContext, View, weighted_sum


class LaatConfig(ObjectiveConfig):
    name: Literal["laat"] = "laat"
    expand: bool = True
    """Whether class embeddings are spread out; false leaves CLIP's, unless ``model.expand_text`` asks for it."""
    temperature: Positive | Literal["model"] = 1.0
    """tau of the cosines in loss and attack; "model" takes the model's own logit scale, 1 / tau = 100 for CLIP."""
    weight_trades: Weight = 1.0
    """Of the negative cosine of each image's clean and adversarial embeddings."""


class Laat(Objective[LaatConfig]):
    tecoa_settings: ClassVar[dict[str, Any] | None] = {"expand": False, "temperature": "model", "weight_trades": 0.0}

    @property
    def views(self) -> frozenset[View]:
        return frozenset({"adv", "clean"} if self.config.weight_trades else {"adv"})

    @property
    def expands_text(self) -> bool:
        return self.config.expand

    def attack_loss(self, ctx: StepContext, features: ImageFeatures) -> Tensor:
        return F.cross_entropy(self._logits(ctx, features), ctx.label_B, reduction="none")

    def loss(self, ctx: StepContext) -> LossOutput:
        terms = {"ce": F.cross_entropy(self._logits(ctx, ctx.adv), ctx.label_B)}
        if self.config.weight_trades:
            terms["trades"] = -(ctx.clean.embed_BD * ctx.adv.embed_BD).sum(-1).mean()
        return LossOutput(weighted_sum({"ce": 1.0, "trades": self.config.weight_trades}, terms), terms)

    def _logits(self, ctx: StepContext, features: ImageFeatures) -> Tensor:
        """Cosines with the anchors over the temperature, ``[B, C]``; the anchors come expanded in ``ctx.text_CD``."""
        if self.config.temperature == "model":
            return ctx.logits(features.embed_BD)
        return features.embed_BD @ ctx.text_CD.detach().T / self.config.temperature
