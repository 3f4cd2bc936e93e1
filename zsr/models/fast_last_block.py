"""A ViT's transformer when only the class token is wanted: the last block need not answer for the patches.

With class-token pooling the embedding reads one token of the last block's output. That block's keys and values are needed
of all tokens, its queries, output projection and MLP of one: ten of its twelve parts of arithmetic fall away, 7 % of a
12-block tower, in the forward pass and in both backward passes. Numbers stay what they are, up to rounding.

Shapes: B images, L tokens with the class token first, E width.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from zsr.models.attention import ContiguousAttention


def can_skip_patches(visual: nn.Module) -> bool:
    """Whether :func:`class_token_of` gives this image tower's pooled token: open_clip's plain ViT with faster layers."""
    from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer

    if not isinstance(visual, VisionTransformer) or visual.pool_type != "tok" or visual.attn_pool is not None:
        return False
    transformer = visual.transformer
    last: Any = transformer.resblocks[-1] if type(transformer) is Transformer and len(transformer.resblocks) else None
    return (
        type(last) is ResidualAttentionBlock
        # Not its subclasses: RAM's attention draws and caps weights of its own.
        and type(last.attn) is ContiguousAttention
        and last.attn.dropout == 0
        and transformer.batch_first
        and not transformer.grad_checkpointing
    )


def class_token_of(transformer: nn.Module, x_BLE: Tensor) -> Tensor:
    """The class token that the transformer gives, ``[B, 1, E]``."""
    *blocks, last = cast(Any, transformer).resblocks
    for block in blocks:
        x_BLE = block(x_BLE)
    first_B1E = x_BLE[:, :1] + last.ls_1(last.attn.attend_first(last.ln_1(x_BLE)))
    token_B1E: Tensor = first_B1E + last.ls_2(last.mlp(last.ln_2(first_B1E)))
    return token_B1E


def skipped_macs(visual: nn.Module) -> float:
    """Multiply-accumulates of one image's forward pass that :func:`class_token_of` leaves out; 0 where it is not used."""
    if not can_skip_patches(visual):
        return 0.0
    last = cast(Any, visual).transformer.resblocks[-1]
    tokens, width = cast(Any, visual).positional_embedding.shape
    weights = [parameter.numel() for parameter in last.mlp.parameters() if parameter.dim() == 2]
    per_token = sum(weights) + last.attn.out_proj.weight.numel() + width * width  # and its query
    return float((tokens - 1) * (per_token + 2 * tokens * width))
