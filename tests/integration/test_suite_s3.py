"""A set in CLIP_benchmark's layout in a bucket: looked into once, each tar downloaded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import webdataset
from s3_server import moto_server, use_server
from shard_factory import encode_image, make_image

from zsr.data.s3 import S3Storage, make_client
from zsr.data.shards import ShardSet

pytestmark = pytest.mark.network


def write_tar(path: Path, numbers: list[int]) -> None:
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for number in numbers:
            image = encode_image(make_image(number, 16, 16), "png")
            tar.write({"__key__": f"s{number:07d}", "png": image, "cls": str(number % 2).encode()})


def test_a_bucket_in_clip_benchmarks_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[str] = []
    real = S3Storage._download
    monkeypatch.setattr(S3Storage, "_download", lambda self, s, p: (downloads.append(s.file), real(self, s, p))[1])
    above, split = S3Storage("s3://sets/wds_x", tmp_path / "none"), S3Storage("s3://sets/wds_x/test", tmp_path / "none")

    def store(storage: S3Storage, name: str, text: str) -> None:
        (tmp_path / "text").write_text(text)
        storage.put(tmp_path / "text", name)

    def open_set(cache: str = "cache") -> ShardSet:
        return ShardSet("s3://sets/wds_x/test", tmp_path / cache)

    with moto_server() as port:
        use_server(monkeypatch, port)
        make_client().create_bucket(Bucket="sets")
        with pytest.raises(ValueError, match=r"there is no s3://sets/wds_x/test/index\.json"):
            open_set()
        store(above, "classnames.txt", "cat\ndog\n")
        store(above, "zeroshot_classification_templates.txt", "a {c}.\n")
        for shard, numbers in enumerate([[0, 1, 2], [3, 4]]):
            write_tar(tmp_path / "tar", numbers)
            split.put(tmp_path / "tar", f"{shard}.tar")

        shards = open_set()
        assert (shards.classes, shards.templates, shards.index.class_counts) == (["cat", "dog"], ["a {}."], [3, 2])
        assert [shards.read(number).key for number in range(5)] == [f"s{number:07d}" for number in range(5)]
        assert open_set().index == shards.index
        assert downloads == ["0.tar", "1.tar"]
        assert not list((tmp_path / "cache").rglob("*.part"))

        write_tar(tmp_path / "tar", [7, 8])
        split.put(tmp_path / "tar", "1.tar")
        later = open_set()
        assert downloads == ["0.tar", "1.tar", "1.tar"]
        assert [later.read(number).key for number in (2, 3, 4)] == ["s0000002", "s0000007", "s0000008"]
