"""From a package's files to the pictures of a set: idx files, folders as classes, and vector emoji. Pure functions of bytes."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops

from zsr.data.decode import open_rgb

FOLDER_SIDE = 224
MAX_A_CLASS = 50

_MAX_CANVAS = 20_000_000  # pixels; clip art beyond this is a speck on a poster, and slow to decode
_MIN_DRAWN = 24  # pixels of the longer side of what is drawn
_PAPER = 8  # how far a channel may be from white and still be paper
_PNG = b"\x89PNG\r\n\x1a\n"
_IDX_IMAGES, _IDX_LABELS = 0x803, 0x801


class Picture(NamedTuple):
    """An image on its way into a set."""

    class_name: str
    stem: str
    """What its sample's key keeps of where it comes from."""
    image: Image.Image


class FolderClass(NamedTuple):
    """A class made of folders of a package."""

    name: str
    folders: tuple[str, ...]
    without: tuple[str, ...] = ()
    """Stems of files that lie there and show something else; ``x*`` for all that begin with x."""


def read_idx(images: bytes, labels: bytes, classes: Sequence[str]) -> list[Picture]:
    """Pictures of a pair of gzipped idx files, as MNIST has them, in the order of their classes.

    Raises:
        ValueError: the files are of another kind, torn, or do not belong together.
    """
    pixels, numbers = gzip.decompress(images), gzip.decompress(labels)
    if len(pixels) < 16 or len(numbers) < 8:
        raise ValueError("the idx files end before their headers do")
    kind, count, height, width = struct.unpack(">4I", pixels[:16])
    label_kind, label_count = struct.unpack(">2I", numbers[:8])
    if (kind, label_kind) != (_IDX_IMAGES, _IDX_LABELS) or count != label_count:
        raise ValueError(f"the idx files say kind {kind:#x} with {count} images and {label_kind:#x} with {label_count}")
    if len(pixels) != 16 + count * height * width or len(numbers) != 8 + count or max(numbers[8:]) >= len(classes):
        raise ValueError("the idx files do not hold what their headers say")
    grey_NHW = np.frombuffer(pixels, np.uint8, offset=16).reshape(count, height, width)
    return [
        Picture(classes[label], f"{number:05d}", Image.fromarray(grey_NHW[number]))
        for number, label in sorted(enumerate(numbers[8:]), key=lambda pair: pair[1])
    ]


def pick_folders(
    files: Mapping[str, bytes], classes: Sequence[FolderClass], *, no_folders: Sequence[str] = ()
) -> list[Picture]:
    """Pictures of folders as classes: what is drawn, on white, in the middle of a square of at most ``FOLDER_SIDE`` pixels.

    Left out are: mirrored twins (``*_mirror``), empty and tiny drawings, canvases of more than 20 million pixels, pixel
    duplicates (within a class all but the first, across classes all), and of a class of more than ``MAX_A_CLASS`` an even
    choice.

    Args:
        files: contents of PNG files by path.
        classes: each with folders; images may lie deeper in them.
        no_folders: names of folders, at any depth, that are left out.

    Raises:
        ValueError: nothing is left of a class, a name in ``without`` is not there, or a file is no image.
    """
    pictures: list[Picture] = []
    for chosen in classes:
        paths = [PurePosixPath(path) for path in sorted(files) if _lies_in(path, chosen.folders, no_folders)]
        for pattern in chosen.without:
            if not any(path.match(f"{pattern}.png") for path in paths):
                raise ValueError(f"the class {chosen.name!r} leaves out {pattern}, which is not in its folders")
        for path in paths:
            if not any(path.match(f"{pattern}.png") for pattern in (*chosen.without, "*_mirror")):
                image = cut_out(files[str(path)])
                if image is not None:
                    pictures.append(Picture(chosen.name, path.stem, image))
    pictures = drop_twins(pictures)
    kept = []
    for chosen in classes:
        found = [picture for picture in pictures if picture.class_name == chosen.name]
        if not found:
            raise ValueError(
                f"nothing is left of the class {chosen.name!r}; the package is not the one that was chosen from"
            )
        count = min(len(found), MAX_A_CLASS)
        kept += [found[number * len(found) // count] for number in range(count)]
    return kept


def cut_out(content: bytes) -> Image.Image | None:
    """What an image file shows, on white, in the middle of a square with a small margin; None where that is next to nothing.

    Raises:
        ValueError: it is no PNG file, or a torn one.
    """
    if not content.startswith(_PNG):
        raise ValueError("a file that is called .png is none")
    width, height = struct.unpack(">2I", content[16:24])  # Pillow refuses to look at the largest of these
    if width * height > _MAX_CANVAS:
        return None
    image = open_rgb(content)
    ink = ImageChops.difference(image, Image.new("RGB", image.size, "white"))
    strongest = ImageChops.lighter(ImageChops.lighter(*ink.split()[:2]), ink.split()[2])
    box = strongest.point([0] * (_PAPER + 1) + [255] * (255 - _PAPER)).getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) < _MIN_DRAWN:
        return None
    drawn = image.crop(box)
    side = math.ceil(max(drawn.size) * 1.08)
    square = Image.new("RGB", (side, side), "white")
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    if side > FOLDER_SIDE:
        square = square.resize((FOLDER_SIDE, FOLDER_SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return square


def drop_twins(pictures: Iterable[Picture]) -> list[Picture]:
    """Pictures without pixel duplicates: the first one stays where all are of one class, none where they are not."""
    found: dict[bytes, list[Picture]] = {}
    for picture in pictures:
        size = ",".join(map(str, picture.image.size)).encode()
        found.setdefault(hashlib.sha256(size + picture.image.tobytes()).digest(), []).append(picture)
    return [twins[0] for twins in found.values() if len({twin.class_name for twin in twins}) == 1]


def draw_emoji(files: Mapping[str, bytes], names: Mapping[str, str]) -> list[Picture]:
    """Emoji of an Iconify package, drawn as the embedded ones are.

    Args:
        files: ``icons.json`` and ``chars.json``.
        names: class name by codepoint, as ``concepts.json`` of the embedded set writes codepoints.
    """
    # resvg is a package of the recipes alone, and only this set needs it.
    from zsr.recipes.emoji_shards import render

    icon_set = json.loads(files["icons.json"])
    chars = json.loads(files["chars.json"])
    slugs = {"-".join(part for part in point.split("-") if part != "fe0f"): slug for point, slug in chars.items()}
    drawn = [
        Picture(name, point, Image.fromarray(render(icon_set, slugs[point])))
        for point, name in names.items()
        if point in slugs
    ]
    return drop_twins(drawn)


def _lies_in(path: str, folders: Sequence[str], no_folders: Sequence[str]) -> bool:
    return any(path.startswith(f"{folder}/") for folder in folders) and not set(path.split("/")) & set(no_folders)
