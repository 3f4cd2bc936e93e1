"""The image tower: pixels in [0, 1] to embeddings and projected patch tokens, from one forward pass.

Shapes: B images, D embedding width, E width inside the tower, L tokens of a sequence, P patches, H x W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsr.config.schema import ModelConfig, Precision
from zsr.models.fast_last_block import can_skip_patches, class_token_of
from zsr.models.prompts import Prompt, make_prompt
from zsr.models.robust_attention import HiddenColumns, use_plain_attention, use_robust_attention


@dataclass(frozen=True)
class ImageFeatures:
    """What one forward pass of the image tower gives.

    Attributes:
        embed_BD: unit embeddings, float32.
        raw_BD: the same before normalisation, float32.
        tokens_BPD: projected patch tokens, not normalised, float32, row by row of the tower's map; None unless asked for.
        class_token_BD: the projected class token, not normalised, float32; None unless tokens were asked of a tower that
            has one. Where the class token is what is pooled, this is ``raw_BD``.
        grid: rows and columns of the map of patches, rows x columns = P; (0, 0) unless tokens were asked for.
    """

    embed_BD: Tensor
    raw_BD: Tensor
    tokens_BPD: Tensor | None = None
    class_token_BD: Tensor | None = None
    grid: tuple[int, int] = (0, 0)


class ImageTower(nn.Module):
    """Pixels in [0, 1] to embeddings: normalisation, open_clip's visual tower, projection of patch tokens.

    A patch token is what the embedding would be if the tower pooled that place alone:

    - ViT: the last block's token, with the final norm and the projection that the pooled token gets.
    - ResNet: the last feature, with the attention pool's value and output projections (MaskCLIP, Zhou et al., ECCV 2022,
      arXiv 2112.01071, section 3.2). As there, without the pool's position embedding.

    Attributes:
        grid: rows and columns of the map of patches, at the model's image size; (0, 0) where there are no tokens.
        tokens_missing: why this tower has no patch tokens, a sentence; empty where it has.
        prompt: what is trained in place of the weights, if anything (zsr/models/prompts.py).
        columns: what hides columns of attention at random, if anything (zsr/models/robust_attention.py).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, visual: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], precision: Precision
    ) -> None:
        super().__init__()
        self.visual = visual
        self.precision = precision
        self.is_vit, self.is_resnet = _family(visual)
        self.tokens_missing = "" if self.is_resnet else _why_no_tokens(visual, self.is_vit)
        self.grid = (0, 0) if self.tokens_missing else _grid(visual)
        self.prompt: Prompt | None = None
        self.columns: HiddenColumns | None = None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def has_tokens(self) -> bool:
        return not self.tokens_missing

    def equip(self, config: ModelConfig) -> None:
        """Give the tower what the settings ask for beyond open_clip's: a prompt with frozen weights, robust attention.

        Raises:
            ValueError: this kind of tower cannot have it.
        """
        self.prompt = make_prompt(config, self.visual, self.is_vit)
        if self.prompt is not None:
            self.visual.requires_grad_(False)
        self.columns = use_robust_attention(self.visual, config, self.is_vit)

    @contextmanager
    def hiding_columns(self, seed: int) -> Iterator[None]:
        """Hide random columns of attention in here, from a stream that starts at ``seed`` (``model.attention_drop``).

        Without that setting nothing happens.
        """
        if self.columns is None:
            yield
            return
        before = self.columns.active
        self.columns.reseed(seed)
        self.columns.active = True
        try:
            yield
        finally:
            self.columns.active = before

    def pretrained_copy(self) -> ImageTower:
        """A frozen copy in eval mode, without prompt and with plain attention: the pre-trained tower, before training."""
        copied = copy.deepcopy(self)
        copied.prompt = copied.columns = None
        use_plain_attention(copied.visual)
        return copied.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ImageTower:
        super().train(mode)
        # Batch norm keeps the pre-trained statistics: with the batch's own, what a sample gives would depend on its batch and
        # its worker, and the model in training would be another one than in attack and evaluation.
        for module in self.visual.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, image_BCHW: Tensor, tokens: bool = False) -> ImageFeatures:
        """Encode images.

        Args:
            image_BCHW: float pixels in [0, 1] at the model's image size.
            tokens: also return projected patch tokens, from the same pass.

        Raises:
            ValueError: tokens were asked of a tower that has none.
        """
        if tokens and self.tokens_missing:
            raise ValueError(self.tokens_missing)
        encode = self._encode_vit if self.is_vit else self._encode_resnet if self.is_resnet else self._encode_other
        with torch.autocast(image_BCHW.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            input_BCHW = (image_BCHW - self.mean) / self.std
            if self.prompt is not None and self.prompt.pad is not None:
                input_BCHW = self.prompt.pad(input_BCHW)
            raw_BD, class_BD, tokens_BPD = encode(input_BCHW, tokens)
        raw_BD = raw_BD.float()
        embed_BD = F.normalize(raw_BD, dim=-1)
        if tokens_BPD is None:
            return ImageFeatures(embed_BD, raw_BD)
        return ImageFeatures(
            embed_BD, raw_BD, tokens_BPD.float(), None if class_BD is None else class_BD.float(), self.grid
        )

    def _encode_vit(self, input_BCHW: Tensor, tokens: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """open_clip's own stages, one by one: what the last block gives is needed for tokens."""
        visual = cast(Any, self.visual)
        # In float32 whatever comes after: bfloat16 has eight bits, in which a perturbation of 1/255 is two steps.
        with torch.autocast(input_BCHW.device.type, enabled=False):
            x_BLE = visual._embeds(input_BCHW)
        if self.prompt is not None and self.prompt.token is not None:
            x_BLE = visual.transformer(self.prompt.token(x_BLE, visual.ln_pre))[:, : x_BLE.shape[1]]
        elif not tokens and can_skip_patches(visual):
            x_BLE = class_token_of(visual.transformer, x_BLE)
        else:
            x_BLE = visual.transformer(x_BLE)
        raw_BD = self._project(visual._pool(x_BLE)[0])
        if not tokens:
            return raw_BD, None, None
        # The final norm works on each token by itself, so before or after pooling is the same for a single one.
        all_BLD = self._project(visual.ln_post(x_BLE))
        num_leading = all_BLD.shape[1] - self.grid[0] * self.grid[1]  # class token
        class_BD = None if num_leading == 0 else raw_BD if visual.pool_type == "tok" else all_BLD[:, 0]
        return raw_BD, class_BD, all_BLD[:, num_leading:]

    def _encode_resnet(self, input_BCHW: Tensor, tokens: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        visual = cast(Any, self.visual)
        x_BEhw = input_BCHW
        for stage in (visual.stem, visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x_BEhw = stage(x_BEhw)
        pool = visual.attnpool
        raw_BD = pool(x_BEhw)
        return raw_BD, None, pool.c_proj(pool.v_proj(x_BEhw.flatten(2).transpose(1, 2))) if tokens else None

    def _encode_other(self, input_BCHW: Tensor, tokens: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.visual(input_BCHW), None, None

    def _project(self, x: Tensor) -> Tensor:
        """In float32 as well, for little: rounded embeddings hide from a search without gradients what a small step gains."""
        proj = cast(Any, self.visual).proj
        if proj is None:
            return x
        with torch.autocast(x.device.type, enabled=False):
            return x.to(proj.dtype) @ proj


@contextmanager
def in_precision(precision: Precision, towers: Sequence[ImageTower]) -> Iterator[None]:
    """Run these towers in a precision in here; put back each one's own."""
    before = [tower.precision for tower in towers]
    try:
        for tower in towers:
            tower.precision = precision
        yield
    finally:
        for tower, own in zip(towers, before, strict=True):
            tower.precision = own


def _family(visual: nn.Module) -> tuple[bool, bool]:
    """Whether this is open_clip's ViT, and whether it is its ResNet."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    return isinstance(visual, VisionTransformer), isinstance(visual, ModifiedResNet)


def _why_no_tokens(visual: Any, is_vit: bool) -> str:
    """Why the tower, no ResNet, has no patch tokens; empty if it has."""
    way_out = "choose a ViT with class-token or average pooling, or an objective that needs no patch tokens"
    if not is_vit:
        return (
            f"this image tower ({type(visual).__name__}) pools inside a library that gives out no patch tokens in the "
            f"space of its embeddings; {way_out}"
        )
    if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
        return (
            "this image tower pools its patches by attention with queries of their own, so no patch has a place in the "
            f"space of its embeddings; {way_out}"
        )
    share = getattr(visual.patch_dropout, "prob", 0.0)
    if share:
        return (
            f"this image tower leaves out patches at random in training (patch_dropout={share}), so they make no map; "
            f"{way_out}"
        )
    return ""


def _grid(visual: Any) -> tuple[int, int]:
    if hasattr(visual, "grid_size"):
        rows, columns = visual.grid_size
        return rows, columns
    return visual.image_size // 32, visual.image_size // 32  # a ResNet halves five times
