"""What the frozen model gives for a clean image is kept by sample, and keeping it changes nothing but the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_clip import write_tiny_clip

from zsr.attacks.noise import sample_seeds
from zsr.config import load_config
from zsr.engine.sample_cache import SampleCache
from zsr.engine.step import TrainStep
from zsr.models import TextBank, load_model


def test_rows_are_made_once_for_each_sample_and_grow_beyond_the_first_table():
    cache, made = SampleCache(), []

    def row(number: int) -> torch.Tensor:
        return torch.tensor([float(number), -float(number)])

    def ask(numbers: list[int]) -> torch.Tensor:
        def make(places: torch.Tensor) -> torch.Tensor:
            made.extend(numbers[place] for place in places.tolist())
            return torch.stack([row(numbers[place]) for place in places.tolist()])

        return cache.get("row", [f"key {number}" for number in numbers], make)

    for numbers in ([1, 2, 3], [3, 4], list(range(3000)), [2999, 0, 7]):
        assert torch.equal(ask(numbers), torch.stack([row(number) for number in numbers]))
    assert sorted(made) == list(range(3000))
    assert torch.equal(ask([5000, 5000]), torch.stack([row(5000)] * 2))  # twice in one batch


def test_names_are_kept_apart():
    cache = SampleCache()
    assert cache.get("a", ["k"], lambda _: torch.ones(1)).item() == 1
    assert cache.get("b", ["k"], lambda _: torch.zeros(1)).item() == 0


# Objectives with one constant of a sample, and the passes of the frozen tower in a step without the cache.
@pytest.mark.parametrize("name", ["tima", "tga_zsr", "comp_tga", "agft", "fare", "gsb", "regmix", "caw", "advcl"])
def test_from_the_second_epoch_on_the_frozen_tower_rests_and_the_loss_is_the_same(tmp_path: Path, name):
    def step(cached: bool) -> tuple[TrainStep, list[int]]:
        settings = [f"model.name={write_tiny_clip(tmp_path / str(cached))}", f"objective={name}", "attack.eps=8/255"]
        config = load_config("default", [*settings, f"train.cache_frozen={str(cached).lower()}"])
        model = load_model(config.model)
        made = TrainStep(config, model, TextBank(model), ["cat", "dog", "boat"], ["a photo of a {}."])
        passes: list[int] = []
        made.frozen.visual.transformer.resblocks[0].register_forward_hook(lambda *_: passes.append(1))
        with torch.no_grad():
            for parameter in made.parameters:
                parameter += 0.01 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
                )
        return made, passes

    image = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    label = torch.arange(6) % 3
    keys = [f"sample {number}" for number in range(6)]
    (plain, plain_passes), (cached, cached_passes) = step(False), step(True)
    image = torch.nn.functional.interpolate(image, size=(plain.model.image_size,) * 2)
    losses = []
    # Another order and another share of the batch: rows must follow their keys.
    for rows in (torch.arange(6), torch.tensor([5, 0, 3, 1]), torch.tensor([2, 4])):
        arguments = (image[rows], label[rows], sample_seeds([keys[i] for i in rows], "train", 0), 0.5)
        expected = plain(*arguments).loss.total
        found = cached(*arguments, [keys[i] for i in rows]).loss.total
        losses.append((found.item(), expected.item()))
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    always = 1 if name == "caw" else 0  # its other frozen view, of the attacked image, is no constant
    assert len(plain_passes) == 3 * (1 + always)
    assert len(cached_passes) == 1 + 3 * always


@pytest.mark.parametrize("fast_layers", ["true", "false"])
@pytest.mark.parametrize("name", ["tga_zsr", "comp_tga"])
def test_a_tower_that_has_not_moved_sees_what_the_frozen_one_sees_to_the_last_bit(tmp_path: Path, name, fast_layers):
    settings = [f"model.name={write_tiny_clip(tmp_path)}", f"objective={name}", f"model.fast_layers={fast_layers}"]
    config = load_config("default", settings)
    model = load_model(config.model).train()
    step = TrainStep(config, model, TextBank(model), ["cat", "dog", "boat"], ["a photo of a {}."])
    image = torch.rand(6, 3, *(model.image_size,) * 2, generator=torch.Generator().manual_seed(0))
    loss = step(image, torch.arange(6) % 3, sample_seeds(["a", "b", "c", "d", "e", "f"], "train", 0), 0.5).loss
    assert loss.terms["amc"] == 0 < loss.terms["ar"]
    assert torch.backends.mha.get_fastpath_enabled()  # as it was
