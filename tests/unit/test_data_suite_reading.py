"""Sets in CLIP_benchmark's layout: written here with webdataset's own writer, read back sample by sample."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import pytest
import webdataset
from shard_factory import encode_image, make_image

from zsr.cli.main import main
from zsr.data import clip_benchmark
from zsr.data.inspect import verify
from zsr.data.pipeline import eval_batches
from zsr.data.shards import ShardSet
from zsr.data.storage import LocalStorage

CLASSES = ["tabby cat", "dog", "emu"]
KINDS = ("jpg", "png", "webp")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSR_CACHE", str(tmp_path / "cache"))


def image_of(number: int) -> bytes:
    return encode_image(make_image(number, 20, 24), KINDS[number % 3])


def write_tar(path: Path, numbers: list[int], label: dict[int, int] | None = None) -> None:
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for number in numbers:
            known = str((label or {}).get(number, number % len(CLASSES))).encode()
            tar.write({"__key__": f"s{number:07d}", KINDS[number % 3]: image_of(number), "cls": known})


def write_set(root: Path, sizes: list[int]) -> Path:
    """``wds_pets`` with tars of these sizes; returns the folder of the tars."""
    split = root / "wds_pets" / "test"
    split.mkdir(parents=True)
    start = 0
    for shard, size in enumerate(sizes):
        write_tar(split / f"{shard}.tar", list(range(start, start + size)))
        start += size
    (split / "nshards.txt").write_text(f"{len(sizes)}\n")
    (split.parent / "classnames.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (split.parent / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c}, a type of pet.\n")
    return split


def test_every_sample_comes_back(tmp_path):
    """Twelve tars of different sizes: 10.tar and 11.tar come after 9.tar, as the samples were numbered."""
    sizes = [3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 2, 7]
    shards = ShardSet(write_set(tmp_path, sizes))
    assert (len(shards), shards.classes) == (sum(sizes), CLASSES)
    assert shards.templates == ["a photo of a {}.", "a {}, a type of pet."]
    assert shards.index.shard_sizes == sizes
    for number in range(len(shards)):
        raw = shards.read(number)
        assert raw.key == f"s{number:07d}"
        assert raw.parts == {KINDS[number % 3]: image_of(number), "cls": str(number % 3).encode()}
    labels = [number % 3 for number in range(len(shards))]
    assert shards.index.class_counts == [labels.count(label) for label in range(3)]
    assert [
        label for batch in eval_batches(shards, image_size=16, batch_size=8) for label in batch.label.tolist()
    ] == labels
    assert verify(shards.address, show_progress=False) == []
    for entry in shards.index.shards:
        content = (tmp_path / "wds_pets" / "test" / entry.file).read_bytes()
        assert entry.sha256 == hashlib.sha256(content).hexdigest()


def test_what_was_found_is_kept_tar_by_tar(tmp_path, monkeypatch):
    split = write_set(tmp_path, [3, 4, 2])
    looked: list[str] = []
    real = clip_benchmark._look_into

    def look(storage, found):
        looked.append(found.file)
        return real(storage, found)

    monkeypatch.setattr(clip_benchmark, "_look_into", look)
    first = ShardSet(split).index
    assert looked == ["0.tar", "1.tar", "2.tar"]
    assert ShardSet(split).index == first
    monkeypatch.chdir(tmp_path)
    assert ShardSet("wds_pets/test").index == first  # the same place by another name
    assert len(looked) == 3
    assert sorted(path.name for path in split.iterdir()) == ["0.tar", "1.tar", "2.tar", "nshards.txt"]

    write_tar(split / "1.tar", [3, 4, 5, 6, 7])
    later = ShardSet(split)
    assert looked[3:] == ["1.tar"]
    assert later.index.shard_sizes == [3, 5, 2]
    assert [later.read(number).key for number in (3, 7)] == ["s0000003", "s0000007"]

    same_size = (split / "2.tar").stat()
    write_tar(split / "2.tar", [9, 10])
    assert (split / "2.tar").stat().st_size == same_size.st_size
    os.utime(split / "2.tar", ns=(same_size.st_atime_ns, same_size.st_mtime_ns + 1))
    assert ShardSet(split).read(8).key == "s0000009"
    assert looked[4:] == ["2.tar"]


def test_a_stopped_scan_goes_on_where_it_was(tmp_path, monkeypatch):
    split = write_set(tmp_path, [2, 2])
    whole = (split / "1.tar").read_bytes()
    (split / "1.tar").write_bytes(b"\x17" * len(whole))
    with pytest.raises(ValueError, match=r"shard 1\.tar of .* is not a plain tar file"):
        ShardSet(split)
    (split / "1.tar").write_bytes(whole)
    real = LocalStorage.digest
    read: list[str] = []
    monkeypatch.setattr(LocalStorage, "digest", lambda self, found: read.append(found.file) or real(self, found))
    assert ShardSet(split).index.shard_sizes == [2, 2]
    assert read == ["1.tar"]


def test_labels_out_of_range_are_named(tmp_path):
    split = write_set(tmp_path, [3, 3])
    write_tar(split / "1.tar", [3, 4, 5], label={4: 3, 5: 3})
    sentence = (
        r"shard 1\.tar of .* has 2 samples with the label 3, but classnames\.txt names 3 classes \(labels 0 to 2\)"
    )
    with pytest.raises(ValueError, match=sentence):
        ShardSet(split)
    with (split.parent / "classnames.txt").open("a") as file:
        file.write("fox\n")
    assert ShardSet(split).index.class_counts == [2, 1, 1, 2]  # 0 1 2, 0 and twice 3


@pytest.mark.parametrize(
    ("sample", "sentence"),
    [
        ({"cls": b"0"}, "sample 'x' has no image of a known kind .*, only cls"),
        ({"jpg": b"..."}, "sample 'x': no label"),
        ({"jpg": b"...", "cls": b"cat"}, "sample 'x': the label b'cat' is not a number"),
    ],
)
def test_samples_without_image_or_label_are_named(tmp_path, sample, sentence):
    split = write_set(tmp_path, [2])
    with webdataset.TarWriter(str(split / "0.tar"), encoder=False) as tar:
        tar.write({"__key__": "x", **sample})
    with pytest.raises(ValueError, match=rf"shard 0\.tar of .*{sentence}"):
        ShardSet(split)


def test_what_is_missing_is_said(tmp_path):
    split = write_set(tmp_path, [2, 2])
    (split / "1.tar").rename(tmp_path / "1.tar")
    with pytest.raises(ValueError, match=r"holds 1 tars, but its nshards\.txt says 2; fetch those that are missing"):
        ShardSet(split)
    (tmp_path / "1.tar").rename(split / "1.tar")
    with pytest.raises(ValueError, match="its subfolders are sets: test"):
        ShardSet(split.parent)
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        text = (split.parent / name).read_text()
        (split.parent / name).unlink()
        with pytest.raises(ValueError, match=rf"holds tars but neither an index\.json nor, .* a {re.escape(name)}"):
            ShardSet(split)
        (split / name).write_text(text)  # beside the tars will do
    assert len(ShardSet(split)) == 4
    (split / "zeroshot_classification_templates.txt").write_text("a photo of a {}.\n")
    with pytest.raises(ValueError, match=r"a prompt has \{c\} for the class once, not 'a photo of a \{\}\.'"):
        ShardSet(split)


def test_an_index_can_be_written_beside_the_tars(tmp_path, capsys):
    split = write_set(tmp_path, [2, 3])
    scanned = ShardSet(split).index
    with pytest.raises(SystemExit) as stopped:
        main(["data", "index", str(split)])
    assert not stopped.value.code
    (split.parent / "classnames.txt").unlink()  # not needed any more
    assert ShardSet(split).index == scanned
    with pytest.raises(SystemExit) as stopped:
        main(["data", "index", str(split)])
    assert stopped.value.code == 2
    assert "has an index.json already" in capsys.readouterr().err
