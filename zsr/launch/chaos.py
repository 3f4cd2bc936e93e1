"""make chaos: training runs whose surroundings are broken on purpose, at moments that a seed decides.

    python -m zsr.launch.chaos --runs 20                   # on a cluster of this machine's own; prints a table
    python -m zsr.launch.chaos --runs 3 --seed 40 --no-network

Each run must finish, end with the weights and the optimizer state of an undisturbed run, bit for bit, and leave one run
in MLflow with every metric once. Whoever operates the cluster is played too: what was killed is started again after some
seconds, and the driver's command is given again, as a job with retries would.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zsr.launch.chaos_bed import BUCKET, Bed
from zsr.launch.chaos_judge import Traces, read_traces, verdict
from zsr.launch.chaos_net import Network, why_not
from zsr.launch.services import family

KINDS = ("worker", "raylet", "driver", "s3", "mlflow", "link")
NODES = 3
STEPS, LOGGED = 30, 3
TRAINING = [
    "objective=tecoa", f"train.max_steps={STEPS}", "train.batch_size=16", "train.checkpoint_every=6",
    f"train.log_every={LOGGED}", "train.eval_every=15", "eval.num_samples=16", "eval.attack.steps=1", "optim.lr=1e-4",
    "launch.workers=2", "launch.max_failures=8", "tracking.name=mlflow",
]  # fmt: skip
DRIVER_LIMIT, RUN_LIMIT_S = 8, 1500.0
LINK_CUT_S = 20.0  # longer than the head takes to give a silent node up


@dataclass(frozen=True)
class Blow:
    """One thing to break.

    Attributes:
        what: of ``KINDS``.
        node: where to look first for a node that trains, for what lies on nodes.
        step: after which logged step; None is while the run starts.
        after_s: how long after that.
        pause_s: until it is started again.
    """

    what: str
    node: str
    step: int | None
    after_s: float
    pause_s: float


@dataclass
class Outcome:
    """One run: what was done to it and what became of it."""

    seed: int | None
    blows: list[str] = field(default_factory=list)
    drivers: int = 0
    starts: int = 0
    first_step_s: float = 0.0
    seconds: float = 0.0
    finished: bool = False
    problems: list[str] = field(default_factory=list)
    traces: Traces | None = None

    @property
    def passed(self) -> bool:
        return self.finished and not self.problems


def draw(seed: int, kinds: Sequence[str], starting_s: float) -> list[Blow]:
    """What happens to the run of a seed: each kind in turn, at half the seeds with a second one drawn freely.

    Mostly after a step, so that the seed says how much is lost on a fast machine and on a slow one alike.
    """
    rng = random.Random(seed)
    blows = []
    for what in [kinds[seed % len(kinds)], *rng.sample(kinds, rng.randint(0, 1))]:
        step = rng.randrange(LOGGED, STEPS, LOGGED) if rng.random() < 0.8 else None
        after_s = rng.uniform(0, starting_s if step is None else 1)
        pause_s = LINK_CUT_S if what == "link" else rng.uniform(1, 4)
        blows.append(Blow(what, f"node-{rng.randint(1, NODES)}", step, after_s, pause_s))
    return blows


class Run:
    """One run on the bed, from its first driver to its end.

    Args:
        bed: where.
        name: of the run; no two may share it.
        blows: what to break.
        say: told what happens.
    """

    def __init__(self, bed: Bed, name: str, blows: Sequence[Blow], say: Callable[[str], None]) -> None:
        self._bed, self._name, self._say = bed, name, say
        self._left = list(blows)
        self._mending: list[tuple[float, Callable[[], None], str]] = []
        self._log = bed.home / f"{name}.log"
        self._driver: subprocess.Popen[bytes] | None = None
        self._began = self.first_step_s = 0.0
        self._reached: dict[int, float] = {}

    def go(self, outcome: Outcome) -> None:
        """Run to the end, or to ``RUN_LIMIT_S``."""
        self._began = time.monotonic()
        self._launch(outcome)
        while self._seconds() < RUN_LIMIT_S:
            time.sleep(0.2)
            step = self._step()
            if step and not self.first_step_s:
                self.first_step_s = self._seconds()
            self._reached.setdefault(step, self._seconds())
            self._strike(outcome)
            self._mend()
            if not self._mending:
                self._bed.tend()
            assert self._driver is not None
            code = self._driver.poll()
            if code == 0:
                outcome.finished = True
                break
            if code is not None and not any("driver" in what for _, _, what in self._mending):
                if outcome.drivers >= DRIVER_LIMIT:
                    break
                self._mending.append((self._seconds() + 2, lambda: self._launch(outcome), "driver"))
        outcome.seconds, outcome.first_step_s = self._seconds(), self.first_step_s
        outcome.starts = len(re.findall(r" start step=", self._text()))
        self._end_driver()
        for _, mend, what in self._mending:
            if what != "driver":
                mend()

    def deliver(self, outcome: Outcome) -> None:
        """Give the command once more: a run that has ended has only its last records to deliver."""
        self._launch(outcome)
        assert self._driver is not None
        self._driver.wait(RUN_LIMIT_S)

    def _launch(self, outcome: Outcome) -> None:
        outcome.drivers += 1
        command = [str(Path(sys.executable).with_name("zsr")), "train", "--preset", "demo", *TRAINING]
        command += [f"name={self._name}", f"tracking.uri={self._bed.mlflow_uri}"]
        command += [f"launch.storage=s3://{BUCKET}/runs"]
        with self._log.open("ab") as log:
            self._driver = subprocess.Popen(
                command, env=self._bed.environment, cwd=self._bed.home, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip

    def _strike(self, outcome: Outcome) -> None:
        for blow in list(self._left):
            since = 0.0
            if blow.step is not None:
                since = min((at for step, at in self._reached.items() if step >= blow.step), default=math.inf)
            if self._seconds() < since + blow.after_s:
                continue
            mend = self._break(blow, outcome)
            if mend is None:
                continue  # nothing of the kind is there at this moment: the next that is
            self._left.remove(blow)
            outcome.blows.append(f"{blow.what} at {self._seconds():.0f} s, step {self._step()}")
            self._say(f"run={self._name} broke={outcome.blows[-1]!r}")
            self._mending.append((self._seconds() + blow.pause_s, mend, blow.what))

    def _break(self, blow: Blow, outcome: Outcome) -> Callable[[], None] | None:
        """Break it; return what mends it, or None if there was nothing to break."""
        bed = self._bed
        if blow.what in ("worker", "raylet", "link"):
            # Of a run of two on three nodes, one node has no part in it.
            node = next((node for node in _from(blow.node, bed.node_names) if bed.trains(node)), None)
            if node is None:
                return None
            if blow.what == "worker":
                return _nothing if bed.kill_worker(node) else None
            if blow.what == "raylet":
                return (lambda: bed.again(node)) if bed.kill_raylet(node) else None
            bed.cut(node)
            return lambda: bed.plug(node)
        if blow.what == "driver":
            self._end_driver()
            return lambda: self._launch(outcome)
        bed.kill(blow.what)
        return lambda: bed.start(blow.what)

    def _mend(self) -> None:
        for entry in list(self._mending):
            due, mend, _ = entry
            if self._seconds() >= due:
                self._mending.remove(entry)
                mend()

    def _end_driver(self) -> None:
        if self._driver is not None and self._driver.poll() is None:
            for pid in family(self._driver.pid):
                os.kill(pid, signal.SIGKILL)
            self._driver.wait()

    def _step(self) -> int:
        """The last step that the run said it had done."""
        found = re.findall(r" step=(\d+)/\d+ (?!objective)", self._text())
        return int(found[-1]) if found else 0

    def _text(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def _seconds(self) -> float:
        return time.monotonic() - self._began


def run_chaos(
    seeds: Sequence[int], bed: Bed, say: Callable[[str], None], kinds: Sequence[str] = KINDS
) -> list[Outcome]:
    """The undisturbed run, then one for each seed; the first outcome is the undisturbed one's."""
    calm = Outcome(None)
    run = Run(bed, "calm", (), say)
    run.go(calm)
    say(f"run=calm seconds={calm.seconds:.0f} first_step={calm.first_step_s:.0f} finished={calm.finished}")
    calm.traces = read_traces(bed, "calm") if calm.finished else None
    if not calm.finished or calm.traces is None:
        raise OSError("the undisturbed run did not finish: " + (bed.home / "calm.log").read_text()[-2000:])
    outcomes = [calm]
    for seed in seeds:
        name = f"seed-{seed}"
        outcome = Outcome(seed)
        blows = draw(seed, kinds, calm.first_step_s)
        run = Run(bed, name, blows, say)
        run.go(outcome)
        for service in ("s3", "mlflow"):
            bed.start(service)
            bed.wait(service)
        for node in bed.node_names:
            bed.again(node, only_if_dead=True)
        if outcome.finished:
            outcome.traces = read_traces(bed, name)
            if outcome.traces.status != "FINISHED":
                run.deliver(outcome)
                outcome.traces = read_traces(bed, name)
            outcome.problems = verdict(outcome.traces, calm.traces)
        outcomes.append(outcome)
        say(
            f"run={name} finished={outcome.finished} recoveries={outcome.starts - 1} seconds={outcome.seconds:.0f} "
            f"problems={'; '.join(outcome.problems) or 'none'}"
        )
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    lines = ["| seed | broken | recoveries | seconds | finished | weights equal | metrics once |", "|" + " --- |" * 7]
    for outcome in outcomes:
        equal = not any(problem.startswith("weights") for problem in outcome.problems) and outcome.finished
        once = not any(problem.startswith("metrics") for problem in outcome.problems) and outcome.finished
        broken = "; ".join(outcome.blows) or ("nothing" if outcome.seed is None else "nothing: it had ended before")
        cells = [
            "-" if outcome.seed is None else str(outcome.seed), broken, str(max(outcome.starts - 1, 0)),
            f"{outcome.seconds:.0f}", *("yes" if good else "NO" for good in (outcome.finished, equal, once)),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 0 if every run passed."""
    parser = argparse.ArgumentParser(
        prog="python -m zsr.launch.chaos", description="Training that is broken on purpose."
    )
    parser.add_argument("--runs", type=int, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first (default: %(default)s)")
    parser.add_argument("--no-network", action="store_true", help="no network namespaces: no link is cut")
    parser.add_argument("--report", type=Path, help="write the table there too")
    asked = parser.parse_args(argv)
    reason = "asked not to" if asked.no_network else why_not()
    if reason:
        print(f"network=off reason={reason!r} note='nodes share an address, and no link is cut'", flush=True)
    kinds = [kind for kind in KINDS if kind != "link" or not reason]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started here is stopped
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"t={time.monotonic() - began:.0f}s {line}", flush=True)

    say(f"stage=start nodes={NODES}")
    with Bed(NODES, None if reason else Network(NODES)) as bed:
        outcomes = run_chaos(range(asked.seed, asked.seed + asked.runs), bed, say, kinds)
    passed = sum(outcome.passed for outcome in outcomes[1:])
    text = f"{table(outcomes)}\n\n{passed} of {asked.runs} passed, in {(time.monotonic() - began) / 60:.0f} minutes."
    print(text, flush=True)
    if asked.report:
        asked.report.write_text(text + "\n")
    return 0 if passed == asked.runs else 1


def _from(first: str, names: Sequence[str]) -> list[str]:
    start = names.index(first)
    return [*names[start:], *names[:start]]


def _nothing() -> None:
    """A killed worker is Ray's to replace."""


if __name__ == "__main__":
    sys.exit(main())
