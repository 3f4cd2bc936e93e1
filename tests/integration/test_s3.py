"""Sets in object storage, against a real server on loopback and connections that break."""

from __future__ import annotations

import logging
import multiprocessing
import random
import threading
import time
from collections.abc import Iterator
from itertools import islice
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from s3_server import Fault, FaultyGateway, FlakyProxy, free_port, moto_server, use_server
from shard_factory import encode_image, make_image, make_shards

from zsr.data import s3
from zsr.data.convert import convert
from zsr.data.pipeline import num_steps_per_epoch, train_batches
from zsr.data.s3 import S3Storage, make_client
from zsr.data.shards import ShardSet

pytestmark = pytest.mark.network

BUCKET, ADDRESS = "shards", "s3://shards/sets/small"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of about 500 kB."""
    folder = tmp_path_factory.mktemp("s3") / "small"
    return make_shards(folder, num_samples=36, shard_size=12, image_size=128, extension="png")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[int]:
    with moto_server() as port:
        with pytest.MonkeyPatch.context() as patch:
            use_server(patch, port)
            make_client().create_bucket(Bucket=BUCKET)
            storage = S3Storage(ADDRESS, Path("/nonexistent"))
            for file in folder.iterdir():
                storage.put(file, file.name)
        yield port


@pytest.fixture(autouse=True)
def _quick_and_straight(monkeypatch: pytest.MonkeyPatch, server: int) -> None:
    use_server(monkeypatch, server)
    monkeypatch.setattr(s3, "FIRST_WAIT_S", 0.01)


def open_set(cache: Path, address: str = ADDRESS) -> ShardSet:
    return ShardSet(address, cache)


def assert_whole(shards: ShardSet, folder: Path) -> None:
    for number, shard in enumerate(shards.index.shards):
        assert shards.fetch(number).read_bytes() == (folder / shard.file).read_bytes()


def test_a_set_on_s3_equals_the_folder(tmp_path, folder):
    remote, local = open_set(tmp_path), ShardSet(folder)
    assert remote.address == ADDRESS
    assert [remote.read(i) for i in range(36)] == [local.read(i) for i in range(36)]
    assert remote.storage.num_retries == 0
    assert_whole(remote, folder)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("cache_gb", ["0", "0.0007"])  # everything, or hardly more than one shard
def test_training_from_s3_equals_training_from_the_folder(monkeypatch, tmp_path, folder, cache_gb):
    monkeypatch.setenv("ZSR_CACHE_GB", cache_gb)

    def batches(shards, num_workers):
        stream = train_batches(shards, seed=3, global_batch=8, image_size=64, num_workers=num_workers)
        with_position = list(islice(stream, 6))
        stream.close()
        return with_position

    for (p, remote), (q, local) in zip(batches(open_set(tmp_path), 2), batches(ShardSet(folder), 0), strict=True):
        assert (p, remote.key) == (q, local.key)
        assert torch.equal(remote.image, local.image)


def test_the_next_window_is_fetched_while_this_one_is_read(tmp_path):
    stream = train_batches(open_set(tmp_path), seed=0, global_batch=2, window=1, image_size=16)
    next(stream)  # one shard would do for the first six steps
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list(tmp_path.rglob("*.tar"))) == 2
    stream.close()
    while (alive := [t for t in threading.enumerate() if t.name == "zsr-prefetch"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


@pytest.mark.parametrize("kind", ["reset", "close"])
def test_cut_connections_are_resumed_and_the_data_is_identical(monkeypatch, tmp_path, folder, server, kind, caplog):
    rng = random.Random(0)
    with FlakyProxy(server, lambda _: Fault(rng.randint(30_000, 200_000), kind)) as proxy:
        use_server(monkeypatch, proxy.port)
        shards = open_set(tmp_path)
        with caplog.at_level(logging.WARNING):
            assert_whole(shards, folder)
    size = sum(shard.bytes for shard in shards.index.shards)
    assert shards.storage.num_retries >= 5
    assert proxy.num_bytes < 1.2 * size + 100_000  # gone on with, not begun anew
    assert caplog.text.count("event=s3_retry") == shards.storage.num_retries


def test_a_stalled_connection_is_given_up(monkeypatch, tmp_path, folder, server):
    monkeypatch.setattr(s3, "STALL_TIMEOUT_S", 2)
    with FlakyProxy(server, lambda n: Fault(100_000, "stall") if n in (1, 2) else None) as proxy:
        use_server(monkeypatch, proxy.port)
        shards = open_set(tmp_path)
        assert_whole(shards, folder)
    assert shards.storage.num_retries >= 2


def test_a_trickling_connection_is_given_up(monkeypatch, tmp_path, folder, server, caplog):
    """Twenty bytes a second never stall, and would take hours for the rest of a shard."""
    monkeypatch.setattr(s3, "STALL_TIMEOUT_S", 1)
    # The first brings the index.
    with FlakyProxy(server, lambda n: Fault(100_000, "trickle") if n in (1, 2) else None) as proxy:
        use_server(monkeypatch, proxy.port)
        shards = open_set(tmp_path)
        begun = time.monotonic()
        with caplog.at_level(logging.WARNING):
            assert_whole(shards, folder)
        deadline = begun + 60
        while proxy.num_left < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert proxy.num_left == 2
        size = sum(shard.bytes for shard in shards.index.shards)
        assert proxy.num_bytes < 1.1 * size + 100_000  # gone on with, not begun anew
    assert shards.storage.num_retries == caplog.text.count("error=TooSlowError") == 2


@pytest.mark.parametrize("first", [0, 1])  # to trickle: the index, or the first shard
def test_a_server_that_always_trickles_is_given_up_in_the_end(monkeypatch, tmp_path, server, first):
    monkeypatch.setattr(s3, "STALL_TIMEOUT_S", 0.5)
    monkeypatch.setattr(s3, "MAX_FAILURES", 2)
    with FlakyProxy(server, lambda n: Fault(700, "trickle") if n >= first else None) as proxy:
        use_server(monkeypatch, proxy.port)
        with pytest.raises(OSError, match="3 failures in a row, the last one TooSlowError"):
            open_set(tmp_path).fetch(0)


def test_a_busy_server_is_asked_again(monkeypatch, tmp_path, folder, server):
    with FlakyProxy(server, lambda n: Fault(0, "503") if n in (0, 1, 3) else Fault(600_000)) as proxy:
        use_server(monkeypatch, proxy.port)
        shards = open_set(tmp_path)
        assert_whole(shards, folder)
    assert shards.storage.num_retries >= 3


def test_a_conversion_to_s3_that_failed_goes_on(tmp_path, caplog):
    """Its journal lies in the bucket, so that another machine goes on; nothing but the set is left at the end."""
    images = tmp_path / "images" / "cat"
    images.mkdir(parents=True)
    for number in range(9):
        (images / f"{number}.png").write_bytes(encode_image(make_image(number, 20, 20), "png"))
    (images / "5.png").write_bytes(b"no image")
    address, options = (
        f"s3://shards/made/{tmp_path.name}",
        {"samples_per_shard": 3, "name": "one", "show_progress": False},
    )
    with pytest.raises(ValueError, match="1 of 9 images cannot be used"):
        convert(tmp_path / "images", address, workers=2, **options)
    (images / "5.png").write_bytes(encode_image(make_image(5, 20, 20), "png"))
    assert convert(tmp_path / "images", address, **options).resumed == 2
    convert(tmp_path / "images", tmp_path / "here", **options)
    listed = make_client().list_objects_v2(Bucket=BUCKET, Prefix=f"made/{tmp_path.name}/")["Contents"]
    there = {
        entry["Key"].split("/")[-1]: make_client().get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
        for entry in listed
    }
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}


def test_a_dead_server_ends_in_a_sentence_without_secrets(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(s3, "MAX_FAILURES", 2)
    use_server(monkeypatch, free_port(), user_info="user:sesame@")
    with caplog.at_level(logging.DEBUG, logger="zsr"), pytest.raises(OSError, match="3 failures in a row") as caught:
        open_set(tmp_path)
    assert "is the endpoint right" in str(caught.value)
    assert "sesame" not in str(caught.value) + caplog.text


def _fetch_all(cache: Path) -> None:
    shards = open_set(cache)
    for number in range(3):
        shards.fetch(number)


def test_processes_of_one_machine_fetch_a_shard_once(monkeypatch, tmp_path, folder, server):
    with FlakyProxy(server, lambda _: None) as proxy:
        use_server(monkeypatch, proxy.port)
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=_fetch_all, args=(tmp_path,)) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0, 0, 0]
        size = sum(shard.bytes for shard in ShardSet(folder).index.shards)
        assert size < proxy.num_bytes < size + 50_000
    use_server(monkeypatch, server)
    assert_whole(open_set(tmp_path), folder)


def test_what_a_dead_process_left_is_used(monkeypatch, tmp_path, folder, server):
    """The beginning of a shard is kept; a wrong beginning is noticed and fetched anew."""
    shards = open_set(tmp_path)
    path = shards.fetch(0)
    content = path.read_bytes()
    path.unlink()
    partial = path.with_name(path.name + ".part")

    partial.write_bytes(content[:-1000])
    with FlakyProxy(server, lambda _: None) as proxy:
        use_server(monkeypatch, proxy.port)
        assert open_set(tmp_path).fetch(0).read_bytes() == content
        assert proxy.num_bytes < 10_000

    use_server(monkeypatch, server)
    for wrong in (b"wrong" + content[5:-1000], content[::-1], content + b"more"):
        path.unlink()
        partial.write_bytes(wrong)
        assert open_set(tmp_path).fetch(0).read_bytes() == content


def _read_an_epoch_in_step(cache: Path, address: str, rank: int, barrier: Barrier) -> None:
    shards = open_set(cache, address)
    stream = train_batches(
        shards, seed=1, global_batch=4, image_size=16, window=2, rank=rank, world_size=2, num_workers=2
    )
    for _ in range(2 * num_steps_per_epoch(shards, 4)):
        next(stream)
        barrier.wait(60)  # as training does
    stream.close()


def test_each_shard_is_fetched_once_per_node_and_epoch_with_a_bounded_cache(monkeypatch, tmp_path, server):
    """Two ranks of two loader processes each; the cache holds three windows of the set's six."""
    folder = make_shards(tmp_path / "many", num_samples=96, shard_size=8, image_size=64, extension="png")
    address = f"s3://shards/sets/{tmp_path.name}"
    for file in folder.iterdir():
        S3Storage(address, tmp_path).put(file, file.name)
    sizes = [shard.bytes for shard in ShardSet(folder).index.shards]
    monkeypatch.setenv("ZSR_CACHE_GB", str(6.5 * max(sizes) / 1e9))
    with FaultyGateway(server, share=0) as gateway:
        use_server(monkeypatch, gateway.port)
        fork = multiprocessing.get_context("fork")
        barrier = fork.Barrier(2)
        cache = tmp_path / "cache"
        ranks = [fork.Process(target=_read_an_epoch_in_step, args=(cache, address, rank, barrier)) for rank in (0, 1)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0, 0]
        fetched = [count for path, count in gateway.begun.items() if path.endswith(".tar")]
    # Two epochs, and the first window of the third is being brought at the end; half the set was still there from the first.
    assert len(fetched) == len(sizes) == 12
    assert max(fetched) <= 3 and sum(fetched) <= 2 * 12 + 2
    assert sum(path.stat().st_size for path in cache.rglob("*.tar")) <= 6.5 * max(sizes)


