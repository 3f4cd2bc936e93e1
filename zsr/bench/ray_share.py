"""What Ray Train costs a step, and what a second worker gains: three runs of the same loop in turns.

The bare loop in a process of its own, the same loop in a Ray Train run of one worker, and in one of two. Each worker has
one thread and the same number of images a step.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from zsr.bench.compare import Spread
from zsr.bench.turns import Turns, loop_in_turns
from zsr.config import RunConfig, load_config

BARE, ONE, TWO = "bare", "ray-1", "ray-2"
SHARE_BAR, SCALING_BAR, SHORTEST_STEP_S = 0.02, 0.9, 0.5
"""Ray Train's share of a step of at least so many seconds, and two workers' throughput in units of twice one's."""


@dataclass(frozen=True)
class RayShare:
    """Medians over rounds, with quartiles; a round's values are compared with each other only.

    Attributes:
        step_s: seconds of a step, by run.
        cpu_s: seconds of processor time of a step in the process of rank 0, by run.
        share: Ray Train's part of a step's time: ray-1 over bare, minus 1.
        cpu_share: the same in processor time, which other work on the machine disturbs less.
        scaling: images a second of two workers over twice those of one.
        averaging: part of ray-2's step that is spent averaging gradients, waiting for the other worker included.
        slower: how much longer ray-2's step is without that, against ray-1's: what two workers take from each other.
        cores: two processes that only multiply matrices, over twice one of them: what the machine leaves of a second core.
    """

    step_s: dict[str, Spread]
    cpu_s: dict[str, Spread]
    share: Spread
    cpu_share: Spread
    scaling: Spread
    averaging: Spread
    slower: Spread
    cores: Spread

    @property
    def share_reached(self) -> bool:
        return self.share.median <= SHARE_BAR

    @property
    def scaling_reached(self) -> bool:
        return self.scaling.median >= SCALING_BAR


def measure(rounds: int, block: int, batch_size: int, overrides: Sequence[str] = ()) -> RayShare:
    """Run all three; ``rounds`` blocks of ``block`` steps each, after one that does not count.

    Raises:
        ValueError: settings that cannot be.
        RuntimeError: one of the three failed.
    """
    from zsr.launch.cluster import attach
    from zsr.launch.train import run_ray

    with tempfile.TemporaryDirectory(prefix="zsr-bench-", ignore_cleanup_errors=True) as folder:
        turns = Turns(folder, (BARE, ONE, TWO), (1, 1, 2), rounds + 1, block)
        configs = {
            name: _config(folder, turns, batch_size, ranks, overrides) for name, ranks in zip(turns.names, turns.ranks)
        }
        attach(worker_output=False)
        asked = {"turns": asdict(turns), "config": configs[BARE].model_dump(mode="json"), "name": BARE}
        bare = subprocess.Popen([sys.executable, "-m", "zsr.bench.turns", json.dumps(asked)])
        try:
            with ThreadPoolExecutor(2) as pool:
                runs = [
                    pool.submit(run_ray, configs[name], name, loop=loop_in_turns(turns, name)) for name in (ONE, TWO)
                ]
                for run in runs:
                    run.result()
            if bare.wait(60):
                raise RuntimeError(f"the bare loop ended with {bare.returncode}")
        finally:
            bare.kill()
            bare.wait()
        return summarise({name: _blocks(Path(folder, f"{name}.jsonl")) for name in turns.names}, two_cores())


_MULTIPLY = """
import time, torch
torch.set_num_threads(1)
matrix, done, end = torch.rand(1024, 1024), 0, time.perf_counter() + 2
while time.perf_counter() < end:
    matrix @ matrix
    done += 1
print(done)
"""


def two_cores(rounds: int = 3) -> Spread:
    """Matrix products of two processes at once, over twice those of one alone, in turns. Virtual cores often share one."""
    command = [sys.executable, "-c", _MULTIPLY]

    def products(num: int) -> int:
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(num)]
        return sum(int(process.communicate()[0]) for process in processes)

    return Spread.of([products(2) / (2 * products(1)) for _ in range(rounds)])


def summarise(blocks: dict[str, list[dict[str, float]]], cores: Spread) -> RayShare:
    """From the notes of the three, by round, to what is to be known. The first round is for warming up."""
    bare, one, two = (blocks[name][1:] for name in (BARE, ONE, TWO))
    return RayShare(
        step_s={name: Spread.of([block["wall"] for block in blocks[name][1:]]) for name in blocks},
        cpu_s={name: Spread.of([block["cpu"] for block in blocks[name][1:]]) for name in blocks},
        share=Spread.of([ours["wall"] / theirs["wall"] - 1 for ours, theirs in zip(one, bare)]),
        cpu_share=Spread.of([ours["cpu"] / theirs["cpu"] - 1 for ours, theirs in zip(one, bare)]),
        scaling=Spread.of(
            [a["wall"] / b["wall"] for a, b in zip(one, two)]
        ),  # each of the two does a whole step's images
        averaging=Spread.of([block["averaging"] / block["wall"] for block in two]),
        slower=Spread.of([(b["wall"] - b["averaging"]) / a["wall"] - 1 for a, b in zip(one, two)]),
        cores=cores,
    )


def _config(folder: str, turns: Turns, batch_size: int, ranks: int, overrides: Sequence[str]) -> RunConfig:
    return load_config(
        "demo",
        [
            "objective=tecoa",
            f"train.batch_size={batch_size * ranks}",
            f"train.max_steps={turns.rounds * turns.block + 1}",  # the last step, with the evaluation, is nobody's block
            "train.epochs=1000",
            f"train.log_every={turns.block}",
            f"train.checkpoint_every={turns.block}",
            "train.eval_every=0",
            "eval.num_samples=16",
            "train.num_threads=1",
            f"launch.workers={ranks}",
            "launch.cpus_per_worker=0.5",  # they take turns, so that three find room on two cores
            "launch.max_failures=0",
            f"launch.storage={folder}/runs",
            *overrides,
        ],
    )


def _blocks(file: Path) -> list[dict[str, float]]:
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda block: block["round"])
