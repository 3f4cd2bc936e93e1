"""What a source of images holds, image by image, and how to get at each: the one form that all sources are brought into.

N images. Lists are plain columns and not one object an image: making one takes 0.4 kB an image, so half a gigabyte for
ImageNet, which forked processes share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from zsr.data.decode import EXTENSIONS

REENCODED = ("bmp", "gif", "ppm", "tif", "tiff")
"""Formats that readers of shards need not know: stored as PNG."""

NOT_AN_IMAGE = "not the name of an image"

Read = Callable[[int], dict[str, bytes]]
"""Given an image's number, the parts of its sample by extension: one image, no "cls"."""


@dataclass
class Listing:
    """The images of a source, in a fixed order.

    Attributes:
        names: of the images (N), unique, as a report names them.
        keys: of the classes, in the order of the labels: folder names, WordNet ids, or the names themselves.
        labels: int64 [N], or None where there are none.
        versions: int64 [N, 2]: sizes and times of change; another one means that an image may have changed.
        read: gets at an image's bytes; works in forked processes.
        what: the source in a few words, for the index.
        ignored: (name, reason) of files that do not look like images.
        classes: names of the classes, where the source knows better than to take them from the keys.
        templates, licence: where the source knows them.
    """

    names: Sequence[str]
    keys: list[str]
    labels: np.ndarray | None
    versions: np.ndarray
    read: Read
    what: str
    ignored: list[tuple[str, str]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=list)
    licence: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def label(self, number: int) -> int | None:
        return None if self.labels is None else int(self.labels[number])


class Files:
    """Reads images that are files of their own."""

    def __init__(self, paths: Sequence[Path | str]) -> None:
        self.paths = paths

    def __call__(self, number: int) -> dict[str, bytes]:
        path = self.paths[number]
        with open(path, "rb") as file:
            return {extension_of(str(path)): file.read()}

    def versions(self) -> np.ndarray:
        status = (os.stat(path) for path in self.paths)
        return np.array([(entry.st_size, entry.st_mtime_ns) for entry in status], dtype=np.int64).reshape(-1, 2)


class Ranges:
    """Reads images that are byte ranges of a few large files, such as tars, however deep these are nested.

    Args:
        files: the large files.
        names: of the images (N).
        file: int64 [N], which file holds each.
        offset, size: int64 [N], where in it.
    """

    def __init__(
        self,
        files: Sequence[Path],
        names: Sequence[str],
        file: Sequence[int],
        offset: Sequence[int],
        size: Sequence[int],
    ) -> None:
        self.files, self.names = files, names
        self.file, self.offset, self.size = (np.array(column, dtype=np.int64) for column in (file, offset, size))
        self._descriptors: dict[int, int] = {}

    def __call__(self, number: int) -> dict[str, bytes]:
        file, size = int(self.file[number]), int(self.size[number])
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self.files[file], os.O_RDONLY)
        content = os.pread(self._descriptors[file], size, int(self.offset[number]))
        if len(content) != size:
            raise ValueError(f"{self.files[file].name} ends inside it")
        return {extension_of(self.names[number]): content}

    def versions(self) -> np.ndarray:
        times = np.array([path.stat().st_mtime_ns for path in self.files], dtype=np.int64)
        return np.stack([self.size, times[self.file]], axis=1)


def extension_of(name: str) -> str:
    """A file name's extension, in lower case and without the dot."""
    return PurePosixPath(name).suffix[1:].lower()


def looks_like_image(name: str) -> bool:
    return extension_of(name) in (*EXTENSIONS, *REENCODED)


def number_classes(key_of: Sequence[str], keys: Sequence[str] = ()) -> tuple[list[str], np.ndarray]:
    """Class keys in a fixed order, and each image's label.

    Args:
        key_of: each image's class (N).
        keys: the order, where it is known; else keys are sorted: numbers by value, from 0 to the largest, and ImageNet's
            WordNet ids as everyone sorts them.

    Returns:
        The keys, and labels int64 [N].
    """
    chosen = list(keys)
    if not chosen and all(key.isdigit() for key in key_of):
        chosen = [str(number) for number in range(max(map(int, key_of)) + 1)]
        key_of = [str(int(key)) for key in key_of]
    chosen = chosen or sorted(set(key_of))
    number = {key: label for label, key in enumerate(chosen)}
    return chosen, np.array([number[key] for key in key_of], dtype=np.int64)
