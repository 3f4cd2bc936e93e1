"""What a search may believe: a sweep that maximises robust accuracy would otherwise find the models that hide gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from zsr.attacks.checks import LEVELS

CHECK = "val/check/"
"""Before a check's id, the metric that holds its level."""


def worst(mode: str) -> float:
    """What an objective counts as when a trial has no honest value; without one the search would wait for ever."""
    return 0.0 if mode == "max" else 1e6


def check_levels(metrics: Mapping[str, float]) -> dict[str, str]:
    """Levels of the checks that a trial has been through, by id."""
    return {
        name.removeprefix(CHECK): LEVELS[int(value)]
        for name, value in sorted(metrics.items())
        if name.startswith(CHECK) and value in range(len(LEVELS))
    }


def find_flags(metrics: Mapping[str, float]) -> list[str]:
    """Reasons not to believe a trial's robust accuracy: the checks that failed, by id."""
    return [name for name, level in check_levels(metrics).items() if level == "fail"]


def honest(metrics: Mapping[str, float], objectives: Sequence[tuple[str, str]]) -> dict[str, float]:
    """The objectives as the search may see them: the worst value for what is not finite or not to be believed."""
    flagged = bool(find_flags(metrics))
    seen = {}
    for name, mode in objectives:
        value = metrics.get(name, math.nan)
        distrusted = not math.isfinite(value) or (flagged and "robust" in name)
        seen[name] = worst(mode) if distrusted else float(value)
    return seen
