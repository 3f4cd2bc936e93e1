"""What the embedded emoji shards promise: intact, small, split by concept, one style held out, everyone credited."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import zsr
from zsr.recipes.emoji_concepts import HELD_OUT_STYLE, STYLES, TRAIN_STYLES, Concept, families, split_concepts

ROOT = Path(zsr.__file__).parent
EMOJI = ROOT / "data" / "embedded" / "emoji"
SPLITS = ("train", "val", "test_style", "test_concepts", "test_both")
MEGABYTE = 1_000_000


def index_of(split: str) -> dict[str, Any]:
    return json.loads((EMOJI / split / "index.json").read_text(encoding="utf-8"))


def files_of(split: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for shard in index_of(split)["shards"]:
        with tarfile.open(EMOJI / split / shard["file"]) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None and member.name not in found
                found[member.name] = content.read()
    return found


def keys_of(split: str) -> list[tuple[str, str]]:
    """(style, codepoint) of every sample."""
    names = [name.removesuffix(".cls") for name in files_of(split) if name.endswith(".cls")]
    return [(name.split("-", 1)[0], name.split("-", 1)[1]) for name in names]


def test_images_and_weights_together_are_at_most_15_megabytes() -> None:
    folders = (ROOT / "data" / "embedded", ROOT / "models" / "embedded")
    total = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    assert total <= 15 * MEGABYTE


@pytest.mark.parametrize("split", SPLITS)
def test_shards_match_their_index(split: str) -> None:
    index = index_of(split)
    assert index["format"] == "zsr-shards-1"
    assert sorted(path.name for path in (EMOJI / split).glob("*.tar")) == [shard["file"] for shard in index["shards"]]
    for shard in index["shards"]:
        content = (EMOJI / split / shard["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert index["samples"] == sum(shard["samples"] for shard in index["shards"]) == len(keys_of(split))
    assert (EMOJI / split / "classnames.txt").read_text(encoding="utf-8").splitlines() == index["classes"]
    assert len(set(index["classes"])) == len(index["classes"])


@pytest.mark.parametrize("split", SPLITS)
def test_every_sample_is_a_64_pixel_image_with_a_label(split: str) -> None:
    index, files = index_of(split), files_of(split)
    counts = [0] * len(index["classes"])
    pixels: dict[tuple[str, bytes], str] = {}
    name_of = {
        row["codepoint"]: row["name"] for row in json.loads((EMOJI / "concepts.json").read_text(encoding="utf-8"))
    }
    for name, data in files.items():
        key, suffix = name.rsplit(".", 1)
        if suffix != "webp":
            continue
        image = Image.open(io.BytesIO(data))
        assert (image.size, image.mode) == ((64, 64), "RGB")
        array = np.asarray(image)
        assert array.std() > 5, f"{key} is blank"
        style, codepoint = key.split("-", 1)
        label = int(files[f"{key}.cls"])
        assert index["classes"][label] == name_of[codepoint]
        counts[label] += 1
        twin = pixels.setdefault((style, array.tobytes()), key)
        assert twin == key, f"{key} is drawn exactly like {twin}"
    assert counts == index["class_counts"]
    assert min(counts) >= 1


def test_no_concept_is_in_two_of_train_val_and_test() -> None:
    concepts = {split: {codepoint for _, codepoint in keys_of(split)} for split in SPLITS}
    assert concepts["test_style"] == concepts["train"]
    assert concepts["test_both"] == concepts["test_concepts"]
    assert not concepts["train"] & concepts["val"]
    assert not concepts["train"] & concepts["test_concepts"]
    assert not concepts["val"] & concepts["test_concepts"]
    names = [set(index_of(split)["classes"]) for split in ("train", "val", "test_concepts")]
    assert sum(map(len, names)) == len(set.union(*names))


def test_the_held_out_style_is_only_where_it_is_tested() -> None:
    for split in SPLITS:
        expected = {HELD_OUT_STYLE} if split in ("test_style", "test_both") else set(TRAIN_STYLES)
        assert {style for style, _ in keys_of(split)} == expected


def test_attribution_names_every_style_and_every_licence() -> None:
    text = (EMOJI / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert all(f"| `{style}` |" in text for style in STYLES)
    for words in (
        "Apache-2.0",
        "CC-BY-4.0",
        "MIT",
        "Microsoft Corporation",
        "Google",
        "Twitter",
        "EmojiOne",
        "Mozilla",
    ):
        assert words in text


def concept(name: str, *keywords: str, group: str = "things") -> Concept:
    return Concept(name.replace(" ", "-"), name, group, "", keywords, {})


def test_names_that_share_a_content_word_are_one_family() -> None:
    found = families([concept("bus stop"), concept("oncoming bus"), concept("red apple"), concept("red car")])
    assert sorted(sorted(c.name for c in family) for family in found) == [
        ["bus stop", "oncoming bus"],
        ["red apple"],
        ["red car"],
    ]


def test_a_family_is_never_divided_between_splits() -> None:
    concepts = [
        concept(f"{noun} {kind}", noun) for noun in map("noun{}".format, range(30)) for kind in ("top", "bottom")
    ]
    concepts = [Concept(c.codepoint, c.name.split()[0], c.group, "", c.keywords, {}) for c in concepts]
    splits = split_concepts(concepts, held_out=0.2, seed=1)
    assert sum(len(chosen) for chosen in splits.values()) == len(concepts)
    assert len(splits["val"]) == len(splits["test"]) == 12
    names = {split: {c.name for c in chosen} for split, chosen in splits.items()}
    assert not names["train"] & names["val"] and not names["train"] & names["test"] and not names["val"] & names["test"]
