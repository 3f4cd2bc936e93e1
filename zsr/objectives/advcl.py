"""AdvCL: contrast of views with adversarial ones among them, and pseudo-labels (Fan et al., NeurIPS 2021, arXiv 2111.01124).

    L = CE(s <v(x_a), t>, y) + w_contrast L_con + w_pseudo CE(s <v(x_a), t>, argmax_c <v_0(x), t0_c>)

    L_con = mean over samples and over ordered pairs (a, b), a != b, of the views {x_a, x, high(x)} of one sample, of
            -log [ e^{<v_a, v_b> / tau} / (e^{<v_a, v_b> / tau} + sum_{c in N(y)} e^{<v_a, t_c> / tau}) ]
    x_a   = argmax of CE + w_contrast L_con of the pair (x_a, x) + w_pseudo CE to the pseudo-label

Cost: 2 units per attack step + 10: three trained views and the frozen clean one; PGD-2 takes 14. Without the
high-frequency view 3 less, without contrast 6 less, without pseudo-labels 1 less.

Carried over to CLIP: contrast (NT-Xent, tau 0.5) of each sample's attacked, clean and high-frequency view; cross-entropy
with pseudo-labels, weight 0.2, on the attacked image; an attack on contrast and pseudo-labels.

What differs, and why:

- Negatives are class prompts, those of classes other than the sample's, in place of other samples of the batch. So the
  loss is a mean of what each sample has alone: averaged gradients of two workers are the joined batch's, the attack on
  one image does not depend on which others it meets, and no embedding has to travel between workers. As in SupCon, what
  shares the label is no negative: the own class and classes with the same prompt as it are left out.
- Pseudo-labels are the frozen CLIP's own zero-shot predictions, a stand-in for ClusterFit's clusters, and the zero-shot
  head takes the place of five cluster heads.
- Cross-entropy on true labels, weight 1, is added: here one tunes a classifier, the authors pre-train without labels.
- Two random augmentations: this lineage trains without; the clean and the attacked image are the two views.
- One attacked image serves all terms, and the attack's contrast has it and the clean image. The authors' code makes two, one
  against the contrast with both augmentations and the high-frequency view, one against the pseudo-labels' cross-entropy.
- The authors' code does not bring the filtered image back into [0, 1]; ``high_frequency`` has two ways, since towers here take
  pixels.
- Not carried over: batch norms split by the kind of image (ViTs have none), and pre-training from scratch.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zsr.config.base import Positive, Weight
from zsr.config.plugins import PluginConfig
from zsr.models import ImageFeatures, RobustCLIP
from zsr.objectives.base import LossOutput, Objective, ObjectiveConfig, StepContext, View, weighted_sum


class AdvclConfig(ObjectiveConfig):
    name: Literal["advcl"] = "advcl"
    weight_contrast: Weight = 1.0
    weight_pseudo: Weight = 0.2
    temperature: Positive = 0.5
    """tau of the contrast, in place of the logit scale."""
    negatives: Literal["classes", "none"] = "classes"
    """What views are pushed away from: prompts of other classes, or nothing, which leaves -<v_a, v_b> / tau."""
    high_frequency: Literal["offset", "clip", "off"] = "offset"
    """The third view: the image without its low frequencies around middle grey (0.5 added; near CLIP's own mean pixel, so
    that both signs survive), or clipped at black, which loses the negative half; or no such view."""
    radius: Positive = 8.0
    """Frequencies below this, in cycles per image, are removed. Theirs is 8 on images of 32 pixels."""
    attack: Literal["joint", "ce"] = "joint"
    """What training's attack maximises: all terms, or cross-entropy alone, as evaluation does."""


