"""The threat model's promises: what a projection, a random start and a step may do to an image.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zsr.attacks.noise import fill_normal, fill_uniform, sample_seeds
from zsr.attacks.threat import ThreatModel

torch.set_num_threads(1)

NORM = st.sampled_from(["linf", "l2"])
EPS = st.one_of(st.just(0.0), st.floats(1e-4, 1.0), st.sampled_from([1 / 255, 4 / 255, 8 / 255]))
SEEDS = st.lists(st.integers(0, 2**63 - 1), min_size=0, max_size=5)
ROUNDING = 1e-15  # of one addition on pixels in [0, 1], float64


@st.composite
def cases(draw):
    """A threat model, images (some pixels exactly black or white) and perturbations of any size, all in float64."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    image = (torch.rand(shape, dtype=torch.float64, generator=generator) * 1.4 - 0.2).clamp(0, 1)
    length = draw(st.sampled_from([0.0, 1e-9, 0.01, 0.3, 50.0]))
    delta = torch.randn(shape, dtype=torch.float64, generator=generator) * length
    return ThreatModel(draw(NORM), draw(EPS)), image, delta


def sizes(norm: str, delta: Tensor) -> list[float]:
    """Norms by the definition, sample by sample."""
    values = [[abs(value) for value in row.flatten().tolist()] for row in delta]
    return [max(row) if norm == "linf" else math.sqrt(sum(value * value for value in row)) for row in values]


@given(cases())
def test_projection_lies_in_the_ball_and_in_the_pixel_box(case):
    threat, image, delta = case
    projected = threat.project(delta, image)
    assert all(size <= threat.eps + ROUNDING for size in sizes(threat.norm, projected))
    attacked = image + projected
    assert not len(image) or (attacked.min() >= -ROUNDING and attacked.max() <= 1 + ROUNDING)


@given(cases())
def test_projecting_twice_is_projecting_once(case):
    threat, image, delta = case
    once = threat.project(delta, image)
    assert torch.allclose(threat.project(once, image), once, rtol=0, atol=ROUNDING)


@given(cases())
def test_projection_never_enlarges_a_pixel_or_turns_its_sign(case):
    threat, image, delta = case
    projected = threat.project(delta, image)
    assert (projected.abs() <= delta.abs() + ROUNDING).all()
    assert (projected * delta >= -ROUNDING).all()


@given(cases())
def test_an_allowed_perturbation_is_left_alone(case):
    threat, image, delta = case
    inside = threat.project(delta, image) * 0.5
    assert torch.allclose(threat.project(inside, image), inside, rtol=0, atol=ROUNDING)


@given(cases(), st.integers(0, 2**32))
def test_projection_is_the_nearest_point_of_the_ball(case, seed):
    threat, image, delta = case
    image = torch.full_like(image, 0.5)
    threat = ThreatModel(threat.norm, min(threat.eps, 0.4))  # the box is out of reach: this is about the ball
    projected = threat.project(delta, image)
    for other_seed in range(seed, seed + 4):
        generator = torch.Generator().manual_seed(other_seed)
        other = torch.randn(delta.shape, dtype=torch.float64, generator=generator)
        # Candidates near the projection are the hard ones; pulling them into the ball by the definition keeps them fair.
        other = projected + other * 10.0 ** -(other_seed % 6)
        for row, near, target in zip(other, projected, delta, strict=True):
            size = sizes(threat.norm, row[None])[0]
            row = row * min(1.0, threat.eps / size) if size else row
            assert (near - target).norm() <= (row - target).norm() + 1e-12


@given(cases(), st.integers(0, 2**32))
def test_linf_projection_is_the_nearest_point_of_ball_and_box_together(case, seed):
    _, image, delta = case
    threat = ThreatModel("linf", 0.1)
    projected = threat.project(delta, image)
    low, high = (image - 0.1).clamp_min(0), (image + 0.1).clamp_max(1)
    other = low + (high - low) * torch.rand(image.shape, dtype=torch.float64, generator=torch.manual_seed(seed))
    assert ((projected - delta).abs() <= (other - image - delta).abs() + ROUNDING).all()


@given(cases())
def test_size_is_the_norm(case):
    threat, _, delta = case
    assert threat.size(delta).tolist() == pytest.approx(sizes(threat.norm, delta), rel=1e-12)