def test_a_cache_too_small_for_two_windows_is_said(monkeypatch, tmp_path, folder, caplog):
    size = sum(shard.bytes for shard in ShardSet(folder).index.shards)
    for limit, said in ((size + 1000, 0), (size / 2, 1)):
        monkeypatch.setenv("ZSR_CACHE_GB", str(limit / 1e9))
        with caplog.at_level(logging.WARNING):
            train_batches(open_set(tmp_path), seed=0, global_batch=4, image_size=16)
        assert caplog.text.count("event=cache_small") == said


def test_waiting_times_grow_up_to_a_bound_and_differ(monkeypatch, tmp_path, server):
    waits: list[float] = []
    monkeypatch.setattr(s3, "FIRST_WAIT_S", 0.2)
    monkeypatch.setattr(s3, "LONGEST_WAIT_S", 3.0)
    monkeypatch.setattr(s3.time, "sleep", waits.append)
    use_server(monkeypatch, free_port())
    for _ in range(2):
        with pytest.raises(OSError, match="9 failures in a row"):
            open_set(tmp_path)
    first, second = waits[:8], waits[8:]
    for waited in (first, second):
        for number, seconds in enumerate(waited):
            longest = min(3.0, 0.2 * 2**number)
            assert longest / 2 <= seconds <= longest
    assert first != second


