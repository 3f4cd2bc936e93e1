"""A tower gives a sample the same features in training, attack and evaluation, whatever else is in its batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_models import write_variant
from tiny_clip import ARCHITECTURE, write_tiny_clip

import zsr  # noqa: F401  makes torchvision importable beside CPU torch
from zsr.attacks.noise import sample_seeds
from zsr.config import OBJECTIVES, ModelConfig, load_config
from zsr.engine.optim import learning_rate, make_optimizer, set_learning_rate
from zsr.engine.step import TrainStep
from zsr.models import TextBank, load_model
from zsr.models.clip import _still

BATCH = 6


class Made:
    """A step on a model of the given folder, and a batch for it."""

    def __init__(self, model: str, *settings: str) -> None:
        self.config = load_config("default", [f"model.name={model}", f"train.batch_size={BATCH}", *settings])
        self.model = load_model(self.config.model)
        self.step = TrainStep(
            self.config, self.model, TextBank(self.model), ["cat", "dog", "boat"], ["a photo of a {}."]
        )
        self.model.train()
        size = self.model.image_size
        self.image = torch.rand(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))

    def run(self, rows: slice = slice(None)) -> tuple[dict[str, float], torch.Tensor]:
        """Terms, and all gradients in one vector."""
        self.model.zero_grad(set_to_none=True)
        seeds = sample_seeds([str(i) for i in range(BATCH)], "train", 0)[rows]
        loss = self.step(self.image[rows], (torch.arange(BATCH) % 3)[rows], seeds, 0.5).loss
        loss.total.backward()
        gradient = torch.cat([p.grad.flatten() for p in self.step.parameters if p.grad is not None])
        return {name: term.item() for name, term in loss.terms.items()}, gradient


def halves_differ(made: Made) -> float:
    """Distance of the mean of two halves' gradients from the joined batch's, in units of the latter."""
    joined = made.run()[1]
    halves = (made.run(slice(0, BATCH // 2))[1] + made.run(slice(BATCH // 2, None))[1]) / 2
    return float((halves - joined).norm() / joined.norm())


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_two_halves_make_the_joined_gradient_on_a_tower_with_batch_norm(tmp_path: Path, name: str) -> None:
    # Noise alone perturbs: a sign near zero may turn with the batch size's rounding. This tower has a single patch.
    settings = ["attack.steps=0", *(["objective.weight_ccr=0"] if name == "ccr_ccs" else [])]
    assert halves_differ(Made(write_variant(tmp_path, "resnet"), f"objective={name}", *settings)) < 1e-4


def test_before_the_first_update_student_and_teacher_agree_on_a_tower_with_batch_norm(tmp_path: Path) -> None:
    model = write_variant(tmp_path, "resnet")
    assert Made(model, "objective=pmg_aft").run()[0]["pretrained"] == pytest.approx(0, abs=1e-6)
    assert Made(model, "objective=fare", "objective.weight_clean=1").run()[0]["clean"] == pytest.approx(0, abs=1e-6)
    assert Made(model, "objective=regmix", "attack.eps=0").run()[0]["main"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
def test_no_reduction_depends_on_the_number_of_workers(tmp_path: Path, reduction: str) -> None:
    settings = ["objective=pmg_aft", f"objective.reduction={reduction}", "attack.steps=0"]
    assert halves_differ(Made(write_tiny_clip(tmp_path), *settings)) < 1e-4


@pytest.mark.parametrize("drop", ["attention_drop=0.3", "attention_cap=0.3"])
def test_rams_attention_leaves_training_a_function_of_its_samples(tmp_path: Path, drop: str) -> None:
    made = Made(write_tiny_clip(tmp_path), "objective=regmix", f"model.{drop}")
    assert torch.equal(made.run()[1], made.run()[1])
    assert halves_differ(Made(write_tiny_clip(tmp_path), "objective=regmix", "attack.steps=0", f"model.{drop}")) < 1e-4


def test_noise_of_pre_training_is_switched_off() -> None:
    import open_clip
    import timm

    architecture: dict[str, Any] = {**ARCHITECTURE, "vision_cfg": {**ARCHITECTURE["vision_cfg"], "patch_dropout": 0.5}}
    towers = [
        open_clip.CLIP(**architecture).visual,
        timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.3, img_size=32),
    ]
    for visual, side in zip(towers, (32, 32), strict=True):
        visual.train()
        image = torch.rand(4, 3, side, side)
        with torch.no_grad():
            first, second = visual(image), visual(image)
            assert not torch.equal(first, second)  # else the test could not fail
            _still(visual)
            assert torch.equal(visual(image), visual(image))


def test_random_weights_are_the_same_whenever_they_are_loaded() -> None:
    config = ModelConfig(name="RN50", pretrained="random")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load_model(config).text_projection
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(load_model(config).text_projection, first)


def test_the_text_map_has_a_rate_of_its_own(tmp_path: Path) -> None:
    made = Made(
        write_tiny_clip(tmp_path), "objective=tima", "optim.lr=40", "optim.text_lr_factor=1e-6", "optim.decay=constant"
    )
    optim, step = made.config.optim, made.step
    optimizer = make_optimizer(optim, step.parameters, step.text_parameters)
    set_learning_rate(optimizer, learning_rate(optim, 0, 10))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.pop(id(made.model.text_projection)) == pytest.approx(4e-5)
    assert len(rates) == len(step.parameters) - 1 and set(rates.values()) == {40.0}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ["objective=fare", "attack.random_start=false"],
            "attack.random_start=false: objective.name=fare starts at the minimum",
        ),
        (
            ["objective=tga_zsr", "objective.map_size=2"],
            "objective.map_size=2: is smaller than the model's map of patches",
        ),
        (["objective=advcl", "objective.radius=100"], "objective.radius=100: leaves no frequency"),
        (["objective=ccr_ccs", "resnet"], "objective.weight_ccr=1: needs two patches or more, and this model has one"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path: Path, settings: list[str], sentence: str) -> None:
    model = write_variant(tmp_path, "resnet") if "resnet" in settings else write_tiny_clip(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        Made(model, *(setting for setting in settings if setting != "resnet"))


def test_prompts_of_another_architecture_are_not_taken_from_the_text_cache(tmp_path: Path) -> None:
    model = load_model(ModelConfig(name=write_tiny_clip(tmp_path / "model")))
    TextBank(model, tmp_path / "cache").features(["cat"], ["a {}"])
    model.architecture = {**model.architecture, "quick_gelu": True}
    other = TextBank(model, tmp_path / "cache")
    other.features(["cat"], ["a {}"])
    assert len(list((tmp_path / "cache").iterdir())) == 2
