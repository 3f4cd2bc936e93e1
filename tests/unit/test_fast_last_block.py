"""The class token without the patches' share of the last block: the same token, the same gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_clip import ARCHITECTURE
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import zsr  # noqa: F401  first: makes torchvision importable beside CPU torch
from zsr.config import ModelConfig
from zsr.models.fast_last_block import can_skip_patches, class_token_of, skipped_macs
from zsr.models.fast_layers import use_fast_layers
from zsr.models.robust_attention import use_robust_attention

# isort: split
import open_clip  # after zsr, which makes torchvision importable beside CPU torch

torch.set_num_threads(1)


def make_visual(fast: bool = True, **vision: Any) -> Any:
    torch.manual_seed(0)
    architecture: dict[str, Any] = copy.deepcopy(ARCHITECTURE)
    architecture["vision_cfg"] |= vision
    visual = open_clip.CLIP(**architecture).visual
    for parameter in visual.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    if fast:
        use_fast_layers(visual)
    return visual


def gradients(token_B1E: Tensor, x: Tensor, visual: Any) -> list[Tensor]:
    direction = torch.linspace(-1, 1, token_B1E.numel()).view_as(token_B1E)
    wanted = [x, *visual.transformer.parameters()]
    return list(torch.autograd.grad((token_B1E.float() * direction).sum(), wanted))


@pytest.mark.parametrize("vision", [{}, {"ls_init_value": 0.1}, {"layers": 1}, {"final_ln_after_pool": True}])
def test_the_class_token_and_its_gradients_are_those_of_the_whole_transformer(vision):
    visual = make_visual(**vision)
    assert can_skip_patches(visual)
    x = torch.randn(3, 17, 32, requires_grad=True)
    whole, token = visual.transformer(x)[:, :1], class_token_of(visual.transformer, x)
    assert token.shape == (3, 1, 32) and torch.allclose(token, whole, rtol=1e-5, atol=1e-6)
    for found, expected in zip(gradients(token, x, visual), gradients(whole, x, visual), strict=True):
        assert (found - expected).norm() <= 1e-5 * max(expected.norm().item(), 1)
    assert torch.allclose(visual._pool(token)[0], visual._pool(visual.transformer(x))[0], rtol=1e-5, atol=1e-5)


def test_in_bf16_it_is_as_near_to_float32_as_the_whole_transformer():
    visual, x = make_visual(), torch.randn(3, 17, 32, requires_grad=True)
    exact = visual.transformer(x)[:, :1]
    exact_gradients = gradients(exact, x, visual)
    with torch.autocast("cpu", torch.bfloat16):
        whole, token = visual.transformer(x)[:, :1], class_token_of(visual.transformer, x)
        found, usual = gradients(token, x, visual), gradients(whole, x, visual)
    for mine, theirs, wanted in zip([token, *found], [whole, *usual], [exact, *exact_gradients], strict=True):
        error, allowed = ((some.float() - wanted).norm() / wanted.norm() for some in (mine, theirs))
        assert error < max(1.5 * allowed, 1e-3)


def test_towers_that_need_their_patches_or_other_attention_are_left_alone():
    assert not can_skip_patches(make_visual(fast=False))
    assert not can_skip_patches(make_visual(pool_type="avg"))
    assert not can_skip_patches(make_visual(attentional_pool=True, attn_pooler_heads=2))
    robust = make_visual()
    use_robust_attention(robust, ModelConfig(attention_cap=0.5), True)
    assert not can_skip_patches(robust)
    checkpointed = make_visual()
    checkpointed.set_grad_checkpointing(True)
    assert not can_skip_patches(checkpointed)
    resnet = open_clip.CLIP(
        16, {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 64}, ARCHITECTURE["text_cfg"]
    ).visual
    assert not can_skip_patches(resnet)


@pytest.mark.parametrize("vision", [{}, {"mlp_ratio": 2.0}])
def test_the_arithmetic_left_out_is_what_a_counter_misses(vision):
    visual, x = make_visual(**vision).double(), torch.randn(1, 17, 32, dtype=torch.float64)

    def macs(run: Any) -> float:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / 2

    whole, token = (
        macs(lambda f=f: f()) for f in (lambda: visual.transformer(x), lambda: class_token_of(visual.transformer, x))
    )
    assert whole - token == skipped_macs(visual) > 0
    assert skipped_macs(make_visual(fast=False)) == 0
