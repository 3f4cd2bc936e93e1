"""Where the numbers of a run go: nowhere (null), a file beside the run (jsonl), or an MLflow server (mlflow)."""

from zsr.tracking.base import RunTracker, make_tracker

__all__ = ["RunTracker", "make_tracker"]
