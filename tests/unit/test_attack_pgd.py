"""PGD against a plain float64 version of itself, its bounds re-measured, and what it must leave as it found it.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from zsr.attacks.base import input_gradients_only
from zsr.attacks.noise import sample_seeds
from zsr.attacks.pgd import PGD, PGDConfig

torch.set_num_threads(1)

SHAPE = (3, 4, 4)
SETTINGS = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(["linf", "l2"]),
        "eps": st.sampled_from([0.0, 1 / 255, 8 / 255, 0.3, 1.0]),
        "step_size": st.sampled_from([0.0, 1 / 255, 0.05, 1.0]),
        "steps": st.integers(0, 4),
        "random_start": st.just(True),
        "restarts": st.integers(1, 3),
        "best_iterate": st.booleans(),
    }
)


def make_images(num: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Pixels in [0, 1], a good share of them exactly at an end."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand((num, *SHAPE), dtype=dtype, generator=generator) * 1.3 - 0.15).clamp(0, 1)


class Bumpy:
    """A loss with many hills whose row i depends on image i and its target alone; elementwise, so exact in any batch."""

    def __init__(self, target_BCHW: Tensor) -> None:
        self.target_BCHW = target_BCHW

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        return (torch.sin(40 * (image_BCHW - self.target_BCHW)) + image_BCHW * self.target_BCHW).flatten(1).sum(1)


def plain_pgd(gradient, image, start, norm, eps, step_size, steps):
    """Madry et al.'s iteration on the attacked image itself, one sample at a time, in numpy; every iterate."""
    iterates = []
    for row, attacked, grad_of in zip(image, start, gradient, strict=True):
        path = [attacked]
        for _ in range(steps):
            grad = grad_of(attacked)
            if norm == "linf":
                attacked = attacked + step_size * np.sign(grad)
                attacked = np.minimum(np.maximum(attacked, row - eps), row + eps)
            else:
                away = attacked + step_size * grad / np.sqrt(np.sum(grad**2)) - row
                attacked = row + away * min(1.0, eps / np.sqrt(np.sum(away**2)))
            attacked = np.minimum(np.maximum(attacked, 0.0), 1.0)
            path.append(attacked)
        iterates.append(path)
    return np.array(iterates)  # [B, steps + 1, C, H, W]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_every_iterate_equals_a_plain_numpy_pgd(norm, random_start, kind):
    image, rng, steps = make_images(4), np.random.default_rng(0), 6
    slope, centre = rng.normal(size=(2, 4, *SHAPE))

    def loss(attacked_BCHW: Tensor) -> Tensor:
        if kind == "linear":
            return (torch.from_numpy(slope) * attacked_BCHW).flatten(1).sum(1)
        return (torch.from_numpy(slope) * (attacked_BCHW - torch.from_numpy(centre)) ** 2).flatten(1).sum(1)

    if kind == "linear":
        gradient = [lambda x, s=s: s for s in slope]
    else:
        gradient = [lambda x, s=s, c=c: 2 * s * (x - c) for s, c in zip(slope, centre, strict=True)]
    eps, step_size = (0.05, 0.02) if norm == "linf" else (0.6, 0.25)
    found = [
        PGD(PGDConfig(norm=norm, eps=eps, step_size=step_size, steps=k, random_start=random_start))
        .perturb(loss, image, seeds=[1, 2, 3, 4])
        .image_BCHW.numpy()
        for k in range(steps + 1)
    ]
    if not random_start:
        assert (found[0] == image.numpy()).all()
    expected = plain_pgd(gradient, image.numpy(), found[0], norm, eps, step_size, steps)
    for k in range(steps + 1):
        assert np.abs(found[k] - expected[:, k]).max() < 1e-14
    assert np.abs(found[-1] - found[0]).max() > 0.01


@given(SETTINGS, st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**32), st.floats(0, 1))
@settings(max_examples=60)
def test_eps_and_the_pixel_range_are_never_exceeded(options, dtype, seed, progress):
    image, target = make_images(3, seed, dtype), make_images(3, seed + 1, dtype)
    attack = PGD(PGDConfig(**options, schedule={"name": "linear"}))
    attacked = attack.perturb(Bumpy(target), image, sample_seeds(["a", "b", "c"], seed), progress).image_BCHW
    assert attacked.min() >= 0 and attacked.max() <= 1
    delta = (attacked.double() - image.double()).flatten(1)
    size = delta.abs().amax(1) if options["norm"] == "linf" else delta.square().sum(1).sqrt()
    # What is left is the rounding of one addition per pixel near 1: half a unit in the last place.
    unit = torch.finfo(dtype).eps / 2 * (1 if options["norm"] == "linf" else delta.shape[1] ** 0.5)
    assert (size <= options["eps"] * progress + 2 * unit).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("extra", [{"best_iterate": True}, {"restarts": 4}])
