"""LocalSession: one process, checkpoints in a folder; what ``zsr train --local`` and tests use."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from zsr.engine.background import Background
from zsr.engine.shelf import Shelf, Write


class LocalSession:
    """Keeps the last ``keep`` checkpoints of a run, and the best, under ``folder/checkpoints/step-00000123``.

    Args:
        folder: of the run; made if missing.
        keep: how many checkpoints stay, beside the best.
        resume: continue from the newest sound checkpoint there; otherwise the folder must not hold any.

    Raises:
        FileExistsError: ``resume`` is off and the folder holds checkpoints, which a new run would mix with its own.
    """

    rank = 0
    world_size = 1
    local_rank = 0

    def __init__(self, folder: Path, keep: int = 2, resume: bool = True) -> None:
        self.folder = folder
        self.shelf = Shelf(folder / "checkpoints", keep)
        self._background = Background()
        if not resume and self.saved():
            raise FileExistsError(f"{folder} holds a run already; resume it, or give another output folder")

    def saved(self) -> list[Path]:
        """Checkpoints by age, oldest first."""
        return self.shelf.saved()

    def resume_from(self) -> Path | None:
        return self.shelf.newest_sound()

    def report(self, metrics: dict[str, float], checkpoint: Write | None) -> None:
        if checkpoint is not None:
            self._background.submit(partial(self.shelf.put, int(metrics["step"]), checkpoint))

    def close(self) -> None:
        self._background.wait()

    def preempted(self) -> bool:
        return False
