"""torch.compile is an option that cannot fail a run."""

from __future__ import annotations

import logging

import torch
import torch._inductor.config
from torch import nn

from zsr.config import ModelConfig
from zsr.models import load_model
from zsr.models.fast_compile import compile_blocks

torch.set_num_threads(1)


def test_without_a_compiler_there_is_a_warning_and_the_same_model(tiny_model_name, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing that was compiled before
    torch._dynamo.reset()
    missing = torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)})
    with missing, caplog.at_level(logging.WARNING, "zsr.models"):
        model = load_model(ModelConfig(name=tiny_model_name, compile=True))
    assert "model.compile=true: torch.compile does not work here" in caplog.text
    assert "compiler" in caplog.text  # it failed for want of one
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        plain = load_model(ModelConfig(name=tiny_model_name))
        assert torch.equal(model.encode_image(image).raw_BD, plain.encode_image(image).raw_BD)


def test_a_tower_without_blocks_stays_as_it_is(caplog):
    with caplog.at_level(logging.WARNING, "zsr.models"):
        assert compile_blocks(nn.Sequential(nn.Linear(2, 2))) == 0
    assert "Sequential has no transformer blocks" in caplog.text
