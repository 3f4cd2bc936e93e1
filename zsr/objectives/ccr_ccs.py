"""CCR and CCS: contrastive constraints on attention (Chen et al., WACV 2023, arXiv 2105.09597), carried over to CLIP.

    L = CE(s <v(x_a), t>, y) + w_ccr L_CCR + w_ccs L_CCS

    w = softmax_p(<u_p, t_y> / tau),  a+ = unit(sum_p w_p u_p),  a- = unit(sum_p (1 - w_p) u_p),  u_p unit patch tokens of x_a
    L_CCR = mean_i [gamma - <t_y, a+> + <t_y, a->]_+     (content re-sourcing: reversed attention must fit worse)
    L_CCS = mean_i [gamma - <t_y, a+> + <t_j, a+>]_+     (content swapping: a swapped-in class must fit it worse)

Cost: 2 units per attack step + 3, as TeCoA, since tokens come with the adversarial view; PGD-2 takes 7.

**Uncertain**: all of it. The paper is about image-text matching, nothing in it is adversarial, and its equations are not public
here: the abstract gives the two ideas, METHODS.md 9 this reading of them. No published number belongs to these weights, margin
or temperature; the defaults are where retrieval losses of this kind commonly start.

Carried over: the two constraints, which need no annotation of where to look. The class prompt is the query, projected
patch tokens are keys and content, and both are asked of the attacked image.

What cannot be: the paper supervises trained cross-attention between the words of a caption and regions of a detector, both
ways, on top of a matching loss. CLIP has no attention between text and image, so the map here is a plain softmax of cosines and
only the image tower learns from it; a class prompt has no words to compare one by one, so only text asks; there is no
caption to swap in, so another class stands for it. Attention precision, recall and F1 need annotated regions and are left out.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zsr.config.base import Positive, Weight
from zsr.config.plugins import PluginConfig
from zsr.models import RobustCLIP
from zsr.objectives.base import (
    LossOutput,
    Objective,
    ObjectiveConfig,
    StepContext,
    pairs_of_different_classes,
    weighted_sum,
)


class CcrCcsConfig(ObjectiveConfig):
    name: Literal["ccr_ccs"] = "ccr_ccs"
    weight_ccr: Weight = 1.0
    """Content re-sourcing: what the class's attention gathers fits the class better than what it leaves out."""
    weight_ccs: Weight = 1.0
    """Content swapping: what the class's attention gathers fits that class better than another one."""
    margin: Weight = 0.2
    """gamma of both hinges, a difference of cosines."""
    temperature: Positive = 0.1
    """tau of the attention, on cosines: small looks at few patches."""
    swap: Literal["confusable", "batch"] = "confusable"
    """The class that CCS swaps in: the one whose untuned prompt is closest to the true one's, the same in every step; or the
    class of the next sample in the batch that has another one, as when pairs of a batch are swapped. The latter depends on
    how samples are spread over workers."""


class CcrCcs(Objective[CcrCcsConfig]):
    tecoa_settings: ClassVar[dict[str, Any] | None] = {"weight_ccr": 0.0, "weight_ccs": 0.0}

    @property
    def needs_tokens(self) -> bool:
        return bool(self.config.weight_ccr or self.config.weight_ccs)

    def check(self, attack: PluginConfig, model: RobustCLIP) -> None:
        if self.config.weight_ccr and model.image.grid == (1, 1):
            raise ValueError(
                f"objective.weight_ccr={self.config.weight_ccr:g}: needs two patches or more, and this model has one; use 0"
            )

    def loss(self, ctx: StepContext) -> LossOutput:
        config = self.config
        terms = {"ce": F.cross_entropy(ctx.logits(ctx.adv.embed_BD), ctx.label_B)}
        if config.weight_ccr or config.weight_ccs:
            tokens_BPD = ctx.adv.tokens_BPD
            assert tokens_BPD is not None, "the objective needs tokens"
            text_CD = ctx.text_CD.detach()
            attended_BD, left_out_BD = contents(tokens_BPD, text_CD[ctx.label_B], config.temperature)
            fit_B = cosines(attended_BD, text_CD[ctx.label_B])
            if config.weight_ccr:
                terms["ccr"] = self._hinge(fit_B, cosines(left_out_BD, text_CD[ctx.label_B])).mean()
            if config.weight_ccs:
                other_B, exists_B = self._swapped_in(ctx)
                hinge_B = self._hinge(fit_B, cosines(attended_BD, text_CD[other_B]))
                terms["ccs"] = hinge_B.masked_fill(~exists_B, 0).mean()
        weights = {"ce": 1.0, "ccr": config.weight_ccr, "ccs": config.weight_ccs}
        return LossOutput(weighted_sum(weights, terms), terms)

    def _hinge(self, better_B: Tensor, worse_B: Tensor) -> Tensor:
        return F.relu(self.config.margin - better_B + worse_B)

    def _swapped_in(self, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """A class for each sample that is another one and has another prompt, and whether there is one."""
        pairs_CC = pairs_of_different_classes(ctx.duplicate_CC)
        if self.config.swap == "confusable":
            closest_C = ctx.constant("closest class", lambda: closest_class(ctx.text0_CD, pairs_CC))
            return closest_C[ctx.label_B], pairs_CC.any(1)[ctx.label_B]
        place_B = torch.arange(len(ctx.label_B), device=ctx.label_B.device)
        following_BB = ctx.label_B[(place_B[:, None] + place_B) % len(place_B)]  # the batch as seen from each sample
        usable_BB = pairs_CC[ctx.label_B[:, None], following_BB]
        first_B1 = usable_BB.int().argmax(1, keepdim=True)  # the first of equals
        return following_BB.gather(1, first_B1)[:, 0], usable_BB.any(1)


def contents(tokens_BPD: Tensor, query_BD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What a query's attention gathers from patches and what it leaves out, unit ``[B, D]`` each.

    The second has the reversed weights ``(1 - w) / (P - 1)``, of which only the direction counts; with one patch it is 0.
    """
    unit_BPD = F.normalize(tokens_BPD, dim=-1)
    weight_BP = torch.softmax((unit_BPD @ query_BD[:, :, None])[:, :, 0] / temperature, dim=-1)
    attended_BD, left_out_BD = ((weights_BP[:, None] @ unit_BPD)[:, 0] for weights_BP in (weight_BP, 1 - weight_BP))
    return F.normalize(attended_BD, dim=-1), F.normalize(left_out_BD, dim=-1)


def cosines(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Cosines ``[B]`` of unit vectors, row by row."""
    return (a_BD * b_BD).sum(-1)


def closest_class(text0_CD: Tensor, pairs_CC: Tensor) -> Tensor:
    """For each class the most similar one it can be told from, ``[C]``; class 0 where there is none."""
    return (text0_CD @ text0_CD.T).masked_fill(~pairs_CC, -torch.inf).argmax(1)
