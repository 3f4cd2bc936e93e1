"""Text-guided attention maps, their exact distance at image size from a few numbers per sample, and the losses on them.

Shapes: B images, N prompts, C classes, D embedding width, P = h x w patches, S x S pixels.

A map says how well each projected patch token fits a prompt of the image's true class. TGA-ZSR and Comp-TGA resize maps to
S x S pixels and compare them there. Bilinear resizing is linear and separable: a map ``a`` becomes ``U_h a U_w^T`` with fixed
``U_h`` [S, h] and ``U_w`` [S, w]. So a distance in pixels needs only the Gram matrices ``U^T U``, of which the triangular
factors are kept (``R^T R = U^T U``, a sum of squares that rounding cannot make negative):

    ||U_h d U_w^T|| = ||R_h d R_w^T||

The same holds of anything that is linear in fixed functions of pixels, products of two resized maps among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from zsr.config.base import Weight
from zsr.config.plugins import PluginConfig
from zsr.models import ImageFeatures, RobustCLIP
from zsr.objectives.base import LossOutput, Objective, ObjectiveConfig, StepContext, View, weighted_sum

_SMALLEST_NORM = 1e-12  # of a channel or a token, as in torch's own normalize


class AttentionConfig(ObjectiveConfig):
    """What the objectives on attention maps share."""

    weight_ar: Weight
    """Attention refinement: the attacked image's map is held to the frozen model's of the clean image."""
    weight_amc: Weight
    """Model constraint: the clean image's map is held to the same; 0 saves the clean view, three units."""
    map_axis: Literal["token", "feature"] = "token"
    """What features are divided by: the norm of each channel over all tokens, class token included (official code, which
    made the published numbers), or each token's own norm, so that the map holds cosines (the paper's text)."""
    map_order: Literal["normalize_first", "resize_first"] = "normalize_first"
    """Min-max to [0, 1] over the patches and then resize (official code), or resize and then min-max over the pixels (the
    paper's text). The second spans [0, 1] exactly; the first falls short of it where a patch's centre is no pixel."""
    map_size: Annotated[int, Field(ge=1)] = 224
    """S. Maps are S x S whatever the model's image size, since published weights belong to norms over 224 x 224 pixels."""


AttentionT = TypeVar("AttentionT", bound=AttentionConfig)


