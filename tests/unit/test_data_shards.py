"""Index, storage on disk, and random access to samples."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_factory import make_shards, write_index, write_tar

from zsr.data.index import INDEX_FILE, parse_index
from zsr.data.shards import ShardSet
from zsr.data.storage import LocalStorage, embedded_sets, open_storage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "set", num_samples=20, num_classes=4, shard_size=8)


def edit_index(folder: Path, **changes: object) -> None:
    content = json.loads((folder / INDEX_FILE).read_text())
    (folder / INDEX_FILE).write_text(json.dumps(content | changes))


def test_samples_are_numbered_in_shard_order(folder):
    shards = ShardSet(folder)
    assert (len(shards), len(shards.classes), shards.templates) == (20, 4, ["a photo of a {}."])
    assert [shards.locate(sample) for sample in (0, 7, 8, 19)] == [(0, 0), (0, 7), (1, 0), (2, 3)]
    for sample in (19, 0, 8, 7):
        raw = shards.read(sample)
        assert raw.key == f"s{sample:06d}"
        assert raw.parts["cls"] == str(sample % 4).encode()
        assert raw.parts["webp"][:4] == b"RIFF"
    with pytest.raises(IndexError):
        shards.read(20)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.data())
def test_locate_inverts_the_numbering(tmp_path_factory, sizes, data):
    folder = tmp_path_factory.mktemp("set")
    entries = [
        write_tar(folder / f"{n}.tar", [(f"{n}-{j}", {"cls": b"0"}) for j in range(s)]) for n, s in enumerate(sizes)
    ]
    shards = ShardSet(write_index(folder, entries, [0] * sum(sizes), 1))
    sample = data.draw(st.integers(0, sum(sizes) - 1))
    shard, place = shards.locate(sample)
    assert sum(sizes[:shard]) + place == sample
    assert shards.read(sample).key == f"{shard}-{place}"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_tar_dialects_give_the_same_samples(tmp_path, form):
    """Long names and extended headers, folders among the members, and dots in extensions, as other writers make them."""
    source = tmp_path / "source" / ("a" * 60)
    source.mkdir(parents=True)
    names = ["x.cls", "x.seg.PNG", "y.cls", ("z" * 70) + ".cls"]
    for name in names:
        (source / name).write_bytes(name.encode())
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=form) as tar:
        tar.add(source.parent, arcname=".", recursive=False)
        for name in names:
            tar.add(source / name, arcname=f"{source.name}/{name}")
    entry = write_tar(tmp_path / "other.tar", [(key, {"cls": b"0"}) for key in "abc"])
    entry = entry.model_copy(update={"file": "s.tar", "bytes": path.stat().st_size})
    shards = ShardSet(write_index(tmp_path, [entry], [0, 0, 0], 1))
    found = [shards.read(sample) for sample in range(3)]
    assert [raw.key for raw in found] == [f"{source.name}/{key}" for key in ("x", "y", "z" * 70)]
    assert found[0].parts == {"cls": b"x.cls", "seg.png": b"x.seg.PNG"}


def test_few_files_stay_open(folder):
    shards = ShardSet(folder)
    shards._max_open = 1
    before = len(os.listdir("/proc/self/fd"))
    keys = [shards.read(sample).key for sample in (0, 8, 16, 0, 8, 16)]
    assert keys == ["s000000", "s000008", "s000016"] * 2
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_set_can_be_sent_to_another_process(folder):
    shards = ShardSet(folder)
    shards.read(3)
    assert pickle.loads(pickle.dumps(shards)).read(3) == shards.read(3)


def test_damaged_shards_are_named(folder):
    shard = folder / "000001.tar"
    content = shard.read_bytes()

    shard.write_bytes(content[:-1024])
    with pytest.raises(ValueError, match=r"shard 000001.tar of .* has \d+ bytes, the index says \d+"):
        ShardSet(folder).read(8)

    shard.write_bytes(b"\x17" * len(content))
    with pytest.raises(ValueError, match=r"shard 000001.tar .* is not a plain tar file"):
        ShardSet(folder).read(8)

    first = folder / "000000.tar"
    shard.write_bytes(first.read_bytes()[:1024].ljust(len(content), b"\0"))  # one sample, then the tar's end
    with pytest.raises(
        ValueError, match=r"shard 000001.tar .* holds 1 samples, the index says 8; run `zsr data verify`"
    ):
        ShardSet(folder).read(8)

    shard.unlink()
    with pytest.raises(ValueError, match=r"shard 000001.tar .* is missing"):
        ShardSet(folder).read(8)
    assert ShardSet(folder).read(0).key == "s000000"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"samples": 21}, "samples=21, but the shards listed hold 20"),
        ({"class_counts": [20]}, "class_counts has 1 entries for 4 classes"),
        ({"class_counts": [5, 5, 5, 6]}, "class_counts adds up to 21, but samples=20"),
        ({"format": "zsr-shards-9"}, "format: Input should be 'zsr-shards-1'"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
    ],
)
def test_contradictory_indexes_are_refused(folder, changes, sentence):
    edit_index(folder, **changes)
    with pytest.raises(ValueError, match=f"index.json of the set .* is not usable: .*{sentence}"):
        ShardSet(folder)


def test_a_shard_name_cannot_leave_its_folder(folder):
    shards = json.loads((folder / INDEX_FILE).read_text())["shards"]
    edit_index(folder, shards=[shards[0] | {"file": "../x.tar"}, *shards[1:]])
    with pytest.raises(ValueError, match=r"shards.0.file"):
        ShardSet(folder)


def test_an_index_survives_its_own_text(folder):
    index = ShardSet(folder).index
    assert parse_index(index.to_json(), "here") == index


def test_addresses_that_lead_nowhere(tmp_path):
    make_shards(tmp_path / "emoji" / "train")
    for address, sentence in {
        tmp_path / "none": "has no index.json; there is no such folder",
        tmp_path / "emoji": "its subfolders are sets: train",
        tmp_path: "`zsr data convert` makes a set",
        "zsr:nothing/here": "there is no embedded set zsr:nothing/here; there are",
        "gs://key:secret@bucket/x": "is a folder, s3://bucket/prefix or zsr:name/split, not gs://...",
        "s3://key:secret@bucket/x": "credentials belong in AWS_ACCESS_KEY_ID",
        "s3:///x": "s3://bucket/prefix, not",
    }.items():
        with pytest.raises(ValueError, match=sentence) as caught:
            ShardSet(address)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("address", embedded_sets())
def test_embedded_sets_hold_what_their_index_says(address):
    shards = ShardSet(address)
    labels = [int(shards.read(sample).parts["cls"]) for sample in range(len(shards))]
    assert [labels.count(number) for number in range(len(shards.classes))] == shards.index.class_counts


def test_putting_a_file_into_a_folder_leaves_nothing_else(tmp_path):
    (tmp_path / "local").write_bytes(b"content")
    storage = open_storage(tmp_path / "new" / "set")
    assert isinstance(storage, LocalStorage)
    storage.put(tmp_path / "local", "index.json")
    assert storage.read_text("index.json") == "content"
    assert os.listdir(tmp_path / "new" / "set") == ["index.json"]
