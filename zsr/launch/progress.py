"""What the screen says while a sweep runs: one line when something happens to a trial, and a sign of life in between.

The same callback keeps the trial book, since it is the one place that learns everything in order.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray import tune
from ray.util import placement_group_table

from zsr.launch.capacity import Demand
from zsr.launch.cluster import current_capacity
from zsr.launch.guard import find_flags
from zsr.launch.plan import TRIAL_START_S, Plan, duration
from zsr.launch.trials import PLACE, Tenure, TrialBook, TrialRecord, TrialState

QUIET_S = 15.0
"""Longest silence before a sign of life."""

LOOK_S = 1.0
"""Pause between two looks at which places are held; by so much a trial's time may be wrong."""

SILENT_S = 600.0
"""Time without any report from a trial after which something may be wrong."""


class Progress(tune.Callback):
    """Prints trials and writes them down.

    Args:
        plan: of the sweep.
        book: where trials are written down.
        concurrent: trials at once.
    """

    def __init__(self, plan: Plan, book: TrialBook, concurrent: int) -> None:
        self._book = book
        self._metrics = [name for name, _ in plan.metrics]
        self._num_trials, self._steps, self._concurrent = plan.num_trials, plan.steps, concurrent
        self._expected_s = plan.trial_s
        self._demand = Demand.of(plan.config.launch)
        self._begin()

    def _begin(self) -> None:
        self._tenure, self._looked = Tenure(), 0.0
        self._started = self._spoken = self._heard = time.monotonic()
        self._running: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_tenure", "_running")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()  # clocks of another process mean nothing here

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._page(trial)
        record.state = "running"
        record.attempts += 1
        self._keep(trial, record)
        self._running[trial.trial_id] = time.monotonic()
        verb = "continues" if record.attempts > 1 else "starts"
        chosen = " ".join(f"{key}={_short(value)}" for key, value in record.point.items())
        self._say(f"trial={record.number} state={verb} (about {TRIAL_START_S:.0f}s to the first step) {chosen}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        self._heard = time.monotonic()
        if PLACE in result:  # the workers run, and have nothing else to say yet
            self._tenure.settle(trial.trial_id, result[PLACE])
            return
        record = self._page(trial)
        measured = dict(result["measured"])
        if not result.get("ended"):
            record.history.append(measured)
        record.metrics = measured or record.metrics
        record.flags = find_flags(measured)
        record.checkpoint = result.get("checkpoint_path") or record.checkpoint
        record.error = result.get("error") or record.error
        if result.get("ended") in ("finished", "diverged"):
            # Set before Tune calls the trial complete: a sweep that dies in between must not run it again.
            record.state = result["ended"]
        self._keep(trial, record)
        if not result.get("ended"):
            step = f"{measured.get('step', 0):.0f}/{self._steps or '?'}"
            self._say(f"trial={record.number} step={step} {_numbers(measured)} elapsed={duration(record.seconds)}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._page(trial)
        self._end(trial, record, record.state if record.ended else "pruned")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._page(trial)
        record.error = _last_line(trial)
        self._end(trial, record, "failed")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(f"trial={self._page(trial).number} state=retrying problem={_last_line(trial)!r}")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        if now - self._looked >= LOOK_S and self._running:
            self._look()
        if now - self._spoken < QUIET_S or not self._running:
            return
        waiting = " ".join(
            f"trial={self._number(trials, name)} for={duration(now - since)}" for name, since in self._running.items()
        )
        note = self._lack_of_nodes()
        if not note and now - self._heard > SILENT_S:
            note = " note='no report for long; `ray status` and the dashboard show what the workers do'"
        self._say(f"running {waiting} {self._totals()}{note}")

    def _lack_of_nodes(self) -> str:
        """A sentence if workers have no place yet: Ray lets them wait for nodes without a word."""
        groups = placement_group_table().values()
        num = sum(group["state"] == "PENDING" and len(group["bundles"]) == self._demand.workers for group in groups)
        if not num:
            return ""
        there = current_capacity().describe()
        return f" waiting={num} note='no place yet for {num} trials, each of {self._demand}; there are {there}'"

    def _end(self, trial: Any, record: TrialRecord, state: TrialState) -> None:
        record.state = state
        self._keep(trial, record)
        self._running.pop(trial.trial_id, None)
        extra = "".join(f" flag={flag}" for flag in record.flags)
        extra += f" problem={record.error!r}" if record.error else ""
        self._say(
            f"trial={record.number} state={state} {_numbers(record.metrics)}{extra} took={duration(record.seconds)} "
            f"{self._totals()}"
        )

    def _totals(self) -> str:
        records = self._book.all()
        ended = [record for record in records if record.ended]
        text = f"done={len(ended)}/{self._num_trials} elapsed={duration(time.monotonic() - self._started)}"
        left = self._num_trials - len(ended)
        if left:
            seconds = self._seconds_per_trial(records)
            gone = sum(time.monotonic() - since for since in self._running.values())
            if seconds is None or gone >= left * seconds:  # longer than planned, and nothing reported yet
                text += " eta=unknown"
            else:
                text += f" eta={duration((left * seconds - gone) / min(self._concurrent, left))}"
        return text

    def _seconds_per_trial(self, records: Sequence[TrialRecord]) -> float | None:
        """What a trial takes: what the ended ones took, else as running ones promise, else as planned."""
        ended = [record.seconds for record in records if record.state == "finished"]
        if ended:
            return sum(ended) / len(ended)
        steps = self._steps or 0
        promised = [r.seconds * steps / r.metrics["step"] for r in records if r.metrics.get("step") and steps]
        return max(promised) if promised else self._expected_s

    def _page(self, trial: Any) -> TrialRecord:
        number = trial.config["number"]
        return self._book.create(number, trial.trial_id, trial.config["point"])

    def _number(self, trials: Sequence[Any], trial_id: str) -> int:
        return next(int(trial.config["number"]) for trial in trials if trial.trial_id == trial_id)

    def _look(self) -> None:
        groups = placement_group_table().items()
        self._looked = time.monotonic()
        self._tenure.look([place for place, group in groups if group["state"] == "CREATED"], self._looked)

    def _keep(self, trial: Any, record: TrialRecord) -> None:
        self._look()
        record.seconds += self._tenure.lap(trial.trial_id)
        self._book.write(record)

    def _say(self, line: str) -> None:
        print(line, flush=True)
        self._spoken = time.monotonic()


def _numbers(metrics: Mapping[str, float]) -> str:
    shown = {"clean_acc": "val/clean_acc", "robust_acc": "val/robust_acc"}
    return " ".join(f"{name}={metrics[key]:.4f}" for name, key in shown.items() if key in metrics)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _last_line(trial: Any) -> str:
    """The last line of a trial's error, which names what went wrong; the rest is in Ray's logs."""
    text = str(trial.get_pickled_error() or trial.get_error() or "").strip()
    return text.splitlines()[-1][:300] if text else "unknown"
