"""A sweep with a budget: it stops with a sentence, ends well, goes on with more money, and pays for no queue."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray_support import head_process, starts
from test_sweep import Command

# Two minutes on two idle cores, most of it the start of the head and of two drivers.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.timeout(1500)]
DOLLARS_PER_SECOND = 10
QUEUE_S = 30.0
PATIENCE_S = 600

HOLDER = """
import ray, sys
ray.init(log_to_driver=False, logging_level="ERROR")
group = ray.util.placement_group([{"CPU": 2}])
assert group.wait(60)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def everything_taken(environment: dict[str, str]) -> Iterator[None]:
    """Another job holds all of the cluster."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        yield
    finally:
        holder.communicate(timeout=60)


def test_a_budget_stops_a_sweep_that_a_larger_one_continues_and_queueing_is_free(tmp_path: Path) -> None:
    with head_process(2) as environment:
        command = Command(tmp_path, environment)
        try:
            with everything_taken(environment):
                # What a trial takes is unknown before the first has ended: it runs, costs far more than a dollar, and is the
                # last.
                process = command.start(
                    "--num-trials=3", "--workers-per-trial=1", "--max-concurrent=1", "--max-cost=1",
                    f"launch.gpu_hour_price={3600 * DOLLARS_PER_SECOND}",
                )  # fmt: skip
                deadline = time.monotonic() + PATIENCE_S
                while not [trial for trial in command.trials().values() if trial["state"] == "running"]:
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(0.1)
                asked_at = time.monotonic()
                time.sleep(QUEUE_S)
                assert not starts(tmp_path / "diary"), "or nothing waited"
            free_at = time.monotonic()
            while command.trials()[0]["state"] == "running" and process.poll() is None:
                time.sleep(0.1)
            ended_at = time.monotonic()
            output, _ = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0, output
            trials = command.trials()
            assert {number: trial["state"] for number, trial in trials.items()} == {0: "finished"}, output
            assert "stage=budget note='--max-cost=1: " in output
            assert "no new trial starts" in output
            assert "best trial=0" in output

            seconds = trials[0]["seconds"]
            assert 8 * 0.1 <= seconds <= ended_at - free_at + 1, (
                "eight steps of 0.1 s at least; waiting is not among them"
            )
            assert seconds <= ended_at - asked_at - QUEUE_S + 1
            (bill,) = bills(tmp_path)
            assert bill == pytest.approx(seconds * DOLLARS_PER_SECOND)

            again = command.start("--resume")
            refused, _ = again.communicate(timeout=PATIENCE_S)
            assert again.returncode == 2, refused
            found = re.search(
                r"--max-cost=1: the budget is spent, \S+ on 1 of 3 trials; go on with --resume --max-cost=(\S+)",
                refused,
            )
            assert found, refused

            # As much as the sentence names is enough for one trial more, and not for two.
            process = command.start("--resume", f"--max-cost={found[1]}")
            output, _ = process.communicate(timeout=PATIENCE_S)
        finally:
            command.stop()
    assert process.returncode == 0, output
    trials = command.trials()
    states = {number: trial["state"] for number, trial in trials.items()}
    # The first point is the best one, so that the scheduler may stop what comes later.
    assert states[0] == "finished" and {*states.values()} <= {"finished", "pruned"} and len(states) > 1, output
    # A trial that happened to take less than the first leaves money for a third; else the sentence is said again.
    assert (f"stage=budget note='--max-cost={float(found[1]):g}: " in output) == (len(states) == 2)
    assert len(starts(tmp_path / "diary")) == len(states), "no trial ran twice"
    assert trials[0]["seconds"] == seconds
    assert sorted(bills(tmp_path)) == pytest.approx(sorted(t["seconds"] * DOLLARS_PER_SECOND for t in trials.values()))

    (sweep,) = tmp_path.glob(".zsr/runs/dummy-*")
    lines = [json.loads(line) for line in (sweep / "tracking" / "metrics.jsonl").read_text().splitlines()]
    account = [line["values"]["cost/usd"] for line in lines if "cost/usd" in line.get("values", {})]
    # The last entry is the bill: every second that a trial held its workers, start-up included.
    assert account[-1] == pytest.approx(sum(t["seconds"] for t in trials.values()) * DOLLARS_PER_SECOND)
    assert account == sorted(account)


def bills(folder: Path) -> list[float]:
    """What each trial's own record says that it cost."""
    found = []
    for spool in folder.glob(".zsr/runs/dummy-*/train/*/tracking/metrics.jsonl"):
        values = [json.loads(line).get("values", {}) for line in spool.read_text().splitlines()]
        found.append([each["cost/usd"] for each in values if "cost/usd" in each][-1])
    return found
