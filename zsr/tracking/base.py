"""The shape of a tracker, and the one function that makes it from settings.

A tracker is a plug-in: a config with a ``name`` and a class in one file of this package. What all share is here:
who the run is, local copies of artifacts, and the rule that no metric is recorded twice for a step.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from zsr.config.plugins import Plugin, PluginConfig
from zsr.config.schema import TRACKERS, TrackingConfig
from zsr.engine.protocols import RunStatus
from zsr.tracking.spool import NewSteps, Spool

log = logging.getLogger("zsr.tracking")


class TrackerConfig(PluginConfig):
    """What any tracker may be told; each uses what it needs."""

    uri: str | None = None
    experiment: str = "zsr"


@dataclass(frozen=True)
class RunIdentity:
    """Which run this is, in words that survive a restart.

    Attributes:
        name: what people read.
        key: what finds the run again, such as ``{"sweep": "tima-1122", "trial": "3"}``.
        parent: key of the run that this one belongs to.
        tags: labels set when the run starts.
    """

    name: str
    key: Mapping[str, str]
    parent: Mapping[str, str] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def key_text(self) -> str:
        return key_text(self.key)


def key_text(key: Mapping[str, str]) -> str:
    """One string for a key; the same mapping gives the same string in any order.

    Raises:
        ValueError: the key is empty, or a part holds a character that a tag search could not carry.
    """
    text = "/".join(f"{name}={value}" for name, value in sorted(key.items()))
    if not text or "'" in text or "`" in text:
        raise ValueError(f"a run's key should be non-empty and without quotes, not {dict(key)!r}")
    return text


TrackerConfigT = TypeVar("TrackerConfigT", bound=TrackerConfig)


class RunTracker(Plugin[TrackerConfigT], Generic[TrackerConfigT]):
    """Base of all trackers: turns calls into records and keeps them in a spool file.

    Args:
        config: settings of this tracker.
        identity: which run it records.
        folder: the run's folder on this machine, where records and artifacts are kept.
    """

    registry: ClassVar = TRACKERS
    spool_name: ClassVar[str] = "metrics.jsonl"

    def __init__(self, config: TrackerConfigT, identity: RunIdentity, folder: Path) -> None:
        super().__init__(config)
        self.identity = identity
        self.folder = folder
        self.run_id = identity.key_text
        self.spool = Spool(folder / self.spool_name)
        self._new_steps = NewSteps()
        self._new_steps.learn(self.spool.records())
        self._record(
            "start",
            config=config.model_dump(),
            name=identity.name,
            key=dict(identity.key),
            parent=None if identity.parent is None else dict(identity.parent),
            tags=dict(identity.tags),
        )

    def log_params(self, params: Mapping[str, str | int | float]) -> None:
        self._record("params", values={key: str(value) for key, value in params.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        fresh = self._new_steps.fresh(metrics, step)
        if fresh:
            self._record("metrics", step=step, values=fresh)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        try:
            target = self.folder / "artifacts" / folder / path.name
            if path.resolve() != target.resolve():
                # A copy: the caller may overwrite or delete its file long before it can be delivered.
                target.parent.mkdir(parents=True, exist_ok=True)
                if path.is_dir():
                    shutil.copytree(path, target, dirs_exist_ok=True)
                else:
                    shutil.copy2(path, target)
            self._record("artifact", path=str(target), folder=folder)
        except OSError as error:
            log.warning("tracker=%s artifact=%s problem=%r", self.config.name, path, error)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._record("tags", values={key: str(value) for key, value in tags.items()})

    def register_model(self, name: str, folder: Path, card: str, alias: str = "best") -> None:
        """Publish the model files in ``folder``, which must stay until delivered, as the next version of ``name``."""
        self._record("model", name=name, path=str(folder), card=card, alias=alias)

    def finish(self, status: RunStatus) -> None:
        self._record("finish", status=status)

    def _record(self, kind: str, **content: Any) -> None:
        try:
            self.spool.append({"kind": kind, "time": int(time.time() * 1000), **content})
        except (OSError, ValueError, TypeError) as error:  # full disk, closed file, a value that is no JSON
            log.warning("tracker=%s lost=%s problem=%r", self.config.name, kind, error)


def make_tracker(
    config: TrackingConfig,
    *,
    run_name: str,
    key: Mapping[str, str],
    parent: Mapping[str, str] | None = None,
    folder: Path,
    tags: Mapping[str, str] | None = None,
) -> RunTracker[Any]:
    """The tracker that ``config`` names, for one run.

    Raises:
        ValueError: the settings cannot work, such as MLflow without an address.
    """
    identity = RunIdentity(run_name, dict(key), None if parent is None else dict(parent), dict(tags or {}))
    settings = TRACKERS.config_class(config.name).model_validate(config.model_dump())
    tracker: RunTracker[Any] = TRACKERS.build(settings, identity, folder)
    return tracker
