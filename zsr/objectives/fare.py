"""FARE: unsupervised adversarial fine-tuning of embeddings (Schlarmann et al., ICML 2024, arXiv 2402.12336).

    L = mean_i |f(x_a) - f_0(x)|_2^2 + w_clean mean_i |f(x) - f_0(x)|_2^2,   x_a = argmax |f(x_a) - f_0(x)|_2^2

f is the embedding before normalisation, the squares are summed over its dimensions. No labels and no text are read: any
images will do. The random start keeps the attack from starting at the loss's minimum, where it has no gradient.

Cost: 2 units per attack step + 4, 3 more with ``weight_clean``; PGD-2 takes 8, the published PGD-10 takes 24, one less
once frozen embeddings are kept by sample.

What differs from the authors' code (METHODS.md 8): the clean pass is made only where its term has a weight; theirs runs it
in every step, with a graph, for the log. Where it has a weight w, theirs is 1 - w and w; here the attacked term keeps 1. Frozen
embeddings can be kept by sample; theirs are made anew in each epoch. Their attack is PGD with a momentum of 0.9 on signs, and
takes the sign of the sum in every step: as 0.9 < 1, that is the last gradient's sign wherever there is one, and plain PGD.

``distance=cosine`` is Sim-CLIP (arXiv 2407.14971) as its code runs: the paper's symmetric loss has a second half, which the
frozen model of the code leaves without a gradient, so that -cos(f(x_a), f_0(x)) / 2 is left. Its attack stays that of FARE.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from zsr.config.base import Weight
from zsr.config.plugins import PluginConfig
from zsr.models import ImageFeatures, RobustCLIP
from zsr.objectives.base import LossOutput, Objective, ObjectiveConfig, StepContext, View, weighted_sum


class FareConfig(ObjectiveConfig):
    name: Literal["fare"] = "fare"
    distance: Literal["l2", "cosine"] = "l2"
    """Of the loss, both terms: |a - b|^2 of embeddings before normalisation (FARE), or -cos(a, b) / 2 (Sim-CLIP)."""
    weight_clean: Weight = 0.0
    """Of the distance of the original image's embedding; 0 in the authors' published runs."""


class Fare(Objective[FareConfig]):
    uses_classes: ClassVar[bool] = False

    @property
    def views(self) -> frozenset[View]:
        return frozenset({"adv", "clean", "frozen_clean"} if self.config.weight_clean else {"adv", "frozen_clean"})

    def check(self, attack: PluginConfig, model: RobustCLIP) -> None:
        if not getattr(attack, "random_start", True):
            raise ValueError(
                "attack.random_start=false: objective.name=fare starts at the minimum of its own loss, where the attack has no "
                "gradient, so that nothing would ever be trained; set it to true"
            )

    def attack_loss(self, ctx: StepContext, features: ImageFeatures) -> Tensor:
        return squared_distance(features.raw_BD, self._frozen_raw_BD(ctx))

    def loss(self, ctx: StepContext) -> LossOutput:
        terms = {"adv": self._distance(ctx, ctx.adv)}
        if self.config.weight_clean:
            terms["clean"] = self._distance(ctx, ctx.clean)
        return LossOutput(weighted_sum({"adv": 1.0, "clean": self.config.weight_clean}, terms), terms)

    def _distance(self, ctx: StepContext, features: ImageFeatures) -> Tensor:
        """Mean distance of a view to the frozen model's embeddings of the original images."""
        if self.config.distance == "cosine":
            return -(features.embed_BD * ctx.frozen_clean_embed_BD.detach()).sum(-1).mean() / 2
        return squared_distance(features.raw_BD, self._frozen_raw_BD(ctx)).mean()

    def _frozen_raw_BD(self, ctx: StepContext) -> Tensor:
        return ctx.per_sample("raw", lambda features, _: features.raw_BD).detach()


def squared_distance(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """``|a_i - b_i|^2`` for each row, ``[B]``."""
    return (a_BD - b_BD).square().sum(-1)
