"""Ground truth that lies apart from the images, as ImageNet's validation set has it.

The official devkit numbers classes in an order of its own: line n of ILSVRC2012_validation_ground_truth.txt is such a number
for image n, and only the devkit's meta.mat says which WordNet id it stands for. Taken for labels, the numbers give a set on
which every model scores 0.1 %, so they are refused without the table. What else is in use:

    ILSVRC2012_val_00000001.JPEG n01751748        names and WordNet ids, in two columns
    ILSVRC2012_val_00000001.JPEG 65               names and labels from 0, in the order of the sorted WordNet ids
    ImageId,PredictionString                      Kaggle's LOC_val_solution.csv: the WordNet id comes first
    n01751748                                     WordNet ids alone, a line an image
"""

from __future__ import annotations

import importlib
import io
import re
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

from zsr.data.sources.listing import Listing, number_classes

_TRUTH_FILE, _META_FILE, _MAP_FILE = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "map_clsloc.txt"


def label_by(listing: Listing, path: Path) -> None:
    """Give a listing the labels in a ground-truth file.

    Args:
        listing: gets ``keys`` and ``labels``.
        path: a text as above, or the devkit: its folder, or ILSVRC2012_devkit_t12.tar.gz.

    Raises:
        ValueError: the file cannot be read, does not name every image once, or holds the devkit's numbers without the
            table that belongs to them.
    """
    text, synsets = _read(path)
    rows = [re.split(r"[\s,]+", line.strip()) for line in text.splitlines() if line.strip()]
    if rows and rows[0][0] in ("ImageId", "filename", "file", "path"):
        rows = rows[1:]
    if not rows:
        raise ValueError(f"{path} holds no labels")
    if all(len(row) == 1 for row in rows):
        key_of = _in_order(listing, [row[0] for row in rows], synsets, path)
    elif all(len(row) > 1 for row in rows):
        key_of = _by_name(listing, {PurePosixPath(row[0]).stem: row[1] for row in rows}, path)
    else:
        raise ValueError(
            f"{path} has lines of one word and lines of several; it should have a label a line, or name and label"
        )
    listing.keys, listing.labels = number_classes(key_of)


def _in_order(listing: Listing, keys: list[str], synsets: dict[str, str], path: Path) -> list[str]:
    if len(keys) != len(listing):
        raise ValueError(f"{path} has {len(keys)} labels for {len(listing)} images")
    if all(key.isdigit() for key in keys):
        if not synsets:
            raise ValueError(
                f"{path} holds numbers of the ILSVRC devkit, which are not in the order of the WordNet ids; lay the "
                f"devkit's {_META_FILE} beside it, or name the devkit itself (ILSVRC2012_devkit_t12.tar.gz)"
            )
        missing = sorted(set(keys) - set(synsets))
        if missing:
            raise ValueError(f"{path} has the number {missing[0]}, which the devkit's table does not")
        keys = [synsets[key] for key in keys]
    # Line n belongs to image n by name; a listing is sorted so already.
    assert list(listing.names) == sorted(listing.names)
    return keys


def _by_name(listing: Listing, key_of: dict[str, str], path: Path) -> list[str]:
    stems = [PurePosixPath(name).stem for name in listing.names]
    missing = [stem for stem in stems if stem not in key_of]
    if missing:
        raise ValueError(f"{path} has no label for {len(missing)} of {len(stems)} images, such as {missing[0]}")
    if len(set(stems)) != len(stems):
        raise ValueError(f"{listing.what} holds several images of one name, so {path} cannot tell them apart")
    return [key_of[stem] for stem in stems]


def _read(path: Path) -> tuple[str, dict[str, str]]:
    """The text, and WordNet ids by the devkit's numbers where these are known."""
    try:
        if path.is_dir():
            found = next(iter(sorted(path.rglob(_TRUTH_FILE))), None)
            if found is None:
                raise ValueError(f"the folder {path} holds no {_TRUTH_FILE}")
            path = found
        elif tarfile.is_tarfile(path):
            return _read_devkit(path)
        meta, table = path.with_name(_META_FILE), path.with_name(_MAP_FILE)
        synsets = _parse_meta(meta.read_bytes()) if meta.exists() else {}
        if not synsets and table.exists():
            rows = [line.split() for line in table.read_text(encoding="utf-8").splitlines()]
            synsets = {row[1]: row[0] for row in rows if len(row) > 1}
        return path.read_text(encoding="utf-8"), synsets
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the ground truth {path} cannot be read: {error}") from None


def _read_devkit(path: Path) -> tuple[str, dict[str, str]]:
    parts: dict[str, bytes] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            if name in (_TRUTH_FILE, _META_FILE):
                content = tar.extractfile(member)
                assert content is not None
                parts[name] = content.read()
    if len(parts) < 2:
        raise ValueError(f"{path} is not the ILSVRC devkit: it lacks {_TRUTH_FILE} or {_META_FILE}")
    return parts[_TRUTH_FILE].decode(), _parse_meta(parts[_META_FILE])


def _parse_meta(content: bytes) -> dict[str, str]:
    try:
        loadmat = importlib.import_module("scipy.io").loadmat
    except ImportError:
        raise ValueError(
            f"reading the devkit's {_META_FILE} needs scipy; install it with `pip install scipy`"
        ) from None

    def plain(value: Any) -> str:  # MATLAB wraps every value in arrays
        while getattr(value, "shape", ()):
            value = value.ravel()[0]
        return str(value)

    rows = loadmat(io.BytesIO(content))["synsets"].ravel()
    return {plain(row["ILSVRC2012_ID"]): plain(row["WNID"]) for row in rows if plain(row["num_children"]) == "0"}
