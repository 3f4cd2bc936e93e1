"""Sets that are shards already, to be laid into others: of another size, resized, or mixed anew."""

from __future__ import annotations

import re

import numpy as np

from zsr.data.decode import EXTENSIONS, read_label
from zsr.data.progress import tracked
from zsr.data.shards import ShardSet
from zsr.data.sources.listing import Listing


def list_set(address: str, show_progress: bool = False) -> Listing:
    """The samples of a set; parts other than the image and its label come along unchanged.

    Raises:
        ValueError: there is no set, or a sample has no image or no label.
        OSError: a remote shard cannot be fetched.
    """
    shards = ShardSet(address)
    names: list[str] = []
    labels = np.full(len(shards), -1, dtype=np.int64)
    for number in tracked(range(len(shards)), "list", show_progress):
        raw = shards.read(number)
        kept = [extension for extension in EXTENSIONS if extension in raw.parts]
        if not kept:
            raise ValueError(f"sample {raw.key!r} of {shards.address} has no image of a known kind")
        # A key that an earlier conversion made begins with the number of the sample then.
        names.append(f"{re.sub(r'^[0-9]{8}-', '', raw.key)}.{kept[0]}")
        if shards.has_labels:
            labels[number] = read_label(raw.parts)
    sizes = np.repeat([shard.bytes for shard in shards.index.shards], shards.index.shard_sizes)
    digests = [int(shard.sha256[:15], 16) for shard in shards.index.shards]
    index = shards.index
    return Listing(
        names,
        shards.classes,
        labels if shards.has_labels else None,
        np.stack([sizes, np.repeat(digests, shards.index.shard_sizes)], axis=1),
        _Samples(shards),
        f"the set {index.name}" + f" ({index.source})" * bool(index.source),
        classes=shards.classes,
        templates=index.templates,
        licence=index.licence,
    )


class _Samples:
    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards

    def __call__(self, number: int) -> dict[str, bytes]:
        return {extension: part for extension, part in self.shards.read(number).parts.items() if extension != "cls"}
