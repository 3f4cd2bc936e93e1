"""AutoAttack by zsr and by the public implementation: seconds, encoder passes and verdicts on the same model and images.

Ours runs as ``zsr eval`` does, through the runner, on its own layers: with float32 passes, and with bfloat16 passes and float32
verdicts (``--precision bf16``). Theirs runs as people call it: the ordinary open_clip model in float32, its weights frozen,
under cached class embeddings, whole set, same batch size. Images are decoded before, for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from zsr.attacks.autoattack import AutoAttack, AutoAttackConfig
from zsr.bench.compare import Progress
from zsr.bench.public_attack import PlainClassifier, public_predictions
from zsr.bench.sides import Sides, in_turns
from zsr.config.schema import Precision
from zsr.data.shards import ShardSet
from zsr.engine.quick_eval import ZeroShotHead
from zsr.eval.images import Images
from zsr.eval.ledger import Ledger
from zsr.eval.runner import classify_clean, run_attack, still_right
from zsr.eval.scene import Scene
from zsr.eval.target import BARE, plain_target
from zsr.models import in_precision

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")

BAR = 2.0
"""Least ratio of their time to ours, the faster of the two."""


@dataclass(frozen=True)
class AttackRow:
    """The cascade by both.

    Attributes:
        precision: of our passes.
        clean, robust, their_robust: samples right without an attack, and after each.
        differ: samples whose verdict differs.
        passes, their_passes: of the image tower, images forward or backward.
    """

    precision: Precision
    samples: int
    clean: int
    robust: int
    their_robust: int
    differ: int
    passes: int
    their_passes: int
    time: Sides

    def reached(self, device: str) -> bool:
        return self.time.ratio(device) >= BAR


def compare_attacks(
    head: ZeroShotHead,
    shards: ShardSet,
    config: AutoAttackConfig,
    *,
    num_samples: int,
    batch_size: int,
    rounds: int = 2,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> list[AttackRow]:
    """Attack a set in as many blocks as there are rounds, each block by all three.

    Returns:
        Ours in float32, and in bfloat16, each against theirs.

    Raises:
        ValueError, OSError: the set cannot be read.
        ModuleNotFoundError: the public implementation is not installed.
    """
    import pyautoattack  # type: ignore[import-untyped]  # noqa: F401 - if it is missing, that is said before anything is measured

    model, attack, plain = head.model, AutoAttack(config), PlainClassifier(head)
    whole = Images(shards, model.image_size, num_samples)
    blocks = []
    for ids in np.array_split(whole.ids, min(rounds, len(whole))):
        block = Images(shards, model.image_size)
        block.ids = ids
        block.batch(ids.tolist())  # decoded now, and kept
        blocks.append(Scene(block, plain_target(head), shards.classes, device=device, seed=seed))
    passes = dict.fromkeys(PRECISIONS, 0)

    def ours(precision: Precision, number: int) -> tuple[np.ndarray, np.ndarray]:
        scene, ledger, before = blocks[number], Ledger(None, ""), {BARE: Ledger(None, "")}
        with in_precision(precision, [model.image]):
            clean = classify_clean(scene, before, batch_size=batch_size)
            verdicts = run_attack(scene, attack, clean, ledger, batch_size=batch_size)
        passes[precision] += sum(line.passes for line in (*before[BARE].lines, *ledger.lines))
        label = scene.images.label
        return clean.pred[BARE] == label, still_right(clean, verdicts, label, BARE)

    def theirs(number: int) -> tuple[np.ndarray, np.ndarray]:
        batch = blocks[number].images.batch(blocks[number].images.ids.tolist())
        label_B = batch.label.to(device)
        said_B = public_predictions(
            plain, batch.image.to(device).float() / 255, label_B, eps=config.eps, norm=config.norm,
            attacks=attack.stages, steps=config.steps, target_classes=config.target_classes, queries=config.queries,
            batch_size=batch_size, seed=seed,
        )  # fmt: skip
        stands = (said_B == label_B).cpu().numpy()
        return stands, stands

    some = torch.rand(2, 3, model.image_size, model.image_size, device=device)
    with torch.no_grad():  # warms all up
        plain(some)
        for precision in PRECISIONS:
            with in_precision(precision, [model.image]):
                head(some)
    plain.passes = 0
    works: list[Callable[[int], tuple[np.ndarray, np.ndarray]]] = [partial(ours, name) for name in PRECISIONS]
    (*mine, other), (*spent, their_spent) = in_turns([*works, theirs], len(blocks), device, "autoattack", progress)
    their_robust = np.concatenate([stands for _, stands in other])
    rows = []
    for precision, found, own in zip(PRECISIONS, mine, spent, strict=True):
        clean, robust = (np.concatenate(parts) for parts in zip(*found, strict=True))
        row = AttackRow(
            precision, len(robust), int(clean.sum()), int(robust.sum()), int(their_robust.sum()),
            int((robust != their_robust).sum()), passes[precision], plain.passes, Sides.of(own, their_spent),
        )  # fmt: skip
        rows.append(row)
    return rows
