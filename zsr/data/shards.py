"""Random access to the samples of a set of shards.

A shard is an uncompressed tar, so a sample is a few byte ranges of a local file. Offsets are found by one pass over the
headers; after that a sample costs one ``pread`` per part, which has no file position to share and is therefore safe in
threads and after a fork.
"""

from __future__ import annotations

import os
import tarfile
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from zsr.data.index import INDEX_FILE, Shard, ShardIndex, parse_index
from zsr.data.storage import Storage, open_storage

_OPEN_TRIES = 5


class RawSample(NamedTuple):
    """A sample as stored: its key and the bytes of each part by extension ("jpg", "cls")."""

    key: str
    parts: dict[str, bytes]


class _Member(NamedTuple):
    extension: str
    offset: int
    size: int


@dataclass
class _OpenShard:
    descriptor: int
    samples: list[tuple[str, list[_Member]]]


class ShardSet:
    """The samples of one set, numbered 0..N-1 in shard order.

    Args:
        address: folder, ``s3://bucket/prefix`` or ``zsr:name/split``.
        cache_dir: where remote shards are kept; see ``open_storage``.

    Raises:
        ValueError: no set at that address, or an index that contradicts itself.
    """

    def __init__(self, address: str | Path, cache_dir: str | Path | None = None) -> None:
        self.storage: Storage = open_storage(address, cache_dir)
        self.index: ShardIndex = parse_index(self.storage.read_text(INDEX_FILE), self.storage.address)
        self._ends = np.cumsum(self.index.shard_sizes)
        self._max_open = 32
        self._reset()

    @property
    def address(self) -> str:
        return self.storage.address

    @property
    def classes(self) -> list[str]:
        return self.index.classes

    @property
    def has_labels(self) -> bool:
        return bool(self.index.classes)

    @property
    def templates(self) -> list[str]:
        return self.index.templates

    def __len__(self) -> int:
        return self.index.samples

    def locate(self, sample: int) -> tuple[int, int]:
        """The shard that holds a sample, and the sample's place in it.

        Raises:
            IndexError: no such sample.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of a set of {len(self)}")
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return shard, int(sample - self._ends[shard] + self.index.shards[shard].samples)

    def read(self, sample: int) -> RawSample:
        """The bytes of one sample.

        Raises:
            IndexError: no such sample.
            ValueError: its shard is missing or is not what the index describes.
            OSError: its shard cannot be fetched or read.
        """
        shard, place = self.locate(sample)
        opened = self._open(shard)
        key, members = opened.samples[place]
        parts = {}
        for extension, offset, size in members:
            content = os.pread(opened.descriptor, size, offset)
            if len(content) != size:
                raise ValueError(f"shard {self.index.shards[shard].file} of {self.address} ends inside sample {key!r}")
            parts[extension] = content
        return RawSample(key, parts)

    def fetch(self, shard: int) -> Path:
        """Local file of one shard, downloaded first if need be."""
        return self.storage.fetch(self.index.shards[shard])

    def keep_open(self, num_shards: int) -> None:
        """Allow this many shards to stay open; opening one again costs a pass over its headers."""
        self._max_open = max(self._max_open, num_shards)

    def _open(self, shard: int) -> _OpenShard:
        with self._lock:
            opened = self._opened.get(shard)
            if opened is None:
                file = self._open_file(shard)
                # Closed when the last reader lets go: a thread may still be reading a shard that is dropped here.
                try:
                    opened = _OpenShard(file.fileno(), scan(file, self.index.shards[shard], self.address))
                except (ValueError, OSError):
                    file.close()
                    raise
                weakref.finalize(opened, file.close)
                self._opened[shard] = opened
                if len(self._opened) > self._max_open:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(shard)
            return opened

    def _open_file(self, shard: int) -> BinaryIO:
        for _ in range(_OPEN_TRIES - 1):
            try:
                return self.fetch(shard).open("rb")
            except FileNotFoundError:
                pass  # a bounded cache made room for another shard in between
        return self.fetch(shard).open("rb")

    def reopen(self) -> None:
        """Forget open files. For a forked process: a lock that another thread held at the fork stays locked in it."""
        self._reset()

    def _reset(self) -> None:
        self._opened: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_opened", "_lock")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset()


def scan(file: BinaryIO, shard: Shard, address: str) -> list[tuple[str, list[_Member]]]:
    """Key and member ranges of each sample of a tar file open at its beginning; members with one key follow each other.

    Raises:
        ValueError: the file is no tar, is compressed or cut short, or holds more or fewer samples than the index says.
    """
    where = f"shard {shard.file} of {address}"
    samples: list[tuple[str, list[_Member]]] = []
    for path_in_tar, offset, size in _plain_members(file) or _any_members(file, where):
        folder, _, name = path_in_tar.rpartition("/")
        stem, _, extension = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if not samples or samples[-1][0] != key:
            samples.append((key, []))
        samples[-1][1].append(_Member(extension.lower(), offset, size))
    if len(samples) != shard.samples:
        raise ValueError(f"{where} holds {len(samples)} samples, the index says {shard.samples}; run `zsr data verify`")
    return samples


def _plain_members(file: BinaryIO) -> list[tuple[str, int, int]]:
    """(name, offset, size) of the files in a tar with nothing but plain headers, else an empty list.

    Every loader process of a node scans every shard, so this must cost little beside decoding a few images; the tarfile
    module takes ten times as long, and is left the tars with long names, extended headers or damage.
    """
    members: list[tuple[str, int, int]] = []
    descriptor, at = file.fileno(), 0
    end = os.fstat(descriptor).st_size
    while True:
        header = os.pread(descriptor, 512, at)
        if len(header) < 512 or header[0] == 0:
            return members if len(header) == 512 else []
        digits = header[124:136].rstrip(b" \0")
        if header[257:262] != b"ustar" or header[156] not in b"0\0" or not digits.isdigit() or header[345]:
            return []
        size = int(digits, 8)
        name = header[: header.index(0)] if header[99] == 0 else header[:100]
        members.append((name.decode("utf-8", "surrogateescape"), at + 512, size))
        at += 512 + (size + 511) // 512 * 512
        if at > end:
            return []


def _any_members(file: BinaryIO, where: str) -> list[tuple[str, int, int]]:
    members: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    members.append((member.name, member.offset_data, member.size))
    except tarfile.TarError as error:
        raise ValueError(f"{where} is not a plain tar file: {error}") from None
    return members
