"""Comp-TGA: complementary text-guided attention (TPAMI 2026, arXiv 2603.18598), the authors' successor of TGA-ZSR.

    L = CE(s <v(x_a), t>, y) + w_ar ||A(x_a) - A_0(x)|| + w_amc ||A(x) - A_0(x)||
    A = A+ (1 - A-),   A+ = map of the true class's prompt,   A- = map of "This is not a photo of a {}" with its name

with maps and norms as in TGA-ZSR (zsr/objectives/tga_zsr.py), the product taken pixel by pixel after both maps were resized.

Cost: 2 units per attack step + 3, three more for the clean view (``weight_amc``), one more for the frozen maps unless they are
kept by sample; PGD-2 takes 11, or 10 from the second epoch on with ``train.cache_frozen``, which keeps 2 x 49 numbers a
sample for ViT-B/32. The second prompt is encoded once, before the first step.

**Uncertain**: the paper's text is not public here; the formula is the official code's (METHODS.md 3.2). ``map_axis`` and
``map_order`` are TGA-ZSR's, and their other values are the first paper's intent carried over.

What differs from the code, and why: the code re-seeds torch inside every map and every loss, so that each attack starts from
the same noise; nothing here touches the random stream. As shipped the code stops with a NameError in this map. No map is made
at 224 x 224: a product of two bilinear maps is a combination of fixed functions (:meth:`CompTga.basis`), so its norm too
follows exactly from the patches. Text is not multiplied by the logit scale, which min-max cancels. The code's commented
alternative "This is the background of the image" names no class and is no value of ``complement_template``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import field_validator
from torch import Tensor

from zsr.config.base import Weight
from zsr.objectives.attention_map import AttentionConfig, TextGuidedAttention
from zsr.objectives.base import StepContext

# Which pairs of patches, one of each map, share pixels along one side: a patch with itself, and with its neighbour either way.
_ITSELF = [(slice(None), slice(None))]
_NEIGHBOURS = [(slice(None, -1), slice(1, None)), (slice(1, None), slice(None, -1))]


class CompTgaConfig(AttentionConfig):
    name: Literal["comp_tga"] = "comp_tga"
    weight_ar: Weight = 0.10
    """alpha: the attacked image's map is held to the frozen model's of the clean image."""
    weight_amc: Weight = 0.07
    """beta: the clean image's map is held to the same; 0 saves the clean view, three units."""
    complement_template: str = "This is not a photo of a {}"
    """The prompt of A-, with {} for the name of the true class."""

    @field_validator("complement_template")
    @classmethod
    def _names_the_class(cls, template: str) -> str:
        if "{}" not in template:
            raise ValueError('needs {} where the class name goes, as in "This is not a photo of a {}"')
        return template


class CompTga(TextGuidedAttention[CompTgaConfig]):
    @property
    def extra_templates(self) -> Mapping[str, str]:
        wanted = self.config.weight_ar or self.config.weight_amc
        return {"complement": self.config.complement_template} if wanted else {}

    def texts(self, ctx: StepContext) -> Sequence[Tensor]:
        return [ctx.text0_CD, ctx.extra_text_CD["complement"]]

    def coefficients(self, map_BNhw: Tensor) -> Tensor:
        """``A+ (1 - A-)`` in the basis of products, ``[B, 2h - 1, 2w - 1]``."""
        # Resizing keeps constants, so one minus a resized map is one minus the map, resized.
        wanted_Bhw, other_Bhw = map_BNhw[:, 0], 1 - map_BNhw[:, 1]

        def block(row_pairs: list[tuple[slice, slice]], column_pairs: list[tuple[slice, slice]]) -> Tensor:
            products = [
                wanted_Bhw[:, row, column] * other_Bhw[:, other_row, other_column]
                for row, other_row in row_pairs
                for column, other_column in column_pairs
            ]
            return torch.stack(products).sum(0)

        sides = (_ITSELF, _NEIGHBOURS)
        return torch.cat([torch.cat([block(rows, columns) for columns in sides], dim=2) for rows in sides], dim=1)

    def basis(self, resize_Sh: Tensor) -> Tensor:
        """Products of two resizing functions, ``[S, 2h - 1]``: squares, then neighbours; the others are 0 everywhere.

        With u_i(y) the share of patch row i in pixel row y, the product of two resized maps is the sum over i, j and columns
        k, l of u_i(y) u_j(y) u_k(x) u_l(x) a_ik b_jl, and at most two neighbouring u are not 0 at a pixel.
        """
        return torch.cat([resize_Sh**2, resize_Sh[:, :-1] * resize_Sh[:, 1:]], dim=1)
