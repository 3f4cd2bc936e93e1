"""TGA-ZSR: text-guided attention (Yu, Zhang and Xu, NeurIPS 2024, arXiv 2410.21802).

    L = CE(s <v(x_a), t>, y) + w_ar ||A(x_a) - A_0(x)|| + w_amc ||A(x) - A_0(x)||,   A(x) = resize(minmax(F(x) t_y))

F(x) are the projected patch tokens, each channel divided by its norm over the tokens; t_y is the true class's prompt, A_0 the
frozen model's map. Norms are un-squared over 224 x 224 pixels, means over the batch (L_AR and L_AMC; METHODS.md 3.1).

Cost: 2 units per attack step + 3, three more for the clean view (``weight_amc``), one more for the frozen map unless it is
kept by sample; PGD-2 takes 11, or 10 from the second epoch on with ``train.cache_frozen``, which keeps 49 numbers a sample
for ViT-B/32.

Paper and official code differ in two places, both options here; the defaults are the code's, since it made the published
numbers and the weights belong to it. ``map_axis``: the code divides each channel by its norm over the tokens, so its map
is no map of cosines; the paper divides each token by its own. ``map_order``: the code normalises before it resizes, the paper
after. "Normalise" is min-max in the code; that the paper means the same over pixels is an assumption.

What differs from the code, and why: logits and map come from one forward pass, the code runs it twice; no map is made at
224 x 224, since the norm follows exactly from a map's patches (zsr/objectives/attention_map.py); a constant map is 0, not
0 / 0; the norm's gradient is 0 where both maps are equal, as at the first step's L_AMC. Where they differ by rounding
alone the gradient has its full length, as in any norm that is not squared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from zsr.config.base import Weight
from zsr.objectives.attention_map import AttentionConfig, TextGuidedAttention
from zsr.objectives.base import StepContext


class TgaZsrConfig(AttentionConfig):
    name: Literal["tga_zsr"] = "tga_zsr"
    weight_ar: Weight = 0.08
    """alpha: the attacked image's map is held to the frozen model's of the clean image."""
    weight_amc: Weight = 0.05
    """beta: the clean image's map is held to the same; 0 saves the clean view, three units. The authors report their
    AutoAttack numbers at 0.009, and accuracy under PGD that jumps between 0.04 and 0.05 (METHODS.md 3.5)."""


class TgaZsr(TextGuidedAttention[TgaZsrConfig]):
    def texts(self, ctx: StepContext) -> Sequence[Tensor]:
        return [ctx.text0_CD]  # text is not tuned, and the frozen map must not move
