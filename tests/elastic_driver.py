"""A driver for tests: trains with the real loop, notes every batch, and waits at given steps for what the test does.

    python tests/elastic_driver.py CONFIG.yaml FOLDER      # with RAY_ADDRESS; FOLDER is seen by all nodes

``FOLDER/holds.json`` has ``holds``, a list of [step, world size]: at such a step a group of that size goes no further, so
that what happens next can only be the cluster's doing; and ``step_s``, by which every step is slowed down.
``FOLDER/notes-*.jsonl`` say who trained on what.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def loop(config: Any, session: Any, tracker: Any) -> Any:
    from zsr.engine.loop import Trainer

    folder = Path(config.data.cache_dir).parent
    notes = folder / f"notes-{time.time_ns()}-rank{session.rank}.jsonl"

    class Noted(Trainer):
        def _step(self, batch: Any) -> None:
            step = self.state.step
            while [step, session.world_size] in (asked := json.loads((folder / "holds.json").read_text()))["holds"]:
                (folder / f"holding-{step}-{session.world_size}-{session.rank}").touch()
                time.sleep(0.1)
            time.sleep(asked["step_s"])
            super()._step(batch)
            self._note(step=step + 1, keys=batch.key, lr=self.optimizer.param_groups[0]["lr"])

        def _note(self, **what: Any) -> None:
            with notes.open("a") as file:
                file.write(json.dumps(what) + "\n")

    trainer = Noted(config, session, tracker)
    trainer._note(start=trainer.state.step, world=session.world_size, rank=session.rank)
    result = trainer.run()
    return SimpleNamespace(metrics=result.metrics)


def attempts(folder: Path) -> list[dict[str, Any]]:
    """What the notes say: for each attempt where it started, how many took part, and what they trained on at each step."""
    order: list[dict[str, Any]] = []
    ranks: set[int] = set()
    for path in sorted(folder.glob("notes-*.jsonl")):
        head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
        same = order and (order[-1]["start"], order[-1]["world"]) == (head["start"], head["world"])
        if not same or head["rank"] in ranks:
            order.append({"start": head["start"], "world": head["world"], "steps": {}})
            ranks = set()
        ranks.add(head["rank"])
        for line in lines:
            step = order[-1]["steps"].setdefault(line["step"], {"keys": [], "lr": set()})
            step["keys"] += line["keys"]
            step["lr"].add(line["lr"])
    return order


def kept(tries: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The steps that count: of each attempt those before the point at which the next one started."""
    steps: dict[int, dict[str, Any]] = {}
    for number, attempt in enumerate(tries):
        end = tries[number + 1]["start"] if number + 1 < len(tries) else sys.maxsize
        steps |= {step: done for step, done in attempt["steps"].items() if attempt["start"] < step <= end}
    return steps


def main(config_file: str) -> None:
    from zsr.config import load_config
    from zsr.launch.cluster import attach
    from zsr.launch.train import run_ray

    attach()
    result = run_ray(load_config(config_file), "run", loop=loop)
    print("result", json.dumps(result.return_value.metrics), result.checkpoint.path, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
