"""The last round of a sweep: a model that masks its gradients on purpose wins by a cheap attack and loses here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zsr.attacks.checks import Finding
from zsr.config import ATTACKS, RunConfig, load_config
from zsr.data.shards import ShardSet
from zsr.engine.quick_eval import ZeroShotHead, evaluate
from zsr.eval import Accuracy, EvalRow
from zsr.launch.final import BEST, HEADER, UNTOUCHED, Comparison
from zsr.launch.finalists import settle_finalists
from zsr.launch.guard import check_levels, find_flags, honest
from zsr.launch.plan import Plan
from zsr.launch.results import CLEAN, ROBUST, judge, markdown
from zsr.launch.store import Store
from zsr.launch.strong import STRONG, Finalists, strong_metrics
from zsr.launch.sweep import BOTH, Sweep, main
from zsr.launch.trials import TrialBook, TrialRecord
from zsr.models import RobustCLIP, TextBank, load_model

SOUND, MASKED = 0, 1


def masked(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the tower sees is rounded to 64 levels, which has no gradient; the one that is left over points backwards."""
    image_BCHW: Tensor = arguments[0]
    return (image_BCHW * 64).round() / 64 - 1e-5 * image_BCHW, *arguments[1:]


def embedded(number: int, config: RunConfig) -> RobustCLIP:
    """The embedded CLIP, which no attack spares, as it is or with a mask on."""
    model = load_model(config.model)
    model.eval()
    if number == MASKED:
        model.image.register_forward_pre_hook(masked)
    return model


def plan_of(config: RunConfig, finalists: Finalists) -> Plan:
    return Plan(
        name="s", tree={}, config=config, points=[], metrics=BOTH, num_trials=2, max_concurrent=None, steps=1, step_s=None,
        seed=0, finalists=finalists,
    )  # fmt: skip


def trial(number: int, robust: float, **metrics: float) -> TrialRecord:
    return TrialRecord(
        number, f"t{number}", {}, state="finished", metrics={CLEAN: 0.5, ROBUST: robust, **metrics}, flags=[]
    )


def test_a_sweep_does_not_choose_the_model_that_masks_its_gradients(tmp_path: Path) -> None:
    config = load_config("demo", ["train.num_threads=1"])
    finalists = Finalists(
        count=1, num_samples=64, attack={"name": "autoattack", "version": "custom", "attacks": ("apgd-ce",), "steps": 5}
    )
    shards = ShardSet(config.data.val)
    trials = []
    for number in (SOUND, MASKED):
        model = embedded(number, config)
        head = ZeroShotHead(model, TextBank(model), shards.classes, shards.templates[:1])
        result = evaluate(head, shards, ATTACKS.build(config.eval.attack), num_samples=64)
        assert result.robust_acc is not None
        assert result.zero_grad_frac == 0, "the mask leaves a gradient, so that the cheap checks see none missing"
        assert all(finding.level != "fail" for finding in result.findings)
        trials.append(trial(number, result.robust_acc))
    assert trials[MASKED].metrics[ROBUST] > trials[SOUND].metrics[ROBUST] + 0.03
    cheated = judge(trials, BOTH).best
    assert cheated is not None
    assert cheated.number == MASKED, "PGD alone would choose it"

    measured: list[int] = []

    def measure(plan: Plan, some: Sequence[TrialRecord]) -> Iterator[tuple[TrialRecord, dict[str, float]]]:
        for record in some:
            measured.append(record.number)
            yield record, strong_metrics(embedded(record.number, config), config, plan.finalists)

    book = TrialBook(Store(str(tmp_path)))
    settle_finalists(trials, plan_of(config, finalists), book, measure)  # type: ignore[arg-type]
    assert measured == [MASKED, SOUND], "the place of one that fails goes to the next"
    assert {"black-box", "loss-not-rising"} & set(trials[MASKED].flags)
    assert trials[SOUND].flags == []
    best = judge(trials, BOTH).best
    assert best is not None
    assert best.number == SOUND
    assert [record.flags for record in book.all()] == [trials[SOUND].flags, trials[MASKED].flags]


Answer = dict[str, float] | Exception


class Measured:
    """Answers by trial number, and who was asked."""

    def __init__(self, answers: dict[int, Answer]) -> None:
        self.answers, self.asked = answers, list[list[int]]()

    def __call__(self, plan: Plan, trials: Sequence[TrialRecord]) -> Iterator[tuple[TrialRecord, Answer]]:
        self.asked.append([record.number for record in trials])
        return ((record, self.answers[record.number]) for record in trials)


def settle(trials: list[TrialRecord], answers: dict[int, Answer], folder: Path, count: int = 2) -> Measured:
    measure = Measured(answers)
    plan = plan_of(load_config("demo"), Finalists(count=count))
    settle_finalists(trials, plan, TrialBook(Store(str(folder))), measure)
    return measure


def test_the_strong_attack_decides_between_the_finalists(tmp_path: Path) -> None:
    trials = [trial(0, 0.3), trial(1, 0.5), trial(2, 0.4)]
    measure = settle(trials, {1: {STRONG: 0.1}, 2: {STRONG: 0.2}}, tmp_path)
    assert measure.asked == [[1, 2]]
    results = judge(trials, BOTH)
    assert results.best is trials[2]
    assert "| strong |" in markdown(results, plan_of(load_config("demo"), Finalists()))
    assert settle(trials, {}, tmp_path).asked == [], "a sweep that goes on does not measure them again"


