"""What a sweep will ask for: trials, workers, hours, price. Worked out before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zsr.config import RunConfig
from zsr.launch.cost import Budget, Rate
from zsr.launch.space import Point
from zsr.launch.strong import Finalists

TRIAL_START_S = 25.0
"""From asking for a trial to its first step: workers start and import torch. Measured on two CPU cores: 20 to 30 s."""


@dataclass(frozen=True)
class Plan:
    """One sweep, settled.

    Attributes:
        name: of the sweep.
        tree: settings that all trials share, as plain data.
        config: the same, checked: what a trial is without the space's choices.
        points: samples of the space that were checked.
        metrics: objectives with their modes.
        num_trials: trials in all.
        max_concurrent: trials at once, if the caller limits them.
        steps: optimizer steps of a trial; ``None`` if its data could not be read from here.
        step_s: seconds a step takes, evaluation included, if known.
        seed: of the search.
        test_sets: on which the best trial is compared with the untouched model at the end.
        finalists: which trials are measured again by a strong attack, and how.
        max_cost: dollars after which no new trial starts; 0 for no limit.
    """

    name: str
    tree: Mapping[str, Any]
    config: RunConfig
    points: list[Point]
    metrics: tuple[tuple[str, str], ...]
    num_trials: int
    max_concurrent: int | None
    steps: int | None
    step_s: float | None
    seed: int
    test_sets: tuple[str, ...] = ()
    finalists: Finalists = field(default_factory=Finalists)
    max_cost: float = 0.0

    @property
    def rate(self) -> Rate:
        return Rate.of(self.config.launch)

    @property
    def budget(self) -> Budget | None:
        return Budget(self.max_cost, self.rate, self.trial_s) if self.max_cost else None

    @property
    def multi_objective(self) -> bool:
        return len(self.metrics) > 1

    @property
    def cpus_per_trial(self) -> float:
        return self.config.launch.workers * self.config.launch.cpus_per_worker

    @property
    def gpus_per_trial(self) -> float:
        return self.config.launch.workers * self.config.launch.gpus_per_worker

    @property
    def trial_s(self) -> float | None:
        """Seconds that one trial takes, if it can be said."""
        if self.steps is None or self.step_s is None:
            return None
        return TRIAL_START_S + self.steps * self.step_s

    def sweep_s(self, concurrent: int) -> float | None:
        """Seconds that the sweep takes with so many trials at once; scheduling may end trials sooner."""
        return None if self.trial_s is None else math.ceil(self.num_trials / max(concurrent, 1)) * self.trial_s

    def lines(self, concurrent: int | None = None) -> list[str]:
        """The plan for people, a ``key=value`` line per part."""
        config, launch = self.config, self.config.launch
        at_once = concurrent or self.max_concurrent or 1
        objectives = " ".join(f"{mode}({metric})" for metric, mode in self.metrics)
        lines = [
            f"plan sweep={self.name} objective={config.objective.name} architecture={config.model.name} search={objectives}",
            f"plan trials={self.num_trials} at_once={concurrent or self.max_concurrent or 'as many as fit'} "
            f"workers_per_trial={launch.workers} cpus_per_trial={self.cpus_per_trial:g} gpus_per_trial={self.gpus_per_trial:g}",
            f"plan steps_per_trial={self.steps or 'unknown'} batch_size={config.train.batch_size} "
            f"checked_points={len(self.points)} storage={launch.storage}",
            f"plan finalists={self.finalists.count} attack={self.finalists.attack['name']} on={config.data.val} "
            f"samples={self.finalists.num_samples or 'all'}",
        ]
        if self.trial_s is None:
            lines.append("plan time=unknown note='the first trial will tell; a trial takes about 25 s to start'")
            return lines
        total_s = self.sweep_s(at_once) or 0.0
        rate, seconds = self.rate, self.num_trials * self.trial_s
        price = f" cost={rate.cost(seconds):.2f}" if rate.usd else ""
        lines.append(
            f"plan time_per_trial={duration(self.trial_s)} time={duration(total_s)} (at {at_once} at once) "
            f"{rate.unit}_hours={rate.hours(seconds):.3g}{price}"
        )
        if self.max_cost and rate.cost(seconds) > self.max_cost:
            affordable = int(self.max_cost // rate.cost(self.trial_s))
            lines.append(
                f"plan max_cost={self.max_cost:g} note='enough for about {affordable} of {self.num_trials} trials'"
            )
        return lines


def count_trial_steps(config: RunConfig) -> int | None:
    """Optimizer steps of one run, or ``None`` when its training set cannot be read from here."""
    from zsr.data.pipeline import num_steps_per_epoch
    from zsr.data.shards import ShardSet

    try:
        shards = ShardSet(config.data.train, config.data.cache_dir)
        per_epoch = num_steps_per_epoch(shards, config.train.batch_size, config.data.last_batch)
    except (OSError, ValueError):
        return config.train.max_steps or None
    planned = per_epoch * config.train.epochs
    return min(planned, config.train.max_steps) if config.train.max_steps else planned


def duration(seconds: float) -> str:
    """``45s``, ``3m20s`` or ``5h10m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