def test_neither_credentials_nor_endpoint_are_ever_logged(monkeypatch, tmp_path, folder, server, caplog):
    """Through retries, a failure for good and an address that carries a password."""
    monkeypatch.setattr(s3, "MAX_FAILURES", 1)
    said = []
    with FlakyProxy(server, lambda n: Fault(0, "503") if n == 1 else None) as proxy:
        use_server(monkeypatch, proxy.port)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASESAME")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "open-sesame")
        with caplog.at_level(logging.DEBUG, logger="zsr"):
            assert_whole(open_set(tmp_path), folder)
            for address in ("s3://user:open-sesame@shards/sets", "s3://shards/none"):
                with pytest.raises(ValueError) as caught:
                    open_set(tmp_path, address)
                said.append(str(caught.value))
    assert "event=s3_retry" in caplog.text
    everything = caplog.text + "".join(said)
    assert "SESAME" not in everything.upper() and str(proxy.port) not in everything


@pytest.fixture
def other_set(folder: Path, tmp_path: Path) -> str:
    """A set of its own on the server, to be damaged."""
    address = f"s3://shards/sets/{tmp_path.name}"
    storage = S3Storage(address, tmp_path)
    for file in folder.iterdir():
        storage.put(file, file.name)
    return address


def damage(address: str, file: str, content: bytes | None) -> None:
    key = address.removeprefix(f"s3://{BUCKET}/") + "/" + file
    if content is None:
        make_client().delete_object(Bucket=BUCKET, Key=key)
    else:
        make_client().put_object(Bucket=BUCKET, Key=key, Body=content)


