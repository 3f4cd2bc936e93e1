"""What an objective says it costs is what its step does, counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zsr.bench.ours import BenchTrainer, class_names, make_batch, make_config
from zsr.bench.passes import count_passes
from zsr.config import OBJECTIVES
from zsr.models import load_model

torch.set_num_threads(1)
TEMPLATE = "a photo of a {}"


def make_trainer(objective: str, model_name: str, *overrides: str) -> BenchTrainer:
    config = make_config(objective, model_name, 4, overrides=overrides)
    return BenchTrainer(config, load_model(config.model), class_names(5), TEMPLATE)


@pytest.mark.parametrize("objective", OBJECTIVES.names())
@pytest.mark.parametrize("attack_steps", [2, 3])
def test_encoder_passes_are_the_units_that_the_objective_states(objective, attack_steps, tiny_model_name):
    trainer = make_trainer(objective, tiny_model_name, f"attack.steps={attack_steps}", "train.cache_frozen=false")
    batch = make_batch(4, 5, 32)
    for _ in range(2):
        passes = trainer.step_counted(batch)
        assert passes.units == trainer.step_fn.objective.cost_units(attack_steps)
        if trainer.step_fn.objective.needs_attack:
            assert passes.to_input - passes.to_weights == attack_steps  # no attack fills a weight's gradient


def test_frozen_features_that_are_kept_by_sample_cost_nothing_the_second_time(tiny_model_name):
    trainer = make_trainer("tga_zsr", tiny_model_name, "train.cache_frozen=true")
    batch = make_batch(4, 5, 32)
    assert [trainer.step_counted(batch).units for _ in range(3)] == [11, 10, 10]


def test_passes_are_counted_one_by_one():
    encoder = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    x = torch.rand(8, 6)
    with count_passes(8, encoder) as passes:
        with torch.no_grad():
            encoder(x)
        assert (passes.forward, passes.to_input, passes.to_weights) == (1, 0, 0)
        encoder(x).sum().backward()
        assert (passes.forward, passes.to_input, passes.to_weights) == (2, 1, 1)
        encoder.requires_grad_(False)
        image = x.clone().requires_grad_(True)
        out = encoder(image)
        torch.autograd.grad((out * 2).sum() + out.square().sum(), image)
        assert (passes.forward, passes.to_input, passes.to_weights) == (3, 2, 1)
        encoder(x[:2])
        assert passes.forward == 3.25
    encoder(x)
    assert passes.units == 3.25 + 2 + 1
