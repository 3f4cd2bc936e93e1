"""TIMA: text-image mutual awareness (arXiv 2405.17678; AAAI-26 40(29):24235), the preprint and the published version.

    L = w_tam L_TAM + w_takd L_TAKD               (text-aware image tuning: text is a constant)
      + w_mhe (L_MHE + w_sc L_SC) + w_iakd L_IAKD   (image-aware text tuning: images are constants)

    L_TAM  = CE of s (<v_a, t_j> + m_yj) for j != y, s <v_a, t_y> for j = y
             with m_yj = m_0 +- m_1 phi(d_yj), d_yj = 1 - <t_y, t_j> rescaled to [0, 1] over j != y
    L_TAKD = KL(softmax(s v_0(x) T / tau) || softmax(s v T / tau)) tau^2
    L_MHE  = mean over pairs i != j of h(|t_i - t_j|)
    L_SC   = 1 - corr(<t_i, t_j>, <t0_i, t0_j>) over pairs i != j
    L_IAKD = KL(softmax(s v_0(x) T0 / tau) || softmax(s v_0(x) T / tau)) tau^2

``variant: v1`` is the preprint: the text-distance adaptive margin (TAM) takes d from the original text, once, phi is the
identity, and there is no L_SC. ``variant: aaai26`` is the published version: its adaptive semantic-aware margin (ASAM)
takes d from the text as it is tuned, as a constant of the step, so that the margin follows classes as they move apart;
its semantic-consistent energy (SC-MHE) adds L_SC, so that similarities may fall but keep their order. Pairs of classes
with the same prompt take no part in margins, L_MHE or L_SC.

Cost: 2 units per attack step + 3, one more if a distillation weight is on (v_0(x)), three more if ``takd_view`` is
"clean" and its weight is on. PGD-2 with distillation takes 8, in either variant; the terms on text are matrices of
C x C, no pass of an encoder.

**Uncertain**: the paper's text, code and weights are not public; abstracts and reviews fix the parts (hyperspherical
energy, the two distillations, the margin by semantic distance, semantic consistency) but not these formulas, which are
METHODS.md 1.2's reconstruction. What is open there is an option here: the margin's sign and shape, the text it is
measured on, the energy's form, the form of consistency, the view that is distilled. That both variants distil in the same
way is an assumption: the published abstract does not name the distillations. The image bank of L_IAKD is the batch
itself: frozen embeddings of the clean images, an unbiased estimate of the mean over the training set. Text is tuned
through the text tower's last projection alone, shared by all prompts, so that it transfers to unseen class names.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

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
    weighted_sum,
)
from zsr.objectives.text_spread import (
    MarginShape,
    adaptive_margin,
    centred_similarity,
    hyperspherical_energy,
    semantic_consistency,
)

_OF_AAAI26 = ("weight_sc", "sc_form", "margin_text", "margin_shape")


class TimaConfig(ObjectiveConfig):
    name: Literal["tima"] = "tima"
    variant: Literal["v1", "aaai26"] = "v1"
    """The preprint's terms, or the published version's: see the module."""
    weight_tam: Weight = 1.0
    weight_takd: Weight = 1.0
    weight_mhe: Weight = 1.0
    weight_iakd: Weight = 1.0
    weight_sc: Weight = 1.0
    """aaai26: of semantic consistency beside the energy, both times ``weight_mhe``. Where classes are nearly orthogonal from
    the start, 10 leaves the energy nothing to do (docs/tima_acceptance.md)."""
    sc_form: Literal["correlation", "affine"] = "correlation"
    """aaai26: 1 - correlation with the original similarities, a smooth stand-in for rank correlation; or the residual of their
    best affine map, min over a >= 0, b of the mean of (<t_i, t_j> - a <t0_i, t0_j> - b)^2. The latter vanishes at a = 0,
    where all classes are equally similar, which is what the energy alone wants: by itself it does not keep the order."""
    margin_base: Weight = 0.0
    """m_0, a cosine added to every wrong class."""
    margin_scale: Weight = 0.05
    """m_1, the most that semantic distance adds or takes, a cosine."""
    margin_sign: Literal["distant", "similar"] = "distant"
    """Which wrong classes get the larger margin: the semantically distant ones (m_0 + m_1 d), as the observed negative
    correlation of margin and similarity suggests, or the similar ones (m_0 - m_1 d), as in face recognition; the latter needs
    ``margin_base`` of ``margin_scale`` or more to push at all, else it only lets go of the distant ones."""
    margin_text: Literal["current", "original"] = "current"
    """aaai26: the text on which d is measured. v1 takes the original."""
    margin_shape: MarginShape = "identity"
    """aaai26: phi."""
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

    @model_validator(mode="after")
    def _fits_variant(self) -> TimaConfig:
        if self.variant == "v1":
            for field in _OF_AAAI26:
                if (value := getattr(self, field)) != TimaConfig.model_fields[field].default:
                    raise ValueError(
                        f"{field}={value} is for variant=aaai26 and variant=v1 has no use for it; leave it out"
                    )
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

    @property
    def weight_sc(self) -> float:
        """Of L_SC in the total; 0 in v1."""
        return self.config.weight_mhe * self.config.weight_sc if self.config.variant == "aaai26" else 0.0

    def loss(self, ctx: StepContext) -> LossOutput:
        config = self.config
        terms = {"tam": self._margin_loss(ctx)}
        if config.weight_takd:
            terms["takd"] = self._text_aware_distillation(ctx)
        if config.weight_mhe:
            pairs_CC = pairs_of_different_classes(ctx.duplicate_CC)
            terms["mhe"] = hyperspherical_energy(ctx.text_CD, pairs_CC, config.mhe_form, config.mhe_power)
            if self.weight_sc:
                original_CC = ctx.constant("tima/similarity", lambda: centred_similarity(ctx.text0_CD, pairs_CC))
                terms["sc"] = semantic_consistency(ctx.text_CD, original_CC, pairs_CC, config.sc_form)
        if config.weight_iakd:
            terms["iakd"] = self._image_aware_distillation(ctx)
        weights = {
            "tam": config.weight_tam,
            "takd": config.weight_takd,
            "mhe": config.weight_mhe,
            "sc": self.weight_sc,
            "iakd": config.weight_iakd,
        }
        return LossOutput(weighted_sum(weights, terms), terms)

    def _margin_loss(self, ctx: StepContext) -> Tensor:
        logits_BC = ctx.logits(ctx.adv.embed_BD)
        if self.config.margin_base or self.config.margin_scale:
            logits_BC = logits_BC + ctx.scale * self._margin(ctx)[ctx.label_B]
        return F.cross_entropy(logits_BC, ctx.label_B)

    def _margin(self, ctx: StepContext) -> Tensor:
        config = self.config
        scale = config.margin_scale if config.margin_sign == "distant" else -config.margin_scale

        def margin_on(text_CD: Tensor) -> Tensor:
            return adaptive_margin(text_CD, ctx.duplicate_CC, config.margin_base, scale, config.margin_shape)

        if config.variant == "aaai26" and config.margin_text == "current":
            return margin_on(ctx.text_CD.detach())
        return ctx.constant("tima/margin", lambda: margin_on(ctx.text0_CD))

    def _text_aware_distillation(self, ctx: StepContext) -> Tensor:
        view = ctx.adv if self.config.takd_view == "adv" else ctx.clean
        target_BC = ctx.logits(ctx.frozen_clean_embed_BD)
        return kl_divergence(target_BC, ctx.logits(view.embed_BD), self.config.temperature)

    def _image_aware_distillation(self, ctx: StepContext) -> Tensor:
        bank_BD = ctx.frozen_clean_embed_BD
        target_BC = ctx.logits(bank_BD, ctx.text0_CD)
        return kl_divergence(target_BC, ctx.logits(bank_BD, ctx.text_CD), self.config.temperature)
