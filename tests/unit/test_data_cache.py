"""The cache of downloaded shards: checked before use, bounded, whole for whoever looks."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from zsr.data.cache import ShardCache
from zsr.data.index import Shard
from zsr.data.storage import cache_limit

CONTENT = {number: bytes([number]) * 1000 for number in range(6)}


def shard(number: int) -> Shard:
    digest = hashlib.sha256(CONTENT[number]).hexdigest()
    return Shard(file=f"{number}.tar", samples=1, bytes=1000, sha256=digest)


def get(cache: ShardCache, number: int, downloads: list[int] | None = None) -> Path:
    def download(partial: Path) -> None:
        if downloads is not None:
            downloads.append(number)
        partial.write_bytes(CONTENT[number])

    return cache.get(shard(number), "a set", download)


def names(folder: Path) -> set[str]:
    return {path.name.split("-")[1] for path in folder.iterdir() if path.suffix == ".tar"}


def test_the_least_recently_used_shards_make_room(tmp_path):
    cache = ShardCache(tmp_path, max_bytes=3500)
    for age, number in enumerate((0, 1, 2)):
        os.utime(get(cache, number), (1000 + age, 1000 + age))
    get(cache, 0)  # used again, so that 1 is the oldest now
    get(cache, 3)
    assert names(tmp_path) == {"0.tar", "2.tar", "3.tar"}
    get(cache, 4)
    assert names(tmp_path) == {"0.tar", "3.tar", "4.tar"}


def test_a_cache_smaller_than_a_shard_still_serves_it(tmp_path):
    cache = ShardCache(tmp_path, max_bytes=10)
    assert get(cache, 0).read_bytes() == CONTENT[0]
    assert get(cache, 1).read_bytes() == CONTENT[1]
    assert names(tmp_path) == {"1.tar"}


def test_an_open_shard_outlives_its_file(tmp_path):
    cache = ShardCache(tmp_path, max_bytes=1000)
    with get(cache, 0).open("rb") as file:
        path = get(cache, 1)
        assert path.exists()
        assert file.read() == CONTENT[0]


def test_many_threads_download_once(tmp_path):
    cache, downloads = ShardCache(tmp_path), []
    threads = [threading.Thread(target=get, args=(cache, number % 3, downloads)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(downloads) == [0, 1, 2]


def test_a_torn_file_is_fetched_anew(tmp_path):
    cache, downloads = ShardCache(tmp_path), []
    get(cache, 0).write_bytes(b"short")
    assert get(cache, 0, downloads).read_bytes() == CONTENT[0]
    assert downloads == [0]


def test_wrong_content_is_tried_twice_and_never_stored(tmp_path):
    tries = []

    def download(partial: Path) -> None:
        tries.append(1)
        partial.write_bytes(CONTENT[1])

    with pytest.raises(ValueError, match=r"shard 0.tar of a set is corrupt: its sha256 is .* the index says"):
        ShardCache(tmp_path).get(shard(0), "a set", download)
    assert len(tries) == 2
    assert names(tmp_path) == set()


def test_the_limit_is_read_from_the_environment(monkeypatch):
    monkeypatch.delenv("ZSR_CACHE_GB", raising=False)
    assert cache_limit() == 0
    monkeypatch.setenv("ZSR_CACHE_GB", "1.5")
    assert cache_limit() == 1_500_000_000
    for wrong in ("much", "-1", "inf", "nan"):
        monkeypatch.setenv("ZSR_CACHE_GB", wrong)
        with pytest.raises(ValueError, match=f"ZSR_CACHE_GB={wrong} should be a number of gigabytes"):
            cache_limit()
