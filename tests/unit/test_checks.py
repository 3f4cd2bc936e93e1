"""Each cheap check fires on a measurement made to deserve it, and is silent on a healthy one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zsr.attacks.apgd import APGD, APGDConfig
from zsr.attacks.autoattack import AutoAttack, AutoAttackConfig
from zsr.attacks.checks import (
    CHECKS,
    LEVELS,
    MIN_RANGE,
    ZERO_GRAD_LIMIT,
    Facts,
    Finding,
    judge,
    losses_of,
    metrics_of,
    tolerance,
)
from zsr.attacks.pgd import PGD, PGDConfig

NAMES = ("ash", "beech", "cedar", "deal", "elm")
EPS = 4 / 255
NUM = 40

CHEAP = {
    "zero-gradients", "lost-temperature", "probabilities", "epsilon-exceeded", "pixel-range", "not-finite", "label-range",
    "duplicate-class-names", "chance-level", "few-classes",
}  # fmt: skip


class Measurement:
    """What a healthy classifier of scale 100 shows; a test spoils one thing."""

    def __init__(self, num_classes: int = len(NAMES)) -> None:
        torch.manual_seed(0)
        self.facts: dict[str, Any] = {"class_names": NAMES[:num_classes], "eps": EPS}
        self.label_B = torch.arange(NUM) % num_classes
        spread_BC = torch.rand(NUM, num_classes) * 6
        self.clean_BC = 20 + spread_BC.scatter(1, self.label_B[:, None], 9.0)
        self.attacked_BC = self.clean_BC.clone()
        wrong_B = torch.arange(NUM) < NUM // 2
        self.attacked_BC[wrong_B] = self.clean_BC[wrong_B].roll(1, dims=1)
        self.image_BCHW = torch.rand(NUM, 3, 8, 8)
        self.attacked_BCHW = (self.image_BCHW + EPS * torch.randn(NUM, 3, 8, 8).sign()).clamp(0, 1)
        self.zero_grad_B = torch.zeros(NUM, dtype=torch.bool)

    def see(self, parts: int = 1) -> Facts:
        facts = Facts(**self.facts)
        for rows in torch.arange(NUM).chunk(parts):
            facts.see_clean(self.clean_BC[rows], self.label_B[rows])
            facts.see_attacked(
                self.image_BCHW[rows], self.attacked_BCHW[rows], self.attacked_BC[rows], self.zero_grad_B[rows],
                self.label_B[rows].clamp(0, len(self.facts["class_names"]) - 1),
            )  # fmt: skip
        return facts

    def findings(self) -> dict[str, Finding]:
        return {finding.id: finding for finding in judge(self.see())}

    def levels(self) -> dict[str, str]:
        """Of the checks that found something."""
        return {name: finding.level for name, finding in self.findings().items() if finding.level != "ok"}


def test_a_healthy_measurement_passes_every_cheap_check() -> None:
    findings = Measurement().findings()
    assert set(findings) == CHEAP
    assert set(CHECKS) > CHEAP
    assert {finding.level for finding in findings.values()} == {"ok"}


def test_the_sums_do_not_depend_on_how_the_samples_came() -> None:
    whole, parts, joined = Measurement().see(), Measurement().see(7), Facts(**Measurement().facts)
    for share in (Measurement().see().sums, Measurement().see().sums.tolist()):  # as from a rank, as from a file
        joined.add(share)
    assert torch.equal(whole.sums, parts.sums)
    assert torch.equal(joined.sums, 2 * whole.sums)
    assert judge(whole) == judge(parts)


@pytest.mark.parametrize(("blind", "level"), [(1, "warn"), (int(NUM * ZERO_GRAD_LIMIT), "warn"), (10, "fail")])
def test_zero_gradients(blind: int, level: str) -> None:
    seen = Measurement()
    seen.zero_grad_B[:blind] = True
    assert seen.levels() == {"zero-gradients": level}
    assert seen.findings()["zero-gradients"].value == pytest.approx(blind / NUM)


def test_lost_temperature_is_graver_for_bare_cosines() -> None:
    seen = Measurement()
    low = seen.clean_BC.amin(1, keepdim=True)
    span = seen.clean_BC.amax(1, keepdim=True) - low
    narrow = (seen.clean_BC - low) / span * (MIN_RANGE - 0.01)
    seen.clean_BC = narrow + 20
    assert seen.levels() == {"lost-temperature": "warn"}
    seen.clean_BC = narrow / 2 - 0.5
    assert seen.levels() == {"lost-temperature": "fail"}
    seen.clean_BC[: NUM // 2 + 1] *= 10
    assert seen.levels() == {}, "the median image is what counts"


def test_probabilities_are_told_from_logits() -> None:
    seen = Measurement()
    seen.clean_BC = seen.clean_BC.softmax(1)
    assert seen.levels() == {"probabilities": "fail"}
    seen.clean_BC = seen.clean_BC.bfloat16()
    assert seen.levels() == {"probabilities": "fail"}
    seen.facts["expects_logits"] = False
    assert "probabilities" not in seen.findings()
    assert seen.levels() == {}


def further(seen: Measurement, by: float) -> Tensor:
    """Attacked images, one of them ``by`` further than epsilon in its norm, inside the pixel box."""
    seen.image_BCHW = torch.full_like(seen.image_BCHW, 0.5)
    delta = torch.zeros_like(seen.image_BCHW)
    if seen.facts.get("norm") == "l2":
        delta[3] = torch.randn(3, 8, 8).sign() / (3 * 8 * 8) ** 0.5 * (seen.facts["eps"] + by)
    else:
        delta[3, 0, 0, 0] = seen.facts["eps"] + by
    return seen.image_BCHW + delta


@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", 0.5)])
def test_epsilon_is_measured_again_from_the_pixels(norm: Any, eps: float) -> None:
    slack = tolerance(norm, eps, 3 * 8 * 8)
    assert slack < eps / 1000
    for by, level in ((0.0, None), (-0.5 * eps, None), (2 * slack, "fail")):
        seen = Measurement()
        seen.facts |= {"norm": norm, "eps": eps}
        seen.attacked_BCHW = further(seen, by)
        assert seen.levels().get("epsilon-exceeded") == level
    seen.facts["eps"] = None
    assert "epsilon-exceeded" not in seen.findings()


@pytest.mark.parametrize("value", [-1e-4, 1.0001])
def test_pixels_outside_the_box(value: float) -> None:
    seen = Measurement()
    seen.image_BCHW[5, 1, 2, 3] = seen.attacked_BCHW[5, 1, 2, 3] = value
    assert seen.levels() == {"pixel-range": "fail"}
    seen.attacked_BCHW[5, 1, 2, 3] = min(max(value, 0.0), 1.0)
    assert seen.levels() == {}


@pytest.mark.parametrize("where", ["clean_BC", "attacked_BC", "attacked_BCHW"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(where: str, value: float) -> None:
    seen = Measurement()
    getattr(seen, where)[2].view(-1)[0] = value
    assert seen.levels()["not-finite"] == "fail"


@pytest.mark.parametrize("label", [-1, len(NAMES)])
def test_labels_outside_the_classes(label: int) -> None:
    seen = Measurement()
    seen.label_B[7] = label
    assert seen.levels() == {"label-range": "fail"}


def test_duplicate_names_are_noted_and_many_are_doubtful() -> None:
    seen = Measurement()
    seen.facts["class_names"] = ("red maple", "Red_maple", "cedar", "deal", "elm")
    assert seen.levels() == {"duplicate-class-names": "warn"}
    assert "red maple" in seen.findings()["duplicate-class-names"].sentence
    many = Facts(class_names=[*map(str, range(99)), "98"])
    assert {finding.id: finding.level for finding in judge(many)}["duplicate-class-names"] == "note"


def test_a_constant_answer_is_no_robustness() -> None:
    seen = Measurement(2)
    seen.attacked_BC = torch.tensor([[30.0, 10.0]]).expand(NUM, 2)
    assert seen.levels() == {"chance-level": "fail", "few-classes": "note"}
    assert seen.findings()["chance-level"].value == 0.5
    seen.attacked_BC = seen.attacked_BC.clone()
    seen.attacked_BC[:3] = seen.attacked_BC[:3].flip(1)  # three answers differ: two right ones less, one more
    assert seen.levels()["chance-level"] == "warn"


@pytest.mark.parametrize(("num", "level"), [(1, "ok"), (19, "ok"), (20, "fail")])
def test_a_few_images_say_nothing_of_a_constant_answer(num: int, level: str) -> None:
    facts, logits_BC = Facts(NAMES[:2]), torch.tensor([[30.0, 10.0]]).expand(num, 2)
    image_BCHW, label_B = torch.rand(num, 3, 4, 4), torch.zeros(num, dtype=torch.long)
    facts.see_attacked(image_BCHW, image_BCHW, logits_BC, torch.zeros(num, dtype=torch.bool), label_B)
    assert {finding.id: finding.level for finding in judge(facts)}["chance-level"] == level


def test_no_robustness_at_all_is_a_number_to_be_believed() -> None:
    seen = Measurement()
    seen.attacked_BC = seen.clean_BC.roll(1, dims=1)
    assert seen.findings()["chance-level"].value == 0
    assert seen.levels() == {}


def test_a_set_known_for_chance_is_noted() -> None:
    seen = Measurement()
    seen.facts["chance_level"] = True
    assert seen.levels() == {"chance-level": "note"}
    unlabelled = Facts(class_names=NAMES, chance_level=True)
    assert {finding.id: finding.level for finding in judge(unlabelled)}["chance-level"] == "note"


@pytest.mark.parametrize(("num_classes", "aside"), [(2, "apgd-dlr and apgd-t"), (3, "apgd-t")])
def test_few_classes(num_classes: int, aside: str) -> None:
    finding = Measurement(num_classes).findings()["few-classes"]
    assert finding.level == "note"
    assert f" {aside} " in finding.sentence


@pytest.mark.filterwarnings("ignore:the dlr")
@pytest.mark.parametrize(
    ("attack", "levels"),  # with 2, 3 and 4 classes
    [
        (APGD(APGDConfig(eps=EPS, loss="dlr")), ("fail", "ok", "ok")),
        (APGD(APGDConfig(eps=EPS, loss="dlr-targeted")), ("fail", "fail", "ok")),
        (AutoAttack(AutoAttackConfig(eps=EPS)), ("warn", "warn", "ok")),
        (
            AutoAttack(AutoAttackConfig(eps=EPS, version="custom", attacks=("apgd-dlr", "apgd-t"))),
            ("fail", "warn", "ok"),
        ),
        (PGD(PGDConfig(eps=EPS, step_size=EPS)), ("ok", "ok", "ok")),
    ],
)
def test_an_attack_of_which_nothing_ran_is_no_robustness(attack: Any, levels: tuple[str, ...]) -> None:
    for num_classes, level in zip((2, 3, 4), levels, strict=True):
        seen = Measurement(num_classes)
        seen.facts["losses"] = losses_of(attack)
        assert seen.findings()["few-classes"].level == level
        if level == "fail":  # and so it is: every image comes back as it was
            image_BCHW, label_B = torch.rand(3, 3, 4, 4), torch.zeros(3, dtype=torch.long)
            found = attack.attack_classifier(_Edge(num_classes), image_BCHW, label_B, [1, 2, 3])
            assert torch.equal(found.image_BCHW, image_BCHW) and not found.success_B.any()


class _Edge:
    """Class 0 while the first pixel stays below 2; its gradient says where to go."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        first_B = image_BCHW[:, 0, 0, 0]
        others_BC = (first_B - 2)[:, None].expand(-1, self.num_classes - 1)
        return torch.cat([torch.zeros_like(first_B)[:, None], others_BC], dim=1)


def test_findings_come_gravest_first_and_as_numbers_for_the_tracker() -> None:
    seen = Measurement()
    seen.zero_grad_B[0] = True
    seen.label_B[7] = -1
    findings = judge(seen.see())
    assert [finding.id for finding in findings[:2]] == ["label-range", "zero-gradients"]
    numbers = metrics_of(findings)
    assert numbers["val/check/label-range"] == LEVELS.index("fail") == 3
    assert numbers["val/check/zero-gradients"] == LEVELS.index("warn") == 2
    assert numbers["val/check/not-finite"] == 0