def test_flagged_finalists_are_replaced_until_enough_have_passed(tmp_path: Path) -> None:
    trials = [trial(0, 0.3), trial(1, 0.5), trial(2, 0.4), trial(3, 0.2), trial(4, 0.1)]
    failed = {STRONG: 0.4, "val/check/black-box": 3.0}
    measure = settle(trials, {1: failed, 2: {STRONG: 0.2}, 0: failed, 3: {STRONG: 0.1}}, tmp_path)
    assert measure.asked == [[1, 2], [0], [3]]
    assert judge(trials, BOTH).best is trials[2]
    assert [record.number for record in judge(trials, BOTH).front] == [2]


def test_where_every_trial_fails_there_is_no_best(tmp_path: Path) -> None:
    trials = [trial(0, 0.3), trial(1, 0.5)]
    failed = {STRONG: 0.4, "val/check/batch-size": 3.0}
    settle(trials, {0: failed, 1: failed}, tmp_path)
    assert judge(trials, BOTH).best is None


def test_a_trial_that_cannot_be_measured_says_so_and_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = [trial(0, 0.3), trial(1, 0.5)]
    measure = settle(trials, {1: OSError("no such checkpoint"), 0: {STRONG: 0.1}}, tmp_path, count=1)
    assert measure.asked == [[1]]
    assert "trial=1 finalist=unmeasured problem='no such checkpoint'" in capsys.readouterr().out
    assert judge(trials, BOTH).best is trials[1], "without any strong number the cheap one decides, as before"


def test_no_finalists_leave_the_choice_to_the_cheap_attack(tmp_path: Path) -> None:
    trials = [trial(0, 0.3), trial(1, 0.5)]
    assert settle(trials, {}, tmp_path, count=0).asked == []
    assert judge(trials, BOTH).best is trials[1]


def test_a_level_stays_the_graver_of_both_attacks(tmp_path: Path) -> None:
    trials = [trial(0, 0.3, **{"val/check/lost-temperature": 2.0, "val/check/chance-level": 0.0})]
    settle(trials, {0: {STRONG: 0.1, "val/check/lost-temperature": 0.0, "val/check/chance-level": 1.0}}, tmp_path)
    assert check_levels(trials[0].metrics) == {"chance-level": "note", "lost-temperature": "warn"}
    assert trials[0].flags == []


def test_any_failed_check_is_a_flag_and_hides_the_robust_number_from_the_search() -> None:
    metrics = {CLEAN: 0.5, ROBUST: 0.4, "val/check/not-finite": 3.0, "val/check/zero-gradients": 2.0}
    assert find_flags(metrics) == ["not-finite"]
    assert honest(metrics, BOTH) == {CLEAN: 0.5, ROBUST: 0.0}
    assert honest({**metrics, "val/check/not-finite": 2.0}, BOTH) == {CLEAN: 0.5, ROBUST: 0.4}


def test_the_strong_attack_has_the_sweeps_budget_and_its_mistakes_come_before_the_first_trial(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = load_config("demo", ["eval.attack.eps=3/255"])
    strong = Finalists().attack_config(config)
    assert (strong.norm, strong.eps, strong.attacks) == ("linf", pytest.approx(3 / 255), ("apgd-ce", "apgd-t"))
    wrong = Sweep(name="s", preset="demo", space=lambda t, b: {}, finalists=Finalists(attack={"name": "pgdd"}))
    assert main(wrong, ["--dry-run"]) == 2
    assert "pgd" in capsys.readouterr().err


def test_the_table_of_the_held_out_sets_says_what_is_not_to_be_believed() -> None:
    def row(*findings: Finding) -> EvalRow:
        half = Accuracy(0.5, 10)
        return EvalRow("set", 0.2, "a {}.", half, {"pgd": half}, {"pgd": 0.0}, findings=findings)

    masked = Finding(id="zero-gradients", level="fail", sentence="9 of 10")
    sound = Finding(id="pixel-range", level="ok", sentence="none of 10")
    rows = Comparison("pgd", {UNTOUCHED: [row(sound)], BEST: [row(masked, sound)]}).rows()
    assert [dict(zip(HEADER, cells, strict=True))["checks"] for cells in rows] == [
        "none raised",
        "fail: zero-gradients",
    ]


def test_evaluations_in_training_carry_findings(tiny_model_name: str, small_shards: Path, make_config: Any) -> None:
    config = make_config()
    model = load_model(config.model)
    shards = ShardSet(small_shards)
    head = ZeroShotHead(model, TextBank(model), shards.classes, shards.templates[:1])
    sound = evaluate(head, shards, ATTACKS.build(config.eval.attack), seed=1)
    assert {"epsilon-exceeded", "pixel-range", "zero-gradients"} <= {finding.id for finding in sound.findings}
    assert all(finding.level == "ok" for finding in sound.findings if finding.id in ("epsilon-exceeded", "pixel-range"))
    with torch.no_grad():
        model.logit_scale.fill_(1e7)  # cross-entropy is flat to the last bit wherever the model is right
    blind = evaluate(head, shards, ATTACKS.build(config.eval.attack), seed=1)
    assert "zero-gradients" in [finding.id for finding in blind.findings if finding.level == "fail"]
    assert blind.zero_grad_frac is not None
    assert blind.zero_grad_frac > 0.05
