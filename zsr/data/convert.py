"""Make a set of shards from a folder of images, and check or look at a set that exists.

A conversion depends on the source files and its settings alone: the same input gives the same bytes. The index is written
last, so an interrupted conversion leaves no set that could be mistaken for a whole one.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import webdataset
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from zsr.data.cache import file_sha256
from zsr.data.decode import EXTENSIONS, decode, decode_whole, open_rgb, read_label
from zsr.data.index import INDEX_FILE, Shard, ShardIndex
from zsr.data.pipeline import subset_ids
from zsr.data.plan import EpochPlan
from zsr.data.shards import ShardSet
from zsr.data.storage import Storage, open_storage

log = logging.getLogger(__name__)

Item = TypeVar("Item")

_MTIME = 1_700_000_000  # in every tar header instead of the clock
_REENCODED = ("bmp", "gif", "ppm", "tif", "tiff")  # formats that readers of shards need not know: stored as PNG
_JPEG_QUALITY = 95  # of images that are resized; others keep their bytes


def convert(
    source: Path,
    target: str | Path,
    *,
    name: str | None = None,
    templates: Sequence[str] = ("This is a photo of a {}.",),
    samples_per_shard: int = 1000,
    image_size: int = 0,
    seed: int = 0,
    licence: str = "",
    labels: bool = True,
    show_progress: bool = True,
) -> ShardIndex:
    """Write the images under ``source`` as shards, an index, and the class names and templates as CLIP_benchmark reads them.

    Args:
        source: a folder of folders, one a class; a class is named like its folder, with spaces for underscores. Images
            may lie deeper in it.
        target: folder or ``s3://bucket/prefix`` that holds no set yet.
        name: of the set; the source folder's when empty.
        templates: prompts with ``{}`` for the class name.
        samples_per_shard: the last shard may hold fewer.
        image_size: shorter side, in pixels, that larger images are resized to; 0 keeps every file's bytes.
        seed: of the order in which samples are laid into shards. They are mixed, because training reads a few
            shards at a time.
        licence: of the images, for the index.
        labels: without, every image anywhere under ``source`` is taken and the set has no classes.
        show_progress: draw a bar with the remaining time on stderr.

    Raises:
        ValueError: there are no images, a template lacks its ``{}``, the target holds a set already, or images cannot be
            decoded (they are named, all of them in the log; nothing is left out silently).
    """
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"the template {template!r} has no {{}} for the class name")
    storage = open_storage(target)
    if _holds_a_set(storage):
        raise ValueError(f"{storage.address} holds a set already; choose another target or delete it first")
    classes, files = list_images(source) if labels else ([], list_unlabelled(source))
    order = EpochPlan([len(files)], seed, 0, len(files), window=1).order.tolist()
    shards: list[Shard] = []
    bad: list[str] = []
    with tempfile.TemporaryDirectory(prefix="zsr-convert-") as folder, _progress(show_progress) as progress:
        task = progress.add_task("convert", total=len(files))
        for start in range(0, len(files), samples_per_shard):
            path = Path(folder) / f"{len(shards):06d}.tar"
            chosen = order[start : start + samples_per_shard]
            with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=_MTIME) as tar:
                for number in chosen:
                    image, label = files[number]
                    try:
                        tar.write(_make_sample(number, image, label, image_size))
                    except ValueError as fault:
                        bad.append(f"{image.relative_to(source)}: {fault}")
                        log.warning("event=bad_image file=%s reason=%s", image, fault)
                    progress.advance(task)
            if not bad:
                storage.put(path, path.name)
            size, digest = path.stat().st_size, file_sha256(path)
            shards.append(Shard(file=path.name, samples=len(chosen), bytes=size, sha256=digest))
            path.unlink()
        if bad:
            first = "; ".join(bad[:10]) + ("; and others, all in the log" if len(bad) > 10 else "")
            raise ValueError(f"{len(bad)} of {len(files)} images cannot be used; repair or remove them: {first}")
        counts = Counter(label for _, label in files)
        index = ShardIndex(
            name=name or source.resolve().name,
            classes=classes,
            templates=list(templates),
            samples=len(files),
            shards=shards,
            class_counts=[counts[label] for label in range(len(classes))],
            licence=licence,
            source=f"converted from the folder {source.resolve().name}",
        )
        texts = {
            "classnames.txt": "".join(f"{class_name}\n" for class_name in classes),
            "zeroshot_classification_templates.txt": "".join(t.replace("{}", "{c}") + "\n" for t in templates),
            INDEX_FILE: index.to_json(),  # last: it makes the rest a set
        }
        for file_name, text in texts.items():
            (Path(folder) / file_name).write_text(text, encoding="utf-8")
            storage.put(Path(folder) / file_name, file_name)
    return index


def list_images(source: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Class names, and (file, class number) of each image in a fixed order. Files of other kinds are counted in the log.

    Raises:
        ValueError: there is no such folder, no class folder in it, or a class without images.
    """
    if not source.is_dir():
        raise ValueError(f"there is no folder {source}")
    folders = sorted(folder for folder in source.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if not folders:
        raise ValueError(f"{source} has no folders; it should hold one folder of images a class")
    files, others = [], [file for file in source.iterdir() if file.is_file()]
    for label, folder in enumerate(folders):
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        images = [path for path in found if path.suffix[1:].lower() in (*EXTENSIONS, *_REENCODED)]
        if not images:
            raise ValueError(f"the class folder {folder} holds no images")
        others += [path for path in found if path not in set(images)]
        files += [(path, label) for path in images]
    if others:
        log.warning("event=files_ignored count=%d reason=not_an_image first=%s", len(others), others[0])
    return [folder.name.replace("_", " ") for folder in folders], files


def list_unlabelled(source: Path) -> list[tuple[Path, None]]:
    """Every image under a folder, in a fixed order. Files of other kinds are counted in the log.

    Raises:
        ValueError: there is no such folder, or no image in it.
    """
    if not source.is_dir():
        raise ValueError(f"there is no folder {source}")
    found = sorted(path for path in source.rglob("*") if path.is_file())
    images = [path for path in found if path.suffix[1:].lower() in (*EXTENSIONS, *_REENCODED)]
    if not images:
        raise ValueError(f"{source} holds no images")
    if len(images) < len(found):
        log.warning("event=files_ignored count=%d reason=not_an_image", len(found) - len(images))
    return [(path, None) for path in images]


def verify(address: str | Path, cache_dir: str | None = None, show_progress: bool = True) -> list[str]:
    """Read a whole set and compare it with its index.

    Returns:
        One sentence a fault, empty for a sound set: missing or altered shards, samples that cannot be decoded or have a
        wrong label, keys that occur twice, class counts that differ.

    Raises:
        ValueError: there is no set at ``address``, or its index is not usable.
    """
    shards = ShardSet(address, cache_dir)
    problems: list[str] = []
    keys: set[str] = set()
    labels: Counter[int] = Counter()
    start = 0
    for number, shard in enumerate(_tracked(shards.index.shards, "verify", show_progress)):
        try:
            digest = file_sha256(shards.fetch(number))
            if digest != shard.sha256:
                problems.append(f"shard {shard.file}: its sha256 is {digest}, the index says {shard.sha256}")
            for sample in range(start, start + shard.samples):
                raw = shards.read(sample)
                where = f"shard {shard.file}, sample {raw.key!r}"
                if raw.key in keys:
                    problems.append(f"{where}: the key occurs twice in the set")
                keys.add(raw.key)
                try:
                    if shards.has_labels:
                        labels[read_label(raw.parts)] += 1
                    decode_whole(raw.parts)
                except ValueError as fault:
                    problems.append(f"{where}: {fault}")
        except (ValueError, OSError) as fault:
            problems.append(str(fault))
        start += shard.samples
    names = shards.classes
    for label in sorted(labels.keys() - set(range(len(names)))):
        problems.append(f"{labels[label]} samples have the label {label}, but there are {len(names)} classes")
    for label, (class_name, count) in enumerate(zip(names, shards.index.class_counts)):
        if labels[label] != count:
            problems.append(f"class {class_name!r} has {labels[label]} readable samples, the index says {count}")
    return problems


def info(address: str | Path) -> dict[str, Any]:
    """What a set holds, from its index alone: numbers, names and texts that JSON can hold."""
    index = ShardSet(address).index
    summary = index.model_dump(include={"name", "samples", "licence", "source", "templates"})
    return summary | {
        "classes": len(index.classes),
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "samples_per_class": [min(index.class_counts), max(index.class_counts)] if index.class_counts else [],
        "digest": hashlib.sha256(json.dumps([shard.sha256 for shard in index.shards]).encode()).hexdigest()[:16],
    }


def sample(address: str | Path, out: Path, *, seed: int = 0, columns: int = 8, rows: int = 5, side: int = 112) -> None:
    """Draw a montage of randomly chosen samples with their class names, as a PNG of ``columns`` x ``rows`` images."""
    shards = ShardSet(address)
    margin, line = 6, 14
    sheet = Image.new("RGB", (columns * (side + margin) + margin, rows * (side + line + margin) + margin), "white")
    pen = ImageDraw.Draw(sheet)
    chosen = np.random.default_rng(seed).permutation(subset_ids(len(shards), 0))[: columns * rows]
    for place, number in enumerate(sorted(chosen.tolist())):
        raw = shards.read(number)
        left = margin + place % columns * (side + margin)
        top = margin + place // columns * (side + line + margin)
        sheet.paste(Image.fromarray(decode(raw.parts, side).transpose(1, 2, 0)), (left, top))
        text = shards.classes[read_label(raw.parts)] if shards.has_labels else raw.key
        while len(text) > 1 and pen.textlength(text) > side:
            text = text[:-1]
        pen.text((left, top + side), text, fill="black")
    sheet.save(out, format="PNG")


def _make_sample(number: int, path: Path, label: int | None, image_size: int) -> dict[str, Any]:
    """What TarWriter writes; the key keeps a trace of the source file and is unique by its number."""
    extension, content = _stored_form(path, image_size)
    stem = re.sub("[^A-Za-z0-9-]+", "-", path.stem)[:60].strip("-")
    known = {} if label is None else {"cls": str(label).encode()}
    return {"__key__": f"{number:08d}-{stem}", **known, extension: content}


def _stored_form(path: Path, image_size: int) -> tuple[str, bytes]:
    """Extension and bytes of an image as it is laid into a shard."""
    extension, content = path.suffix[1:].lower(), path.read_bytes()
    if extension in EXTENSIONS:
        height, width, _ = decode_whole({extension: content}).shape
        if not image_size or min(height, width) <= image_size:
            return "jpg" if extension == "jpeg" else extension, content
    image = open_rgb(content)
    if image_size and min(image.size) > image_size:
        width, height = (round(side * image_size / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if extension in ("jpg", "jpeg"):
        image.save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
        return "jpg", buffer.getvalue()
    image.save(buffer, format="PNG")
    return "png", buffer.getvalue()


def _holds_a_set(storage: Storage) -> bool:
    try:
        storage.read_text(INDEX_FILE)
    except ValueError:
        return False
    return True


def _progress(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=Console(stderr=True), disable=not show,
    )  # fmt: skip


def _tracked(items: Iterable[Item], what: str, show: bool) -> Iterator[Item]:
    with _progress(show) as progress:
        yield from progress.track(list(items), description=what)
