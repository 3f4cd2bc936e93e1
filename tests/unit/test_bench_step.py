"""The bench's reference loops compute what zsr computes, only dearer; and the bench measures and judges as it says."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from zsr.attacks.noise import sample_seeds
from zsr.bench.compare import Row, Spread, compare
from zsr.bench.ours import BenchTrainer, class_names, make_batch, make_config
from zsr.bench.passes import count_passes
from zsr.bench.rate import matmul_rate, tower_macs
from zsr.bench.reference import OFFICIAL, TEMPLATE, OfficialStep
from zsr.cli.main import app
from zsr.models import load_model

torch.set_num_threads(1)
NAMES = class_names(5)


def both(objective: str, model_name: str, *overrides: str) -> tuple[BenchTrainer, OfficialStep]:
    plain, ours = (
        make_config(objective, model_name, 4, overrides=[*overrides, f"model.fast_layers={fast}"])
        for fast in ("false", "true")
    )
    official = OFFICIAL[objective].of(load_model(plain.model), NAMES)
    return BenchTrainer(ours, load_model(ours.model), NAMES, TEMPLATE), official


@pytest.mark.parametrize("objective", OFFICIAL)
def test_the_official_loop_and_ours_give_the_same_loss_and_the_same_weights(objective, tiny_model_name):
    # Trained through both targets as theirs; there is no such option for the frozen one, whose gradient goes nowhere.
    extra = ["objective.detach_clean=false"] if objective == "pmg_aft" else []
    ours, official = both(objective, tiny_model_name, *extra)
    batch = make_batch(4, 5, 32)
    seeds = sample_seeds(batch.key, "train", 0, 0)
    for step in range(2):
        before = {name: value.clone() for name, value in official.model.visual.named_parameters()}
        loss = official(batch.image.float() / 255, batch.label, seeds)
        ours.step(batch)
        assert ours.last_loss() == pytest.approx(loss.item(), rel=2e-5)
        mine = dict(ours.model.image.visual.named_parameters())
        moved = 0.0
        for name, value in official.model.visual.named_parameters():
            change, my_change = value - before[name], mine[name].detach() - before[name]
            moved += change.norm().item()
            if step == 0:
                assert (change - my_change).norm() <= 0.02 * change.norm() + 1e-8
        assert moved > 0


def test_the_official_attack_is_ours(tiny_model_name):
    ours, official = both("tecoa", tiny_model_name)
    batch = make_batch(4, 5, 32)
    image, seeds = batch.image.float() / 255, sample_seeds(batch.key, "train", 0, 0)
    tokens = official.tokenizer([TEMPLATE.format(name) for name in NAMES])
    theirs = official.attack(image, batch.label, tokens, seeds)
    seen = []
    ours.model.image.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    ours.step(batch)
    # Signs of gradients that are zero but for rounding may differ; hardly any pixel is such a one.
    assert ((seen[-1] - theirs).abs() > 1e-6).float().mean() < 1e-3
    assert (theirs - image).abs().max() <= 1 / 255 + 1e-6 and (theirs - image).abs().max() > 0.5 / 255


@pytest.mark.parametrize(
    ("objective", "image", "text"),
    # Each pass runs forward and backward to input and weights: two attack steps, then tecoa 1, tga 4, pmg 3.
    [("tecoa", 3, 3), ("tga_zsr", 6, 3), ("pmg_aft", 5, 5)],
)
def test_the_official_loop_has_the_habits_it_is_said_to_have(objective, image, text, tiny_model_name):
    _, official = both(objective, tiny_model_name)
    towers = [official.model] if official.frozen is None else [official.model, official.frozen]
    visuals = [getattr(tower, "visual", tower) for tower in towers]
    texts = []
    for tower in towers:
        if hasattr(tower, "transformer") and hasattr(tower, "token_embedding"):
            tower.token_embedding.register_forward_hook(lambda *_: texts.append(torch.is_grad_enabled()))
    batch = make_batch(4, 5, 32)
    with count_passes(4, *visuals) as passes:
        official(batch.image.float() / 255, batch.label, sample_seeds(batch.key, "train", 0, 0))
    assert (passes.forward, passes.to_input, passes.to_weights) == (image, image, image)
    assert texts == [True] * text
    assert all(parameter.grad is not None for parameter in official.model.transformer.parameters())


def test_the_arithmetic_of_a_tower_is_that_of_its_layers(tiny_model_name):
    config = make_config("tecoa", tiny_model_name, 4, overrides=["model.fast_layers=false"])
    width, tokens, layers = 32, 17, 2
    by_hand = 16 * 3 * 8 * 8 * width + layers * (12 * tokens * width**2 + 2 * tokens**2 * width) + width * 16
    assert tower_macs(load_model(config.model)) == by_hand


def test_the_machines_rate_is_a_rate(tiny_model_name):
    model = load_model(make_config("tecoa", tiny_model_name, 4).model)
    rate = matmul_rate(model, 4, torch.float32, seconds=0.02)
    assert 1e7 < rate < 1e15


def test_a_comparison_reports_pairs_passes_and_shares(tiny_model_name):
    rows = compare("tecoa", setting=None, model_name=tiny_model_name, batch_size=4, num_classes=5, repeats=3)
    assert [(row.precision, row.their_precision) for row in rows] == [("fp32", "fp32"), ("bf16", "fp32")]
    for row in rows:
        assert row.passes == row.cost_units == row.warm_passes == 7
        assert row.ratio is not None and row.ratio.low <= row.ratio.median <= row.ratio.high
        assert row.share.median > 0
        assert row.bar is None and row.reached
    (alone,) = compare("clean", setting=None, model_name=tiny_model_name, batch_size=4, num_classes=5, precision="bf16")
    assert alone.ratio is None and alone.their_images_per_s is None and alone.passes == 3


def test_quartiles():
    assert Spread.of([5, 1, 3, 2, 4]) == Spread(3, 2, 4)
    assert Spread.of([7]) == Spread(7, 7, 7)


@pytest.mark.parametrize(
    ("ratio", "bar", "passes", "reached"),
    [(2.4, 2.3, 7, True), (2.2, 2.3, 7, False), (2.2, None, 7, True), (9, 2.3, 8, False)],
)
def test_a_bar_is_reached_by_ratio_and_by_honest_units(ratio, bar, passes, reached):
    one = Spread(1, 1, 1)
    row = Row("tecoa", "fp32", "fp32", one, one, Spread(ratio, ratio, ratio), passes, 7, 7, one, bar)
    assert row.reached == reached


def test_the_command_prints_a_table_and_json(tiny_model_name):
    arguments = ["bench", "step", "--objective", "tecoa,clean", "--model", tiny_model_name, "--batch-size", "4"]
    arguments += ["--num-classes", "5", "--repeats", "2", "--check"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "tecoa" in shown.output and "clean" in shown.output
    printed = CliRunner().invoke(app, [*arguments, "--json", "--dtype", "bf16"])
    rows = json.loads(printed.stdout)
    assert [row["objective"] for row in rows] == ["tecoa", "clean"]
    assert rows[0]["ratio"]["median"] > 0 and rows[1]["ratio"] is None


@pytest.mark.parametrize(
    ("option", "value"),
    [("--objective", "tekoa"), ("--setting", "cifar"), ("--dtype", "fp16"), ("--device", "cuda:99")],
)
def test_mistakes_are_sentences(option, value):
    result = CliRunner().invoke(app, ["bench", "step", option, value])
    assert isinstance(result.exception, ValueError) and value in str(result.exception)
