"""A sweep's search space: sampled points become dotted overrides, and are checked before any resource is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zsr.config import ConfigError, RunConfig, apply_overrides, validate

if TYPE_CHECKING:
    import optuna

Point = Mapping[str, Any]
Space = Callable[["optuna.trial.BaseTrial", RunConfig], Point]
"""Gives a point for an Optuna trial. It is shown the settings that all trials share, so that a range can be relative to
the preset's own value, and one space serves every preset."""

NUM_CHECKED_POINTS = 64


def point_overrides(point: Point) -> list[str]:
    """The overrides that a point means, as they would be written on the command line."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in point.items()]


def point_config(tree: Mapping[str, Any], point: Point) -> RunConfig:
    """The whole configuration of one trial.

    Args:
        tree: settings that all trials share.
        point: what the space chose.

    Raises:
        ConfigError: the point does not fit.
    """
    return validate(apply_overrides(tree, point_overrides(point)))


def check_space(tree: Mapping[str, Any], space: Space, seed: int, num_points: int = NUM_CHECKED_POINTS) -> list[Point]:
    """Draw points at random, build each one's configuration, and return the points.

    Raises:
        ConfigError: with a sentence for the first point that does not fit, and that point.
    """
    import optuna  # not above: every trial's processes import this module too

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    base = validate(tree)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    points: list[Point] = []
    for number in range(num_points):
        point = space(study.ask(), base)
        try:
            point_config(tree, point)
        except ConfigError as error:
            drawn = ", ".join(point_overrides(point))
            raise ConfigError(
                f"{error} (drawn from the search space, point {number + 1} of {num_points}: {drawn})"
            ) from None
        points.append(dict(point))
    return points


def swept_keys(points: Sequence[Point]) -> list[str]:
    """Every setting that some point sets, in order of appearance."""
    return list(dict.fromkeys(key for point in points for key in point))
