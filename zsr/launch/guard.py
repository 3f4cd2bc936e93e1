"""What a search may believe: a sweep that maximises robust accuracy would otherwise find the models that hide gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

ZERO_GRAD_LIMIT = 0.05
"""Share of validation samples whose input gradient is all zero above which a robust accuracy is not believed: an attack
that sees no gradient says nothing (gradient masking)."""


def worst(mode: str) -> float:
    """What an objective counts as when a trial has no honest value; without one the search would wait for ever."""
    return 0.0 if mode == "max" else 1e6


def find_flags(metrics: Mapping[str, float]) -> list[str]:
    """Reasons not to believe a trial's robust accuracy."""
    share = metrics.get("val/zero_grad_frac", 0.0)
    return [f"zero_grad_frac={share:.3g}>{ZERO_GRAD_LIMIT:g}"] if share > ZERO_GRAD_LIMIT else []


def honest(metrics: Mapping[str, float], objectives: Sequence[tuple[str, str]]) -> dict[str, float]:
    """The objectives as the search may see them: the worst value for what is not finite or not to be believed."""
    flagged = bool(find_flags(metrics))
    seen = {}
    for name, mode in objectives:
        value = metrics.get(name, math.nan)
        distrusted = not math.isfinite(value) or (flagged and "robust" in name)
        seen[name] = worst(mode) if distrusted else float(value)
    return seen