@given(cases(), st.floats(0, 2))
def test_a_step_has_its_length_and_rises_fastest(case, step_size):
    threat, _, grad = case
    step = threat.ascend(grad, step_size)
    for row, row_grad, size in zip(step, grad, sizes(threat.norm, step), strict=True):
        values = row_grad.flatten().tolist()
        dual = sum(map(abs, values)) if threat.norm == "linf" else math.sqrt(sum(value * value for value in values))
        if dual > 1e-10:  # Hoelder's bound is reached: no step of this length gains more to first order
            assert size == pytest.approx(step_size, abs=1e-12)
            assert (row * row_grad).sum().item() == pytest.approx(step_size * dual, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_zero_gradient_makes_no_step_and_no_nan(norm):
    assert (ThreatModel(norm, 0.1).ascend(torch.zeros(2, 3, 4, 4), 0.1) == 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_eps_zero_allows_nothing(norm):
    image = torch.rand(3, 3, 4, 4)
    assert (ThreatModel(norm, 0.0).project(torch.randn(3, 3, 4, 4), image) == 0).all()
    assert (ThreatModel(norm, 0.0).random_start(image, [1, 2, 3]) == 0).all()


@given(NORM, EPS, SEEDS)
def test_random_starts_lie_in_ball_and_box(norm, eps, seeds):
    image = torch.rand((len(seeds), 3, 4, 4), dtype=torch.float64).round(decimals=1)
    start = ThreatModel(norm, eps).random_start(image, seeds)
    assert all(size <= eps + ROUNDING for size in sizes(norm, start))
    attacked = image + start
    assert not len(seeds) or (attacked.min() >= -ROUNDING and attacked.max() <= 1 + ROUNDING)


@given(NORM, st.permutations(list(range(5))), st.integers(1, 4))
def test_a_random_start_depends_on_its_own_seed_and_image_alone(norm, order, cut):
    threat, seeds = ThreatModel(norm, 0.1), [3, 1 << 62, 5, 3, 2**63 - 1]
    image = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    together = threat.random_start(image, seeds)
    parts = [threat.random_start(image[:cut], seeds[:cut]), threat.random_start(image[cut:], seeds[cut:])]
    assert torch.equal(together, torch.cat(parts))
    shuffled = threat.random_start(image[list(order)], [seeds[i] for i in order])
    assert torch.equal(together[list(order)], shuffled)


@pytest.mark.parametrize("fill", [fill_uniform, fill_normal])
def test_noise_leaves_the_global_random_stream_alone(fill):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fill(torch.empty(2, 3, 4, 4), [1, 2])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("fill", [fill_uniform, fill_normal])
def test_noise_does_not_depend_on_memory_format(fill):
    like = torch.empty(2, 3, 8, 8)
    expected = fill(like, [1, 2])
    assert torch.equal(fill(like.to(memory_format=torch.channels_last), [1, 2]), expected)


def test_seeds_follow_key_and_purpose_and_nothing_else():
    seeds = sample_seeds(["a", "b", "a"], "train", 0, 1)
    assert seeds[0] == seeds[2] != seeds[1]
    assert sample_seeds(["b"], "train", 0, 1) == seeds[1:2]
    assert all(0 <= seed < 2**63 for seed in sample_seeds(list(map(str, range(1000))), "eval", 3))
    purposes = [("train", 0, 1), ("train", 0, 2), ("train", 1, 1), ("eval", 0, 1), ("train", 0)]
    assert len({sample_seeds(["a"], *purpose)[0] for purpose in purposes}) == len(purposes)


def largest_gap(values: Tensor) -> float:
    """Kolmogorov-Smirnov distance between values in [0, 1] and the uniform distribution."""
    ordered = values.flatten().double().sort().values
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return (ordered - steps).abs().max().item()


def test_linf_starts_are_uniform_in_the_ball():
    image = torch.full((400, 3, 4, 4), 0.5)
    start = ThreatModel("linf", 0.25).random_start(image, sample_seeds(list(map(str, range(400))), 0))
    assert largest_gap(start / 0.5 + 0.5) < 0.012  # 1.36 / sqrt(19200) = 0.0098 at five per cent


@pytest.mark.parametrize("side", [1, 4])
def test_l2_starts_are_uniform_in_the_ball(side):
    image = torch.full((2000, 3, side, side), 0.5)
    dims = 3 * side * side
    start = ThreatModel("l2", 0.25).random_start(image, sample_seeds(list(map(str, range(2000))), 0)).double()
    length = start.flatten(1).norm(dim=1)
    assert largest_gap((length / 0.25) ** dims) < 0.04  # 1.36 / sqrt(2000) = 0.03: the volume inside is uniform
    direction = start.flatten(1) / length[:, None]
    assert (direction.mean(0).abs() < 0.1).all()
    assert ((direction**2).mean(0) * dims - 1).abs().max() < 0.25
    # Length and direction come from different random numbers: their ranks are not related, whatever the coordinate.
    rank = length.argsort().argsort().double()
    for coordinate in direction.T.abs():
        related = torch.corrcoef(torch.stack([rank, coordinate.argsort().argsort().double()]))[0, 1]
        assert related.abs() < 0.1


@settings(max_examples=20)
@given(st.integers(0, 2**63 - 1))
def test_any_seed_plus_a_restart_is_still_a_seed(seed):
    assert torch.isfinite(fill_uniform(torch.empty(1, 1, 2, 2), [seed + 9])).all()
