"""torchvision's data sets, as far as they are on disk already; nothing is downloaded."""

from __future__ import annotations

import inspect
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from zsr.data.sources.listing import Files, Listing, looks_like_image

_PATHS = ("samples", "_samples", "imgs", "_image_files", "_images")  # where torchvision's classes keep image files
_TARGETS = ("targets", "_labels", "labels")


def list_torchvision(name: str, root: Path, split: str) -> Listing:
    """A data set of torchvision.datasets. Images that are files keep their bytes; arrays become PNG.

    Args:
        name: of the class, such as CIFAR10.
        root: what its constructor calls root.
        split: "train", "test" or another that the class knows.

    Raises:
        ValueError: there is no such class or split, or its files are not under ``root``.
    """
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, datasets.VisionDataset)):
        raise ValueError(f"torchvision has no data set {name!r}; it has {', '.join(datasets.__all__)}")
    known = inspect.signature(kind).parameters
    chosen: dict[str, Any] = {"download": False} if "download" in known else {}
    if "split" in known:
        chosen["split"] = split
    elif "train" in known and split in ("train", "test"):
        chosen["train"] = split == "train"
    elif split != "train":
        raise ValueError(f"--split {split}: torchvision's {name} has no such split")
    try:
        dataset: Any = cast(Any, kind)(str(root), **chosen)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(
            f"torchvision's {name} cannot be read from {root} (--root, --split {split}): {error}"
        ) from None
    labels = _labels(dataset)
    paths = _paths(dataset)
    what = f"torchvision's {name}, {split}"
    keys = [str(entry) for entry in getattr(dataset, "classes", range(int(labels.max()) + 1))]
    if paths:
        files = Files(paths)
        base = Path(root).resolve()
        names = [str(path.relative_to(base)) if path.is_relative_to(base) else path.name for path in files_of(paths)]
        return Listing(names, keys, labels, files.versions(), files, what)
    names = [f"{number}.png" for number in range(len(labels))]
    versions = np.zeros((len(labels), 2), dtype=np.int64)
    return Listing(names, keys, labels, versions, _Arrays(dataset), what)


def files_of(paths: Sequence[str]) -> list[Path]:
    return [Path(path).resolve() for path in paths]


class _Arrays:
    """Reads images that the data set holds in memory, or decodes in its own way."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, number: int) -> dict[str, bytes]:
        image = self.dataset[number][0]
        assert isinstance(image, Image.Image)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return {"png": buffer.getvalue()}


def _labels(dataset: Any) -> np.ndarray:
    for name in _TARGETS:
        found = getattr(dataset, name, None)
        if found is not None and len(found) == len(dataset):
            return np.array([int(label) for label in found], dtype=np.int64)
    return np.array([int(dataset[number][1]) for number in range(len(dataset))], dtype=np.int64)


def _paths(dataset: Any) -> list[str]:
    """The image files behind the data set, if it has one for each image; else nothing."""
    for name in _PATHS:
        found = getattr(dataset, name, None)
        if isinstance(found, list) and len(found) == len(dataset):
            paths = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in found]
            if all(looks_like_image(path) for path in paths):
                return paths
    return []
