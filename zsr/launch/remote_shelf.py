"""A run's checkpoints in a bucket: what zsr/engine/shelf.py does on a disk, with uploads that outlast a short outage."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pyarrow.fs import FileSelector, FileSystem, FileType, copy_files

from zsr.engine.checkpoint import STATE, read_state
from zsr.engine.shelf import NAME, Write, name_of, score_in, surplus

log = logging.getLogger("zsr.train")

PATIENCE_S = 300.0
"""How long a storage that does not answer is asked again. Training goes on meanwhile, up to the next checkpoint."""

Answer = TypeVar("Answer")


class RemoteShelf:
    """Checkpoints under an address that pyarrow can open.

    Args:
        address: such as ``s3://bucket/run/checkpoints``.
        scratch: folder of this machine through which checkpoints pass.
        keep: how many of the last ones stay, beside the best.
    """

    def __init__(self, address: str, scratch: Path, keep: int) -> None:
        self._address, self._scratch, self._keep = address.rstrip("/"), scratch, keep

    def names(self) -> list[str]:
        """Checkpoints by age, oldest first, whole or not."""
        filesystem, root = self._open()
        found = filesystem.get_file_info(FileSelector(root, allow_not_found=True))
        return sorted(i.base_name for i in found if i.type == FileType.Directory and NAME.fullmatch(i.base_name))

    def put(self, step: int, write: Write) -> str:
        """Add a checkpoint, then remove what need not stay; return its address.

        Raises:
            OSError: the storage did not answer for ``PATIENCE_S``, or refused.
        """
        local = self._scratch / "unfinished-checkpoint"
        shutil.rmtree(local, ignore_errors=True)
        write(local)
        patiently(lambda: self._upload(local, name_of(step)))
        shutil.rmtree(local)
        patiently(self._tidy)
        return f"{self._address}/{name_of(step)}"

    def newest_sound(self) -> Path | None:
        """A local copy of the checkpoint to go on from; torn ones are passed over with a warning."""
        for name in reversed(patiently(self.names)):
            try:
                return self.fetch(name)
            except ValueError as error:
                log.warning("checkpoint=%s state=torn problem=%r", name, str(error))
        return None

    def fetch(self, name: str) -> Path:
        """A local copy of the checkpoint with this name.

        Raises:
            ValueError: it is torn.
            OSError: the storage did not answer for ``PATIENCE_S``.
        """
        local = self._scratch / "resume" / name
        shutil.rmtree(local.parent, ignore_errors=True)
        local.mkdir(parents=True)

        def download() -> None:
            filesystem, root = self._open()
            copy_files(f"{root}/{name}", str(local), source_filesystem=filesystem, use_threads=False)

        patiently(download)
        read_state(local)
        return local

    def _upload(self, local: Path, name: str) -> None:
        filesystem, root = self._open()
        target = f"{root}/{name}"
        with_state_last = sorted(local.iterdir(), key=lambda file: (file.name == STATE, file.name))
        if filesystem.get_file_info(f"{target}/{STATE}").type != FileType.NotFound:
            filesystem.delete_file(f"{target}/{STATE}")  # of a torn one: not a checkpoint from here on
        filesystem.create_dir(target, recursive=True)
        for file in with_state_last:
            copy_files(str(file), f"{target}/{file.name}", destination_filesystem=filesystem, use_threads=False)

    def _tidy(self) -> None:
        filesystem, root = self._open()
        for name in surplus(
            {name: self._score(filesystem, f"{root}/{name}/{STATE}") for name in self.names()}, self._keep
        ):
            filesystem.delete_dir(f"{root}/{name}")

    def _score(self, filesystem: FileSystem, path: str) -> float | None:
        try:
            with filesystem.open_input_stream(path) as file:
                return score_in(file.read().decode())
        except FileNotFoundError:
            return None

    def _open(self) -> tuple[FileSystem, str]:
        filesystem, path = FileSystem.from_uri(self._address)
        return filesystem, path


def patiently(ask: Callable[[], Answer], patience_s: float = PATIENCE_S) -> Answer:
    """What ``ask`` returns; asked again with growing pauses while the storage is away.

    Raises:
        OSError: the last answer, after ``patience_s``.
    """
    deadline, pause = time.monotonic() + patience_s, 0.5
    while True:
        try:
            return ask()
        except OSError as error:
            if time.monotonic() + pause > deadline:
                raise
            log.warning("storage=away again_in=%.1fs problem=%r", pause, str(error)[:200])
        time.sleep(pause)
        pause = min(2 * pause, 10.0)
