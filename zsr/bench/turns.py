"""The training loop in blocks of steps, several loops taking turns: what is measured side by side meets the same machine.

Every loop lives in a process (or two) of its own and waits, between blocks, for its turn in a folder that all see. The
order is turned round at every other round. What a loop does after the steps of a block, logging, a checkpoint, a report,
belongs to the block; its checkpoint is written while another has its turn.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zsr.config import RunConfig
from zsr.data.pipeline import Batch
from zsr.engine import loop
from zsr.engine.distributed import average_gradients
from zsr.engine.loop import Trainer, TrainResult
from zsr.engine.protocols import Session, Tracker

PAUSE_S = 0.005
TURN_LIMIT_S = 900.0


@dataclass(frozen=True)
class Turns:
    """Whose turn it is.

    Attributes:
        folder: that all see.
        names: who takes part.
        ranks: how many processes each has.
        rounds: blocks of each.
        block: steps of each.
    """

    folder: str
    names: tuple[str, ...]
    ranks: tuple[int, ...]
    rounds: int
    block: int

    def ready(self, name: str, rank: int) -> None:
        """Say so, and wait for all others."""
        Path(self.folder, f"ready-{name}-{rank}").touch()
        everybody = [f"ready-{n}-{r}" for n, count in zip(self.names, self.ranks) for r in range(count)]
        self._until(lambda: all(Path(self.folder, one).exists() for one in everybody))

    def wait(self, name: str, number: int) -> None:
        """Wait for the turn of this one's block ``number``; of a block past the last: until all are done."""
        place = self._place(name, number) if number < self.rounds else self.rounds * len(self.names)
        self._until(lambda: self._now() >= place)

    def done(self, name: str, number: int) -> None:
        """Pass the turn on."""
        new = Path(self.folder, f"turn-{name}")
        new.write_text(str(self._place(name, number) + 1))
        new.replace(Path(self.folder, "turn"))

    def _place(self, name: str, number: int) -> int:
        order: Sequence[str] = self.names if number % 2 == 0 else self.names[::-1]
        return number * len(self.names) + order.index(name)

    def _now(self) -> int:
        try:
            return int(Path(self.folder, "turn").read_text())
        except FileNotFoundError:
            return 0

    def _until(self, met: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TURN_LIMIT_S
        while not met():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no turn within {TURN_LIMIT_S:g} s: another of {', '.join(self.names)} is stuck")
            time.sleep(PAUSE_S)


class TurnTrainer(Trainer):
    """A trainer that stops between blocks and notes how long each took.

    Args:
        config: of the run; one step more than its blocks need.
        session, tracker: as in a run.
        turns: shared with the others.
        name: this one's.
    """

    def __init__(self, config: RunConfig, session: Session, tracker: Tracker | None, turns: Turns, name: str) -> None:
        super().__init__(config, session, tracker)
        self._turns, self._name = turns, name
        self._averaging_s = 0.0

        def timed(*arguments: Any) -> None:
            began = time.monotonic()
            average_gradients(*arguments)
            self._averaging_s += time.monotonic() - began

        setattr(loop, "average_gradients", timed)  # noqa: B010  in place of the loop's own name for it

    def run(self) -> TrainResult:
        self._turns.ready(self._name, self.session.rank)
        return super().run()

    def _step(self, batch: Batch) -> None:
        number, inside = divmod(self.state.step, self._turns.block)
        if inside == 0:
            if number > 0:
                self._note(number - 1)
            self._turns.wait(self._name, number)
            self._wall, self._cpu, self._averaging_s = time.monotonic(), time.process_time(), 0.0
        super()._step(batch)

    def _note(self, number: int) -> None:
        if self.session.rank:
            return
        block = {
            "round": number,
            "wall": (time.monotonic() - self._wall) / self._turns.block,
            "cpu": (time.process_time() - self._cpu) / self._turns.block,
            "averaging": self._averaging_s / self._turns.block,
        }
        with Path(self._turns.folder, f"{self._name}.jsonl").open("a") as file:
            file.write(json.dumps(block) + "\n")
        self._turns.done(self._name, number)


def loop_in_turns(turns: Turns, name: str) -> Callable[[RunConfig, Session, Any], TrainResult]:
    """What a Ray Train worker, or a process of its own, runs instead of the plain loop."""

    def run(config: RunConfig, session: Session, tracker: Any) -> TrainResult:
        torch.set_num_threads(1)
        return TurnTrainer(config, session, tracker, turns, name).run()

    return run


def main(arguments: str) -> None:
    """The bare loop, in this process: ``python -m zsr.bench.turns JSON``, started by ``zsr bench ray``."""
    from zsr.engine.session import LocalSession
    from zsr.tracking import make_tracker

    asked = json.loads(arguments)
    turns = Turns(
        **{**asked["turns"], "names": tuple(asked["turns"]["names"]), "ranks": tuple(asked["turns"]["ranks"])}
    )
    config = RunConfig.model_validate(asked["config"])
    folder = Path(turns.folder) / asked["name"]
    tracker = make_tracker(config.tracking, run_name=asked["name"], key={"run": asked["name"]}, folder=folder)
    loop_in_turns(turns, asked["name"])(config, LocalSession(folder, keep=config.train.keep_checkpoints), tracker)
    os._exit(0)  # nothing is left to do, and others are being timed


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
