"""Records nothing: for the ranks that do not track, and for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from zsr.tracking.base import RunIdentity, RunTracker, TrackerConfig


class NullConfig(TrackerConfig):
    """No settings of its own."""

    name: Literal["null"] = "null"


class NullTracker(RunTracker[NullConfig]):
    """Takes every call, keeps nothing and touches no disk."""

    def __init__(
        self, config: NullConfig | None = None, identity: RunIdentity | None = None, folder: Path | None = None
    ) -> None:
        self.config = config or NullConfig()
        self.identity = identity or RunIdentity("null", {"run": "null"})
        self.folder = folder or Path()
        self.run_id = self.identity.key_text

    def log_metrics(self, metrics: Any, step: int) -> None:
        pass

    def log_artifact(self, path: Path, folder: str = "") -> None:
        pass

    def _record(self, kind: str, **content: Any) -> None:
        pass
