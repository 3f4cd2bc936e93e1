"""What trials cost: hours of what is paid for, money by a table of prices, and a budget that stops new trials."""

from __future__ import annotations

import contextlib
import difflib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from zsr.config import ConfigError, RunConfig
from zsr.config.schema import LaunchConfig
from zsr.engine.protocols import Tracker
from zsr.launch.store import Store
from zsr.launch.trials import TrialBook, TrialRecord

METER_S = 30.0
"""Pause between two looks at what a sweep has cost so far."""

BUDGET_FILE = "budget.json"

PRICES = Path(__file__).with_name("prices.yaml")


@dataclass(frozen=True)
class Rate:
    """What a second of a trial is: paid GPU-hours, or CPU-hours where there are no GPUs.

    Attributes:
        unit: what is paid for.
        amount: GPUs or CPUs that a trial holds.
        usd: price of an hour of one; 0 if nobody said it.
    """

    unit: Literal["gpu", "cpu"]
    amount: float
    usd: float

    @classmethod
    def of(cls, launch: LaunchConfig) -> Rate:
        """
        Raises:
            ConfigError: ``launch.machine`` is not in the table.
        """
        unit: Literal["gpu", "cpu"] = "gpu" if launch.gpus_per_worker else "cpu"
        each = launch.gpus_per_worker or launch.cpus_per_worker
        return cls(unit, launch.workers * each, hour_price(launch, unit))

    def hours(self, seconds: float) -> float:
        return self.amount * seconds / 3600

    def cost(self, seconds: float) -> float:
        """In dollars."""
        return self.hours(seconds) * self.usd

    def metrics(self, seconds: float) -> dict[str, float]:
        """For the tracker: ``cost/gpu_hours`` or ``cost/cpu_hours``, and ``cost/usd`` if there is a price."""
        found = {f"cost/{self.unit}_hours": self.hours(seconds)}
        return {**found, "cost/usd": self.cost(seconds)} if self.usd else found


def hour_price(launch: LaunchConfig, unit: Literal["gpu", "cpu"]) -> float:
    """Price of one GPU-hour (CPU-hour): ``launch.gpu_hour_price``, else that of ``launch.machine`` in the table, else 0.

    Raises:
        ConfigError: the machine is not in the table, or has none of what is paid for.
    """
    if launch.gpu_hour_price or not launch.machine:
        return launch.gpu_hour_price
    table = load_prices(launch.prices)
    if launch.machine not in table:
        close = difflib.get_close_matches(launch.machine, table, n=3, cutoff=0.3) or sorted(table)
        raise ConfigError(
            f"launch.machine={launch.machine}: not in the table of prices; there is {', '.join(close)}, and launch.prices "
            "names a file with others"
        )
    entry = table[launch.machine]
    if not entry[f"{unit}s"]:
        raise ConfigError(f"launch.machine={launch.machine}: it has no {unit.upper()}s, which this run asks for")
    return float(entry["usd"] / entry[f"{unit}s"])


def load_prices(over: str | None) -> dict[str, dict[str, float]]:
    """The package's table with the file ``over`` laid on top.

    Raises:
        ConfigError: the file cannot be read, or an entry lacks a number.
    """
    table: dict[str, Any] = yaml.safe_load(PRICES.read_text())
    if over:
        try:
            more = yaml.safe_load(Path(over).expanduser().read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"launch.prices={over}: {error}; name a YAML file in the form of {PRICES.name}") from None
        if not isinstance(more, Mapping):
            raise ConfigError(f"launch.prices={over}: expected machines with usd, gpus and cpus, as in {PRICES.name}")
        table |= more
    for machine, entry in table.items():
        numbers = [entry.get(key) for key in ("usd", "gpus", "cpus")] if isinstance(entry, Mapping) else [None]
        if not all(isinstance(number, (int, float)) and number >= 0 for number in numbers):
            raise ConfigError(
                f"launch.prices={over}: {machine} should have usd, gpus and cpus, none below 0, not {entry}"
            )
    return table


