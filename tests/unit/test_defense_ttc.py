"""TTC against its formula in plain loops and float64, its gate and cost, and what it must leave as it found it.

Shapes: B images, C channels, H x W pixels, D embedding width.
"""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from tiny_clip import tiny_clip
from torch import Tensor

from zsr.attacks.noise import fill_uniform
from zsr.config import DEFENSES
from zsr.defenses.ttc import TTC, TTCConfig, relative_shift
from zsr.models import ImageFeatures, ImageTower

torch.set_num_threads(1)

SEEDS = [11, 12, 13, 14, 15, 16]
ALWAYS, NEVER = 1e9, 0.0


class DoubleTower:
    """An image tower in float64, where the order of sums cannot flip the sign of a gradient."""

    def __init__(self, tower: ImageTower) -> None:
        self.visual = copy.deepcopy(tower.visual).double().eval()
        self.mean, self.std = tower.mean.double(), tower.std.double()
        self.passes = 0

    def __call__(self, image_BCHW: Tensor) -> ImageFeatures:
        self.passes += 1
        pooled = self.visual((image_BCHW - self.mean) / self.std)
        raw_BD = pooled[0] if isinstance(pooled, tuple) else pooled  # beside the patch tokens, or alone
        return ImageFeatures(torch.nn.functional.normalize(raw_BD, dim=-1), raw_BD)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("victim"), seed=0).eval()


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("frozen"), seed=1).eval()


@pytest.fixture
def victim(clip):
    return DoubleTower(clip.image)


@pytest.fixture
def frozen(other):
    return DoubleTower(other.image)