@given(seed=st.integers(0, 2**32), steps=st.integers(0, 5))
@settings(max_examples=20)
def test_keeping_the_best_is_never_worse_than_the_last_iterate(norm, extra, seed, steps):
    image, loss = make_images(3, seed), Bumpy(make_images(3, seed + 1))
    shared = {"norm": norm, "eps": 0.3, "step_size": 0.2, "steps": steps}
    seeds = sample_seeds(["a", "b", "c"], seed)
    last = PGD(PGDConfig(**shared)).perturb(loss, image, seeds).image_BCHW
    best = PGD(PGDConfig(**shared, **extra)).perturb(loss, image, seeds).image_BCHW
    assert (loss(best) >= loss(last) - 1e-9).all()


def test_keeping_the_best_helps_where_steps_overshoot():
    image, loss = make_images(8), Bumpy(make_images(8, 1))
    shared = {"eps": 0.3, "step_size": 0.3, "steps": 5}
    last = PGD(PGDConfig(**shared)).perturb(loss, image, range(8)).image_BCHW
    best = PGD(PGDConfig(**shared, best_iterate=True)).perturb(loss, image, range(8)).image_BCHW
    assert (loss(best) > loss(last) + 0.1).any()


@given(SETTINGS, st.permutations(list(range(4))), st.integers(1, 3))
@settings(max_examples=40)
def test_a_sample_is_attacked_the_same_way_in_any_batch(options, order, cut):
    attack, seeds = PGD(PGDConfig(**options)), sample_seeds(["a", "b", "c", "d"], 0)
    image, target = make_images(4), make_images(4, 1)

    def run(rows: list[int]) -> Tensor:
        return attack.perturb(Bumpy(target[rows]), image[rows], [seeds[i] for i in rows]).image_BCHW

    together = run([0, 1, 2, 3])
    assert torch.equal(together, torch.cat([run(list(range(cut))), run(list(range(cut, 4)))]))
    assert torch.equal(together[list(order)], run(list(order)))


def test_the_gradient_is_that_of_the_sum_not_of_the_mean():
    # A slope near the smallest float32: divided by the batch size it would vanish, and the sample would not move.
    image = torch.full((256, *SHAPE), 0.5)

    def loss(attacked_BCHW: Tensor) -> Tensor:
        return (attacked_BCHW * torch.tensor(2e-45)).flatten(1).sum(1)

    result = PGD(PGDConfig(eps=0.1, step_size=0.1, steps=1, random_start=False)).perturb(loss, image, range(256))
    assert not result.zero_grad_B.any()
    assert torch.allclose(result.image_BCHW, torch.tensor(0.6))


def test_zero_gradients_are_flagged_sample_by_sample():
    image = make_images(4)
    awake = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(4, 1, 1, 1)

    def loss(attacked_BCHW: Tensor) -> Tensor:
        return (attacked_BCHW * awake).flatten(1).sum(1)

    result = PGD(PGDConfig(eps=0.1, step_size=0.1, steps=2)).perturb(loss, image, range(4))
    assert result.zero_grad_B.tolist() == [False, True, False, True]


@pytest.fixture(scope="module")
def tower(tiny_model_name):
    from zsr.config import ModelConfig
    from zsr.models import load_model

    return load_model(ModelConfig(name=tiny_model_name))


def test_a_sound_model_has_no_zero_gradient_and_a_saturated_one_has(tower):
    image, text = torch.rand(4, 3, 32, 32, generator=torch.manual_seed(0)), torch.eye(16)[:5]
    label, attack = torch.tensor([0, 1, 2, 3]), PGD(PGDConfig(eps=4 / 255, step_size=1 / 255, steps=2))

    def run(scale: float) -> Tensor:
        def loss(attacked_BCHW: Tensor) -> Tensor:
            logits = scale * tower.encode_image(attacked_BCHW).embed_BD @ text.T
            return nn.functional.cross_entropy(
                logits, logits.detach().argmax(-1) if scale > 1e3 else label, reduction="none"
            )

        with input_gradients_only(tower.image):
            return attack.perturb(loss, image, range(4)).zero_grad_B

    assert not run(100.0).any()
    assert run(1e6).all()  # softmax is one-hot in float32: the loss is flat, and the attack says so


