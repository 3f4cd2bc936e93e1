"""Small sets of shards for tests: random images whose content depends on their number alone."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from zsr.data.index import INDEX_FILE, Shard, ShardIndex

_MTIME = 1_700_000_000


def make_image(number: int, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: a few coarse coloured blocks plus fine noise, so that resizing has something to do."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return np.clip(image + rng.integers(-12, 13, image.shape), 0, 255).astype(np.uint8)


def encode_image(image: np.ndarray, extension: str) -> bytes:
    format = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}[extension]
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=format, quality=92, lossless=True)  # each format takes what it knows
    return buffer.getvalue()


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Shard:
    """A WebDataset tar of (key, parts) and its index entry."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, parts in samples:
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size, member.mtime = len(content), _MTIME
                tar.addfile(member, io.BytesIO(content))
    content = path.read_bytes()
    return Shard(file=path.name, samples=len(samples), bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def write_index(folder: Path, shards: list[Shard], labels: list[int], num_classes: int) -> Path:
    index = ShardIndex(
        name=folder.name, classes=[f"class {number}" for number in range(num_classes)], templates=["a photo of a {}."],
        samples=len(labels), shards=shards, class_counts=[labels.count(number) for number in range(num_classes)],
    )  # fmt: skip
    (folder / INDEX_FILE).write_text(index.to_json(), encoding="utf-8")
    return folder


def make_shards(
    folder: Path,
    num_samples: int = 20,
    num_classes: int = 4,
    shard_size: int | list[int] = 8,
    image_size: int | tuple[int, int] = 16,
    extension: str = "webp",
) -> Path:
    """Write a set; sample i has key ``s{i:06d}`` and label ``i % num_classes``.

    Args:
        folder: made if missing; returned.
        shard_size: samples per shard, the last one taking the rest; or the size of each shard, which then fixes the
            number.
        image_size: side, or (height, width), in pixels.
        extension: "webp" or "png" (lossless) or "jpg".
    """
    folder.mkdir(parents=True, exist_ok=True)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if isinstance(shard_size, int):
        sizes = [min(shard_size, num_samples - start) for start in range(0, num_samples, shard_size)]
    else:
        sizes = shard_size
    shards, labels = [], []
    for number, size in enumerate(sizes):
        samples = []
        for _ in range(size):
            sample = len(labels)
            labels.append(sample % num_classes)
            image = encode_image(make_image(sample, height, width), extension)
            samples.append((f"s{sample:06d}", {"cls": str(labels[-1]).encode(), extension: image}))
        shards.append(write_tar(folder / f"{number:06d}.tar", samples))
    return write_index(folder, shards, labels, num_classes)
