"""What every run records at its start and at its end, whoever carries it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zsr.config import RunConfig, to_yaml
from zsr.tracking.base import RunTracker, log
from zsr.tracking.environment import describe_environment
from zsr.tracking.null import NullTracker
from zsr.tracking.plots import plot_run
from zsr.tracking.spool import history


def record_start(tracker: RunTracker[Any], config: RunConfig, swept: Mapping[str, Any] | None = None) -> None:
    """Record who the run is: few params, so that a table of runs stays readable; all settings as a file.

    Args:
        tracker: where to.
        config: the run's settings.
        swept: dotted settings that differ between the runs to be compared.
    """
    if isinstance(tracker, NullTracker):
        return
    tracker.log_params(comparison_params(config, swept or {}))
    tracker.set_tags(
        {
            "zsr.digest": config.digest(),
            "zsr.method": config.objective.name,
            "zsr.architecture": config.model.name,
            "zsr.eps": _short(getattr(config.attack, "eps", 0.0)),
        }
    )
    _write_artifact(tracker, "config.yaml", to_yaml(config))
    _write_artifact(tracker, "environment.json", json.dumps(describe_environment(), indent=1))


def record_end(tracker: RunTracker[Any], metrics: Mapping[str, float]) -> None:
    """Record the final metrics as a file and the curves as a picture; the status is the caller's to set."""
    if isinstance(tracker, NullTracker):
        return
    _write_artifact(tracker, "result.json", json.dumps(dict(metrics), indent=1))
    picture = tracker.folder / "curves.png"
    try:
        if plot_run(history(tracker.folder), picture, tracker.identity.name):
            tracker.log_artifact(picture)
    except Exception as error:  # a picture is never worth a run
        log.warning("tracker plot=failed problem=%r", str(error)[:200])


def comparison_params(config: RunConfig, swept: Mapping[str, Any]) -> dict[str, str | int | float]:
    """Method, architecture, epsilon and the swept settings with the names that the sweep gives them."""
    params: dict[str, str | int | float] = {
        "method": config.objective.name,
        "architecture": config.model.name,
        "eps": _short(getattr(config.attack, "eps", 0.0)),
    }
    for key, value in swept.items():
        if isinstance(value, float):
            params[key] = f"{value:.4g}"  # a column to read; config.yaml has every digit
        else:
            params[key] = value if isinstance(value, (int, str)) else json.dumps(value)
    return params


def _short(eps: float) -> str:
    """A pixel budget as people write it: 4/255 where it is a whole number of those, else the number."""
    units = eps * 255
    return f"{round(units)}/255" if eps and abs(units - round(units)) < 1e-6 else f"{eps:g}"


def _write_artifact(tracker: RunTracker[Any], name: str, text: str) -> None:
    try:
        path = Path(tracker.folder) / "artifacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        tracker.log_artifact(path)
    except OSError as error:
        log.warning("tracker artifact=%s problem=%r", name, error)
