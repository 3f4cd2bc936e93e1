"""The image tower: pixels in [0, 1] to embeddings and projected patch tokens, from one forward pass.

Shapes: B images, D embedding width, E width inside the tower, P patches, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsr.config.schema import Precision


@dataclass(frozen=True)
class ImageFeatures:
    """What one forward pass of the image tower gives.

    Attributes:
        embed_BD: unit embeddings, float32.
        raw_BD: the same before normalisation, float32.
        tokens_BPD: projected patch tokens, not normalised, float32; None unless asked for.
    """

    embed_BD: Tensor
    raw_BD: Tensor
    tokens_BPD: Tensor | None = None


class ImageTower(nn.Module):
    """Pixels in [0, 1] to embeddings: normalisation, open_clip's visual tower, projection of patch tokens."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, visual: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], precision: Precision
    ) -> None:
        super().__init__()
        self.visual = visual
        self.precision = precision
        self.has_tokens = type(visual).__name__ == "VisionTransformer" and getattr(visual, "attn_pool", None) is None
        if self.has_tokens:
            # The tower then returns (pooled, patch tokens) from one pass; the tokens are a view, they cost nothing.
            cast(Any, visual).output_tokens = True
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image_BCHW: Tensor, tokens: bool = False) -> ImageFeatures:
        """Encode images.

        Args:
            image_BCHW: float pixels in [0, 1] at the model's image size.
            tokens: also return projected patch tokens, from the same pass.

        Raises:
            ValueError: tokens were asked of a tower that has none.
        """
        if tokens and not self.has_tokens:
            raise ValueError(
                f"{type(self.visual).__name__} has no patch tokens; choose a ViT without attention pooling, or an "
                "objective that needs none"
            )
        bf16 = self.precision == "bf16"
        with torch.autocast(image_BCHW.device.type, torch.bfloat16, enabled=bf16):
            out = self.visual((image_BCHW - self.mean) / self.std)
            raw, patches = out if self.has_tokens else (out, None)
            tokens_BPD = self._project(patches) if tokens and patches is not None else None
        raw = raw.float()
        return ImageFeatures(F.normalize(raw, dim=-1), raw, None if tokens_BPD is None else tokens_BPD.float())

    def _project(self, patches_BPE: Tensor) -> Tensor:
        """Give patch tokens what the pooled token gets: the final norm (if pooling came before it) and projection."""
        visual = cast(Any, self.visual)
        if visual.final_ln_after_pool:
            patches_BPE = visual.ln_post(patches_BPE)
        return patches_BPE if visual.proj is None else patches_BPE @ visual.proj
