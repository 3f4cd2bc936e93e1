"""The pieces of the strong attacks against their definitions: losses, checkpoints, halving, the projection of FAB, EOT.

Shapes: B images, C channels (or classes, in logits), H x W pixels.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from zsr.attacks.apgd import APGD, APGDConfig
from zsr.attacks.ascent import ascend, checkpoints
from zsr.attacks.autoattack import AutoAttack, AutoAttackConfig
from zsr.attacks.cw import CW, CWConfig
from zsr.attacks.fab import to_plane
from zsr.attacks.losses import classifier_loss, likely_targets
from zsr.attacks.noise import derived_seeds
from zsr.attacks.threat import ThreatModel

torch.set_num_threads(1)


@given(st.integers(0, 2**32), st.integers(4, 7))
@settings(max_examples=30)
def test_losses_equal_their_formulas_in_plain_loops(seed, num_classes):
    logits = torch.randn(5, num_classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    label, target = torch.arange(5) % num_classes, (torch.arange(5) + 1) % num_classes
    found = {name: classifier_loss(name, logits, label, target) for name in ("ce", "margin", "dlr", "dlr-targeted")}
    for row in range(5):
        z, y, t = logits[row].tolist(), int(label[row]), int(target[row])
        falling = sorted(z, reverse=True)
        lead = max(z[i] for i in range(num_classes) if i != y) - z[y]
        expected = {
            "ce": math.log(sum(math.exp(value - z[y]) for value in z)),
            "margin": lead,
            "dlr": lead / (falling[0] - falling[2]),
            "dlr-targeted": (z[t] - z[y]) / (falling[0] - (falling[2] + falling[3]) / 2),
        }
        for name, value in expected.items():
            assert float(found[name][row]) == pytest.approx(value, rel=1e-9, abs=1e-9)


def test_targets_are_the_likeliest_wrong_classes():
    logits = torch.tensor([[3.0, 9.0, 5.0, 4.0], [3.0, 9.0, 5.0, 4.0]])
    assert likely_targets(logits, torch.tensor([1, 2]), 2).tolist() == [[2, 3], [1, 3]]
    assert likely_targets(logits, torch.tensor([1, 2]), 9).shape == (2, 3)


def test_checkpoints_are_those_of_the_paper_for_100_steps():
    # p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), in whole steps: in hundredths, to be exact.
    shares, period = [22], 22
    while shares[-1] + max(period - 3, 6) <= 100:
        period = max(period - 3, 6)
        shares.append(shares[-1] + period)
    assert list(checkpoints(100)) == shares
    assert all(checkpoints(steps) is not None and max(checkpoints(steps)) <= steps for steps in (1, 2, 7, 30))
    assert checkpoints(0) == {}


def climb(loss, start: float, steps: int, eps: float = 1.0) -> list[float]:
    """Every point that an ascent on one pixel visits, from an image of 0.5."""
    image, seen = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), []

    def look(x: Tensor, rows: Tensor) -> tuple[Tensor, None]:
        seen.append(float(x.detach()) - 0.5)
        return loss(x - 0.5).flatten(), None

    found = ascend(look, ThreatModel("linf", eps), image, torch.full_like(image, start), steps=steps)
    assert float(found.loss_B) == max(float(loss(torch.tensor(at, dtype=torch.float64))) for at in seen)
    return seen


def test_an_ascent_equals_the_algorithm_in_plain_numbers():
    """Algorithm 1 of the paper on one pixel with many hills, written again without tensors."""
    steps, eps = 50, 0.4

    def height(at: float) -> float:
        return math.sin(30 * at) + at

    def slope(at: float) -> float:
        return 30 * math.cos(30 * at) + 1

    def clip(at: float) -> float:
        return min(max(at, -eps), eps)

    at, previous, size = 0.05, 0.05, 2 * eps
    heights, best, best_height = [height(at)], at, height(at)
    path, ends = [at], list(checkpoints(steps))
    best_before, halved_before, last = best_height, True, 0
    gradient = slope(at)
    for step in range(1, steps + 1):
        onward = clip(at + size * math.copysign(1.0, gradient))
        weight = 1.0 if step == 1 else 0.75
        at, previous = clip(at + weight * (onward - at) + (1 - weight) * (at - previous)), at
        path.append(at)
        heights.append(height(at))
        gradient = slope(at)
        if heights[-1] > best_height:
            best, best_height = at, heights[-1]
        if step in ends:
            rises = sum(heights[i + 1] > heights[i] for i in range(last, step))
            halve = rises <= 0.75 * (step - last) or (not halved_before and best_before >= best_height)
            if halve:
                size, at, gradient = size / 2, best, slope(best)
            best_before, halved_before, last = best_height, halve, step
    seen = climb(lambda x: torch.sin(30 * x) + x, 0.05, steps, eps)
    assert seen == pytest.approx(path, abs=1e-9)
    assert len(set(seen)) > 10


def test_a_success_stops_a_sample_at_its_first_adversarial_image_and_leaves_the_batch():
    image = torch.full((3, 1, 1, 1), 0.5, dtype=torch.float64)
    rows_seen = []

    def look(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows_seen.append(rows.tolist())
        reach = torch.tensor([0.5, 0.9, 2.0], dtype=torch.float64)[rows]
        return x.flatten(), x.flatten().detach() >= reach

    start = torch.tensor([0.1, -0.1, -0.1], dtype=torch.float64).view(3, 1, 1, 1)
    found = ascend(look, ThreatModel("linf", 0.45), image, start, steps=20)
    assert found.success_B.tolist() == [True, True, False]
    assert float(found.image_BCHW[0]) == 0.6  # the start itself, though higher points lie ahead
    assert rows_seen[0] == [0, 1, 2] and rows_seen[1] == [1, 2] and rows_seen[-1] == [2]


@given(st.integers(0, 2**32), st.sampled_from(["linf", "l2"]))
@settings(max_examples=60)
def test_the_move_to_a_plane_arrives_inside_the_box_by_the_shortest_way(seed, norm):
    generator = torch.Generator().manual_seed(seed)
    at = (torch.rand(4, 1, 3, 3, dtype=torch.float64, generator=generator) * 1.3 - 0.15).clamp(0, 1)
    normal = torch.randn(4, 1, 3, 3, dtype=torch.float64, generator=generator)
    normal[0, 0, 0] = 0
    rise = torch.tensor([0.3, -0.5, 1e-7, 100.0], dtype=torch.float64)
    move = to_plane(norm, at, normal, rise)
    assert (at + move >= -1e-12).all() and (at + move <= 1 + 1e-12).all()
    for row in range(4):
        flat, slope = at[row].flatten(), normal[row].flatten() * (1 if rise[row] > 0 else -1)
        room = torch.where(slope > 0, 1 - flat, flat) * (slope != 0)
        most = float((slope.abs() * room).sum())
        gone = float((normal[row] * move[row]).sum())
        if abs(float(rise[row])) >= most:  # no way: the corner
            assert torch.allclose(move[row].flatten(), slope.sign() * room)
            continue
        assert gone == pytest.approx(float(rise[row]), abs=1e-9)
        # The same optimum by bisection on the length, from the condition of optimality.
        low, high = 0.0, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            length = torch.minimum(middle * (slope.abs() if norm == "l2" else (slope != 0).double()), room)
            low, high = (middle, high) if float((slope.abs() * length).sum()) < abs(float(rise[row])) else (low, middle)
        assert torch.allclose(move[row].flatten(), slope.sign() * length, atol=1e-7)


class Flickering:
    """Two classes whose logits carry noise as strong as the signal, from a stream of its own."""

    def __init__(self) -> None:
        self.generator, self.num_looks = torch.Generator().manual_seed(0), 0

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        self.num_looks += 1
        signal_B = 0.5 - image_BCHW.flatten(1).mean(1)
        noise_B = torch.randn(len(image_BCHW), generator=self.generator) * 0.3
        zero_B = torch.zeros_like(signal_B)
        return torch.stack([signal_B + noise_B, zero_B, zero_B - 9, zero_B - 9], 1)


def test_eot_averages_looks_so_that_noise_does_not_pass_for_success():
    image, label = torch.full((64, 1, 2, 2), 0.1), torch.zeros(64, dtype=torch.long)

    def share_broken(eot: int, steps: int = 8) -> tuple[float, int]:
        model = Flickering()
        found = APGD(APGDConfig(eps=0.1, steps=steps, eot=eot)).attack_classifier(model, image, label, range(64))
        wrong_before = 1 - (Flickering()(image).argmax(1) == 0).double().mean()
        return float(found.success_B.double().mean() - wrong_before), model.num_looks

    # The signal is 0.4 and cannot fall below 0.3: no image is adversarial, and one noisy look in ten says otherwise.
    once, _ = share_broken(1)
    often, num_looks = share_broken(20)
    assert once > 0.3 > 0.05 > often
    assert num_looks == 1 + 20 * (8 + 1)
    rand = AutoAttack(AutoAttackConfig(version="rand", eps=0.1, steps=2))
    assert rand.stages == ("apgd-ce", "apgd-dlr")
    assert [attack.config.eot for attack in rand._attacks] == [20, 20]


def test_autoattack_passes_survivors_on_and_says_which_stage_broke_a_sample():
    given_to = []

    class Recording(AutoAttack):
        def __init__(self, config: AutoAttackConfig) -> None:
            super().__init__(config)
            for index, attack in enumerate(self._attacks):
                inner = attack.attack_classifier
                attack.attack_classifier = lambda *a, index=index, inner=inner: (  # type: ignore[method-assign]
                    given_to.append((index, len(a[1]))), inner(*a),
                )[1]  # fmt: skip

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=generator)
    image = torch.rand(40, 3, 2, 2, generator=generator)

    def model(x: Tensor) -> Tensor:
        return ((x.flatten(1) - 0.5)[:, None] * weight).sum(-1)

    label = model(image).argmax(1)
    label[0] = (label[0] + 1) % 5
    found = Recording(AutoAttackConfig(eps=0.1, steps=3, queries=5)).attack_classifier(model, image, label, range(40))
    assert found.stage_B is not None and found.success_B is not None
    assert found.stage_B[0] == 0
    standing = 40
    for index, num in given_to:
        assert num == standing
        standing -= int((found.stage_B == index).sum())
    assert [index for index, _ in given_to] == [0, 1, 2, 3] and 0 < standing < 40
    assert torch.equal(found.success_B, found.stage_B < 4)


def test_cw_leaves_a_sample_alone_once_the_lead_is_the_confidence_and_calls_that_no_blindness():
    image, label = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])

    def model(x: Tensor) -> Tensor:
        return torch.cat([-x.flatten(1), x.flatten(1) - 0.9], 1)  # lead 2 x - 0.9, already 0.1

    def run(confidence: float) -> float:
        found = CW(CWConfig(eps=0.4, step_size=0.1, steps=4, random_start=False, confidence=confidence))
        result = found.attack_classifier(model, image, label, [0])
        assert not result.zero_grad_B.any() and result.success_B is not None and result.success_B.all()
        return float(result.image_BCHW)

    assert run(50.0) == pytest.approx(0.9)
    assert run(0.25) == pytest.approx(0.6)


def test_seeds_for_different_purposes_differ_and_belong_to_the_sample():
    assert derived_seeds([1, 2], "a") == derived_seeds([1], "a") + derived_seeds([2], "a")
    assert len({*derived_seeds([1, 2], "a"), *derived_seeds([1, 2], "b")}) == 4


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (lambda: APGDConfig(loss="dlt"), "'ce', 'dlr', 'dlr-targeted' or 'margin'"),
        (lambda: AutoAttackConfig(version="custom"), "the custom version needs stages, such as"),
        (lambda: AutoAttackConfig(attacks=("square",)), "version=standard has its own; set version=custom"),
        (lambda: AutoAttackConfig(version="custom", attacks=("apgd-x",)), "apgd-ce"),
    ],
)
def test_settings_that_make_no_attack_are_rejected(config, says):
    with pytest.raises(ValidationError, match=says):
        config()
