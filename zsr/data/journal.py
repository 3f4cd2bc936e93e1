"""What a conversion has finished, kept beside the shards until the set is whole: a killed one goes on from there."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from zsr.config.base import Config
from zsr.data.index import Shard
from zsr.data.storage import FileMissing, Storage

log = logging.getLogger(__name__)

JOURNAL_FILE = "convert-journal.json"


class Rejected(Config):
    """An image that is not in the set, and why."""

    number: int
    file: str
    reason: str


class DoneShard(Config):
    """A shard that is stored, or would be if one of its images could be read."""

    number: int
    fingerprint: str
    """Of its images' names, labels, sizes and times of change: with others the shard is made anew."""
    shard: Shard | None
    rejected: list[Rejected]


class Settings(Config):
    """What decides which image lies where, and with which bytes."""

    samples: int
    samples_per_shard: int
    shuffle: int | None
    image_size: int
    quality: int


class _Content(Config):
    format: Literal["zsr-journal-1"] = "zsr-journal-1"
    settings: Settings
    shards: list[DoneShard]


class Journal:
    """The journal of one conversion.

    Attributes:
        done: what earlier runs finished and is still stored as they did, by shard number.

    Raises:
        ValueError: the target holds an unfinished conversion with other settings.
    """

    def __init__(self, storage: Storage, settings: Settings) -> None:
        self.storage, self.settings = storage, settings
        self.done: dict[int, DoneShard] = {}
        found = self._load()
        if found is None:
            return
        if found.settings != settings:
            other = _difference(found.settings, settings)
            raise ValueError(
                f"{storage.address} holds an unfinished conversion with other settings ({other}); "
                "go on with those, choose another target, or delete it first"
            )
        stored = {entry.file: entry.bytes for entry in storage.list_tars()}
        for entry in found.shards:
            if entry.shard is None or stored.get(entry.shard.file) == entry.shard.bytes:
                self.done[entry.number] = entry

    def add(self, entry: DoneShard) -> None:
        """Record a shard that is stored."""
        self.done[entry.number] = entry
        content = _Content(settings=self.settings, shards=[self.done[number] for number in sorted(self.done)])
        put_text(self.storage, JOURNAL_FILE, content.model_dump_json() + "\n")

    def remove(self) -> None:
        self.storage.remove(JOURNAL_FILE)

    def _load(self) -> _Content | None:
        try:
            return _Content.model_validate_json(self.storage.read_text(JOURNAL_FILE))
        except FileMissing:
            return None
        except ValidationError:  # torn when the power failed, or of another version
            log.warning("event=journal_unreadable set=%s", self.storage.address)
            return None


def put_text(storage: Storage, name: str, text: str) -> None:
    """Store a text; readers see it whole or not at all."""
    with tempfile.TemporaryDirectory(prefix="zsr-") as folder:
        local = Path(folder) / name
        local.write_text(text, encoding="utf-8")
        storage.put(local, name)


def _difference(found: Settings, wanted: Settings) -> str:
    old, new = found.model_dump(), wanted.model_dump()
    return ", ".join(f"{name}={old[name]}, now {new[name]}" for name in old if old[name] != new[name])
