"""Which kind of source an address is, and its listing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from zsr.data.index import INDEX_FILE
from zsr.data.sources import folders, tables, tarballs
from zsr.data.sources.class_names import name_classes
from zsr.data.sources.listing import Listing
from zsr.data.sources.packages import list_torchvision
from zsr.data.sources.sets import list_set
from zsr.data.sources.truth import label_by

Kind = Literal["folders", "flat", "tar", "ilsvrc-train", "csv", "set", "torchvision"]


@dataclass(frozen=True)
class Where:
    """A source as a user names it.

    Attributes:
        source: a path; or torchvision:NAME; or a set's address.
        kind: how it is laid out; found out if None.
        truth: a ground-truth file for images without labels of their own; see ``zsr.data.sources.truth``.
        class_names: "imagenet" or a file; see ``zsr.data.sources.class_names``.
        root: where torchvision's set lies, or the folder from which a table's paths start.
        split: of torchvision's set.
        labels: without, the set gets no classes.
    """

    source: str
    kind: Kind | None = None
    truth: Path | None = None
    class_names: str | None = None
    root: Path | None = None
    split: str = "train"
    labels: bool = True


def open_source(where: Where, show_progress: bool = False) -> tuple[Listing, list[str]]:
    """The images at a place, and the names of their classes (none for a source without labels).

    Raises:
        ValueError: there is nothing there, its layout is not known or not what was said, or labels or names are missing.
        OSError: a remote set cannot be fetched.
    """
    kind = where.kind or find_kind(where)
    if kind not in get_args(Kind):
        raise ValueError(f"--from {kind}: is not one of {', '.join(get_args(Kind))}")
    path = Path(where.source).expanduser()
    listings: dict[Kind, Callable[[], Listing]] = {
        "folders": lambda: folders.list_classes(path) if where.labels else folders.list_all(path),
        "flat": lambda: folders.list_all(path),
        "tar": lambda: tarballs.list_tar(path),
        "ilsvrc-train": lambda: (tarballs.list_class_tars if path.is_dir() else tarballs.list_tar_of_tars)(
            path, show_progress
        ),
        "csv": lambda: tables.list_table(path, where.root, where.labels),
        "set": lambda: list_set(where.source, show_progress),
        "torchvision": lambda: list_torchvision(
            where.source.removeprefix("torchvision:"), where.root or Path("."), where.split
        ),
    }
    listing = listings[kind]()
    if where.truth is not None:
        label_by(listing, where.truth)
    if not where.labels:
        listing.keys, listing.labels, listing.classes = [], None, []
        return listing, []
    if listing.labels is None:
        if kind == "set":  # was made without labels
            return listing, []
        raise ValueError(
            f"{listing.what} has no labels; name a ground-truth file with --truth, or convert without them: --no-labels"
        )
    if listing.classes and where.class_names is None:
        return listing, listing.classes
    return listing, name_classes(listing.keys, where.class_names)


def find_kind(where: Where) -> Kind:
    """The layout of what lies at a place, from a look at it.

    Raises:
        ValueError: there is nothing, or it is none of the layouts.
    """
    source = where.source
    if source.startswith("torchvision:"):
        return "torchvision"
    if "://" in source or source.startswith("zsr:"):
        return "set"
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix in (".csv", ".tsv"):
            return "csv"
        return "ilsvrc-train" if tarballs.holds_tars(path) else "tar"
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}")
    if where.truth is not None:
        return "flat"
    if (path / INDEX_FILE).exists():
        return "set"
    if any(path.glob("*.tar")):
        # CLIP_benchmark's tars have class names beside or above them; without, each tar is a class.
        texts = [place / "classnames.txt" for place in (path, path.resolve().parent)]
        return "set" if any(text.exists() for text in texts) else "ilsvrc-train"
    return "folders"
