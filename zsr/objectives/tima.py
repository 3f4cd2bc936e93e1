"""TIMA: text-image mutual awareness (arXiv 2405.17678; AAAI-26), first version.

    L = w_tam L_TAM + w_takd L_TAKD   (text-aware image tuning: text is a constant)
      + w_mhe L_MHE + w_iakd L_IAKD   (image-aware text tuning: images are constants)

    L_TAM  = CE of s (<v_a, t_j> + m_yj) for j != y, s <v_a, t_y> for j = y
             with m_yj = m_0 +- m_1 d_yj, d_yj = 1 - <t0_y, t0_j> rescaled to [0, 1] over j != y
    L_TAKD = KL(softmax(s v_0(x) T / tau) || softmax(s v T / tau)) tau^2
    L_MHE  = mean over pairs i != j of h(|t_i - t_j|)
    L_IAKD = KL(softmax(s v_0(x) T0 / tau) || softmax(s v_0(x) T / tau)) tau^2

Cost: 2 units per attack step + 3, one more if a distillation weight is on (v_0(x)), three more if ``takd_view`` is
"clean" and its weight is on. PGD-2 with distillation takes 8.

**Uncertain**: the paper's text, code and weights are not public; abstracts and reviews fix the parts (hyperspherical
energy, the two distillations, the text-distance margin) but not these formulas, which are METHODS.md 1.2's
reconstruction. What is open there is an option here: the margin's sign, the energy's form, the view that is distilled.
The image bank of L_IAKD is the batch itself: frozen embeddings of the clean images, an unbiased estimate of the mean
over the training set. Text is tuned through the text tower's last projection alone, shared by all prompts, so that it
transfers to unseen class names.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from zsr.config.base import Positive, Weight
from zsr.objectives.base import (
    LossOutput,
    Objective,
    ObjectiveConfig,
    StepContext,
    View,
    kl_divergence,
    pairs_of_different_classes,
)

_CLOSEST = 1e-6  # squared distance below which two embeddings count as one: keeps the energy and its gradient finite


class TimaConfig(ObjectiveConfig):
    name: Literal["tima"] = "tima"
    weight_tam: Weight = 1.0
    weight_takd: Weight = 1.0
    weight_mhe: Weight = 1.0
    weight_iakd: Weight = 1.0
    margin_base: Weight = 0.0
    """m_0, a cosine added to every wrong class."""
    margin_scale: Weight = 0.05
    """m_1, the most that semantic distance adds or takes, a cosine."""
    margin_sign: Literal["distant", "similar"] = "distant"
    """Which wrong classes get the larger margin: the semantically distant ones (m_0 + m_1 d), as the observed negative
    correlation of margin and similarity suggests, or the similar ones (m_0 - m_1 d), as in face recognition."""
    mhe_form: Literal["bounded", "riesz"] = "bounded"
    """1 / (1 + r^a), used against exploding gradients, or the Riesz energy r^-a (-log r at a = 0)."""
    mhe_power: Weight = 2.0
    takd_view: Literal["adv", "clean"] = "adv"
    """Which view of the model is held to the frozen model's clean prediction."""
    temperature: Positive = 1.0
    """tau of both distillations, on top of the logit scale."""

    @model_validator(mode="after")
    def _bounded_has_power(self) -> TimaConfig:
        if self.mhe_form == "bounded" and self.mhe_power == 0:
            raise ValueError("mhe_power=0 makes the bounded energy constant; use a power above 0, or mhe_form=riesz")
        return self


