"""Random access to the samples of a set of shards.

A shard is an uncompressed tar, so a sample is a few byte ranges of a local file. Offsets are found by one pass over the
headers; after that a sample costs one ``pread`` per part, which has no file position to share and is therefore safe in
threads and after a fork.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from zsr.data.clip_benchmark import scan_set
from zsr.data.index import INDEX_FILE, ShardIndex, parse_index
from zsr.data.storage import FileMissing, Storage, open_storage
from zsr.data.tars import Member, list_samples

_OPEN_TRIES = 5


class RawSample(NamedTuple):
    """A sample as stored: its key and the bytes of each part by extension ("jpg", "cls")."""

    key: str
    parts: dict[str, bytes]


@dataclass
class _OpenShard:
    descriptor: int
    samples: list[tuple[str, list[Member]]]


class ShardSet:
    """The samples of one set, numbered 0..N-1 in shard order.

    Args:
        address: folder, ``s3://bucket/prefix`` or ``zsr:name/split``. What has no index.json may be in CLIP_benchmark's
            layout; see ``zsr.data.clip_benchmark``.
        cache_dir: where remote shards are kept; see ``open_storage``.

    Raises:
        ValueError: no set at that address, or an index that contradicts itself.
    """

    def __init__(self, address: str | Path, cache_dir: str | Path | None = None) -> None:
        self.storage: Storage = open_storage(address, cache_dir)
        self.index: ShardIndex = read_index(self.storage, cache_dir)
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

    def read(self, sample: int, only: Collection[str] | None = None) -> RawSample:
        """The bytes of one sample.

        Args:
            only: extensions to read, where the other parts are not needed; all of them without.

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
            if only is not None and extension not in only:
                continue
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
                    opened = _OpenShard(file.fileno(), self._samples(file, shard))
                except (ValueError, OSError):
                    file.close()
                    raise
                weakref.finalize(opened, file.close)
                self._opened[shard] = opened
                if len(self._opened) > self._max_open:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(shard)
            return opened

    def _samples(self, file: BinaryIO, shard: int) -> list[tuple[str, list[Member]]]:
        entry = self.index.shards[shard]
        where = f"shard {entry.file} of {self.address}"
        samples = list_samples(file, where)
        if len(samples) != entry.samples:
            raise ValueError(
                f"{where} holds {len(samples)} samples, the index says {entry.samples}; run `zsr data verify`"
            )
        return samples

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


def read_index(storage: Storage, cache_dir: str | Path | None = None) -> ShardIndex:
    """The index of what lies at a place: its index.json, else one made by looking into the tars.

    Raises:
        ValueError: there is neither, or what is there cannot be used.
    """
    try:
        text = storage.read_text(INDEX_FILE)
    except FileMissing as missing:
        return scan_set(storage, missing, cache_dir)
    return parse_index(text, storage.address)
