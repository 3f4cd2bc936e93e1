"""Images in tar files, read in place: ImageNet's tar of tars, a folder of a tar a class, and plain tars of images.

Headers are read once; after that an image is one read at a known offset, so nothing is unpacked and any order costs the
same on a disk without seeks. A compressed tar has no offsets and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from zsr.data.progress import tracked
from zsr.data.sources.listing import NOT_AN_IMAGE, Listing, Ranges, looks_like_image, number_classes
from zsr.data.tars import list_members


def list_tar_of_tars(source: Path, show_progress: bool = False) -> Listing:
    """ILSVRC2012_img_train.tar: a tar of tars, each of them one class and named like it.

    Raises:
        ValueError: the file is missing or no plain tar, or holds no tars.
    """
    with _opened(source) as file:
        inner = [member for member in list_members(file, str(source)) if member[0].endswith(".tar")]
        if not inner:
            raise ValueError(f"{source} holds no tars; ILSVRC2012_img_train.tar has one a class, such as n01440764.tar")
        found = [
            (0, PurePosixPath(name).stem, f"{PurePosixPath(name).name}/{member}", start, length)
            for name, offset, size in tracked(sorted(inner), "list", show_progress)
            for member, start, length in list_members(file, f"{name} in {source}", offset, offset + size)
        ]
    return _listing([source], found, f"the tar {source.name}")


def list_class_tars(source: Path, show_progress: bool = False) -> Listing:
    """A folder of tars, each of them one class and named like it.

    Raises:
        ValueError: a tar is not plain, or none holds an image.
    """
    files = sorted(source.glob("*.tar"))
    found = []
    for number, path in enumerate(tracked(files, "list", show_progress)):
        with path.open("rb") as file:
            members = list_members(file, str(path))
        found += [(number, path.stem, f"{path.name}/{name}", offset, size) for name, offset, size in members]
    return _listing(files, found, f"the tars in {source.resolve().name}")


def list_tar(source: Path) -> Listing:
    """A tar of images; the first folder above an image is its class. Without folders there are no labels.

    Raises:
        ValueError: the file is missing or no plain tar, or holds no images.
    """
    with _opened(source) as file:
        members = list_members(file, str(source))
    found = []
    for name, offset, size in members:
        plain = PurePosixPath(name)
        found.append((0, plain.parent.name, str(plain), offset, size))
    return _listing([source], found, f"the tar {source.name}")


def holds_tars(source: Path) -> bool:
    """Whether the first file in a tar is a tar."""
    with _opened(source) as file:
        for name, _, _ in list_members(file, str(source), first_only=True):
            return name.endswith(".tar")
    return False


def _listing(files: list[Path], found: Iterable[tuple[int, str, str, int, int]], what: str) -> Listing:
    """From (file, class key, name, offset, size) of every member."""
    entries = sorted(found, key=lambda entry: entry[2])
    images = [entry for entry in entries if looks_like_image(entry[2])]
    ignored = [(entry[2], NOT_AN_IMAGE) for entry in entries if not looks_like_image(entry[2])]
    if not images:
        raise ValueError(f"{what} holds no images")
    file, key_of, names, offset, size = (list(column) for column in zip(*images))
    read = Ranges(files, names, file, offset, size)
    keys: list[str] = []
    labels: np.ndarray | None = None
    if all(key_of):
        keys, labels = number_classes(key_of, sorted(set(key_of)))
    return Listing(names, keys, labels, read.versions(), read, what, ignored)


def _opened(source: Path) -> BinaryIO:
    try:
        return source.open("rb")
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error.strerror}") from None
