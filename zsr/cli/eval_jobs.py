"""The work of zsr eval: load each model, plan its cards, measure what is missing, print what there is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from zsr.attacks.base import Attack
    from zsr.cli.attacks import Craft
    from zsr.cli.defended import Guarded
    from zsr.cli.eval_progress import EvalProgress
    from zsr.config.schema import Precision
    from zsr.data.suite import Suite
    from zsr.defenses.base import DefenseConfig
    from zsr.eval.card import AttackInfo, ResultCard
    from zsr.eval.images import Images
    from zsr.eval.measure import Means
    from zsr.eval.plan import Blank, Job, Subject, TestSet
    from zsr.eval.runner import Clean, Crew
    from zsr.eval.scene import Scene
    from zsr.eval.target import Target

_OUT = ".zsr/results"


@dataclass(frozen=True)
class Order:
    """What was asked for; fields are the options' values, read.

    Attributes:
        missing: a sentence for each set of the suite that is not there.
        attacks: budget as text, and attack; empty for clean accuracy alone.
    """

    models: Sequence[str]
    suite: Suite | None
    test_sets: Sequence[TestSet]
    missing: Sequence[str]
    attacks: Sequence[tuple[str, Attack[Any]]]
    template: str | None
    pretrained: str | None
    precision: Precision
    seed: int
    device: str | None
    defense: DefenseConfig | None
    gate_model: str | None
    craft: Craft | None
    out: Path | None
    workers: int
    mlflow_run: str | None
    log: bool
    tracking_uri: str | None
    batch_size: int
    probes: bool


@dataclass(frozen=True)
class Scenes:
    """A model on a set: the target of each attack, the jobs, and the clean cards that their predictions come from."""

    test_set: TestSet
    scene: Scene
    jobs: Sequence[tuple[Job, Scene]]
    clean_cards: dict[str, Blank]
    folder: Path


def run(order: Order, dry_run: bool) -> None:
    """Do it, one model after the other.

    Raises:
        ValueError, OSError: a model or a set cannot be read.
    """
    from zsr.cli.eval_progress import EvalProgress
    from zsr.cli.eval_table import show_cards
    from zsr.cli.eval_tracking import check_tracking
    from zsr.cli.models import read_device
    from zsr.eval.card import read_card

    device = read_device(order.device)
    check_tracking(order.models, order.mlflow_run, order.log, order.tracking_uri)
    for sentence in order.missing:
        typer.echo(f"missing: {sentence}")
    cards: list[ResultCard] = []
    words: list[str] = []
    progress = EvalProgress(len(order.models) * len(order.test_sets) * max(len(order.attacks), 1))
    with _crew(order, device, dry_run) as crew, progress:
        for name in order.models:
            subject, guarded, template = _load(order, name, device)
            paths = []
            for scenes in _plan(order, subject, template, device):
                if dry_run:
                    _say_plan(scenes, order.probes)
                    continue
                _measure(scenes, subject, _means(order, device, crew), progress)
                paths += [job.path(judge) for job, _ in scenes.jobs for judge in job.cards]
            own = [(path, read_card(path)) for path in paths]
            cards += [card for _, card in own]
            if not dry_run:
                _track(order, name, subject, own)
            words += [] if guarded is None else guarded.sentences()
    if dry_run:
        return
    show_cards(cards, order.suite)
    for sentence in dict.fromkeys(words):
        typer.echo(sentence)
    if any(card.attack is not None and card.attack.knowledge == "oblivious" for card in cards):
        typer.echo(
            "The attack does not know the defence (oblivious): it is crafted on the bare model. "
            "These are no numbers for an attacker who knows it."
        )


def _crew(order: Order, device: str, dry_run: bool) -> AbstractContextManager[Crew]:
    """Whoever does the batches: this process, or Ray workers."""
    from zsr.eval.runner import LocalCrew

    if not order.workers or dry_run:
        return nullcontext(LocalCrew())
    from zsr.launch.evaluate import RayCrew

    return RayCrew(order.workers, on_gpu=device.startswith("cuda"))


def _track(order: Order, name: str, subject: Subject, cards: Sequence[tuple[Path, ResultCard]]) -> None:
    from zsr.cli.eval_tracking import own_tracker, record_cards, training_tracker

    folder, info = results_folder(order.out), subject.info
    if order.mlflow_run is not None:
        tracker = own_tracker(order.mlflow_run, info.label, info.weights_digest, order.tracking_uri, folder)
        record_cards(tracker, cards)
    if order.log:
        record_cards(training_tracker(name, order.tracking_uri), cards)


def results_folder(out: Path | None) -> Path:
    """Where cards go: ``out``, or ``.zsr/results`` under ZSR_HOME or the current directory."""
    from zsr.launch.store import HOME_VARIABLE

    return out.expanduser() if out is not None else Path(os.environ.get(HOME_VARIABLE) or Path.cwd()) / _OUT


def _load(order: Order, name: str, device: str) -> tuple[Subject, Guarded | None, str | None]:
    from zsr.cli.defended import guard
    from zsr.cli.models import label_of, load_named, trained_config
    from zsr.eval.plan import Subject, identify
    from zsr.models import TextBank

    clip, trained_template = load_named(name, order.pretrained, order.precision, device)
    config = trained_config(name, clip)
    info = identify(
        clip,
        name,
        label_of(name),
        objective=None if config is None else config.objective.name,
        trained_on=None if config is None else str(config.data.train),
    )
    guarded = None
    if order.defense is not None:
        guarded = guard(
            clip, name, order.defense, order.gate_model,
            pretrained=order.pretrained, precision=order.precision, device=device, seed=order.seed,
        )  # fmt: skip
    defended, defense = (None, None) if guarded is None else (guarded.defended, guarded.info())
    return Subject(info, clip, TextBank(clip), defended, defense), guarded, trained_template


def _plan(order: Order, subject: Subject, trained_template: str | None, device: str) -> Iterator[Scenes]:
    from zsr.cli.eval_sets import with_template
    from zsr.engine.quick_eval import ZeroShotHead
    from zsr.eval.images import Images
    from zsr.eval.plan import Blank, Job
    from zsr.eval.scene import Scene
    from zsr.eval.target import BARE, plain_target

    template = None if order.suite is not None else order.template or trained_template
    for test_set in with_template(order.test_sets, template):
        images = Images(test_set.shards, test_set.pixels(subject.model.image_size), test_set.num_samples)
        head = ZeroShotHead(subject.model, subject.bank, test_set.classes, test_set.templates)
        folder = results_folder(order.out) / subject.folder / test_set.folder

        def scene_of(target: Target, images: Images = images, test_set: TestSet = test_set) -> Scene:
            return Scene(
                images, target, test_set.classes,
                device=device, seed=order.seed, chance_level=test_set.chance_level,
                differences=test_set.differences,
            )  # fmt: skip

        def blank(judge: str, attack: Any, images: Images = images, test_set: TestSet = test_set) -> Blank:
            defense = None if judge == BARE else subject.defense
            protocol = test_set.protocol(order.precision)
            return Blank(protocol, test_set.info(images), subject.info, defense, attack, order.seed)

        all_judges = plain_target(head, subject.defended)
        whole, special = scene_of(all_judges), {}
        jobs = []
        for eps_text, attack in order.attacks:
            # One scene for all attacks with the same target: workers load it once.
            if attack.config.name != "adaptive" and order.craft is None:
                scene = whole
            else:
                kind = attack.config.name == "adaptive"
                if kind not in special:
                    special[kind] = scene_of(_special_target(order, kind, head, subject, test_set, images))
                scene = special[kind]
            target = scene.target
            cards = {judge: blank(judge, _attack_info(attack, eps_text, target, judge)) for judge in target.judges}
            jobs.append((Job(folder, attack, cards), scene))
        clean_cards = {judge: blank(judge, None) for judge in all_judges.judges}
        if not order.attacks:
            jobs.append((Job(folder, None, clean_cards), whole))
        yield Scenes(test_set, whole, jobs, clean_cards, folder)


def _special_target(
    order: Order, adaptive: bool, head: Any, subject: Subject, test_set: TestSet, images: Images
) -> Target:
    from zsr.data.suite import read_superclasses
    from zsr.eval.crafted import craft_head
    from zsr.eval.target import adaptive_target, crafted_target

    if adaptive:
        assert subject.defended is not None
        return adaptive_target(head, subject.defended, images.pixels)
    assert order.craft is not None
    templates = None if order.craft.template is None else [order.craft.template]
    superclasses = read_superclasses(test_set.key) if order.craft.superclasses else None
    crafted, label_map = craft_head(
        subject.model, subject.bank, test_set.classes, templates=templates, superclasses=superclasses
    )
    return crafted_target(head, crafted, label_map, order.craft.words, subject.defended)


def _attack_info(attack: Attack[Any], eps_text: str, target: Target, judge: str) -> AttackInfo:
    from zsr.cli.attacks import attack_title
    from zsr.eval.plan import attack_info

    return attack_info(attack, eps_text, attack_title(attack), target.knowledge[judge], target.crafted_on)


def _means(order: Order, device: str, crew: Crew) -> Means:
    from zsr.eval.measure import Means
    from zsr.tracking.environment import versions

    return Means(
        batch_size=order.batch_size,
        crew=crew,
        workers=max(order.workers, 1),
        probes=order.probes,
        device=_device_name(device),
        environment=versions(),
    )


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _measure(scenes: Scenes, subject: Subject, means: Means, progress: EvalProgress) -> None:
    from zsr.eval.measure import measure, measure_clean
    from zsr.eval.runner import Clean

    clean: Clean | None = None
    names = {"model": subject.info.label, "set": scenes.test_set.key}
    for job, scene in scenes.jobs:
        if job.done(means.probes):
            typer.echo(f"there already: {', '.join(job.path(judge).name for judge in job.cards)}", err=True)
            progress.job_done(measured=False)
            continue
        if clean is None:
            clean = measure_clean(scenes.scene, scenes.folder, scenes.clean_cards, means, progress.of(**names))
        attack = job.owner.attack
        told = {} if attack is None else {"attack": attack.name, "eps": attack.eps_text}
        own = Clean({j: clean.pred[j] for j in job.cards}, {j: clean.lines[j] for j in job.cards})
        measure(scene, job, own, means, progress.of(**names, **told))
        progress.job_done(measured=True)


def _say_plan(scenes: Scenes, probes: bool) -> None:
    for job, _ in scenes.jobs:
        for judge, blank in job.cards.items():
            state = "there" if job.there(judge, probes) else "to do"
            typer.echo(
                f"{state}: {blank.model.label}, {blank.dataset.key} ({blank.dataset.samples} samples), "
                + (
                    "clean"
                    if blank.attack is None
                    else f"{blank.attack.title} {blank.attack.norm} {blank.attack.eps_text}"
                )
                + (f", behind {blank.defense.name}" if blank.defense else "")
                + f", card {blank.id}"
            )
