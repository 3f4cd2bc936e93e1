"""Patch tokens of every kind of tower that open_clip builds, against open_clip's own forward pass.

Shapes: B images, D embedding width, E width inside the tower, P patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsr.models import ImageTower

# isort: split
from open_clip.modified_resnet import ModifiedResNet  # after zsr, which makes torchvision importable beside CPU torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, VisionTransformer

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 2.0, "output_dim": 16}


class HeadlessVit(VisionTransformer):
    """A ViT without class token: all that differs is what open_clip's own puts in front and takes off again."""

    def _embeds(self, x: Tensor) -> Tensor:
        patches = self.conv1(x).flatten(2).transpose(1, 2)
        return self.ln_pre(patches + self.positional_embedding[1:])

    def _global_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(dim=1), x


def unprojected() -> VisionTransformer:
    visual = VisionTransformer(**VIT)
    visual.proj = None
    return visual


VITS: dict[str, Callable[[], Any]] = {
    "class token": lambda: VisionTransformer(**VIT),
    "average": lambda: VisionTransformer(**VIT, pool_type="avg"),
    "class token, norm after": lambda: VisionTransformer(**VIT, final_ln_after_pool=True),
    "average, norm after": lambda: VisionTransformer(**VIT, pool_type="avg", final_ln_after_pool=True),
    "no first norm": lambda: VisionTransformer(**VIT, no_ln_pre=True),
    "layer scale, quick gelu": lambda: VisionTransformer(**VIT, ls_init_value=0.3, act_layer=QuickGELU),
    "normalised queries": lambda: VisionTransformer(**VIT, qk_norm=True, scale_fc=True, scale_attn_inner=True),
    "sines for positions": lambda: VisionTransformer(**VIT, pos_embed_type="sin_cos_2d"),
    "wide image": lambda: VisionTransformer(**VIT | {"image_size": (32, 48)}, pool_type="avg"),
    "tall patches": lambda: VisionTransformer(**VIT | {"patch_size": (16, 8)}),
    "no projection": unprojected,
    "no class token": lambda: HeadlessVit(**VIT, pool_type="avg"),
    "its own tokens asked for": lambda: VisionTransformer(**VIT, output_tokens=True),
}


