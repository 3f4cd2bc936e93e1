"""Make a set of shards from a source of images.

A conversion depends on the source and its settings alone: with any number of processes, and killed and taken up again any
number of times, the same input gives the same bytes. A finished shard is stored at once and recorded in a journal beside
it; the index comes last, so nothing unfinished can be mistaken for a whole set.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zsr.data.decode import decode
from zsr.data.index import INDEX_FILE, ShardIndex
from zsr.data.journal import DoneShard, Journal, Rejected, Settings, put_text
from zsr.data.make_shard import ShardMaker
from zsr.data.processes import work_through
from zsr.data.progress import Work
from zsr.data.sources.find import Kind, Where, open_source
from zsr.data.sources.listing import Listing
from zsr.data.storage import FileMissing, Storage, open_storage

log = logging.getLogger(__name__)

REPORT_FILE = "rejected.csv"
_NUM_TIMED = 48  # images whose decoding is timed before and after resizing


@dataclass(frozen=True)
class Cost:
    """What resizing changed: time of one core for an image's crop of 224 pixels, and bytes, before and after."""

    before_ms: float
    after_ms: float
    before_bytes: float
    after_bytes: float


@dataclass(frozen=True)
class Conversion:
    """What came out.

    Attributes:
        index: of the set.
        rejected: images that are not in it; they are also named in rejected.csv.
        ignored: files that did not look like images, named there too.
        resumed: shards that an earlier, interrupted run had finished.
        cost: with resizing only.
    """

    index: ShardIndex
    rejected: list[Rejected]
    ignored: int
    resumed: int
    cost: Cost | None


def convert(
    source: str | Path,
    target: str | Path,
    *,
    kind: Kind | None = None,
    truth: Path | None = None,
    class_names: str | None = None,
    root: Path | None = None,
    split: str = "train",
    labels: bool = True,
    name: str | None = None,
    templates: Sequence[str] = (),
    licence: str = "",
    samples_per_shard: int = 1000,
    shuffle: int | None = 0,
    image_size: int = 0,
    quality: int = 95,
    workers: int = 1,
    max_bad: float = 0,
    show_progress: bool = True,
) -> Conversion:
    """Write the images of a source as shards, an index, and the class names and templates as CLIP_benchmark reads them.

    Args:
        source, kind, truth, class_names, root, split, labels: the images; see ``zsr.data.sources.find.Where``.
        target: folder or ``s3://bucket/prefix`` that holds no set yet. One that holds the beginning of this very
            conversion is gone on with.
        name: of the set; the source's when empty.
        templates: prompts with ``{}`` for the class name; the source's, or "This is a photo of a {}.", when empty.
        licence: of the images, for the index.
        samples_per_shard: the last shard may hold fewer, as may one with images that were rejected.
        shuffle: seed of the order in which images are laid into shards. They are mixed by default because training reads
            a few shards at a time, and sources are sorted by class: unmixed, a batch would hold a few classes only. None
            keeps the source's order, which suits a set that is only evaluated on.
        image_size: shorter side, in pixels, that larger images are resized to; 0 keeps every file's bytes.
        quality: of the JPEGs that resizing makes.
        workers: processes.
        max_bad: images that may be left out because they cannot be read or decoded: a number, or below 1 a share of all.
            Beyond it every image is looked at still, so that the report names all, but no set is made; shards without
            fault are kept for the next run.
        show_progress: on stderr, with the time left.

    Raises:
        ValueError: the source or a setting is wrong, the target holds another set, or too many images are bad.
        OSError: the target cannot be written, or a transfer kept failing.
        RuntimeError: a worker process was killed.
    """
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"the template {template!r} has no {{}} for the class name")
    storage = open_storage(target)
    if _has(storage, INDEX_FILE):
        raise ValueError(f"{storage.address} holds a set already; choose another target or delete it first")
    where = Where(str(source), kind, truth, class_names, root, split, labels)
    listing, classes = open_source(where, show_progress)
    settings = Settings(
        samples=len(listing),
        samples_per_shard=samples_per_shard,
        shuffle=shuffle,
        image_size=image_size,
        quality=quality,
    )
    journal = Journal(storage, settings)
    maker = ShardMaker(listing, storage, settings, storage.workspace())
    resumed = _make_all(maker, journal, workers, show_progress)
    done = [journal.done[number] for number in range(maker.num_shards)]
    rejected = sorted((bad for shard in done for bad in shard.rejected), key=lambda bad: bad.number)
    _report(storage, rejected, listing.ignored)
    allowed = int(max_bad * len(listing)) if 0 < max_bad < 1 else int(max_bad)
    if len(rejected) > allowed:
        raise ValueError(_too_many(storage, rejected, listing, allowed))
    counts = _count_classes(listing, rejected, len(classes))
    index = ShardIndex(
        name=name or _plain_name(str(source)),
        classes=classes,
        templates=list(templates) or listing.templates or ["This is a photo of a {}."],
        samples=len(listing) - len(rejected),
        shards=[entry.shard for entry in done if entry.shard is not None],
        class_counts=counts,
        licence=licence or listing.licence,
        source=f"converted from {listing.what}",
    )
    cost = _measure(maker, done) if image_size else None
    put_text(storage, "classnames.txt", "".join(f"{class_name}\n" for class_name in classes))
    lines = [template.replace("{}", "{c}") + "\n" for template in index.templates]
    put_text(storage, "zeroshot_classification_templates.txt", "".join(lines))
    put_text(storage, INDEX_FILE, index.to_json())  # last: it makes the rest a set
    journal.remove()
    _remove_empty(maker.workspace)
    return Conversion(index, rejected, len(listing.ignored), resumed, cost)