def priced(config: RunConfig) -> RunConfig:
    """The same settings with the price of an hour looked up, so that workers need no table.

    Raises:
        ConfigError: see :func:`hour_price`.
    """
    price = Rate.of(config.launch).usd
    return config.model_copy(update={"launch": config.launch.model_copy(update={"gpu_hour_price": price})})


@dataclass(frozen=True)
class Budget:
    """How much a sweep may cost.

    Attributes:
        usd: the limit.
        rate: what a trial's second costs.
        trial_s: seconds that a trial is planned to take, if known.
    """

    usd: float
    rate: Rate
    trial_s: float | None

    def refusal(self, trials: Sequence[TrialRecord]) -> str | None:
        """Why no new trial may start: what was spent, what running trials will still cost and a new one are too much.

        A trial is expected to take what finished ones took on average, before that what was planned. Where neither is known,
        only what was spent counts.
        """
        spent, ahead, new = self._account(trials)
        if spent + ahead + new <= self.usd and spent < self.usd:
            return None
        running = sum(not trial.ended for trial in trials)
        return (
            f"--max-cost={self.usd:g}: {spent:.2f} spent, {ahead:.2f} still to come for {running} running trials and "
            f"{new:.2f} for another one are more; no new trial starts; --resume with a larger --max-cost goes on"
        )

    def spent_up(self, trials: Sequence[TrialRecord], num_trials: int) -> str | None:
        """Why a resume would change nothing: none of so many trials is under way, some are left, and there is no money."""
        if len(trials) >= num_trials or not all(trial.ended for trial in trials) or not self.refusal(trials):
            return None
        spent, _, new = self._account(trials)
        enough = math.ceil(100 * (spent + new)) / 100 + 0.01
        return (
            f"--max-cost={self.usd:g}: the budget is spent, {spent:.2f} on {len(trials)} of {num_trials} trials; go on with "
            f"--resume --max-cost={enough:.2f} or more"
        )

    def _account(self, trials: Sequence[TrialRecord]) -> tuple[float, float, float]:
        """Dollars that were spent, that running trials will still cost, and that a new trial will."""
        finished = [trial.seconds for trial in trials if trial.state == "finished"]
        expected_s = sum(finished) / len(finished) if finished else self.trial_s or 0.0
        running = [trial for trial in trials if not trial.ended]
        return (
            self.rate.cost(sum(trial.seconds for trial in trials)),
            self.rate.cost(sum(max(expected_s - trial.seconds, 0.0) for trial in running)),
            self.rate.cost(expected_s),
        )


def keep_budget(budget: Budget | None, store: Store) -> None:
    """Lay the budget into the sweep's folder, where the search looks before each trial: a resume may bring another one.

    Raises:
        OSError: the storage does not answer.
    """
    store.write_json(asdict(budget) if budget else None, BUDGET_FILE)


def find_budget(store: Store) -> Budget | None:
    """What ``keep_budget`` kept last; ``None`` for a sweep without a limit.

    Raises:
        OSError: the storage does not answer.
    """
    found = store.read_json(BUDGET_FILE)
    return Budget(found["usd"], Rate(**found["rate"]), found["trial_s"]) if found else None


@contextlib.contextmanager
def cost_meter(tracker: Tracker, book: TrialBook, rate: Rate, every_s: float = METER_S) -> Iterator[None]:
    """Record what a sweep has cost while the block runs, and once more at its end.

    The step is the seconds of all trials so far: it never falls, and a resumed sweep goes on with it.
    """
    ended = threading.Event()

    def record() -> None:
        seconds = sum(trial.seconds for trial in book.all())
        tracker.log_metrics(rate.metrics(seconds), step=int(seconds))

    def run() -> None:
        while not ended.wait(every_s):
            with contextlib.suppress(OSError):  # storage away for a moment: the next look will do
                record()

    thread = threading.Thread(target=run, name="cost", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            record()
