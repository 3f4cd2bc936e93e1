"""The acceptance recipe's checks on a tiny model: TIMA reduces to TeCoA, and tuned text spreads without losing its order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zsr.models import TextBank, class_embeddings, load_model
from zsr.recipes.tima_acceptance import (
    LEAST_SPEARMAN,
    TextRun,
    accuracy_kept,
    margin,
    margin_table,
    same_as_tecoa,
    spearman,
    tune_text,
)

torch.set_num_threads(1)

CLASSES = [f"{colour} {thing}" for colour in ("red", "blue", "old", "tiny") for thing in ("car", "dog", "boat", "tree")]


def test_a_run_of_tima_without_its_extras_ends_in_tecoas_weights_to_the_last_bit(tmp_path: Path, make_config):
    config = make_config(
        "objective.name=tima", "objective.mhe_form=riesz", "attack.schedule.name=cosine", "train.max_steps=7"
    )
    verdict = same_as_tecoa(config, tmp_path)
    assert verdict.passed and "steps=7" in verdict.lines[0]


def run_text(make_config, *overrides: str) -> tuple[TextRun, torch.Tensor, torch.Tensor]:
    config = make_config("objective.name=tima", "optim.name=adamw", "optim.lr=1e-3", *overrides)
    model = load_model(config.model)
    features = TextBank(model).features(CLASSES, ["a photo of a {}."])
    before = class_embeddings(features, model.text_projection).clone()
    images = torch.nn.functional.normalize(torch.randn(64, before.shape[1], generator=torch.manual_seed(0)), dim=1)
    weights = {name: value.clone() for name, value in model.image.state_dict().items()}
    run = tune_text(config, model, features, images, steps=60)
    assert all(torch.equal(value, weights[name]) for name, value in model.image.state_dict().items())
    assert not model.text_projection.requires_grad
    return run, before, class_embeddings(features, model.text_projection)


@pytest.mark.parametrize("form", ["bounded", "riesz"])
def test_text_alone_falls_in_energy_at_every_step_and_keeps_its_order(make_config, form):
    # A weight at which the energy leads; at 0.1 distillation on noisy batches stops it almost where it starts.
    settings = ["objective.weight_mhe=1", "train.batch_size=64", "optim.lr=3e-4"]
    run, before, after = run_text(make_config, f"objective.mhe_form={form}", *settings)
    assert run.verdict().passed, run.verdict().lines
    assert len(run.energies) == 61 and run.rises == 0
    assert run.least < run.energies[-1] < run.energies[0]
    assert run.spearman > LEAST_SPEARMAN
    assert (after @ after.T).mean() < (before @ before.T).mean()


def test_distillation_holds_the_text_back(make_config):
    free, before, moved = run_text(make_config, "objective.weight_iakd=0")
    held, _, kept = run_text(make_config, "objective.weight_iakd=10")
    assert free.energies[-1] < held.energies[-1] < held.energies[0]
    assert (kept - before).norm() < 0.7 * (moved - before).norm()


def test_energy_that_rises_or_an_order_that_is_lost_fails():
    assert not TextRun((0.5, 0.4, 0.41), least=0.3, spearman=0.99).verdict().passed
    assert not TextRun((0.5, 0.5, 0.5), least=0.3, spearman=0.99).verdict().passed
    assert not TextRun((0.5, 0.4, 0.35), least=0.3, spearman=0.89).verdict().passed
    assert TextRun((0.5, 0.4, 0.35), least=0.3, spearman=0.91).verdict().passed


def test_a_point_of_accuracy_lost_on_any_set_fails():
    assert accuracy_kept({"a": 0.5, "b": 0.4}, {"a": 0.495, "b": 0.6}).passed
    assert not accuracy_kept({"a": 0.5, "b": 0.4}, {"a": 0.48, "b": 0.6}).passed


def test_margin_is_the_true_logit_less_the_best_other_one():
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert margin(logits, torch.tensor([0, 1])).tolist() == [1.0, -2.0]
    falling = torch.tensor([[2.0, 3.0], [1.0, 2.5], [0.0, 1.0], [-1.0, 0.5], [-2.0, 0.0]])
    assert margin_table({"model": falling}).passed
    assert not margin_table({"model": falling, "other": falling.flip(0)}).passed


def test_spearman_sees_order_alone():
    values = torch.rand(50, generator=torch.manual_seed(0))
    assert spearman(values, values**3) == pytest.approx(1)
    assert spearman(values, -values) == pytest.approx(-1)