def _make_all(maker: ShardMaker, journal: Journal, workers: int, show_progress: bool) -> int:
    """Make the shards that are not done yet; returns how many were."""
    for number, entry in list(journal.done.items()):
        if entry.fingerprint != maker.fingerprint(number):
            log.warning("event=source_changed shard=%06d action=made_anew", number)
            del journal.done[number]
    left = [number for number in range(maker.num_shards) if number not in journal.done]
    for number in journal.done:
        maker.checked[number] = len(maker.numbers(number))
    resumed = len(journal.done)
    if resumed:
        log.info("event=resumed set=%s shards=%d of=%d", maker.storage.address, resumed, maker.num_shards)
    results = work_through(maker.make, left, workers, lambda: work.at(int(maker.checked.sum())))
    with Work("convert", len(maker.listing), show_progress, done=int(maker.checked.sum())) as work:
        for entry in results:
            journal.add(entry)
            for bad in entry.rejected:
                log.warning("event=bad_image file=%s reason=%s", bad.file, bad.reason)
    return resumed


def _report(storage: Storage, rejected: list[Rejected], ignored: list[tuple[str, str]]) -> None:
    if not rejected and not ignored:
        if _has(storage, REPORT_FILE):  # of an earlier run, whose faults were mended
            storage.remove(REPORT_FILE)
        return
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerows([("file", "reason"), *((bad.file, bad.reason) for bad in rejected), *sorted(ignored)])
    put_text(storage, REPORT_FILE, text.getvalue().encode("utf-8", "backslashreplace").decode())
    if ignored:
        log.warning("event=files_ignored count=%d reason=not_an_image first=%s", len(ignored), ignored[0][0])


def _too_many(storage: Storage, rejected: list[Rejected], listing: Listing, allowed: int) -> str:
    first = "; ".join(f"{bad.file}: {bad.reason}" for bad in rejected[:10]) + "; and others" * (len(rejected) > 10)
    return (
        f"{len(rejected)} of {len(listing)} images cannot be used and --max-bad allows {allowed}; all are named in "
        f"{REPORT_FILE} of {storage.address}. Repair them and convert again, which makes their shards alone, or allow "
        f"more: {first}"
    )


def _count_classes(listing: Listing, rejected: list[Rejected], num_classes: int) -> list[int]:
    if listing.labels is None:
        return []
    counts = np.bincount(listing.labels, minlength=num_classes)
    for label, count in Counter(int(listing.labels[bad.number]) for bad in rejected).items():
        counts[label] -= count
    return counts.tolist()


def _measure(maker: ShardMaker, done: list[DoneShard]) -> Cost | None:
    """Time the decoding of a few images as they were and as they are stored now, in turns."""
    bad = {entry.number for shard in done for entry in shard.rejected}
    total = len(maker.listing)
    chosen = [n for n in range(0, total, max(1, total // _NUM_TIMED)) if n not in bad][:_NUM_TIMED]
    before = [maker.listing.read(number) for number in chosen]
    if not all(set(parts) & {"jpg", "jpeg", "png", "webp"} for parts in before):
        return None  # readers do not know these formats as they were
    after = [maker.stored_form(parts) for parts in before]
    spent = [0.0, 0.0]
    for parts in zip(before, after):
        for side in (0, 1):
            began = time.process_time()
            decode(parts[side], 224)
            spent[side] += time.process_time() - began
    sizes = [float(np.mean([sum(map(len, parts.values())) for parts in each])) for each in (before, after)]
    return Cost(1e3 * spent[0] / len(chosen), 1e3 * spent[1] / len(chosen), *sizes)


def _has(storage: Storage, name: str) -> bool:
    try:
        storage.read_text(name)
    except FileMissing:
        return False
    return True


def _plain_name(source: str) -> str:
    if "://" in source or source.startswith(("torchvision:", "zsr:")):
        return source.rstrip("/").replace(":", "/").split("/")[-1]
    path = Path(source).expanduser().resolve()
    return path.stem if path.is_file() else path.name


def _remove_empty(folder: Path) -> None:
    for left in folder.iterdir():  # of processes that ended in the middle
        os.unlink(left)
    folder.rmdir()
