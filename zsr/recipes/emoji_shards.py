"""Rebuild the embedded emoji shards from pinned packages: python -m zsr.recipes.emoji_shards --out zsr/data/embedded/emoji

Five vendors' drawings are joined on the Unicode codepoint, rendered to 64x64 RGB on white and written as WebDataset tars, one
folder a split. The output depends on the pins below and on nothing else: two runs give the same bytes.

Needs `npm` (only `npm pack`, nothing is installed or executed) or, with --packages, a folder that already holds the tarballs;
and, beyond zsr itself, resvg-py==0.5.0 and pillow (lossless WebP bytes may differ between pillow versions, pixels do not).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

from zsr.recipes.emoji_attribution import ATTRIBUTION, SPLIT_NOTES
from zsr.recipes.emoji_concepts import HELD_OUT_STYLE, STYLES, TRAIN_STYLES, Concept, is_kept, split_concepts

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "names": "unicode-emoji-json@0.9.0",
    "keywords": "emojilib@4.0.3",
    "subgroups": "emoji-datasource@16.0.0",
}
SIDE = 64
TEMPLATES = ["an emoji of {}.", "a drawing of {}.", "a picture of {}."]
SAMPLES_PER_SHARD = 512
# Written into every tar header instead of the clock, so that equal content gives equal bytes.
MTIME = 1_700_000_000

Images = dict[tuple[str, str], np.ndarray]  # by codepoint and style: uint8 [64, 64, 3]


def read_package(package: str, folder: Path, *members: str) -> list[Any]:
    """JSON members of one npm tarball, fetched into `folder` first if it is not there."""
    file = folder / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"fetching package={package}", flush=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(file) as tar:
        return [json.load(tar.extractfile(f"package/{member}")) for member in members]  # type: ignore[arg-type]


def codepoint(emoji: str) -> str:
    """Hex codepoints without the variation selector, which vendors use inconsistently."""
    return "-".join(f"{ord(c):x}" for c in emoji if ord(c) != 0xFE0F)


def load_concepts(folder: Path) -> tuple[list[Concept], dict[str, Any]]:
    """Every kept concept with the slug of its drawing in each style that has one, and the icon sets by style."""
    icon_sets, chars = {}, {}
    for style in STYLES:
        icon_sets[style], chars[style] = read_package(PACKAGES[style], folder, "icons.json", "chars.json")
    (names,) = read_package(PACKAGES["names"], folder, "data-by-emoji.json")
    (keyword_list,) = read_package(PACKAGES["keywords"], folder, "dist/emoji-en-US.json")
    (datasource,) = read_package(PACKAGES["subgroups"], folder, "emoji.json")
    keywords = {codepoint(emoji): words for emoji, words in keyword_list.items()}
    subgroups = {row["unified"].lower().replace("-fe0f", ""): row["subcategory"] for row in datasource}

    concepts = []
    for emoji, row in names.items():
        key, name = codepoint(emoji), row["name"]
        icons = {style: chars[style][key] for style in STYLES if key in chars[style]}
        # The two oldest sets have no table of codepoints: they are joined on the name, as the other sets spell it.
        slugs = [icons[style] for style in ("twemoji", "noto") if style in icons]
        slugs.append(re.sub("[^a-z0-9]+", "-", name.lower()).strip("-"))
        for style in ("emojione", "fxemoji"):
            known = icon_sets[style]["icons"].keys() | icon_sets[style].get("aliases", {}).keys()
            for slug in slugs:
                spelling = slug.replace("-", "") if style == "fxemoji" else slug
                if spelling in known:
                    icons.setdefault(style, spelling)
        subgroup = subgroups.get(key, "")
        if is_kept(name, subgroup) and {"noto", "twemoji", HELD_OUT_STYLE} <= icons.keys():
            words = tuple(word.replace("_", " ") for word in keywords.get(key, ()))
            concepts.append(Concept(key, name, row["group"], subgroup, words, icons))
    return concepts, icon_sets


def render(icon_set: dict[str, Any], slug: str) -> np.ndarray:
    """One drawing as uint8 [64, 64, 3] on white, centred if it is not square."""
    while slug not in icon_set["icons"]:
        slug = icon_set["aliases"][slug]["parent"]
    icon = icon_set["icons"][slug]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icon_set.get("width", 16))
    height = icon.get("height", icon_set.get("height", 16))
    side = max(width, height)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{SIDE}" '
        f'height="{SIDE}" viewBox="{box}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", width=SIDE, height=SIDE, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def drop_duplicates(concepts: list[Concept], images: Images) -> list[Concept]:
    """Concepts without those that some style draws exactly like an earlier one."""
    seen: set[tuple[str, bytes]] = set()
    kept = []
    for concept in concepts:
        digests = {
            (style, hashlib.sha256(images[concept.codepoint, style].tobytes()).digest()) for style in concept.icons
        }
        if not digests & seen:
            kept.append(concept)
            seen |= digests
    return kept


def encode(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="WEBP", lossless=True, quality=80, method=6)
    return buffer.getvalue()


def write_split(
    out: Path, name: str, concepts: list[Concept], styles: tuple[str, ...], images: Images, seed: int
) -> dict[str, Any]:
    """Shards, index, class names and templates of one split; classes are numbered in Unicode order."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.tar"):
        stale.unlink()
    samples = [(label, c, style) for label, c in enumerate(concepts) for style in styles if style in c.icons]
    random.Random(seed).shuffle(samples)
    shards: list[dict[str, Any]] = []
    for start in range(0, len(samples), SAMPLES_PER_SHARD):
        chunk = samples[start : start + SAMPLES_PER_SHARD]
        file = folder / f"{len(shards):06d}.tar"
        with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
            for label, concept, style in chunk:
                for suffix, data in (
                    (".cls", str(label).encode()),
                    (".webp", encode(images[concept.codepoint, style])),
                ):
                    member = tarfile.TarInfo(f"{style}-{concept.codepoint}{suffix}")
                    member.size, member.mtime, member.mode = len(data), MTIME, 0o444
                    tar.addfile(member, io.BytesIO(data))
        content = file.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        shards.append({"file": file.name, "samples": len(chunk), "bytes": len(content), "sha256": sha256})
    counts = [sum(label == index for label, _, _ in samples) for index in range(len(concepts))]
    index = {
        "format": "zsr-shards-1", "name": f"emoji-{name.replace('_', '-')}", "classes": [c.name for c in concepts],
        "templates": TEMPLATES, "samples": len(samples), "shards": shards, "class_counts": counts,
        "licence": "Apache-2.0, CC-BY-4.0 and MIT, by style: see ATTRIBUTION.md",
        "source": "; ".join(PACKAGES[style] for style in styles) + f". {SPLIT_NOTES[name]}",
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "classnames.txt").write_text("".join(c.name + "\n" for c in concepts), encoding="utf-8")
    templates = "".join(template.replace("{}", "{c}") + "\n" for template in TEMPLATES)
    (folder / "zeroshot_classification_templates.txt").write_text(templates, encoding="utf-8")
    return index


