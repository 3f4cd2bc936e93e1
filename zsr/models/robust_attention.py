"""RAM: attention that cannot be captured by a few keys, as an option of the image tower.

RAM (Yuan et al., 2024, arXiv 2401.01750) was made for semantic segmentation under patch attacks, where a small adversarial
patch draws the attention of the whole image to itself. It suppresses the largest attention that a single key gets and drops
attention at random. Only its abstract was available, so both rules below are reconstructions [RECON], and whether they help
against perturbations of all pixels is for an experiment to say:

    A = softmax(Q K^T / sqrt(d));  A <- min(A, cap);  A <- A with a random share of columns hidden;  A <- A / sum_k A

- The cap holds before the division, after which a weight may lie above it. A key at the cap passes no gradient to queries
  and keys, and the smaller the cap, the nearer attention is to uniform: with a small one, look at the share of samples
  without an input gradient before believing a robust accuracy.
- Columns are hidden where :meth:`ImageTower.hiding_columns` says so, as every evaluation does, and never in training, whose
  steps stay functions of their samples. Each block draws anew at each forward pass, one set of columns for the whole batch
  and all heads, so that predictions depend on the batch; the class token's column is never hidden, those of prompt tokens
  may be. Attacking a random model takes the expectation over its randomness (EOT, Athalye et al., ICML 2018): a robust
  accuracy measured with one draw per step is too high.

The weights are held in full, ``[B, heads, L, L]``, so memory grows with the square of the number of patches.

Shapes: B images, L tokens of a sequence, E width inside the tower.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsr.config.schema import ModelConfig
from zsr.models.attention import ContiguousAttention
from zsr.models.fast_linear import linear

DEFAULT_SEED = 0


class HiddenColumns:
    """Which columns are hidden: one private random stream for all blocks of a tower; torch's global one is not touched."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.active = False
        self._generator = torch.Generator().manual_seed(DEFAULT_SEED)  # on the CPU: the same columns on every device

    def reseed(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    def draw(self, length: int) -> Tensor:
        """Bool ``[L]``, True where hidden: of ``length - 1`` columns the share, rounded, but one at least."""
        count = max(1, round(self.share * (length - 1)))
        hidden_L = torch.zeros(length, dtype=torch.bool)
        hidden_L[1 + torch.randperm(length - 1, generator=self._generator)[:count]] = True
        return hidden_L

    def __deepcopy__(self, memo: dict[int, Any]) -> HiddenColumns:
        other = HiddenColumns(self.share)
        other.active = self.active
        other._generator.set_state(self._generator.get_state())
        memo[id(self)] = other  # blocks that shared one stream share the copy
        return other


class RobustAttention(ContiguousAttention):
    """Self-attention on ``[B, L, E]`` with capped weights and hidden columns; parameters are those of its parent.

    Attributes:
        cap: largest weight before renormalising; 0 for none.
        columns: what hides columns while it is active; None for nothing.
        plain_class: what it was before, and becomes again in a copy of the pre-trained tower.
    """

    cap: float
    columns: HiddenColumns | None
    plain_class: type[nn.Module]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        assert query is key and key is value and not need_weights, "an image tower's blocks attend to themselves"
        assert key_padding_mask is None and attn_mask is None, "an image tower's blocks have no mask"
        batch, length, width = query.shape
        packed = linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = packed.view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        # Weights in float32 whatever the precision: dividing by a small sum must not lose what is left.
        weight_BhLL = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).float().softmax(dim=-1)
        if self.cap:
            weight_BhLL = weight_BhLL.clamp(max=self.cap)
        if self.columns is not None and self.columns.active:
            weight_BhLL = weight_BhLL.masked_fill(self.columns.draw(length).to(query.device), 0.0)
        total_BhL1 = weight_BhLL.sum(dim=-1, keepdim=True)
        weight_BhLL = weight_BhLL / total_BhL1.clamp(min=torch.finfo(torch.float32).tiny)
        mixed = F.dropout(weight_BhLL, self.dropout, self.training).to(v.dtype) @ v
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width)), None


def use_robust_attention(visual: nn.Module, config: ModelConfig, is_vit: bool) -> HiddenColumns | None:
    """Switch the attention of a ViT's blocks to :class:`RobustAttention`, in place, if the settings ask for it.

    Returns:
        What hides columns, to reseed; None if nothing does.

    Raises:
        ValueError: the tower has no attention that could be switched.
    """
    if not config.attention_cap and not config.attention_drop:
        return None
    blocks = list(cast(Any, visual).transformer.modules()) if is_vit else []
    plain = [block for block in blocks if isinstance(block, nn.MultiheadAttention)]
    if not plain:
        name = "attention_cap" if config.attention_cap else "attention_drop"
        raise ValueError(
            f"model.{name}={getattr(config, name)}: the image tower of {config.name} ({type(visual).__name__}) has no blocks "
            f"of plain attention; set model.{name}=0, or choose a plain ViT"
        )
    columns = HiddenColumns(config.attention_drop) if config.attention_drop else None
    for block in cast(list[Any], plain):
        block.plain_class, block.cap, block.columns = type(block), config.attention_cap, columns
        block.__class__ = RobustAttention
    return columns


def use_plain_attention(visual: nn.Module) -> None:
    """Undo :func:`use_robust_attention`, in place."""
    for module in visual.modules():
        if isinstance(module, RobustAttention):
            module.__class__ = module.plain_class  # type: ignore[assignment]
