"""Sets in CLIP_benchmark's WebDataset layout, which have no index.json: the index is made by looking into the tars.

    wds_cars/classnames.txt                          one class a line, in the order of the labels
    wds_cars/zeroshot_classification_templates.txt   one prompt a line, with {c} for the class
    wds_cars/test/nshards.txt                        optional: how many tars there should be
    wds_cars/test/0.tar ...                          s0000000.webp (or jpg, png) and s0000000.cls next to each other

The two texts may also lie beside the tars. The address of the set is the folder of the tars. Reading everything once takes
as long as a checksum does, so what was found is kept in the cache, tar by tar: another tar in one's place, or one that
was added, is read anew, the others are not. Nothing is written beside the set; ``zsr data index`` does that.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from zsr.config.base import Config
from zsr.data.cache import locked
from zsr.data.decode import EXTENSIONS, read_label
from zsr.data.index import INDEX_FILE, Shard, ShardFile, ShardIndex
from zsr.data.progress import Work
from zsr.data.storage import FileMissing, LocalStorage, Storage, default_cache, open_storage
from zsr.data.tars import Member, list_samples

log = logging.getLogger(__name__)

CLASSES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
COUNT_FILE = "nshards.txt"


class ScannedShard(Config):
    """What one tar was found to hold, and which version of it that was."""

    version: str
    shard: Shard
    labels: dict[int, int]
    """How many samples have each label."""


class Scan(Config):
    """What is kept between two openings of a set."""

    format: Literal["zsr-scan-1"] = "zsr-scan-1"
    shards: list[ScannedShard]


def scan_set(storage: Storage, missing: FileMissing, cache_dir: str | Path | None = None) -> ShardIndex:
    """The index of a set in CLIP_benchmark's layout.

    Args:
        storage: where the tars lie.
        missing: what is raised if there are none either: it says what was looked for in the first place.
        cache_dir: where remote tars and what was found in them are kept; see ``open_storage``.

    Raises:
        FileMissing: there are no tars.
        ValueError: class names, templates or tars are missing, a tar is damaged, or a sample has no image or no label
            among the classes.
        OSError: a transfer kept failing.
    """
    files = sorted(storage.list_tars(), key=lambda found: _numbers_first(found.file))
    if not files:
        raise FileMissing(f"{missing}, nor are there tars in CLIP_benchmark's layout") if storage.is_remote else missing
    classes, templates = _read_lines(storage, CLASSES_FILE), _read_templates(storage)
    _check_count(storage, len(files))
    scanned = _scan(storage, files, default_cache(cache_dir).parent / "scans")
    totals: Counter[int] = Counter()
    for entry in scanned:
        for label, count in entry.labels.items():
            if not 0 <= label < len(classes):
                raise ValueError(
                    f"shard {entry.shard.file} of {storage.address} has {count} samples with the label {label}, but "
                    f"{CLASSES_FILE} names {len(classes)} classes (labels 0 to {len(classes) - 1}); give it all of them"
                )
            totals[label] += count
    return ShardIndex(
        name="/".join(storage.address.rstrip("/").split("/")[-2:]),
        classes=classes,
        templates=templates,
        samples=sum(entry.shard.samples for entry in scanned),
        shards=[entry.shard for entry in scanned],
        class_counts=[totals[label] for label in range(len(classes))],
        source="read in place, in CLIP_benchmark's layout",
    )


def write_index(address: str | Path, cache_dir: str | Path | None = None) -> ShardIndex:
    """Look into a set in CLIP_benchmark's layout and store its index.json beside the tars.

    Raises:
        ValueError: the set has an index.json already, or cannot be used; see ``scan_set``.
        OSError: a transfer kept failing, or nothing can be written there.
    """
    storage = open_storage(address, cache_dir)
    try:
        storage.read_text(INDEX_FILE)
    except FileMissing as missing:
        index = scan_set(storage, missing, cache_dir)
    else:
        raise ValueError(f"{storage.address} has an {INDEX_FILE} already")
    with tempfile.TemporaryDirectory(prefix="zsr-index-") as folder:
        (Path(folder) / INDEX_FILE).write_text(index.to_json(), encoding="utf-8")
        storage.put(Path(folder) / INDEX_FILE, INDEX_FILE)
    return index


def _scan(storage: Storage, files: list[ShardFile], folder: Path) -> list[ScannedShard]:
    """One entry a file, out of the cache where the file is the one that was read then."""
    place = os.path.abspath(storage.folder) if isinstance(storage, LocalStorage) else storage.address
    path = folder / f"{hashlib.sha256(place.encode()).hexdigest()[:24]}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):  # the ranks of a node open a set together: one reads, the others wait
            return _scan_changed(storage, files, path)
    except PermissionError as error:
        raise ValueError(
            f"what the tars of {storage.address} hold cannot be kept: {error}; name a folder in ZSR_CACHE that can be written"
        ) from None


def _scan_changed(storage: Storage, files: list[ShardFile], path: Path) -> list[ScannedShard]:
    known = {(entry.shard.file, entry.shard.bytes, entry.version): entry for entry in _load(path)}
    done = [known[found.file, found.bytes, found.version] for found in files if _key(found) in known]
    if len(done) < len(files):
        with Work("scan", len(files), done=len(done)) as work:
            for found in files:
                if _key(found) not in known:
                    known[_key(found)] = entry = _look_into(storage, found)
                    done.append(entry)
                    _save(path, done)  # each one counts: a scan that is stopped goes on where it was
                    work.at(len(done))
    return [known[_key(found)] for found in files]


def _key(found: ShardFile) -> tuple[str, int, str]:
    return found.file, found.bytes, found.version


def _look_into(storage: Storage, found: ShardFile) -> ScannedShard:
    where = f"shard {found.file} of {storage.address}"
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", found.file):
        raise ValueError(f"{where} needs another name, of letters, digits, dots, dashes and underscores")
    shard = Shard(file=found.file, samples=1, bytes=found.bytes or 1, sha256=storage.digest(found))
    labels: Counter[int] = Counter()
    with storage.fetch(shard).open("rb") as file:
        samples = list_samples(file, where)
        for key, members in samples:
            labels[_label(file.fileno(), key, members, where)] += 1
    if not samples:
        raise ValueError(f"{where} holds no samples; remove it or store it again")
    log.info("event=scanned set=%s shard=%s samples=%d", storage.address, found.file, len(samples))
    return ScannedShard(version=found.version, shard=shard.model_copy(update={"samples": len(samples)}), labels=labels)


def _label(descriptor: int, key: str, members: list[Member], where: str) -> int:
    extensions = [member.extension for member in members]
    if not set(extensions) & set(EXTENSIONS):
        raise ValueError(
            f"{where}: sample {key!r} has no image of a known kind ({', '.join(EXTENSIONS)}), "
            f"only {', '.join(extensions) or 'nothing'}"
        )
    parts = {m.extension: os.pread(descriptor, m.size, m.offset) for m in members if m.extension == "cls"}
    try:
        return read_label(parts)
    except ValueError as fault:
        raise ValueError(f"{where}: sample {key!r}: {fault}") from None


def _read_templates(storage: Storage) -> list[str]:
    lines = _read_lines(storage, TEMPLATES_FILE)
    for line in lines:
        if line.count("{c}") != 1 or len(re.findall("[{}]", line)) != 2:
            raise ValueError(
                f"{TEMPLATES_FILE} of {storage.address}: a prompt has {{c}} for the class once, not {line!r}"
            )
    return [line.replace("{c}", "{}") for line in lines]


def _read_lines(storage: Storage, name: str) -> list[str]:
    """Lines of a text beside the tars or in the folder above."""
    for place in (storage, storage.parent()):
        try:
            text = place.read_text(name)
        except FileMissing:
            continue
        lines = [line.strip() for line in text.splitlines()]
        while lines and not lines[-1]:
            lines.pop()
        if not lines or not all(lines):
            raise ValueError(f"{name} of {storage.address} has empty lines, or nothing in it")
        return lines
    raise ValueError(
        f"{storage.address} holds tars but neither an index.json nor, beside them or in the folder above, a {name}; "
        "CLIP_benchmark's layout has one (an interrupted `zsr data convert` has not)"
    )


def _check_count(storage: Storage, found: int) -> None:
    try:
        text = storage.read_text(COUNT_FILE).strip()
    except FileMissing:
        return
    if text != str(found):
        raise ValueError(
            f"{storage.address} holds {found} tars, but its {COUNT_FILE} says {text[:20]}; fetch those that are missing"
        )


def _numbers_first(name: str) -> list[tuple[int, int | str]]:
    """Sorts 2.tar before 10.tar."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


def _load(path: Path) -> list[ScannedShard]:
    try:
        return Scan.model_validate_json(path.read_text(encoding="utf-8")).shards
    except (FileNotFoundError, ValidationError):  # of another version of zsr: as good as none
        return []


def _save(path: Path, shards: list[ScannedShard]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_text(Scan(shards=shards).model_dump_json(), encoding="utf-8")
    os.replace(partial, path)