class Advcl(Objective[AdvclConfig]):
    tecoa_settings: ClassVar[dict[str, Any] | None] = {"weight_contrast": 0.0, "weight_pseudo": 0.0}

    @property
    def views(self) -> frozenset[View]:
        config = self.config
        views: set[View] = {"adv"}
        if config.weight_contrast:
            views |= {"clean"} if config.high_frequency == "off" else {"clean", "extra"}
        if config.weight_pseudo:
            views.add("frozen_clean")
        return frozenset(views)

    @property
    def attack_views(self) -> frozenset[View]:
        joint = self.config.attack == "joint" and self.config.weight_contrast
        return frozenset({"clean"} if joint else ())

    def check(self, attack: PluginConfig, model: RobustCLIP) -> None:
        if "extra" in self.views:
            _check_radius(self.config.radius, model.image_size, model.image_size)

    def extra_image(self, image_BCHW: Tensor) -> Tensor:
        high_BCHW = remove_low_frequencies(image_BCHW, self.config.radius)
        return (high_BCHW + (0.5 if self.config.high_frequency == "offset" else 0.0)).clamp(0, 1)

    def attack_loss(self, ctx: StepContext, features: ImageFeatures) -> Tensor:
        config = self.config
        loss_B = super().attack_loss(ctx, features)
        if config.attack == "ce":
            return loss_B
        if config.weight_contrast:
            clean_BD = ctx.clean.embed_BD.detach()  # the clean view's own graph is for the loss, after the attack
            loss_B = loss_B + config.weight_contrast * self._contrast(ctx, [features.embed_BD, clean_BD])
        if config.weight_pseudo:
            logits_BC = ctx.logits(features.embed_BD)
            loss_B = loss_B + config.weight_pseudo * F.cross_entropy(logits_BC, _pseudo_label(ctx), reduction="none")
        return loss_B

    def loss(self, ctx: StepContext) -> LossOutput:
        config = self.config
        logits_BC = ctx.logits(ctx.adv.embed_BD)
        terms = {"ce": F.cross_entropy(logits_BC, ctx.label_B)}
        if config.weight_contrast:
            views = [ctx.adv.embed_BD, ctx.clean.embed_BD]
            if config.high_frequency != "off":
                views.append(ctx.extra.embed_BD)
            terms["contrast"] = self._contrast(ctx, views).mean()
        if config.weight_pseudo:
            terms["pseudo"] = F.cross_entropy(logits_BC, _pseudo_label(ctx))
        weights = {"ce": 1.0, "contrast": config.weight_contrast, "pseudo": config.weight_pseudo}
        return LossOutput(weighted_sum(weights, terms), terms)

    def _contrast(self, ctx: StepContext, views: list[Tensor]) -> Tensor:
        """L_con of each sample, ``[B]``, from its unit embeddings in each view ``[B, D]``."""
        losses = []
        for i, anchor_BD in enumerate(views):
            against_B = self._against(ctx, anchor_BD)
            for j, other_BD in enumerate(views):
                if i != j:
                    positive_B = (anchor_BD * other_BD).sum(1) / self.config.temperature
                    # softplus(n - p) = -log(e^p / (e^p + e^n)), n the log of the negatives' sum
                    losses.append(-positive_B if against_B is None else F.softplus(against_B - positive_B))
        return torch.stack(losses).mean(0)

    def _against(self, ctx: StepContext, anchor_BD: Tensor) -> Tensor | None:
        """Log of the sum over negatives ``[B]``, -inf where a sample has none; None without negatives."""
        if self.config.negatives == "none":
            return None
        same_CC = ctx.duplicate_CC | torch.eye(len(ctx.duplicate_CC), dtype=torch.bool, device=anchor_BD.device)
        similar_BC = anchor_BD @ ctx.text_CD.detach().T / self.config.temperature
        return similar_BC.masked_fill(same_CC[ctx.label_B], -torch.inf).logsumexp(1)


def _pseudo_label(ctx: StepContext) -> Tensor:
    """The frozen model's zero-shot prediction of each clean image, ``[B]``."""
    return ctx.per_sample("advcl/pseudo", lambda features, _: (features.embed_BD @ ctx.text0_CD.T).argmax(1))


def remove_low_frequencies(image_BCHW: Tensor, radius: float) -> Tensor:
    """Images without the frequencies less than ``radius`` cycles per image from zero; values around 0.

    Raises:
        ValueError: nothing of the image would be left.
    """
    height, width = image_BCHW.shape[-2:]
    _check_radius(radius, height, width)
    row_H, column_W = (_cycles(size, image_BCHW.device) for size in (height, width))
    high_HW = row_H.unsqueeze(1).square() + column_W.square() >= radius**2
    return torch.fft.ifft2(torch.fft.fft2(image_BCHW) * high_HW).real


def _check_radius(radius: float, height: int, width: int) -> None:
    most = math.hypot(height // 2, width // 2)
    if radius > most:
        raise ValueError(
            f"objective.radius={radius:g}: leaves no frequency of {height} x {width} pixels; use less than {most:.0f}"
        )


def _cycles(size: int, device: torch.device) -> Tensor:
    """Signed frequency of each place of a discrete Fourier transform, whole numbers: 0, 1, ..., -2, -1."""
    return (torch.arange(size, device=device) + size // 2) % size - size // 2
