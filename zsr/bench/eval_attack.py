"""AutoAttack by zsr and by the public implementation: seconds, encoder passes and verdicts on the same model and images.

Ours runs as ``zsr eval`` does, through the runner, on its own layers. Theirs runs as people call it: the ordinary open_clip
model, its weights frozen, under cached class embeddings, whole set, same batch size. Images are decoded before, for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from zsr.attacks.autoattack import AutoAttack, AutoAttackConfig
from zsr.bench.compare import Progress
from zsr.bench.public_attack import PlainClassifier, public_predictions
from zsr.bench.sides import Sides, in_turns
from zsr.data.shards import ShardSet
from zsr.engine.quick_eval import ZeroShotHead
from zsr.eval.images import Images
from zsr.eval.ledger import Ledger
from zsr.eval.runner import classify_clean, run_attack, still_right
from zsr.eval.scene import Scene
from zsr.eval.target import BARE, plain_target

BAR = 2.0
"""Least ratio of their time to ours."""


@dataclass(frozen=True)
class AttackRow:
    """The cascade by both.

    Attributes:
        clean, robust, their_robust: samples right without an attack, and after each.
        differ: samples whose verdict differs.
        passes, their_passes: of the image tower, images forward or backward.
    """

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
) -> AttackRow:
    """Attack a set in as many blocks as there are rounds, each block by both.

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
    passes = []

    def ours(number: int) -> tuple[np.ndarray, np.ndarray]:
        scene, ledger, before = blocks[number], Ledger(None, ""), {BARE: Ledger(None, "")}
        clean = classify_clean(scene, before, batch_size=batch_size)
        verdicts = run_attack(scene, attack, clean, ledger, batch_size=batch_size)
        passes.append(sum(line.passes for line in (*before[BARE].lines, *ledger.lines)))
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

    with torch.no_grad():  # warms both up
        some = torch.rand(2, 3, model.image_size, model.image_size, device=device)
        head(some), plain(some)
    plain.passes = 0
    (mine, other), (spent, their_spent) = in_turns([ours, theirs], len(blocks), device, "autoattack", progress)
    clean, robust = (np.concatenate(parts) for parts in zip(*mine, strict=True))
    their_robust = np.concatenate([stands for _, stands in other])
    return AttackRow(
        len(robust), int(clean.sum()), int(robust.sum()), int(their_robust.sum()), int((robust != their_robust).sum()),
        sum(passes), plain.passes, Sides.of(spent, their_spent),
    )  # fmt: skip
