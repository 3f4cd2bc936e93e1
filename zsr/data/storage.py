"""Where a set lies: a folder, ``s3://bucket/prefix``, or ``zsr:name/split`` for the sets inside this package."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from pathlib import Path

from zsr.data.cache import file_sha256
from zsr.data.index import INDEX_FILE, Shard, ShardFile

EMBEDDED = Path(__file__).parent / "embedded"


class FileMissing(ValueError):
    """The file is not there, which a reader may be able to do without; other faults are plain ValueErrors."""


class Storage(ABC):
    """A place with an index and shards. ``address`` may be printed: it never holds credentials."""

    address: str
    is_remote: bool
    """Whether fetching a shard takes time, so that it pays to begin early."""

    @abstractmethod
    def read_text(self, name: str) -> str:
        """Content of a small file, such as index.json.

        Raises:
            FileMissing: there is no such file.
            ValueError: there is no access to it; the sentence says what to do.
        """

    @abstractmethod
    def fetch(self, shard: Shard) -> Path:
        """A local file with the shard's content, downloaded and checked first where the set is remote.

        Raises:
            ValueError: the shard is missing, inaccessible or not what the index describes.
            OSError: the transfer kept failing.
        """

    @abstractmethod
    def list_tars(self) -> list[ShardFile]:
        """The tar files that lie here, in no particular order; empty where there is no such place.

        Raises:
            ValueError: no access.
        """

    @abstractmethod
    def digest(self, found: ShardFile) -> str:
        """The sha256 of a file that no index describes, read once from end to end; a remote one stays in the cache.

        Raises:
            ValueError: the file is gone, or there is no access to it.
            OSError: the transfer kept failing.
        """

    @abstractmethod
    def parent(self) -> Storage:
        """The place above this one."""

    @abstractmethod
    def put(self, local: Path, name: str) -> None:
        """Store a copy of a local file under ``name``; readers see it whole or not at all."""

    @abstractmethod
    def workspace(self) -> Path:
        """An empty folder for files that are to be put here. What a process left in it that was killed is removed: one
        process at a time writes a set."""

    def move(self, local: Path, name: str) -> None:
        """``put`` for a file out of the workspace, which is gone then."""
        self.put(local, name)
        local.unlink()

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""


class LocalStorage(Storage):
    """A folder; shards are read in place."""

    is_remote = False

    def __init__(self, folder: Path, address: str | None = None) -> None:
        self.folder = folder
        self.address = address or str(folder)

    def read_text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise FileMissing(f"the set {self.address} has no {name}; {_what_is_there(self.folder)}") from None
        except NotADirectoryError:
            raise FileMissing(f"the set {self.address} is a file; a set is a folder of shards") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} of the set {self.address} cannot be read: {error}") from None

    def fetch(self, shard: Shard) -> Path:
        path = self.folder / shard.file
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise ValueError(f"shard {shard.file} of the set {self.address} is missing") from None
        # The checksum of a file on disk is `zsr data verify`'s business; its size costs nothing and finds a torn copy.
        if size != shard.bytes:
            raise ValueError(f"shard {shard.file} of {self.address} has {size} bytes, the index says {shard.bytes}")
        return path

    def list_tars(self) -> list[ShardFile]:
        if not self.folder.is_dir():
            return []
        found = [(path.name, path.stat()) for path in self.folder.glob("*.tar")]
        return [ShardFile(name, status.st_size, str(status.st_mtime_ns)) for name, status in found]

    def digest(self, found: ShardFile) -> str:
        return file_sha256(self.folder / found.file)

    def parent(self) -> LocalStorage:
        return LocalStorage(Path(os.path.abspath(self.folder)).parent)

    def put(self, local: Path, name: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{name}.{os.getpid()}.part"
        shutil.copyfile(local, partial)
        os.replace(partial, self.folder / name)

    def workspace(self) -> Path:
        return empty_folder(self.folder / ".zsr-convert")

    def move(self, local: Path, name: str) -> None:
        os.replace(local, self.folder / name)

    def remove(self, name: str) -> None:
        for partial in self.folder.glob(f".{name}.*.part"):  # of a writer that was killed
            partial.unlink(missing_ok=True)
        (self.folder / name).unlink(missing_ok=True)


def open_storage(address: str | Path, cache_dir: str | Path | None = None) -> Storage:
    """The storage behind an address.

    Args:
        address: folder, ``s3://bucket/prefix`` or ``zsr:name/split``.
        cache_dir: where remote shards are kept; ``$ZSR_CACHE`` or ``~/.cache/zsr`` when empty. Processes of one machine
            that name the same folder share its files. ``$ZSR_CACHE_GB`` bounds its size.

    Raises:
        ValueError: the address has an unknown form, or ``$ZSR_CACHE_GB`` is no number.
    """
    text = str(address)
    if text.startswith("s3://"):
        from zsr.data.s3 import S3Storage  # boto3 is an optional extra

        return S3Storage(text, default_cache(cache_dir), cache_limit())
    if text.startswith("zsr:"):
        return LocalStorage(_embedded(text), text)
    if "://" in text:
        scheme = text.split("://")[0]  # the rest may hold a password
        raise ValueError(f"a set's address is a folder, s3://bucket/prefix or zsr:name/split, not {scheme}://...")
    return LocalStorage(Path(text).expanduser())


def empty_folder(folder: Path) -> Path:
    """The folder, made anew.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder.parent} cannot be written: {error.strerror}") from None
    return folder


def default_cache(cache_dir: str | Path | None) -> Path:
    chosen = cache_dir or os.environ.get("ZSR_CACHE") or "~/.cache/zsr"
    return Path(chosen).expanduser() / "shards"


def cache_limit() -> int:
    """Bytes that ``$ZSR_CACHE_GB`` (10^9 bytes each) allows the cache; 0 without it, which bounds nothing."""
    text = os.environ.get("ZSR_CACHE_GB") or "0"
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise ValueError(f"ZSR_CACHE_GB={text} should be a number of gigabytes, such as 200; 0 sets no bound")
    return limit


def embedded_sets() -> list[str]:
    """Addresses of the sets inside this package."""
    return sorted(f"zsr:{file.parent.relative_to(EMBEDDED).as_posix()}" for file in EMBEDDED.glob(f"**/{INDEX_FILE}"))


def _embedded(address: str) -> Path:
    if address not in embedded_sets():
        raise ValueError(f"there is no embedded set {address}; there are {', '.join(embedded_sets()) or 'none'}")
    return EMBEDDED / address.removeprefix("zsr:")


def _what_is_there(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    splits = sorted(
        child.name for child in folder.iterdir() if (child / INDEX_FILE).exists() or any(child.glob("*.tar"))
    )
    if splits:
        return f"its subfolders are sets: {', '.join(splits)}"
    return "nor has it tars in CLIP_benchmark's layout. `zsr data convert` makes a set from a folder of images"