def test_damaged_objects_are_found(tmp_path, folder, other_set):
    content = (folder / "000001.tar").read_bytes()
    shards = open_set(tmp_path, other_set)

    damage(other_set, "000001.tar", content[:5000] + b"\x00\x01" + content[5002:])
    with pytest.raises(ValueError, match=r"shard 000001.tar of s3://.* is corrupt: its sha256 is .*, the index says"):
        shards.read(12)
    damage(other_set, "000001.tar", content[:-1])
    with pytest.raises(ValueError, match=rf"shard 000001.tar of s3://.* has {len(content) - 1} bytes, the index says"):
        shards.read(12)
    damage(other_set, "000001.tar", b"")
    with pytest.raises(ValueError, match=r"000001.tar"):
        shards.read(12)
    damage(other_set, "000001.tar", None)
    with pytest.raises(ValueError, match=r"there is no s3://.*/000001.tar"):
        shards.read(12)
    assert shards.read(0).key == "s000000"

    damage(other_set, "000001.tar", content)
    assert shards.read(12).key == "s000012"


def test_an_object_replaced_on_the_way_is_not_mixed(monkeypatch, tmp_path, folder, server, other_set):
    content = (folder / "000000.tar").read_bytes()

    def faults(number: int) -> Fault | None:
        if number != 2:  # the index, then the beginning of the shard
            return Fault(100_000)
        with pytest.MonkeyPatch.context() as patch:
            use_server(patch, server)
            damage(other_set, "000000.tar", content[::-1])
        return None

    with FlakyProxy(server, faults) as proxy:
        use_server(monkeypatch, proxy.port)
        with pytest.raises(ValueError, match=r"000000.tar was replaced while it was being read"):
            open_set(tmp_path, other_set).fetch(0)


@pytest.mark.parametrize(
    ("address", "unset", "sentence"),
    [
        ("s3://nothing-here/x", (), "there is no bucket 'nothing-here'"),
        ("s3://shards/other", (), "there is no s3://shards/other/index.json"),
        (ADDRESS, ("AWS_ACCESS_KEY_ID",), "no AWS credentials for .*AWS_ACCESS_KEY_ID.*AWS_EC2_METADATA_DISABLED=true"),
        (ADDRESS, ("AWS_SECRET_ACCESS_KEY",), "no AWS credentials for"),
    ],
)
def test_mistakes_in_address_or_access(monkeypatch, tmp_path, address, unset, sentence):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if unset == ("AWS_ACCESS_KEY_ID",) else unset:
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=sentence):
        open_set(tmp_path, address)


def test_an_endpoint_that_is_no_url(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "user:sesame@nowhere")
    with pytest.raises(ValueError, match="is not a URL such as http://host:port") as caught:
        open_set(tmp_path)
    assert "sesame" not in str(caught.value)
