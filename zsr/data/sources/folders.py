"""Images in folders: one folder a class, or all together without labels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from zsr.data.sources.listing import NOT_AN_IMAGE, Files, Listing, looks_like_image


def list_classes(source: Path) -> Listing:
    """Each folder in ``source`` is a class; images may lie deeper in it. Hidden files and folders are passed over.

    Raises:
        ValueError: there is no such folder, no class folder in it, or a class without images.
    """
    _check(source)
    top = sorted(entry.name for entry in os.scandir(source) if not entry.name.startswith("."))
    keys = [name for name in top if (source / name).is_dir()]
    if not keys:
        raise ValueError(f"{source} has no folders; it should hold one folder of images a class")
    ignored = [(name, NOT_AN_IMAGE) for name in top if not (source / name).is_dir()]
    names: list[str] = []
    labels: list[int] = []
    for label, key in enumerate(keys):
        before = len(names)
        for name in _files(source, key):
            names.append(name) if looks_like_image(name) else ignored.append((name, NOT_AN_IMAGE))
        if len(names) == before:
            raise ValueError(f"the class folder {source / key} holds no images")
        labels += [label] * (len(names) - before)
    return _listing(source, names, keys, np.array(labels, dtype=np.int64), ignored)


def list_all(source: Path) -> Listing:
    """Every image anywhere under ``source``, without labels.

    Raises:
        ValueError: there is no such folder, or no image in it.
    """
    _check(source)
    found = list(_files(source, ""))
    names = [name for name in found if looks_like_image(name)]
    if not names:
        raise ValueError(f"{source} holds no images")
    ignored = [(name, NOT_AN_IMAGE) for name in found if not looks_like_image(name)]
    return _listing(source, names, [], None, ignored)


def _listing(
    source: Path, names: list[str], keys: list[str], labels: np.ndarray | None, ignored: list[tuple[str, str]]
) -> Listing:
    read = Files([f"{source}/{name}" for name in names])
    return Listing(names, keys, labels, read.versions(), read, f"the folder {source.resolve().name}", ignored)


def _check(source: Path) -> None:
    if not source.is_dir():
        raise ValueError(f"there is no folder {source}")


def _files(source: Path, below: str) -> Iterator[str]:
    """Names, relative to ``source``, of the files in one of its folders and deeper, sorted folder by folder."""
    for folder, folders, files in os.walk(source / below):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        where = os.path.relpath(folder, source)
        for name in sorted(files):
            if not name.startswith("."):
                yield name if where == "." else f"{where}/{name}"
