"""The same attention as ``nn.MultiheadAttention``, without its copies.

open_clip's blocks call ``nn.MultiheadAttention`` with batch-first tensors. Inside, torch transposes them to
sequence-first, so the packed input projection runs on a non-contiguous tensor and becomes a batched product with copies
before and after; on CPU that takes most of a ViT's time in bf16. Here one product runs on the contiguous ``[B, L, E]`` tensor.

Only the class of the module changes: parameters, their names and their order stay, so weights load and save unchanged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsr.models.fast_linear import linear

_SHORT = 256  # tokens up to which the [L, L] weights are small beside a block's other activations


class ContiguousAttention(nn.MultiheadAttention):
    """Self-attention on ``[B, L, E]``; anything beyond what CLIP's towers ask for goes to the parent class."""

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
        plain = query is key and key is value and not need_weights and key_padding_mask is None
        # A mask of three dimensions is laid out per head for the parent's own layout: leave it to the parent.
        if not plain or (attn_mask is not None and attn_mask.dim() != 2):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # True means "look away" to MultiheadAttention, "look" to the function below
        batch, length, width = query.shape
        packed = linear(query, self.in_proj_weight, self.in_proj_bias)
        # [3, B, heads, L, head width]: views, no copies; scaled_dot_product_attention takes strided input.
        qkv = packed.view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        if attn_mask is None and not dropout and _written_out_is_faster(packed):
            mixed = _attend_written_out(*qkv.contiguous())
        else:
            q, k, v = qkv
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width)), None

    def attend_first(self, x_BLE: Tensor) -> Tensor:
        """What the first token alone gets from attending to all of ``x``, ``[B, 1, E]``: the other queries are left out."""
        assert not (self.dropout and self.training), "for CLIP's towers, which have no dropout"
        width = x_BLE.shape[-1]
        bias_q = bias_kv = None
        if self.in_proj_bias is not None:
            bias_q, bias_kv = self.in_proj_bias[:width], self.in_proj_bias[width:]
        q = linear(x_BLE[:, :1].contiguous(), self.in_proj_weight[:width], bias_q)
        kv = linear(x_BLE, self.in_proj_weight[width:], bias_kv)
        q = q.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k, v = kv.unflatten(-1, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        mixed = _attend_written_out(q, k, v) if _written_out_is_faster(kv) else F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


def _written_out_is_faster(packed: Tensor) -> bool:
    """CPU's fused attention is a slow one in bf16: four times the plain products' time at 50 tokens, forward and back."""
    return packed.device.type == "cpu" and packed.dtype == torch.bfloat16 and packed.shape[1] <= _SHORT


def _attend_written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` in three steps, for ``[B, heads, L, d]``; the softmax sums in float32 inside."""
    with torch.autocast(q.device.type, enabled=False):
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
        return weights @ v


def use_fast_attention(module: nn.Module) -> int:
    """Switch every self-attention inside ``module`` to :class:`ContiguousAttention`, in place.

    Attention with separate key or value widths, added biases or sequence-first input keeps its own class.

    Returns:
        How many modules were switched.
    """
    switched = 0
    for child in module.modules():
        if (
            type(child) is nn.MultiheadAttention
            and child.batch_first
            and child._qkv_same_embed_dim
            and child.bias_k is None
            and not child.add_zero_attn
        ):
            child.__class__ = ContiguousAttention
            switched += 1
    return switched
