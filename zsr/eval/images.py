"""The samples of a set that are measured: their keys, labels and pixels, decoded once while they fit into memory.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from zsr.data.decode import read_label
from zsr.data.pipeline import Batch, read_batch, subset_ids
from zsr.data.shards import ShardSet

_KEEP_BYTES = 512 * 2**20


class Images:
    """Samples by their numbers in the set.

    Args:
        shards: the set.
        pixels: side of the square images that are attacked.
        num_samples: the head of the set's fixed subset order; 0 means all.

    Attributes:
        ids: of the samples measured, ascending.

    Raises:
        ValueError: the set has no labels.
    """

    def __init__(self, shards: ShardSet, pixels: int, num_samples: int = 0) -> None:
        if not shards.has_labels:
            raise ValueError(f"{shards.address}: has no labels; accuracy needs a set with classes")
        self.shards, self.pixels = shards, pixels
        self.ids = subset_ids(len(shards), num_samples)
        self._kept: dict[int, np.ndarray] | None = {} if len(self.ids) * 3 * pixels**2 <= _KEEP_BYTES else None

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def keys(self) -> dict[int, str]:
        """By sample; what fixes a sample's random numbers."""
        return self._names[0]

    @cached_property
    def label(self) -> np.ndarray:
        """int64 [samples], in the order of ``ids``."""
        return self._names[1]

    @cached_property
    def digest(self) -> str:
        """Of keys and labels in order, and of the bytes of the shards that hold them, twelve hex digits."""
        held = sorted({self.shards.locate(sample)[0] for sample in self.ids.tolist()})
        lines = [self.shards.index.shards[shard].sha256 for shard in held]
        lines += [f"{key}\t{label}" for key, label in zip(self.keys.values(), self.label.tolist(), strict=True)]
        text = "\n".join(lines)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def batch(self, ids: Sequence[int]) -> Batch:
        """Pixels, labels and keys of some samples.

        Raises:
            ValueError, OSError: one cannot be read.
        """
        if self._kept is None:
            return read_batch(self.shards, np.asarray(ids), self.pixels)
        new = [sample for sample in ids if sample not in self._kept]
        if new:
            for sample, image in zip(new, read_batch(self.shards, np.asarray(new), self.pixels).image, strict=True):
                self._kept[sample] = image.numpy()
        place = np.searchsorted(self.ids, ids)
        return Batch(
            torch.from_numpy(np.stack([self._kept[sample] for sample in ids])),
            torch.from_numpy(self.label[place]),
            [self.keys[sample] for sample in ids],
        )

    @cached_property
    def _names(self) -> tuple[dict[int, str], np.ndarray]:
        keys, labels = {}, []
        for sample in self.ids.tolist():
            raw = self.shards.read(sample, only=("cls",))
            keys[sample] = raw.key
            try:
                labels.append(read_label(raw.parts))
            except ValueError as fault:
                raise ValueError(f"sample {raw.key!r} of {self.shards.address}: {fault}") from None
        wrong = [label for label in labels if not 0 <= label < len(self.shards.classes)]
        if wrong:
            raise ValueError(
                f"{self.shards.address}: the label {wrong[0]} is none of the set's {len(self.shards.classes)} classes"
            )
        return keys, np.asarray(labels, dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None if self._kept is None else {}}