def with_progress(items: list[Any], what: str) -> Iterator[Any]:
    for done, item in enumerate(items, 1):
        yield item
        if done % 200 == 0 or done == len(items):
            print(f"{what} done={done}/{len(items)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the splits, ATTRIBUTION.md and concepts.json"
    )
    parser.add_argument(
        "--packages", type=Path, default=Path("~/.cache/zsr/packages"), help="npm tarballs, fetched if missing"
    )
    parser.add_argument(
        "--held-out", type=float, default=0.11, help="share of concepts for validation, and again for test"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    concepts, icon_sets = load_concepts(args.packages.expanduser())
    images = {
        (concept.codepoint, style): render(icon_sets[style], slug)
        for concept in with_progress(concepts, "render concepts")
        for style, slug in concept.icons.items()
    }
    concepts = drop_duplicates(concepts, images)
    splits = split_concepts(concepts, args.held_out, args.seed)
    plan = {
        "train": (splits["train"], TRAIN_STYLES), "val": (splits["val"], TRAIN_STYLES),
        "test_style": (splits["train"], (HELD_OUT_STYLE,)), "test_concepts": (splits["test"], TRAIN_STYLES),
        "test_both": (splits["test"], (HELD_OUT_STYLE,)),
    }  # fmt: skip
    for number, (name, (chosen, styles)) in enumerate(plan.items()):
        index = write_split(args.out, name, chosen, styles, images, seed=args.seed + number)
        size = sum(shard["bytes"] for shard in index["shards"])
        print(
            f"split={name} classes={len(chosen)} samples={index['samples']} shards={len(index['shards'])} bytes={size}"
        )
    split_of = {c.codepoint: name for name, chosen in splits.items() for c in chosen}
    table = [
        {"codepoint": c.codepoint, "name": c.name, "split": split_of[c.codepoint], "group": c.group, "subgroup": c.subgroup,
         "keywords": list(c.keywords), "styles": list(c.icons)}
        for c in concepts
    ]  # fmt: skip
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in table)
    (args.out / "concepts.json").write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    (args.out / "ATTRIBUTION.md").write_text(ATTRIBUTION, encoding="utf-8")


if __name__ == "__main__":
    main()
