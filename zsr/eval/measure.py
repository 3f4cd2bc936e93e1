"""From a job to its cards: the ledger is opened, what is missing is done, the checks are asked, the cards are written."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zsr.attacks.base import Attack
from zsr.attacks.checks import Finding, gravest_first
from zsr.attacks.noise import sample_seeds
from zsr.eval.card import Cost, ResultCard, write_card
from zsr.eval.examples import MOST, Examples
from zsr.eval.ledger import Ledger, Line
from zsr.eval.plan import Blank, Job
from zsr.eval.probes import drawn, probe, probe_blindly, to_probe
from zsr.eval.runner import Clean, Crew, LocalCrew, Tell, Verdicts, classify_clean, run_attack, still_right, survivors
from zsr.eval.scene import Scene, count_passes
from zsr.eval.shares import share_of
from zsr.models import in_precision

SHARE_AGAIN, MOST_AGAIN = 0.05, 16
"""Of what a bf16 attack left standing, attacked again in float32: this share, and at most so many."""


@dataclass(frozen=True)
class Means:
    """What a measurement is done with; none of it changes a verdict.

    Attributes:
        probes: whether the expensive checks run.
        device: in words, for the card.
        environment: versions, for the card.
    """

    batch_size: int = 128
    crew: Crew = field(default_factory=LocalCrew)
    workers: int = 1
    probes: bool = True
    device: str = "cpu"
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Probed:
    """What the expensive checks found of a judge, and what they took."""

    findings: list[Finding]
    seconds: float = 0.0
    passes: int = 0

    def and_also(self, more: Probed) -> Probed:
        return Probed([*self.findings, *more.findings], self.seconds + more.seconds, self.passes + more.passes)


def measure_clean(scene: Scene, folder: Path, cards: Mapping[str, Blank], means: Means, tell: Tell | None) -> Clean:
    """The clean predictions of each judge, from their ledgers as far as they are there.

    Args:
        cards: of the judges without an attack, by name; their ids own the ledgers.

    Raises:
        ValueError, OSError: the set cannot be read.
    """
    # Evaluations that run at the same time share these; whoever comes second waits and finds them done.
    with ExitStack() as stack:
        ledgers = {
            name: stack.enter_context(Ledger(_ledger_path(folder, blank), blank.id, _about(blank), wait=True))
            for name, blank in cards.items()
        }
        return classify_clean(scene, ledgers, batch_size=means.batch_size, crew=means.crew, tell=tell)


def measure(scene: Scene, job: Job, clean: Clean, means: Means, tell: Tell | None = None) -> list[ResultCard]:
    """Do a job, or what is left of it, and write its cards.

    Args:
        clean: of the job's judges.

    Raises:
        ValueError, OSError: the set cannot be read, or the ledger is in use.
    """
    images, attack = scene.images, job.attack
    if attack is None:
        return [_finish(scene, job, name, clean, None, Probed([]), means) for name in job.cards]
    owner = job.owner
    examples = Examples(job.folder / f"{owner.id}.examples.npz")
    with Ledger(_ledger_path(job.folder, owner), owner.id, _about(owner)) as ledger:
        verdicts = run_attack(
            scene, attack, clean, ledger, batch_size=means.batch_size, crew=means.crew, tell=tell, keep=examples.add,
            num_keep=MOST,
        )  # fmt: skip
    probed = _probed(scene, job, clean, verdicts, means.probes)
    if owner.protocol.precision == "bf16":
        first = next(iter(job.cards))
        probed[first] = probed[first].and_also(_again_in_fp32(scene, attack, first, clean, verdicts))
    cards = [_finish(scene, job, name, clean, verdicts, probed[name], means) for name in job.cards]
    for name, blank in job.cards.items():
        path = job.folder / f"{blank.id}.examples.npz"
        examples.write(path, images, clean.pred[name], verdicts.pred[name], scene.class_names)
    return cards


def _finish(
    scene: Scene,
    job: Job,
    name: str,
    clean: Clean,
    verdicts: Verdicts | None,
    probed: Probed,
    means: Means,
) -> ResultCard:
    blank, label, attack = job.cards[name], scene.images.label, job.attack
    by_class = blank.protocol.metric == "mean_per_class"
    lines = [*clean.lines[name], *(() if verdicts is None else verdicts.lines)]
    seconds, total = sum(line.seconds for line in lines), len(scene.images)
    findings = [*scene.findings(attack, lines, name), *probed.findings]
    card = ResultCard(
        id=blank.id,
        column=blank.column,
        protocol=blank.protocol,
        dataset=blank.dataset,
        model=blank.model,
        defense=blank.defense,
        attack=blank.attack,
        seed=blank.seed,
        clean=share_of(clean.pred[name] == label, label, by_class),
        robust=None if verdicts is None else share_of(still_right(clean, verdicts, label, name), label, by_class),
        survivors={}
        if verdicts is None or attack is None
        else survivors(attack, clean, verdicts, label, name, by_class),
        checks=gravest_first(findings),
        cost=Cost(
            seconds=round(seconds, 3),
            images_per_s=round(total / max(seconds, 1e-9), 3),
            encoder_passes=sum(line.passes for line in lines),
            device=means.device,
            workers=means.workers,
            clean_seconds=round(sum(line.seconds for line in clean.lines[name]), 3),
            clean_passes=sum(line.passes for line in clean.lines[name]),
            shared_by=1 if attack is None else len(job.cards),
            probe_seconds=round(probed.seconds, 3),
            probe_passes=probed.passes,
        ),
        environment=dict(means.environment),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    write_card(card, job.path(name))
    return card


def _probed(scene: Scene, job: Job, clean: Clean, verdicts: Verdicts, wanted: bool) -> dict[str, Probed]:
    """The expensive checks of each judge, by its name, and a note where they were left out."""
    found: dict[str, Probed] = {}
    for name, blank in job.cards.items():
        if not wanted:
            found[name] = Probed([_left_out("nobody asked for the probes")])
            continue
        if blank.attacked_elsewhere:
            found[name] = Probed([_left_out("no probe looked at this classifier, since the attack saw another")])
            continue
        began = time.perf_counter()
        with count_passes(scene.target.towers) as passes:
            findings = _probe(scene, job, name, clean, verdicts)
        if scene.target.surrogate is not None:
            why = "the probes that need a gradient were left out: the attack went through the defence"
            findings = [*findings, _left_out(why)]
        found[name] = Probed(findings, time.perf_counter() - began, passes[0])
    return found


def _left_out(why: str) -> Finding:
    return Finding(id="not-probed", level="note", sentence=why)


def _probe(scene: Scene, job: Job, judge: str, clean: Clean, verdicts: Verdicts) -> list[Finding]:
    """The expensive checks, on a few samples that the judge has right without the attack."""
    target, images, attack = scene.target, scene.images, job.attack
    right = np.flatnonzero(clean.pred[judge] == images.label)
    standing = still_right(clean, verdicts, images.label, judge)
    keys = [images.keys[sample] for sample in images.ids[right].tolist()]
    rows = right[to_probe(keys, (~standing[right]).tolist())]
    if attack is None or not len(rows):
        return []
    batch = images.batch(images.ids[rows].tolist())
    image_BCHW, label_B = batch.image.to(scene.device).float() / 255, batch.label.to(scene.device)
    seeds = sample_seeds(batch.key, "eval", scene.seed)
    standing_B = torch.from_numpy(standing[rows]).to(scene.device)
    facts = scene.facts(attack, verdicts.lines, judge)
    served = target.judges[judge]
    with scene.still():  # the classifier that was attacked, random columns and all
        if served.defended is None:
            return probe(served, attack, image_BCHW, label_B, seeds, ~standing_B, facts)
        left = standing_B.nonzero().flatten().tolist()
        return [
            probe_blindly(
                served.defended.scores(served.head, seed=scene.seed),
                lambda x: served(x, [batch.key[row] for row in left]),
                image_BCHW[left], label_B[left], [seeds[row] for row in left], facts,
            )
        ]  # fmt: skip


def _again_in_fp32(scene: Scene, attack: Attack[Any], judge: str, clean: Clean, verdicts: Verdicts) -> Probed:
    """The whole attack in float32, on some of what a bf16 run left standing."""
    began, images = time.perf_counter(), scene.images
    standing = images.ids[still_right(clean, verdicts, images.label, judge)].tolist()
    order = drawn([images.keys[sample] for sample in standing])
    ids = [standing[row] for row in order[: min(MOST_AGAIN, math.ceil(SHARE_AGAIN * len(standing)))]]
    fell, passes = 0, [0]
    if ids:
        batch = images.batch(ids)
        image_BCHW, label_B = batch.image.to(scene.device).float() / 255, batch.label.to(scene.device)
        seeds, towers = sample_seeds(batch.key, "eval", scene.seed), scene.target.towers
        with scene.still(), in_precision("fp32", towers), count_passes(towers) as passes:
            found, _ = scene.attack(attack, image_BCHW, label_B, seeds)
            with torch.no_grad():
                seen_BC = scene.target.judges[judge](found.image_BCHW, batch.key)
            fell = int((seen_BC.argmax(1) != label_B).sum())
    finding = bf16_finding(verdicts.lines, len(ids), fell)
    return Probed([finding], time.perf_counter() - began, passes[0])


def bf16_finding(lines: Sequence[Line], num_again: int, fell: int) -> Finding:
    """What float32 says of a bf16 run: of the images that it gave up too early, and of those that it could not break.

    Args:
        num_again: survivors that were attacked again in float32.
        fell: how many of those did not survive that.
    """
    redone, broken = sum(line.redone for line in lines), sum(sum(line.success) for line in lines)
    sentence = (
        f"of {num_again} survivors attacked again in float32 {fell} fell; {broken} fell to the attack itself, which took "
        f"float32 for {redone} samples, given up too early in bfloat16"
    )
    level: Any = "ok" if not fell else "warn" if fell <= 0.1 * num_again else "fail"
    return Finding(id="bf16-verdicts", level=level, sentence=sentence, value=fell / max(num_again, 1))


def _ledger_path(folder: Path, blank: Blank) -> Path:
    return folder / f"{blank.id}.verdicts.jsonl"


def _about(blank: Blank) -> dict[str, Any]:
    """For people who open a ledger."""
    attack = "none" if blank.attack is None else f"{blank.attack.title} {blank.attack.eps_text}"
    return {"model": blank.model.label, "set": blank.dataset.key, "attack": attack, "samples": blank.dataset.samples}
