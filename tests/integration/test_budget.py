"""A sweep with a budget: it stops starting trials with a sentence, ends well, and its account is in the tracker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ray_support import head_process
from test_sweep import Command

# A minute on two idle cores, most of it the head's start.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.timeout(900)]
DOLLARS_PER_SECOND = 10


def test_no_trial_starts_when_the_money_is_spent(tmp_path: Path) -> None:
    with head_process(2) as environment:
        command = Command(tmp_path, environment)
        try:
            # What a trial takes is unknown before the first has ended: it runs, costs far more than a dollar, and is the last.
            process = command.start(
                "--num-trials=3", "--workers-per-trial=1", "--max-concurrent=1", "--multi-objective", "--max-cost=1",
                f"launch.gpu_hour_price={3600 * DOLLARS_PER_SECOND}",
            )  # fmt: skip
            output, _ = process.communicate(timeout=600)
        finally:
            command.stop()
    assert process.returncode == 0, output
    trials = command.trials()
    assert {number: trial["state"] for number, trial in trials.items()} == {0: "finished"}, output
    assert "stage=budget note='--max-cost=1: " in output
    assert "no new trial starts" in output
    assert "best trial=0" in output

    (sweep,) = tmp_path.glob(".zsr/runs/dummy-*")
    lines = [json.loads(line) for line in (sweep / "tracking" / "metrics.jsonl").read_text().splitlines()]
    account = [line["values"]["cost/usd"] for line in lines if "cost/usd" in line.get("values", {})]
    # The last entry is the bill: every second of the one trial, start-up included.
    assert account[-1] == pytest.approx(trials[0]["seconds"] * DOLLARS_PER_SECOND)
    assert account == sorted(account)
    (spool,) = sweep.glob("train/*/tracking/metrics.jsonl")
    own = [json.loads(line).get("values", {}) for line in spool.read_text().splitlines()]
    assert [values["cost/usd"] for values in own if "cost/usd" in values][-1] == pytest.approx(account[-1])
