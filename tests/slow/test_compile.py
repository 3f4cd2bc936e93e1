"""A compiled tower computes what a plain one does, in attack and training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo

from zsr.attacks.base import input_gradients_only
from zsr.config import ModelConfig
from zsr.models import load_model

pytestmark = pytest.mark.slow


def test_a_compiled_tower_equals_the_plain_one_and_keeps_its_names(tiny_model_name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # not what a killed process left half-written
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", False)
    plain, compiled = (load_model(ModelConfig(name=tiny_model_name, compile=on)) for on in (False, True))
    torch._dynamo.config.suppress_errors = False  # a block that falls back would prove nothing
    blocks = compiled.image.visual.transformer.resblocks
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    image = torch.rand(4, 3, 32, 32)
    results = []
    for model in (plain, compiled):
        pixels = image.clone().requires_grad_(True)
        with input_gradients_only(model.image):
            (slope,) = torch.autograd.grad(model.encode_image(pixels).embed_BD[:, 0].sum(), pixels)
        features = model.encode_image(image, tokens=True)
        (features.embed_BD[:, 0].sum() + features.tokens_BPD[..., 0].sum()).backward()
        gradients = [parameter.grad for parameter in model.image.visual.parameters()]
        results.append([slope, features.embed_BD.detach(), *gradients])
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    frozen = copy.deepcopy(compiled.image)
    with torch.no_grad():
        assert torch.allclose(frozen(image).embed_BD, results[0][1], atol=1e-5)