def build(make: Callable[[], Any]) -> Any:
    """Random weights, biases and gains included, and statistics of batch norm that are not the first ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        visual = make()
        for parameter in visual.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        for module in visual.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return visual.eval()


def tower_of(visual: nn.Module, precision: Any = "fp32") -> ImageTower:
    return ImageTower(visual, MEAN, STD, precision).eval()


def make_pixels(visual: Any, num: int = 2) -> Tensor:
    size = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size,) * 2
    return torch.rand(num, 3, *size, generator=torch.Generator().manual_seed(1))


def normalize(pixels_BCHW: Tensor) -> Tensor:
    return torch.stack([(pixels_BCHW[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)


def embed(visual: Any, pixels_BCHW: Tensor) -> Tensor:
    out = visual(normalize(pixels_BCHW))
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("kind", VITS)
@torch.no_grad()
def test_a_patch_token_is_what_open_clip_gives_if_it_pools_that_patch_alone(kind):
    visual = build(VITS[kind])
    pixels = make_pixels(visual)
    expected_raw = embed(visual, pixels)
    tower = tower_of(visual)
    found = tower(pixels, tokens=True)
    assert torch.allclose(found.raw_BD, expected_raw, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.embed_BD, F.normalize(expected_raw, dim=-1), atol=1e-5)
    leading = 0 if isinstance(visual, HeadlessVit) else 1
    patches = [visual.image_size[i] // visual.patch_size[i] for i in range(2)]
    assert found.grid == tower.grid == tuple(patches)
    assert found.tokens_BPD.shape[1] == patches[0] * patches[1]
    for place in range(found.tokens_BPD.shape[1]):
        visual._global_pool = lambda x, place=place: (x[:, leading + place], x)
        assert torch.allclose(found.tokens_BPD[:, place], embed(visual, pixels), rtol=1e-5, atol=1e-5), place
    if leading:
        visual._global_pool = lambda x: (x[:, 0], x)
        assert torch.allclose(found.class_token_BD, embed(visual, pixels), rtol=1e-5, atol=1e-5)
    else:
        assert found.class_token_BD is None


@pytest.mark.parametrize("kind", ["class token", "class token, norm after"])
@torch.no_grad()
def test_where_the_class_token_is_pooled_it_is_the_embedding(kind):
    tower = tower_of(build(VITS[kind]))
    found = tower(make_pixels(tower.visual), tokens=True)
    assert torch.equal(found.class_token_BD, found.raw_BD)


@torch.no_grad()
def test_averaged_tokens_are_the_embedding_where_the_tower_averages():
    tower = tower_of(build(VITS["average"]))
    found = tower(make_pixels(tower.visual), tokens=True)
    assert torch.allclose(found.tokens_BPD.mean(dim=1), found.raw_BD, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found.class_token_BD, found.raw_BD, atol=0.1)


@torch.no_grad()
def test_tokens_lie_row_by_row():
    """Without blocks nothing moves between places, so a changed square changes the token of its own place alone."""
    visual = build(lambda: VisionTransformer(**VIT | {"layers": 0, "image_size": (32, 48)}))
    tower, pixels = tower_of(visual), make_pixels(visual)
    other = pixels.clone()
    other[:, :, 8:16, 40:48] = 0  # second row, sixth column
    moved = (tower(pixels, tokens=True).tokens_BPD - tower(other, tokens=True).tokens_BPD).abs().amax(dim=(0, 2))
    map_hw = moved.view(tower.grid)
    assert map_hw[1, 5] > 0 and map_hw.count_nonzero() == 1


def resnet() -> Any:
    visual = ModifiedResNet([1, 1, 1, 1], output_dim=12, heads=4, image_size=64, width=8)
    for module in visual.modules():
        if isinstance(module, nn.Conv2d):  # or else the image would be lost on its way to the pool
            nn.init.kaiming_normal_(module.weight)
    return visual


@torch.no_grad()
def test_tokens_of_a_resnet_are_the_pools_value_and_output_maps_at_each_place():
    visual = build(resnet)
    pixels = make_pixels(visual)
    found = tower_of(visual)(pixels, tokens=True)
    assert torch.allclose(found.raw_BD, visual(normalize(pixels)), rtol=1e-5, atol=1e-6)
    last_BEhw = visual.forward_intermediates(normalize(pixels), indices=1)["image_intermediates"][0]
    assert found.grid == tuple(last_BEhw.shape[2:]) == (2, 2)
    value, output = visual.attnpool.v_proj, visual.attnpool.c_proj
    for row in range(2):
        for column in range(2):
            place_BE = last_BEhw[:, :, row, column]
            expected = (place_BE @ value.weight.T + value.bias) @ output.weight.T + output.bias
            assert torch.allclose(found.tokens_BPD[:, row * 2 + column], expected, rtol=1e-4, atol=1e-5)
    assert found.tokens_BPD.std(dim=(0, 1)).mean() > 0.05
    assert found.class_token_BD is None


@torch.no_grad()
def test_a_resnets_pool_that_looks_everywhere_alike_gives_the_mean_of_its_tokens():
    visual = build(resnet)
    for parameter in (visual.attnpool.positional_embedding, *visual.attnpool.q_proj.parameters()):
        parameter.zero_()
    found = tower_of(visual)(make_pixels(visual), tokens=True)
    assert torch.allclose(found.tokens_BPD.mean(dim=1), found.raw_BD, rtol=1e-4, atol=1e-5)


TOKENLESS: dict[str, tuple[Callable[[], Any], str]] = {
    "attention pool": (lambda: VisionTransformer(**VIT, attentional_pool=True, attn_pooler_heads=2), "by attention"),
    "attention pool that gives tokens": (
        lambda: VisionTransformer(**VIT, attentional_pool=True, attn_pooler_heads=2, output_tokens=True),
        "by attention",
    ),
    "patches left out": (lambda: VisionTransformer(**VIT, patch_dropout=0.5), r"patch_dropout=0\.5"),
    "timm": (lambda: TimmModel("test_vit", embed_dim=16, image_size=160, pool="avg"), "TimmModel"),
}


@pytest.mark.parametrize("kind", TOKENLESS)
@torch.no_grad()
def test_a_tower_without_tokens_says_why_and_embeds_all_the_same(kind):
    make, says = TOKENLESS[kind]
    visual = build(make)
    tower, pixels = tower_of(visual), make_pixels(visual)
    assert not tower.has_tokens and tower.grid == (0, 0)
    found = tower(pixels)
    assert torch.allclose(found.raw_BD, embed(visual, pixels), rtol=1e-5, atol=1e-6)
    assert found.tokens_BPD is None and found.class_token_BD is None and found.grid == (0, 0)
    with pytest.raises(ValueError, match=says) as error:
        tower(pixels, tokens=True)
    assert str(error.value) == tower.tokens_missing
    assert "choose a ViT" in tower.tokens_missing


@pytest.mark.parametrize("make", [VITS["average, norm after"], resnet], ids=["vit", "resnet"])
@torch.no_grad()
def test_tokens_in_bf16_are_float32_near_fp32(make):
    visual = build(make)
    exact, found = (tower_of(visual, precision)(make_pixels(visual), tokens=True) for precision in ("fp32", "bf16"))
    assert found.tokens_BPD.dtype == found.raw_BD.dtype == torch.float32
    assert not torch.equal(found.tokens_BPD, exact.tokens_BPD)
    assert F.cosine_similarity(found.tokens_BPD, exact.tokens_BPD, dim=-1).min() > 0.99
