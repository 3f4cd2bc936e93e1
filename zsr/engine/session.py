"""LocalSession: one process, checkpoints in a folder; what ``zsr train --local`` and tests use."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from zsr.engine.checkpoint import read_state

_NAME = re.compile(r"step-(\d+)")


class LocalSession:
    """Keeps the last ``keep`` checkpoints of a run under ``folder/checkpoints/step-00000123``.

    Args:
        folder: of the run; made if missing.
        keep: how many checkpoints stay.
        resume: continue from the newest sound checkpoint there; otherwise the folder must not hold any.

    Raises:
        FileExistsError: ``resume`` is off and the folder holds checkpoints, which a new run would mix with its own.
    """

    rank = 0
    world_size = 1
    local_rank = 0

    def __init__(self, folder: Path, keep: int = 2, resume: bool = True) -> None:
        self.folder = folder
        self.keep = keep
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if not resume and self.saved():
            raise FileExistsError(f"{folder} holds a run already; resume it, or give another output folder")

    def saved(self) -> list[Path]:
        """Checkpoints by age, oldest first."""
        return sorted(path for path in self.checkpoints.iterdir() if _NAME.fullmatch(path.name))

    def resume_from(self) -> Path | None:
        for folder in reversed(self.saved()):
            try:
                read_state(folder)
            except ValueError:
                continue  # torn by a crash while it was written: the one before it counts
            return folder
        return None

    def report(self, metrics: dict[str, float], checkpoint: Path | None) -> None:
        if checkpoint is None:
            return
        target = self.checkpoints / f"step-{int(metrics['step']):08d}"
        if target.exists():
            shutil.rmtree(target)
        shutil.move(checkpoint, target)
        for old in self.saved()[: -self.keep]:
            shutil.rmtree(old)

    def preempted(self) -> bool:
        return False
