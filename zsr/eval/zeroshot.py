"""One model on several sets under several attacks, without files: what a sweep's last word and a comparison ask for.

``zsr eval`` writes cards instead (zsr/eval/plan.py); both run the same measurement (zsr/eval/runner.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zsr.attacks.base import Attack
from zsr.attacks.checks import Finding, gravest_first
from zsr.data.shards import ShardSet
from zsr.engine.quick_eval import ZeroShotHead
from zsr.eval.card import wilson_interval
from zsr.eval.defended import DefendedCLIP
from zsr.eval.images import Images
from zsr.eval.ledger import Ledger
from zsr.eval.runner import Clean, Verdicts, classify_clean, run_attack, still_right, survivors
from zsr.eval.scene import Scene
from zsr.eval.target import BARE, plain_target
from zsr.models import RobustCLIP, TextBank


@dataclass(frozen=True)
class Accuracy:
    """A share of ``num_samples`` in [0, 1] with its 95 % Wilson interval."""

    value: float
    num_samples: int

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.value, self.num_samples)


@dataclass(frozen=True)
class EvalRow:
    """One set, classified by the bare model or by the defended one.

    Attributes:
        chance: accuracy of guessing, 1 / classes.
        template: the prompt that made the class embeddings.
        robust: accuracy under each attack, by the attack's label.
        zero_grad_frac: share of attacked samples without an input gradient, by the attack's label; 0 unless something is
            wrong.
        defense: name of the test-time defence in front of the model, which the attack does not know; None without one.
        survivors: for attacks in stages, accuracy after each stage, by the attack's label.
        findings: of the checks that need no passes of their own, the gravest first; what is found under one of several
            attacks alone says the attack's label first.
    """

    data: str
    chance: float
    template: str
    clean: Accuracy
    robust: Mapping[str, Accuracy]
    zero_grad_frac: Mapping[str, float]
    defense: str | None = None
    survivors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def doubts(self) -> tuple[Finding, ...]:
        """Findings that a reader of the numbers must know: ``warn`` and ``fail``."""
        return tuple(finding for finding in self.findings if finding.level in ("warn", "fail"))


def evaluate_sets(
    model: RobustCLIP,
    sets: Sequence[ShardSet],
    attacks: Mapping[str, Attack[Any]],
    *,
    template: str | None = None,
    num_samples: int = 0,
    batch_size: int = 128,
    seed: int = 0,
    defended: DefendedCLIP | None = None,
) -> list[EvalRow]:
    """Measure clean and robust zero-shot accuracy on each set.

    Args:
        attacks: by label, such as ``{"2/255": PGD(...)}``; may be empty.
        template: prompt for all sets; each set's own first one if None.
        num_samples: of each set, the head of its fixed subset order; 0 means all.
        defended: ``model`` behind a defence. Each set then gives two rows, without and with it, from one run of the attacks:
            they see the bare model and attack what is right without the defence or with it. A sample is robust for a judge
            that is right on the clean and on the attacked image. (Published tables ask for the attacked image alone; they
            can only be higher.)

    Raises:
        ValueError, OSError: a set cannot be read.
    """
    bank = TextBank(model)
    rows = []
    for shards in sets:
        images = Images(shards, model.image_size, num_samples)
        prompt = shards.templates[0] if template is None else template
        head = ZeroShotHead(model, bank, shards.classes, [prompt])
        scene = Scene(images, plain_target(head, defended), shards.classes, device=head.text_CD.device, seed=seed)
        clean = classify_clean(scene, {name: Ledger(None, "") for name in scene.target.judges}, batch_size=batch_size)
        found = {
            label: (attack, run_attack(scene, attack, clean, Ledger(None, ""), batch_size=batch_size))
            for label, attack in attacks.items()
        }
        for judge in scene.target.judges:
            name = None if judge == BARE or defended is None else defended.defense.config.name
            rows.append(_row(scene, prompt, judge, name, clean, found))
    return rows


def _row(
    scene: Scene,
    prompt: str,
    judge: str,
    defense: str | None,
    clean: Clean,
    found: Mapping[str, tuple[Attack[Any], Verdicts]],
) -> EvalRow:
    label, num = scene.images.label, len(scene.images)
    right = clean.pred[judge] == label
    robust = {name: still_right(clean, verdicts, label, judge) for name, (_, verdicts) in found.items()}
    return EvalRow(
        data=scene.images.shards.address,
        chance=1 / len(scene.class_names),
        template=prompt,
        clean=Accuracy(int(right.sum()) / num, num),
        robust={name: Accuracy(int(still.sum()) / num, num) for name, still in robust.items()},
        zero_grad_frac={
            name: int((right & verdicts.zero_grad).sum()) / max(int(right.sum()), 1)
            for name, (_, verdicts) in found.items()
        },
        defense=defense,
        survivors={
            name: {stage: share.value for stage, share in survivors(attack, clean, verdicts, label, judge).items()}
            for name, (attack, verdicts) in found.items()
            if attack.stages and judge == BARE
        },
        findings=tuple(_findings(scene, judge, clean, found)),
    )


def _findings(
    scene: Scene, judge: str, clean: Clean, found: Mapping[str, tuple[Attack[Any], Verdicts]]
) -> list[Finding]:
    lines = clean.lines[judge]
    if not found:
        return scene.findings(None, lines, judge)
    each = {
        label: scene.findings(attack, [*lines, *verdicts.lines], judge) for label, (attack, verdicts) in found.items()
    }
    shared = [finding for finding in next(iter(each.values())) if all(finding in others for others in each.values())]
    own = [
        finding.model_copy(update={"sentence": f"{label}: {finding.sentence}"})
        for label, findings in each.items()
        for finding in findings
        if finding not in shared
    ]
    return gravest_first([*shared, *own])