@pytest.fixture(scope="module")
def image() -> Tensor:
    """Pixels in [0, 1], a good share of them exactly at an end, where the box cuts."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand((len(SEEDS), 3, 32, 32), dtype=torch.float64, generator=generator) * 1.3 - 0.15).clamp(0, 1)


@pytest.fixture(scope="module")
def noise(image) -> Tensor:
    return fill_uniform(image, SEEDS)


def plain_ttc(victim, frozen, image_BCHW, noise_BCHW, config) -> tuple[Tensor, list[float], list[list[Tensor]]]:
    """METHODS 4.1 one sample at a time with all iterates stored: purified images, tau, iterates."""
    purified, taus, paths = [], [], []
    for image, noise in zip(image_BCHW.unsqueeze(1), noise_BCHW.unsqueeze(1), strict=True):

        def cut(delta, image=image):
            delta = delta.clamp(min=-config.eps).clamp(max=config.eps)
            return torch.minimum(torch.maximum(delta, 0 - image), 1 - image)

        path = [cut(config.eps * noise)]
        anchor = victim(image).raw_BD.detach()
        plain, noisy = frozen(image).raw_BD.detach(), frozen(image + path[0]).raw_BD.detach()
        tau = math.sqrt(((noisy - plain) ** 2).sum()) / math.sqrt((plain**2).sum())
        for _ in range(config.num_steps):
            delta = path[-1].clone().requires_grad_(True)
            distance = ((victim(image + delta).raw_BD - anchor) ** 2).sum()
            distance.backward()
            path.append(cut(path[-1] + config.step_size * torch.sign(delta.grad)))
        weights = [math.exp(config.beta * i) for i in range(config.num_steps + 1)]
        if tau >= config.threshold:
            weights = [1.0] + [0.0] * config.num_steps
        mixed = sum(weight * delta for weight, delta in zip(weights, path, strict=True)) / sum(weights)
        purified.append(image + mixed)
        taus.append(tau)
        paths.append(path)
    return torch.cat(purified), taus, paths


@pytest.mark.parametrize("own_gate", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_steps": 4, "step_size": "3/255"},
        {"num_steps": 1, "beta": 0.0},
        {"num_steps": 3, "beta": -1.5, "eps": "16/255", "step_size": "10/255"},
        {"num_steps": 0},
        {"eps": 0},
    ],
)
def test_equals_the_formula_in_plain_loops(victim, frozen, image, noise, own_gate, settings):
    gate = frozen if own_gate else victim
    config = TTCConfig(**settings)
    # A threshold in the middle of the taus, so that both branches are taken within one batch.
    taus = sorted(plain_ttc(victim, gate, image, noise, config)[1])
    config = config.model_copy(update={"threshold": (taus[2] + taus[3]) / 2})
    expected, _, paths = plain_ttc(victim, gate, image, noise, config)
    found = TTC(config).purify(victim, gate, image, noise)
    assert (found - expected).abs().max() < 1e-14
    if config.eps and config.num_steps:  # the test could tell the branches and the iterates apart
        assert taus[3] - taus[2] > 1e-6
        assert not torch.equal(paths[0][0], paths[0][1])
        moved = [not torch.allclose(row, one + path[0][0]) for row, one, path in zip(found, image, paths, strict=True)]
        assert sum(moved) == 3


def test_stays_within_its_budget_and_the_pixel_range(clip, image, noise):
    single, config = image.float(), TTCConfig(eps="8/255", step_size="5/255", num_steps=3, threshold=ALWAYS)
    found = TTC(config).purify(clip.image, clip.image, single, noise.float())
    assert found.min() >= 0 and found.max() <= 1
    assert (found - single).abs().max() <= 8 / 255 + 1e-7
    assert (found - single).abs().max() > 4 / 255


@pytest.mark.parametrize("own_gate", [False, True])
def test_a_sample_is_purified_the_same_way_in_any_batch(victim, frozen, image, own_gate):
    gate, defense = frozen if own_gate else victim, TTC(TTCConfig(threshold=0.05))

    def run(rows: list[int]) -> Tensor:
        seeds = [SEEDS[i] for i in rows]
        return defense.purify(victim, gate, image[rows], fill_uniform(image[rows], seeds))

    together = run([0, 1, 2, 3, 4, 5])
    assert (together - torch.cat([run([0]), run([1, 2]), run([3, 4, 5])])).abs().max() < 1e-14
    assert (together[[5, 2, 0]] - run([5, 2, 0])).abs().max() < 1e-14


def test_without_a_trigger_the_noise_alone_is_left(victim, image, noise):
    never = TTC(TTCConfig(threshold=NEVER)).purify(victim, victim, image, noise)
    assert (never - (image + noise * (4 / 255)).clamp(0, 1)).abs().max() < 1e-15
    no_steps = TTC(TTCConfig(num_steps=0, threshold=ALWAYS)).purify(victim, victim, image, noise)
    assert torch.equal(no_steps, never)


def test_a_triggered_image_ends_farther_from_its_anchor_than_noise_takes_it(victim, image, noise):
    anchor = victim(image).raw_BD
    always = TTC(TTCConfig(threshold=ALWAYS)).purify(victim, victim, image, noise)
    never = TTC(TTCConfig(threshold=NEVER)).purify(victim, victim, image, noise)
    assert (relative_shift(victim(always).raw_BD, anchor) > 2 * relative_shift(victim(never).raw_BD, anchor)).all()


def test_the_gate_asks_the_frozen_tower_and_the_counterattack_the_victim(victim, frozen, image, noise):
    def numb(image_BCHW: Tensor) -> ImageFeatures:  # never moves: everything looks falsely stable to it
        raw_BD = torch.ones(len(image_BCHW), 16, dtype=image_BCHW.dtype)
        return ImageFeatures(raw_BD / 4, raw_BD)

    defense = TTC(TTCConfig(threshold=1e-9))
    own = defense.purify(victim, victim, image, noise)
    numb_gate = defense.purify(victim, numb, image, noise)
    always = TTC(TTCConfig(threshold=ALWAYS)).purify(victim, victim, image, noise)
    assert torch.equal(numb_gate, always)
    assert not torch.equal(own, always)


def test_features_of_length_zero_do_not_give_nan(image, noise):
    def dead(image_BCHW: Tensor) -> ImageFeatures:
        raw_BD = 0 * image_BCHW.flatten(1)[:, :4]
        return ImageFeatures(raw_BD, raw_BD)

    assert TTC(TTCConfig()).purify(dead, dead, image, noise).isfinite().all()
    shift = relative_shift(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.zeros(2, 2))
    assert shift[0] > 1e9 and shift[1] == 0


def test_weights_are_a_softmax_that_survives_large_exponents():
    assert TTC(TTCConfig(num_steps=2, beta=math.log(3))).weights() == pytest.approx([1 / 13, 3 / 13, 9 / 13])
    assert TTC(TTCConfig(num_steps=3, beta=0)).weights() == [0.25] * 4
    for beta, last in ((1e6, 1.0), (-1e6, 0.0)):
        assert TTC(TTCConfig(num_steps=5, beta=beta)).weights()[-1] == last


@pytest.mark.parametrize("own_gate", [False, True])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_costs_the_passes_that_it_says(clip, other, image, noise, own_gate, num_steps):
    count: Counter[str] = Counter()

    def counter(name: str):
        def hook(_module, _inputs, features: ImageFeatures) -> None:
            count.update([f"{name} forward"])
            if features.raw_BD.requires_grad:
                features.raw_BD.register_hook(lambda _grad: count.update([f"{name} back"]))

        return hook

    hooks = [clip.image.register_forward_hook(counter("victim")), other.image.register_forward_hook(counter("frozen"))]
    try:
        defense = TTC(TTCConfig(num_steps=num_steps))
        gate = other.image if own_gate else clip.image
        with torch.no_grad():
            clip.encode_image(defense.purify(clip.image, gate, image.float(), noise.float()))
    finally:
        for hook in hooks:
            hook.remove()
    assert count.total() == defense.cost_units(own_gate)
    assert count["victim back"] == num_steps and count["frozen back"] == 0
    assert count["frozen forward"] == (2 if own_gate and num_steps else 0)
    assert TTC(TTCConfig()).cost_units() == 6 and TTC(TTCConfig()).cost_units(own_gate=True) == 8


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_works_in_any_grad_mode_and_leaves_model_images_and_random_stream_alone(clip, other, image, noise, context):
    model = clip.image
    model.visual.transformer.resblocks[1].train()
    assert any(parameter.requires_grad for parameter in model.parameters())
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    single, before = image.float(), image.float()
    torch.manual_seed(3)
    stream = torch.get_rng_state()
    try:
        expected = TTC(TTCConfig(threshold=ALWAYS)).purify(model, other.image, single, noise.float())
        with context():
            inside = single * 1  # made in that mode, as a decoded request would be
            found = TTC(TTCConfig(threshold=ALWAYS)).purify(model, other.image, inside, noise.float())
        assert torch.equal(found, expected)
        assert not found.requires_grad and not inside.requires_grad
        assert torch.equal(single, before) and torch.equal(inside, before)
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert all(parameter.grad is None for tower in (model, other.image) for parameter in tower.parameters())
        assert torch.equal(torch.get_rng_state(), stream)
    finally:
        model.eval()


def test_works_with_a_bf16_tower(clip, image, noise):
    model = copy.deepcopy(clip.image)
    model.precision = "bf16"
    found = TTC(TTCConfig(threshold=ALWAYS)).purify(model, model, image.float(), noise.float())
    assert found.dtype == torch.float32 and found.isfinite().all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eps": 4}, r"eps=4 is more than the whole pixel range \[0, 1\]; write 4/255"),
        ({"step_size": 2}, r"step_size=2 is more than the whole pixel range \[0, 1\]; write 2/255"),
        ({"num_steps": -1}, "greater than or equal to 0"),
        ({"threshold": -0.1}, "greater than or equal to 0"),
        ({"beta": float("nan")}, "finite number"),
        ({"steps": 3}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_defence_are_rejected(options, says):
    with pytest.raises(ValidationError, match=says):
        TTCConfig(**options)


def test_the_defaults_are_the_published_ones_and_the_name_is_registered():
    config = DEFENSES.config_class("ttc")()
    assert config.model_dump() == {
        "name": "ttc", "eps": 4 / 255, "step_size": 1 / 255, "num_steps": 2, "beta": 2.0, "threshold": 0.2,
    }  # fmt: skip
    assert TTCConfig(eps="4/255", step_size="1/255") == config
    assert isinstance(DEFENSES.build(config), TTC)
    with pytest.raises(ValueError, match="is not a known defense; did you mean 'ttc'"):
        DEFENSES.config_class("tcc")
