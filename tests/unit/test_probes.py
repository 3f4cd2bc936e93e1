"""Each probe fires on a classifier or an attack made to deserve it, and is silent on a sound one.

Shapes: B images, C classes, P values of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zsr.attacks.apgd import APGD, APGDConfig
from zsr.attacks.autoattack import AutoAttack, AutoAttackConfig
from zsr.attacks.base import Attack, AttackResult, Logits
from zsr.attacks.checks import Facts, Finding
from zsr.attacks.pgd import PGD, PGDConfig
from zsr.eval.probes import MOST_IMAGES, Sample, probe, probe_blindly, to_probe

EPS = 12 / 255
NUM, SIDE, CLASSES = 16, 6, 5
PASSES_ALL, PASSES_LEFT = 27, 206  # what the module says a sample costs, and one that is left standing

torch.set_num_threads(1)


class Bench:
    """Images near the prototypes of five classes, and a classifier by cosine with scale 100."""

    def __init__(self, eps: float = EPS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.prototype_CP = torch.randn(CLASSES, 3 * SIDE * SIDE, generator=generator)
        self.label_B = torch.arange(NUM) % CLASSES
        noise_BP = torch.randn(NUM, 3 * SIDE * SIDE, generator=generator)
        flat_BP = 0.5 + 0.05 * (self.prototype_CP[self.label_B] + 1.5 * noise_BP)
        self.image_BCHW = flat_BP.clamp(0, 1).view(NUM, 3, SIDE, SIDE)
        self.seeds = list(range(NUM))
        self.facts = Facts(class_names=list("abcde"), eps=eps)
        assert bool((self.sound(self.image_BCHW).argmax(1) == self.label_B).all())

    def sound(self, image_BCHW: Tensor) -> Tensor:
        unit_BP = torch.nn.functional.normalize(image_BCHW.flatten(1) - 0.5, dim=1)
        return 100 * unit_BP @ torch.nn.functional.normalize(self.prototype_CP, dim=1).T

    def probe(self, classify: Logits, attack: Attack[Any], broken_B: Tensor | None = None) -> dict[str, Finding]:
        """Probe after the main attack; ``broken_B`` instead of its verdicts."""
        if broken_B is None:
            found = attack.attack_classifier(classify, self.image_BCHW, self.label_B, self.seeds)
            with torch.no_grad():
                broken_B = classify(found.image_BCHW).argmax(1) != self.label_B
        findings = probe(classify, attack, self.image_BCHW, self.label_B, self.seeds, broken_B, self.facts)
        return {finding.id: finding for finding in findings}

    def levels(self, *arguments: Any) -> dict[str, str]:
        return {name: finding.level for name, finding in self.probe(*arguments).items()}


def strong() -> APGD:
    return APGD(APGDConfig(eps=EPS, steps=40))


ALL_OK = dict.fromkeys(("randomised", "batch-size", "loss-not-rising", "weak-beats-strong", "black-box"), "ok")


@pytest.mark.parametrize(
    "attack",
    [
        APGD(APGDConfig(eps=EPS, steps=40, restarts=5)),  # one start stays below the nearest wrong class now and then
        PGD(PGDConfig(eps=EPS, step_size=EPS / 4, steps=40, restarts=5)),
        AutoAttack(AutoAttackConfig(eps=EPS, version="custom", attacks=("apgd-ce", "apgd-t"), steps=30)),
    ],
    ids=["apgd", "pgd", "autoattack"],
)
def test_a_sound_attack_on_a_sound_model_passes(attack: Attack[Any]) -> None:
    bench = Bench()
    broken_B = (
        bench.sound(attack.attack_classifier(bench.sound, bench.image_BCHW, bench.label_B, bench.seeds).image_BCHW)
        .argmax(1)
        .ne(bench.label_B)
    )
    assert 0 < int(broken_B.sum()) < NUM, "some fall and some stand, or this test says nothing"
    assert bench.levels(bench.sound, attack) == ALL_OK


def test_gradients_masked_by_rounding_are_found_by_a_search_without_gradients() -> None:
    bench = Bench(2 * EPS)

    def rounding(image_BCHW: Tensor) -> Tensor:
        return bench.sound((image_BCHW * 64).round() / 64)  # round has gradient zero

    levels = bench.levels(rounding, APGD(APGDConfig(eps=2 * EPS, steps=40)))
    assert levels["loss-not-rising"] == "fail"
    assert levels["black-box"] == "fail"


def test_a_search_through_a_defence_is_judged_by_the_defence_and_goes_past_its_boundary() -> None:
    bench = Bench(2 * EPS)

    def search(scores: Logits, judge: Logits) -> Finding:
        return probe_blindly(scores, judge, bench.image_BCHW, bench.label_B, bench.seeds, bench.facts)

    assert search(bench.sound, bench.sound).level == "fail", "nothing was attacked before, so much is left to break"

    def worried(image_BCHW: Tensor) -> Tensor:
        """Has all wrong from the start: a search that stops there would bring the images back as they are."""
        logits_BC = bench.sound(image_BCHW)
        return logits_BC - 200 * torch.nn.functional.one_hot(bench.label_B, CLASSES)

    assert search(worried, bench.sound).level == "fail"
    right_BC = 100.0 * torch.nn.functional.one_hot(bench.label_B, CLASSES)
    assert search(bench.sound, lambda x: right_BC).level == "ok", "what judges was not broken"
    nothing = probe_blindly(bench.sound, bench.sound, bench.image_BCHW[:0], bench.label_B[:0], [], bench.facts)
    assert (nothing.id, nothing.level) == ("black-box", "ok")


def test_an_attack_that_is_weaker_than_one_step() -> None:
    bench = Bench()
    feeble = PGD(PGDConfig(eps=EPS, step_size=EPS / 1000, steps=20, random_start=False))
    levels = bench.levels(bench.sound, feeble)
    assert levels["weak-beats-strong"] == "fail"
    assert levels["loss-not-rising"] == "ok", "the classifier is sound"


@pytest.mark.parametrize(("standing", "level"), [(1, "warn"), (2, "warn"), (3, "fail"), (NUM, "fail")])
def test_a_verdict_rests_on_three_images_of_those_left_standing(standing: int, level: str) -> None:
    bench = Bench(10 * EPS)  # under which nothing stands a weak attack
    findings = bench.probe(bench.sound, strong(), torch.arange(NUM) >= standing)
    for check in ("weak-beats-strong", "black-box"):
        assert findings[check].value == 1, findings[check].sentence
        assert (findings[check].level, f"of {standing} images" in findings[check].sentence) == (level, True)


def test_a_model_that_answers_differently() -> None:
    bench = Bench()
    generator = torch.Generator().manual_seed(0)

    def noisy(size: float) -> Callable[[Tensor], Tensor]:
        def classify(image_BCHW: Tensor) -> Tensor:
            logits_BC = bench.sound(image_BCHW)
            return logits_BC + size * torch.randn(logits_BC.shape, generator=generator)

        return classify

    nothing_B = torch.zeros(NUM, dtype=torch.bool)
    assert bench.levels(noisy(100.0), strong(), nothing_B)["randomised"] == "fail"
    assert bench.levels(noisy(0.5), strong(), nothing_B)["randomised"] == "warn", "no answer turns"
    eot = APGD(APGDConfig(eps=EPS, steps=10, eot=2))
    assert bench.levels(noisy(100.0), eot, nothing_B)["randomised"] == "warn", "the attack averages"


def test_a_model_that_looks_at_its_batch() -> None:
    bench = Bench()

    def batch_norm(image_BCHW: Tensor) -> Tensor:
        return bench.sound(image_BCHW - image_BCHW.mean(0) + 0.5)

    assert bench.levels(batch_norm, strong())["batch-size"] == "fail"


def test_fp16_underflow_shows_where_the_loss_is_a_mean_over_many() -> None:
    bench = Bench()

    def half(image_BCHW: Tensor) -> Tensor:
        return bench.sound(image_BCHW.half().float()).half().float() / 4  # leads of 6 to 17, with gradients in fp16

    finding = bench.probe(half, strong())["batch-size"]
    assert finding.level == "fail"
    assert "0 of 8 gradients differ" in finding.sentence, "it is not the batch that matters, but the division"

    def bfloat(image_BCHW: Tensor) -> Tensor:
        return bench.sound(image_BCHW.bfloat16().float()).bfloat16().float() / 4

    assert bench.levels(bfloat, strong())["batch-size"] == "ok"


class BatchMean(PGD):
    """An attack whose verdicts depend on its batch: it gives up in large ones."""

    def attack_classifier(self, logits: Logits, image_BCHW: Tensor, label_B: Tensor, seeds: Any) -> AttackResult:
        if len(image_BCHW) > 4:
            return AttackResult(image_BCHW, torch.zeros(len(image_BCHW), dtype=torch.bool))
        return super().attack_classifier(logits, image_BCHW, label_B, seeds)


def test_an_attack_that_gives_up_in_large_batches() -> None:
    bench = Bench()
    assert bench.levels(bench.sound, BatchMean(PGDConfig(eps=EPS, step_size=EPS / 4, steps=10)))["batch-size"] == "fail"


def test_probes_cost_what_they_say_and_look_at_few_images() -> None:
    bench, passes = Bench(), [0]

    def counted(image_BCHW: Tensor) -> Tensor:
        passes[0] += len(image_BCHW)
        with_grad = torch.is_grad_enabled() and image_BCHW.requires_grad
        passes[0] += len(image_BCHW) * with_grad  # the backward pass is one more
        return bench.sound(image_BCHW)

    bench.image_BCHW, bench.label_B = bench.image_BCHW.repeat(4, 1, 1, 1), bench.label_B.repeat(4)
    bench.seeds = list(range(4 * NUM))
    assert 4 * NUM > MOST_IMAGES
    pgd = PGD(PGDConfig(eps=EPS, step_size=EPS / 4, steps=40))
    bench.probe(counted, pgd, torch.ones(4 * NUM, dtype=torch.bool))
    few = 8 * (2 + 2 * (2 * 10 + 1))  # a gradient alone, and PGD-10 twice
    broken = passes[0]
    assert broken == MOST_IMAGES * PASSES_ALL + few
    passes[0] = 0
    bench.probe(counted, pgd, torch.zeros(4 * NUM, dtype=torch.bool))
    assert 0 < passes[0] - broken <= MOST_IMAGES * PASSES_LEFT


def test_without_images_or_epsilon_there_is_less_to_say() -> None:
    bench = Bench()
    nothing = torch.zeros(0, dtype=torch.bool)
    assert probe(bench.sound, strong(), bench.image_BCHW[:0], bench.label_B[:0], [], nothing, bench.facts) == []
    bench.facts = Facts(class_names=list("abcde"), eps=0.0)
    assert bench.levels(bench.sound, strong(), torch.zeros(NUM, dtype=torch.bool)) == {
        "randomised": "ok", "batch-size": "ok"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("standing", "broken", "taken"),
    [((40, 40), (20, 20), (24, 8)), ((3, 2), (50, 50), (5, 27)), ((2, 1), (1, 0), (3, 1)), ((40, 40), (0, 0), (32, 0))],
)
def test_mostly_what_was_left_standing_is_probed(standing: Any, broken: Any, taken: tuple[int, int]) -> None:
    sample, number = Sample(), 0
    for num_standing, num_broken in zip(standing, broken, strict=True):  # batch by batch, mixed
        broken_B = (torch.arange(num_standing + num_broken) >= num_standing).roll(1)
        value_B = torch.arange(number, number + len(broken_B))
        number += len(broken_B)
        image_BCHW = (2 * value_B + broken_B).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        sample.see(image_BCHW, value_B, [f"k{value}" for value in value_B.tolist()], broken_B)
    found = sample.take()
    assert found is not None
    image_BCHW, label_B, keys, broken_B = found
    assert (int((~broken_B).sum()), int(broken_B.sum())) == taken
    assert torch.equal(image_BCHW[:, 0, 0, 0], (2 * label_B + broken_B).float()), "rows stay together"
    assert keys == [f"k{label}" for label in label_B.tolist()]
    assert len(set(keys)) == len(keys)
    assert Sample().take() is None


def test_one_draw_for_every_measurement_and_survivors_first() -> None:
    keys = [f"class{number // 100}/{number:03d}" for number in range(300)]
    broken = [number not in (7, 150, 299) for number in range(300)]
    rows = to_probe(keys, broken)
    assert set(rows[:3]) == {7, 150, 299} and len(set(rows)) == len(rows) == MOST_IMAGES
    assert {row // 100 for row in rows[3:]} == {0, 1, 2}, "not the first by key, which are of one class"
    sample = Sample()
    for start in range(0, 300, 50):  # as a sweep's finalist sees them
        part = slice(start, start + 50)
        sample.see(torch.zeros(50, 3, 2, 2), torch.zeros(50), keys[part], torch.tensor(broken[part]))
    found = sample.take()
    assert found is not None and found[2] == [keys[row] for row in rows]
