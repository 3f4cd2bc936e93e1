"""Records in ``metrics.jsonl`` of the run's folder: one JSON object a line, artifacts copied beside it."""

from __future__ import annotations

from typing import Literal

from zsr.tracking.base import RunTracker, TrackerConfig


class JsonlConfig(TrackerConfig):
    """No settings of its own; the file lies in the run's folder."""

    name: Literal["jsonl"] = "jsonl"


class JsonlTracker(RunTracker[JsonlConfig]):
    """The record file itself is the result. A restart of the run continues it and repeats no step."""
