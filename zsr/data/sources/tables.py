"""Images that a CSV names, a line each: path and label, path and class name, or all three."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from zsr.data.sources.listing import Files, Listing, number_classes

_PATH = ("path", "file", "filename", "filepath", "image", "image_path")
_LABEL = ("label", "target", "class_id", "class_index")
_CLASS = ("class", "class_name", "classname", "category", "wnid", "synset")


def list_table(source: Path, images: Path | None = None, labels: bool = True) -> Listing:
    """The images named in a table with a header (commas, or tabs in a .tsv).

    Args:
        source: has a column path (or file, filename, image) and a column label (a number from 0) or class (a name), or
            both, which then names the numbers.
        images: the folder that paths start from; the table's own by default.
        labels: without, the path alone is read.

    Raises:
        ValueError: a column is missing, a cell is empty, one image occurs twice, or a label has two names. Images that are
            not there are found when they are read.
    """
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if source.suffix == ".tsv" else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{source} cannot be read as a table: {error}") from None
    if not rows:
        raise ValueError(f"{source} has no rows below its header")
    names = _column(source, rows, _PATH)
    if names is None:
        raise ValueError(f"{source} has no column path (or {', '.join(_PATH[1:])}), only {', '.join(rows[0])}")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{source} names {twice} twice")
    keys: list[str] = []
    label: np.ndarray | None = None
    classes: list[str] = []
    if labels:
        keys, label, classes = _labels(source, rows)
    folder = images or source.parent
    read = Files([str(folder / name) for name in names])
    return Listing(names, keys, label, _versions(read), read, f"the table {source.name}", classes=classes)


def _labels(source: Path, rows: list[dict[str, str]]) -> tuple[list[str], np.ndarray, list[str]]:
    numbers, names = _column(source, rows, _LABEL), _column(source, rows, _CLASS)
    if numbers is None or (names is None and not all(number.isdigit() for number in numbers)):
        key_of = names or numbers
        if key_of is None:
            raise ValueError(f"{source} has neither a column label nor a column class, only {', '.join(rows[0])}")
        return *number_classes(key_of), []
    wrong = next((number for number in numbers if not number.isdigit()), None)
    if wrong is not None:
        raise ValueError(f"{source}: the label {wrong!r} is not a number from 0; leave the column out to use the names")
    keys, label = number_classes(numbers)
    if names is None:
        return keys, label, []
    pairs: dict[int, str] = {}
    for number, name in zip(label.tolist(), names):
        if pairs.setdefault(number, name) != name:
            raise ValueError(f"{source}: the label {number} is named {pairs[number]!r} and {name!r}")
    return keys, label, [pairs.get(number, f"class {number}") for number in range(len(keys))]


def _column(source: Path, rows: list[dict[str, str]], known: tuple[str, ...]) -> list[str] | None:
    header = next((name for name in rows[0] if name and name.strip().lower() in known), None)
    if header is None:
        return None
    cells = [(row[header] or "").strip() for row in rows]
    if not all(cells):
        raise ValueError(f"{source}: line {cells.index('') + 2} has nothing in the column {header}")
    return cells


def _versions(read: Files) -> np.ndarray:
    def of(path: Path) -> tuple[int, int]:
        try:
            status = path.stat()
        except OSError:
            return -1, 0  # reading it will say so, with the other images that cannot be used
        return status.st_size, status.st_mtime_ns

    return np.array([of(Path(path)) for path in read.paths], dtype=np.int64)
