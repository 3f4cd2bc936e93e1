"""Check or look at a set that exists: all of it against its index, what the index says, some of its images."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from zsr.data.cache import file_sha256
from zsr.data.decode import decode, decode_whole, read_label
from zsr.data.pipeline import subset_ids
from zsr.data.progress import tracked
from zsr.data.shards import ShardSet


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
    for number, shard in enumerate(tracked(shards.index.shards, "verify", show_progress)):
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
