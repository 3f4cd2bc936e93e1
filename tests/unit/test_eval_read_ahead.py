"""The next batch is read while one is being done, and a batch that cannot be read is an error when it is due."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from zsr.data.pipeline import Batch
from zsr.eval.ledger import CLEAN, Line
from zsr.eval.runner import LocalCrew
from zsr.eval.scene import Answer, Request


class Scene:
    """Does a batch only after the next one has been read."""

    def __init__(self, last: int, broken: int = -1) -> None:
        self.images, self.last, self.broken = self, last, broken
        self.read = [threading.Event() for _ in range(last + 1)]

    def batch(self, ids: Sequence[int]) -> Batch:
        (sample,) = ids
        if sample == self.broken:
            raise ValueError(f"sample {sample} cannot be decoded")
        self.read[sample].set()
        return Batch(torch.full((1, 3, 2, 2), sample, dtype=torch.uint8), torch.tensor([sample]), [str(sample)])

    def do(self, request: Request, batch: Batch) -> Answer:
        (sample,) = request.ids
        assert batch.key == [str(sample)]
        if sample < self.last and sample + 1 != self.broken:
            assert self.read[sample + 1].wait(30)
        return Answer(Line(CLEAN, list(request.ids), {"bare": [int(batch.image[0, 0, 0, 0])]}))


def run(scene: Any, count: int) -> list[int]:
    return [
        answer.line.ids[0] for answer in LocalCrew().run(scene, (Request(CLEAN, [n], ("bare",)) for n in range(count)))
    ]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_batches_come_in_order_and_the_next_one_is_read_meanwhile(count):
    assert run(Scene(count - 1), count) == list(range(count))


def test_batches_before_the_broken_one_are_done():
    answers = LocalCrew().run(Scene(4, broken=2), (Request(CLEAN, [n], ("bare",)) for n in range(5)))
    assert [next(answers).line.ids, next(answers).line.ids] == [[0], [1]]
    with pytest.raises(ValueError, match="sample 2 cannot be decoded"):
        next(answers)
