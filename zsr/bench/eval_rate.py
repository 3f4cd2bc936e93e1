"""Clean accuracy through the runner, against what the image tower does with tensors in memory.

The runner reads the set, turns bytes into floats, classifies, keeps a ledger on disk and asks the cheap checks. It is timed as
it stands, and once more with the images decoded already: what is between the two is decoding.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from zsr.attacks.base import input_gradients_only
from zsr.bench.compare import Progress
from zsr.bench.sides import Sides, Spent, in_turns, total
from zsr.data.shards import ShardSet
from zsr.engine.quick_eval import ZeroShotHead
from zsr.eval.images import Images
from zsr.eval.ledger import Ledger
from zsr.eval.runner import classify_clean
from zsr.eval.scene import Scene
from zsr.eval.target import BARE, plain_target

BAR = 0.9
"""Least share of the bare tower's rate."""


@dataclass(frozen=True)
class RateRow:
    """Shares of the bare tower's rate; 1 is as fast.

    Attributes:
        bare: the tower alone.
        decoded, whole: runner with images in memory, and with everything; theirs is the runner in ``Sides``.
        decoding: reading and decoding alone.
    """

    samples: int
    bare: Spent
    decoding: Spent
    decoded: Sides
    whole: Sides

    def share(self, which: Sides, device: str) -> float:
        return 1 / which.ratio(device)

    def reached(self, device: str) -> bool:
        return self.share(self.whole, device) >= BAR


def compare_rate(
    head: ZeroShotHead,
    shards: ShardSet,
    *,
    num_samples: int,
    batch_size: int,
    rounds: int = 5,
    device: str = "cpu",
    progress: Progress | None = None,
) -> RateRow:
    """Classify a set clean: by the bare tower, by the runner on images in memory, by the runner; and decode it alone.

    Raises:
        ValueError, OSError: the set cannot be read.
    """
    model = head.model
    kept = Images(shards, model.image_size, num_samples)
    ids = kept.ids.tolist()
    image_BCHW = kept.batch(ids).image.to(device).float() / 255
    batches = image_BCHW.split(batch_size)

    def bare(_: int) -> None:
        with torch.no_grad(), input_gradients_only(model.image):
            for batch_BCHW in batches:
                model.encode_image(batch_BCHW)

    def run(images: Images) -> None:
        scene = Scene(images, plain_target(head), shards.classes, device=device)
        with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger.jsonl", "bench") as ledger:
            classify_clean(scene, {BARE: ledger}, batch_size=batch_size)

    def decode(_: int) -> None:
        Images(shards, model.image_size, num_samples).batch(ids)

    works = [
        bare, lambda _: run(kept), lambda _: run(Images(shards, model.image_size, num_samples)), decode,
    ]  # fmt: skip
    bare(0)  # warms up
    _, (alone, decoded, whole, decoding) = in_turns(works, rounds, device, "throughput", progress)
    return RateRow(len(ids), total(alone), total(decoding), Sides.of(alone, decoded), Sides.of(alone, whole))