class TextGuidedAttention(Objective[AttentionT]):
    """``CE(x_a) + weight_ar L_AR + weight_amc L_AMC``; a subclass says which prompts and what is compared.

    ``L_AR = mean_i ||A(x_a) - A_0(x)||`` and ``L_AMC = mean_i ||A(x) - A_0(x)||`` with the un-squared norm over S x S pixels,
    whose gradient is taken as 0 where the maps are equal. ``A_0(x)``, the frozen model's, is a constant of each sample.
    """

    tecoa_settings: ClassVar[dict[str, Any] | None] = {"weight_ar": 0.0, "weight_amc": 0.0}

    @property
    def needs_tokens(self) -> bool:
        return bool(self.config.weight_ar or self.config.weight_amc)

    @property
    def views(self) -> frozenset[View]:
        views: set[View] = {"adv"}
        if self.config.weight_amc:
            views.add("clean")
        if self.config.weight_ar or self.config.weight_amc:
            views.add("frozen_clean")
        return frozenset(views)

    def check(self, attack: PluginConfig, model: RobustCLIP) -> None:
        for count in model.image.grid:
            _check_size(count, self.config.map_size)

    def texts(self, ctx: StepContext) -> Sequence[Tensor]:
        """Class embeddings ``[C, D]`` of the N prompts that a sample's maps are made for."""
        raise TypeError(f"{type(self).__name__} names no prompts")

    def coefficients(self, map_BNhw: Tensor) -> Tensor:
        """What is compared, ``[B, h', w']``, in terms of :meth:`basis`."""
        return map_BNhw[:, 0]

    def basis(self, resize_Sh: Tensor) -> Tensor:
        """Functions of a pixel's row (or column), ``[S, h']``, made of those that resize."""
        return resize_Sh

    def loss(self, ctx: StepContext) -> LossOutput:
        config = self.config
        terms = {"ce": F.cross_entropy(ctx.logits(ctx.adv.embed_BD), ctx.label_B)}
        if config.weight_ar or config.weight_amc:
            # The name holds whatever shapes the rows, so that rows of other settings are never taken for them.
            name = f"{config.name} map {config.map_axis} {config.map_order} {config.map_size}"
            frozen_BNhw = ctx.per_sample(name, lambda features, label_B: self._maps(ctx, features, label_B)).detach()
            if config.weight_ar:
                terms["ar"] = self._distance(ctx, ctx.adv, frozen_BNhw)
            if config.weight_amc:
                terms["amc"] = self._distance(ctx, ctx.clean, frozen_BNhw)
        weights = {"ce": 1.0, "ar": config.weight_ar, "amc": config.weight_amc}
        return LossOutput(weighted_sum(weights, terms), terms)

    def _maps(self, ctx: StepContext, features: ImageFeatures, label_B: Tensor) -> Tensor:
        """Normalised maps ``[B, N, h, w]``, one number a patch."""
        query_BND = torch.stack([text_CD[label_B] for text_CD in self.texts(ctx)], dim=1)
        map_BNhw = text_maps(features, query_BND, self.config.map_axis)
        if self.config.map_order == "normalize_first":
            return min_max(map_BNhw, map_BNhw)
        rows, columns = self._per_side(ctx, "extreme pixels", extreme_pixels, map_BNhw)
        # Resizing keeps affine maps affine: min-max of the pixels is min-max of the patches by the pixels' extremes.
        return min_max(map_BNhw, rows @ map_BNhw @ columns.T)

    def _distance(self, ctx: StepContext, features: ImageFeatures, frozen_BNhw: Tensor) -> Tensor:
        map_BNhw = self._maps(ctx, features, ctx.label_B)
        difference_Bhw = self.coefficients(map_BNhw) - self.coefficients(frozen_BNhw)
        rows, columns = self._per_side(ctx, "factor", self._factor, map_BNhw)
        return torch.linalg.vector_norm(rows @ difference_Bhw @ columns.T, dim=(1, 2)).mean()

    def _factor(self, count: int, size: int) -> Tensor:
        return triangular_factor(self.basis(bilinear_matrix(count, size)))

    def _per_side(
        self, ctx: StepContext, name: str, make: Callable[[int, int], Tensor], map_BNhw: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``make(h, S)`` and ``make(w, S)``, constants of the run."""

        def constant(count: int) -> Tensor:
            return ctx.constant(f"{name} {count}", lambda: make(count, self.config.map_size).to(map_BNhw))

        return constant(map_BNhw.shape[2]), constant(map_BNhw.shape[3])


def text_maps(features: ImageFeatures, query_BND: Tensor, axis: str) -> Tensor:
    """Maps ``[B, N, h, w]`` of normalised patch tokens against prompts, before min-max.

    With axis "token" a channel's norm runs over the class token too, where the tower has one (METHODS.md 3.1, official
    code); with average pooling and no class token, and in a ResNet, over the patches alone. A channel that is 0 in every
    token, or such a token, stays 0.

    Raises:
        ValueError: the grid is not known and P is no square.
    """
    tokens_BPD = features.tokens_BPD
    assert tokens_BPD is not None, "the objective needs tokens"
    if axis == "feature":
        tokens_BPD = F.normalize(tokens_BPD, dim=-1, eps=_SMALLEST_NORM)
    else:
        class_BD = features.class_token_BD
        all_BLD = tokens_BPD if class_BD is None else torch.cat([class_BD[:, None], tokens_BPD], dim=1)
        norm_B1D = torch.linalg.vector_norm(all_BLD, dim=1, keepdim=True).clamp_min(_SMALLEST_NORM)
        query_BND = query_BND / norm_B1D  # dividing the query is cheaper than dividing every token
    map_BNP = query_BND @ tokens_BPD.transpose(1, 2)
    return map_BNP.unflatten(-1, grid_of(features))


def grid_of(features: ImageFeatures) -> tuple[int, int]:
    """Rows and columns of the patches; a square where the tower does not say.

    Raises:
        ValueError: it does not say and the number of patches is no square.
    """
    assert features.tokens_BPD is not None
    num = features.tokens_BPD.shape[1]
    if features.grid != (0, 0):
        return features.grid
    side = round(num**0.5)
    if side * side != num:
        raise ValueError(f"{num} patch tokens make no square map; give ImageFeatures.grid, its rows and columns")
    return side, side


def min_max(map_BNhw: Tensor, among_BNhw: Tensor) -> Tensor:
    """``(map - low) / (high - low)``, each map by the extremes of its ``among``.

    The official code has no guard; here a constant map becomes 0 instead of 0 / 0, and every other map is untouched.
    """
    low = among_BNhw.amin((-2, -1), keepdim=True)
    span = among_BNhw.amax((-2, -1), keepdim=True) - low
    return (map_BNhw - low) / torch.where(span > 0, span, torch.ones_like(span))


def bilinear_matrix(count: int, size: int) -> Tensor:
    """``U`` [S, h], float64: bilinear resizing of ``count`` values to ``size``, with half-pixel centres.

    As torch's interpolate does it without align_corners. Antialiasing changes nothing, since maps are only enlarged.

    Raises:
        ValueError: the map would be made smaller.
    """
    _check_size(count, size)
    left_S, share_S = _places(count, size)
    resize_Sh = torch.zeros(size, count, dtype=torch.float64)
    resize_Sh.scatter_add_(1, left_S[:, None], 1 - share_S[:, None])
    resize_Sh.scatter_add_(1, (left_S + 1).clamp_max(count - 1)[:, None], share_S[:, None])
    return resize_Sh


def _check_size(count: int, size: int) -> None:
    if count > size:
        raise ValueError(
            f"objective.map_size={size}: is smaller than the model's map of patches, {count} on a side; use {count} or more"
        )


def extreme_pixels(count: int, size: int) -> Tensor:
    """The rows of ``U`` that suffice to find the lowest and the highest pixel, ``[at most 2h, h]``.

    Between neighbouring patches a resized map is linear in the row and linear in the column, so among the pixels there the
    corner ones are extreme: the first and the last row between two patches, and the same columns.
    """
    left_S, _ = _places(count, size)
    border_S = torch.diff(left_S, prepend=left_S.new_tensor([-1]), append=left_S.new_tensor([count])) != 0
    return bilinear_matrix(count, size)[border_S[:-1] | border_S[1:]]


def triangular_factor(basis_Sh: Tensor) -> Tensor:
    """``R`` [at most h, h] with ``R^T R = basis^T basis``."""
    return torch.linalg.qr(basis_Sh, mode="r").R


def _places(count: int, size: int) -> tuple[Tensor, Tensor]:
    """For each pixel the patch at or before it and how far it is on the way to the next, in [0, 1)."""
    place_S = ((torch.arange(size, dtype=torch.float64) + 0.5) * count / size - 0.5).clamp_min(0)
    left_S = place_S.floor().long()
    return left_S, place_S - left_S