class Tima(Objective[TimaConfig]):
    tecoa_settings: ClassVar[dict[str, Any] | None] = {
        "weight_tam": 1.0,
        "weight_takd": 0.0,
        "weight_mhe": 0.0,
        "weight_iakd": 0.0,
        "margin_base": 0.0,
        "margin_scale": 0.0,
    }

    @property
    def views(self) -> frozenset[View]:
        config = self.config
        views: set[View] = {"adv"}
        if config.weight_takd or config.weight_iakd:
            views.add("frozen_clean")
        if config.weight_takd and config.takd_view == "clean":
            views.add("clean")
        return frozenset(views)

    @property
    def tunes_text(self) -> bool:
        return bool(self.config.weight_mhe or self.config.weight_iakd)

    def loss(self, ctx: StepContext) -> LossOutput:
        config = self.config
        terms = {"tam": self._margin_loss(ctx)}
        if config.weight_takd:
            terms["takd"] = self._text_aware_distillation(ctx)
        if config.weight_mhe:
            pairs_CC = pairs_of_different_classes(ctx.duplicate_CC)
            terms["mhe"] = hyperspherical_energy(ctx.text_CD, pairs_CC, config.mhe_form, config.mhe_power)
        if config.weight_iakd:
            terms["iakd"] = self._image_aware_distillation(ctx)
        weights = {
            "tam": config.weight_tam,
            "takd": config.weight_takd,
            "mhe": config.weight_mhe,
            "iakd": config.weight_iakd,
        }
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return LossOutput(total, terms)

    def _margin_loss(self, ctx: StepContext) -> Tensor:
        logits_BC = ctx.logits(ctx.adv.embed_BD)
        if self.config.margin_base or self.config.margin_scale:
            margin_CC = adaptive_margin(
                ctx.text0_CD, ctx.duplicate_CC, self.config.margin_base, self._signed_margin_scale()
            )
            logits_BC = logits_BC + ctx.scale * margin_CC[ctx.label_B]
        return F.cross_entropy(logits_BC, ctx.label_B)

    def _signed_margin_scale(self) -> float:
        return self.config.margin_scale if self.config.margin_sign == "distant" else -self.config.margin_scale

    def _text_aware_distillation(self, ctx: StepContext) -> Tensor:
        view = ctx.adv if self.config.takd_view == "adv" else ctx.clean
        target_BC = ctx.logits(ctx.frozen_clean.embed_BD)
        return kl_divergence(target_BC, ctx.logits(view.embed_BD), self.config.temperature)

    def _image_aware_distillation(self, ctx: StepContext) -> Tensor:
        bank_BD = ctx.frozen_clean.embed_BD
        target_BC = ctx.logits(bank_BD, ctx.text0_CD)
        return kl_divergence(target_BC, ctx.logits(bank_BD, ctx.text_CD), self.config.temperature)


def hyperspherical_energy(text_CD: Tensor, pairs_CC: Tensor, form: str, power: float) -> Tensor:
    """Mean energy of class embeddings on the unit sphere (Liu et al., NeurIPS 2018); small when they are spread out.

    Args:
        text_CD: unit embeddings; the Gram matrix is taken in their precision, float32 in training.
        pairs_CC: ordered pairs to count; the diagonal and duplicated prompts left out.
        form: "bounded", 1 / (1 + r^a), or "riesz", r^-a with -log r at a = 0.
        power: a.

    Returns:
        Scalar; 0 if there is no pair.
    """
    squared_CC = (2 - 2 * text_CD @ text_CD.T).clamp_min(_CLOSEST)
    if form == "bounded":
        energy_CC = 1 / (1 + squared_CC ** (power / 2))
    elif power == 0:
        energy_CC = -squared_CC.log() / 2
    else:
        energy_CC = squared_CC ** (-power / 2)
    return energy_CC.masked_fill(~pairs_CC, 0).sum() / pairs_CC.sum().clamp_min(1)


def adaptive_margin(text0_CD: Tensor, duplicate_CC: Tensor, base: float, scale: float) -> Tensor:
    """Cosine margins ``[C, C]``, row y for images of class y: ``base + scale * d`` off the diagonal, 0 on it.

    d is the cosine distance of the original class embeddings, rescaled to [0, 1] over the row's other classes. A class
    with the same prompt as y gets no margin: nothing could tell the two apart.
    """
    counted_CC = pairs_of_different_classes(duplicate_CC)
    distance_CC = 1 - text0_CD @ text0_CD.T
    low_C1 = distance_CC.masked_fill(~counted_CC, torch.inf).amin(1, keepdim=True)
    high_C1 = distance_CC.masked_fill(~counted_CC, -torch.inf).amax(1, keepdim=True)
    rescaled_CC = (distance_CC - low_C1) / (high_C1 - low_C1).clamp_min(1e-12)
    return (base + scale * rescaled_CC).masked_fill(~counted_CC, 0)
