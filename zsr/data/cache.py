"""Shards kept on this machine's disk, shared by all its processes: each is downloaded and checked once.

A file appears under its final name only when its content has the checksum that the index promises, so a reader never
needs to ask again. The name starts with that checksum: a set that was rewritten does not meet its old shards here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from zsr.data.index import Shard, ShardFile

log = logging.getLogger(__name__)


class ShardCache:
    """A folder of downloaded shards.

    Args:
        folder: made when needed; one that is filled beforehand may be read-only.
        max_bytes: least recently used shards make room for new ones beyond this, before a download and again after it,
            since others may have come meanwhile; 0 keeps all. Shards that are being downloaded come on top.
    """

    def __init__(self, folder: Path, max_bytes: int = 0) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def get(self, shard: Shard, address: str, download: Callable[[Path], None]) -> Path:
        """The shard's file; whoever comes first downloads it, the others wait for that.

        With ``max_bytes`` the file may be gone again a moment later: open it, and ask again if that fails. An open file
        can be read to its end whatever happens here.

        Args:
            shard: what is wanted.
            address: of its set, for messages.
            download: makes the given file complete. The file may hold the beginning already, left by a process that
                died: the rest is enough, since the whole is checked afterwards.

        Raises:
            ValueError: what was downloaded is not what the index describes, twice.
            OSError: the download failed, or the folder cannot be written.
        """
        path = self.folder / f"{shard.sha256[:16]}-{shard.file}"
        if _is_whole(path, shard):
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".lock")):
            if _is_whole(path, shard):
                return path
            self._make_room(shard.bytes)
            partial = path.with_name(path.name + ".part")
            # Twice: a wrong beginning left by someone else, or bits flipped on the way, deserve one more try. A wrong
            # object in the bucket stays wrong.
            for _ in range(2):
                download(partial)
                found = file_sha256(partial)
                if found == shard.sha256:
                    os.replace(partial, path)
                    self._make_room(keep=path)
                    return path
                log.warning("event=shard_corrupt set=%s shard=%s sha256=%s", address, shard.file, found)
                partial.unlink()
        raise ValueError(
            f"shard {shard.file} of {address} is corrupt: its sha256 is {found}, the index says {shard.sha256}; "
            "store the shard again, or run `zsr data verify` on the original"
        )

    def adopt(self, found: ShardFile, address: str, download: Callable[[Path], None]) -> str:
        """Download a file whose checksum nobody knows yet, and keep it under the one that it turns out to have.

        Returns:
            Its sha256; with it ``get`` finds the file.

        Raises:
            OSError: the download failed, or the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(f"{address}/{found.file} {found.version}".encode()).hexdigest()[:16]
        partial = self.folder / f"{name}.part"
        with locked(self.folder / f"{name}.lock"):
            partial.unlink(missing_ok=True)  # nothing could tell whether what another process left is right
            self._make_room(found.bytes)
            download(partial)
            digest = file_sha256(partial)
            path = self.folder / f"{digest[:16]}-{found.file}"
            os.replace(partial, path)
            self._make_room(keep=path)
        return digest

    def _make_room(self, num_bytes: int = 0, keep: Path | None = None) -> None:
        if not self.max_bytes:
            return
        with locked(self.folder / "cache.lock"):
            found = [(path.stat(), path) for path in self.folder.iterdir() if path.suffix not in (".lock", ".part")]
            excess = sum(status.st_size for status, _ in found) + num_bytes - self.max_bytes
            for status, path in sorted(found, key=lambda entry: entry[0].st_mtime_ns):
                if excess <= 0:
                    break
                if path == keep:  # a shard may be larger than the whole cache
                    continue
                path.unlink(missing_ok=True)
                excess -= status.st_size


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(path: Path, shard: Shard) -> bool:
    # Content was checked before the file got this name; the size guards against a disk that lost data in a crash.
    try:
        whole = path.stat().st_size == shard.bytes
        with contextlib.suppress(PermissionError):  # somebody else's cache
            os.utime(path)  # the time of last use, by which room is made
    except FileNotFoundError:
        return False
    return whole


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes and threads; the kernel frees it if its holder dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Unlocked by name, not by closing: a process forked meanwhile holds a copy of the descriptor.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
