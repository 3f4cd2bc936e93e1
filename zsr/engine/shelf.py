"""A run's checkpoints in one folder: the last few and the best, each of them whole or not there.

folder/step-00000032/...        the newest of them that is sound is where a run goes on
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from zsr.engine.checkpoint import STATE, read_state

log = logging.getLogger("zsr.train")

NAME = re.compile(r"step-(\d{8})")
Write = Callable[[Path], None]
"""Writes a checkpoint into the folder that it is given."""


def name_of(step: int) -> str:
    """What the checkpoint of a step is called; names sort by step."""
    return f"step-{step:08d}"


def surplus(scores: Mapping[str, float | None], keep: int) -> list[str]:
    """Names that may go, when the last ``keep`` and the best are to stay; of equally good ones the first is the best."""
    names = sorted(scores)
    best = max((name for name in names if scores[name] is not None), key=lambda name: scores[name] or 0.0, default=None)
    return [name for name in names[:-keep] if name != best]


def score_in(state_json: str) -> float | None:
    """The score that a checkpoint's ``state.json`` carries; None for none, and for one that cannot be read."""
    try:
        score = json.loads(state_json).get("score")
    except (json.JSONDecodeError, AttributeError):
        return None
    return None if score is None else float(score)


class Shelf:
    """Checkpoints on a disk.

    Args:
        folder: where they lie; made if missing.
        keep: how many of the last ones stay, beside the best.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)

    def saved(self) -> list[Path]:
        """Checkpoints by age, oldest first, sound or not."""
        return sorted(path for path in self.folder.iterdir() if NAME.fullmatch(path.name))

    def put(self, step: int, write: Write) -> Path:
        """Add a checkpoint, then remove what need not stay.

        Raises:
            OSError: the disk is full or gone; what was there before is still there.
        """
        unfinished, target = self.folder / ".unfinished", self.folder / name_of(step)
        shutil.rmtree(unfinished, ignore_errors=True)
        write(unfinished)
        if target.exists():  # torn, or a run would have gone on from it
            shutil.rmtree(target)
        unfinished.rename(target)
        scores = {path.name: self._score(path) for path in self.saved()}
        for name in surplus(scores, self._keep):
            shutil.rmtree(self.folder / name)
        return target

    def newest_sound(self) -> Path | None:
        """The checkpoint to go on from. One that a crash has torn, or that has rotted, is passed over with a warning."""
        for folder in reversed(self.saved()):
            try:
                read_state(folder)
            except ValueError as error:
                log.warning("checkpoint=%s state=torn problem=%r", folder.name, str(error))
                continue
            return folder
        return None

    def fetch(self, name: str) -> Path:
        """Folder of the checkpoint with this name, on this machine."""
        return self.folder / name

    def _score(self, folder: Path) -> float | None:
        try:
            return score_in((folder / STATE).read_text())
        except OSError:
            return None
