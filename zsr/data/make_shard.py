"""One shard of a conversion: reads its images, checks that they decode, resizes them if wanted, writes the tar.

Which images a shard holds and every byte of it depend on the source and the settings alone, so shards can be made in any
order by any number of processes.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from zsr.data.decode import EXTENSIONS, JPEG, decode_whole, open_rgb, resize
from zsr.data.index import Shard
from zsr.data.journal import DoneShard, Rejected, Settings
from zsr.data.plan import EpochPlan
from zsr.data.sources.listing import Listing
from zsr.data.storage import Storage

_MTIME = 1_700_000_000  # in every tar header instead of the clock


@dataclass
class ShardMaker:
    """Makes and stores shards by number.

    Attributes:
        workspace: folder for the shard that is being written.
        checked: int64 [num_shards], shared by processes: images of each shard looked at so far.
    """

    listing: Listing
    storage: Storage
    settings: Settings
    workspace: Path
    order: np.ndarray = field(init=False)
    checked: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        total = len(self.listing)
        self.order = np.arange(total)
        if self.settings.shuffle is not None:
            self.order = EpochPlan([total], self.settings.shuffle, 0, total, window=1).order
        self.checked = np.frombuffer(mmap.mmap(-1, 8 * self.num_shards), np.int64)

    @property
    def num_shards(self) -> int:
        return -(-len(self.listing) // self.settings.samples_per_shard)

    def numbers(self, shard: int) -> np.ndarray:
        """The images that belong into a shard, in its order."""
        size = self.settings.samples_per_shard
        return self.order[shard * size : (shard + 1) * size]

    def fingerprint(self, shard: int) -> str:
        """Another one means that the shard's images are not what they were."""
        lines = [
            f"{number} {self.listing.names[number]} {self.listing.label(number)} {self.listing.versions[number].tolist()}"
            for number in self.numbers(shard).tolist()
        ]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def make(self, shard: int) -> DoneShard:
        """Write and store one shard.

        Raises:
            OSError: the target cannot be written, or a transfer kept failing.
        """
        name = f"{shard:06d}.tar"
        path = self.workspace / f"{name}.{os.getpid()}"
        numbers, rejected = self.numbers(shard).tolist(), []
        with path.open("wb") as file:
            hashed = _Hashed(file)
            with webdataset.TarWriter(hashed, encoder=False, mtime=_MTIME) as tar:
                for done, number in enumerate(numbers):
                    try:
                        tar.write(self._sample(number))
                    except ValueError as fault:
                        reason = " ".join(str(fault).split())
                        file_name = self.listing.names[number].encode("utf-8", "backslashreplace").decode()
                        rejected.append(Rejected(number=number, file=file_name, reason=reason))
                    self.checked[shard] = done + 1
        entry = None
        if len(rejected) < len(numbers):
            samples = len(numbers) - len(rejected)
            entry = Shard(file=name, samples=samples, bytes=hashed.length, sha256=hashed.digest.hexdigest())
            self.storage.move(path, name)
        else:
            path.unlink()
        return DoneShard(number=shard, fingerprint=self.fingerprint(shard), shard=entry, rejected=rejected)

    def _sample(self, number: int) -> dict[str, Any]:
        """What TarWriter writes; the key keeps a trace of the source and is unique by its number."""
        try:
            parts = self.listing.read(number)
        except OSError as fault:
            if fault.errno is None:  # a transfer that failed says nothing about the image
                raise
            raise ValueError(f"cannot be read: {fault.strerror}") from None
        stem = re.sub("[^A-Za-z0-9-]+", "-", PurePosixPath(self.listing.names[number]).stem)[:60].strip("-")
        label = self.listing.label(number)
        known = {} if label is None else {"cls": str(label).encode()}
        return {"__key__": f"{number:08d}-{stem}", **known, **self.stored_form(parts)}

    def stored_form(self, parts: Mapping[str, bytes]) -> dict[str, bytes]:
        """Parts of a sample as they are laid into a shard: the image checked, and resized or encoded anew if need be.

        Raises:
            ValueError: the image cannot be decoded.
        """
        image = next((extension for extension in EXTENSIONS if extension in parts), None) or next(iter(parts))
        others = {extension: part for extension, part in parts.items() if extension != image}
        return {**self._stored_image(image, parts[image]), **others}

    def _stored_image(self, extension: str, content: bytes) -> dict[str, bytes]:
        side = self.settings.image_size
        if extension in EXTENSIONS:
            pixels = decode_whole({extension: content})
            if not side or min(pixels.shape[:2]) <= side:
                return {"jpg" if extension in JPEG else extension: content}
        else:
            pixels = np.array(open_rgb(content))
        shorter = min(pixels.shape[:2])
        if side and shorter > side:
            height, width = (round(length * side / shorter) for length in pixels.shape[:2])
            pixels = resize(pixels, height, width)
        image, buffer = Image.fromarray(pixels), io.BytesIO()
        if extension in JPEG:
            image.save(buffer, format="JPEG", quality=self.settings.quality, subsampling=0)
            return {"jpg": buffer.getvalue()}
        image.save(buffer, format="PNG")
        return {"png": buffer.getvalue()}


class _Hashed:
    """A file to write to, whose length and checksum are known at the end without reading it again."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.digest, self.length = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.length += len(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.flush()