@pytest.mark.parametrize("raises", [False, True])
def test_an_attack_leaves_gradients_flags_modes_and_the_random_stream_as_they_were(tower, raises):
    model = tower.image
    frozen = next(iter(model.visual.transformer.resblocks[0].parameters()))
    frozen.requires_grad_(False)
    model.train()
    model.visual.transformer.resblocks[1].eval()
    try:
        modes = [module.training for module in model.modules()]
        flags = [parameter.requires_grad for parameter in model.parameters()]
        torch.manual_seed(3)
        stream = torch.get_rng_state()
        calls = []

        def loss(attacked_BCHW: Tensor) -> Tensor:
            calls.append([parameter.requires_grad for parameter in model.parameters()] + [model.training])
            if raises and len(calls) == 2:
                raise RuntimeError("out of memory")
            return model(attacked_BCHW).raw_BD.sum(1)

        image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        before = image.clone()
        attack = PGD(PGDConfig(eps=4 / 255, steps=3, restarts=2))
        if raises:
            with pytest.raises(RuntimeError, match="out of memory"), input_gradients_only(model):
                attack.perturb(loss, image, [1, 2])
        else:
            with input_gradients_only(model):
                result = attack.perturb(loss, image, [1, 2]).image_BCHW
            assert not result.requires_grad
        assert not any(any(call) for call in calls)
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), stream)
        assert torch.equal(image, before)
    finally:
        frozen.requires_grad_(True)


def test_the_schedule_scales_eps_and_step_together():
    image = torch.full((2, *SHAPE), 0.5, dtype=torch.float64)
    attack = PGD(
        PGDConfig(eps=0.2, step_size=0.1, steps=1, random_start=False, schedule={"name": "linear", "start": 0.5})
    )

    def slope(attacked_BCHW: Tensor) -> Tensor:
        return attacked_BCHW.flatten(1).sum(1)

    for progress, expected in [(0.0, 0.05), (0.5, 0.075), (1.0, 0.1)]:
        moved = attack.perturb(slope, image, [0, 1], progress).image_BCHW - image
        assert torch.allclose(moved, torch.full_like(moved, expected))
        assert attack.threat(progress).eps == pytest.approx(2 * expected)


def test_an_empty_batch_is_attacked_without_complaint():
    for norm in ("linf", "l2"):
        result = PGD(PGDConfig(norm=norm, steps=2, best_iterate=True)).perturb(
            lambda attacked: attacked.flatten(1).sum(1), torch.empty(0, *SHAPE), []
        )
        assert result.image_BCHW.shape == (0, *SHAPE) and result.zero_grad_B.shape == (0,)


def test_as_many_seeds_as_images_are_asked_for():
    with pytest.raises(ValueError):
        PGD(PGDConfig()).perturb(lambda attacked: attacked.flatten(1).sum(1), make_images(3), [1, 2])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eps": 4}, r"eps=4 is more than the whole pixel range \[0, 1\]; write 4/255"),
        ({"step_size": 2}, r"step_size=2 is more than the whole pixel range \[0, 1\]; write 2/255"),
        ({"eps": "300/255"}, r"eps=1\.17647 is more than the whole pixel range"),
        ({"eps": -0.1}, "greater than or equal to 0"),
        ({"eps": "4 of 255"}, "valid number"),
        ({"eps": "4/0"}, "should be a number or a fraction such as 2/255, not '4/0'"),
        ({"steps": -1}, "greater than or equal to 0"),
        ({"restarts": 0}, "greater than or equal to 1"),
        ({"restarts": 3, "random_start": False}, "restarts=3 with random_start off would repeat one start; turn it on"),
        ({"norm": "l1"}, "'linf' or 'l2'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_settings_that_make_no_attack_are_rejected_with_the_fix(options, says):
    with pytest.raises(ValidationError, match=says):
        PGDConfig(**options)


def test_a_large_l2_budget_and_fractions_are_fine():
    assert PGDConfig(norm="l2", eps=3, step_size=1.5).eps == 3
    assert PGDConfig(eps="4/255").eps == 4 / 255
