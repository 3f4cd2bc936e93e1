"""Checkpoints in a bucket: kept and torn as on a disk, and an outage is waited out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3_server import Fault, FlakyProxy, moto_server, use_server

pytest.importorskip("pyarrow")
from zsr.engine.checkpoint import MODEL, OPTIMIZER, STATE
from zsr.engine.shelf import name_of

pytestmark = [pytest.mark.network, pytest.mark.xdist_group("s3")]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with moto_server() as port:
        yield port


@pytest.fixture
def bucket(port: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    from pyarrow.fs import FileSystem

    use_server(monkeypatch, port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    name = f"b{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}"
    filesystem, path = FileSystem.from_uri(f"s3://{name}?allow_bucket_creation=true")
    filesystem.create_dir(path)
    return name


def writes(content: bytes, score: float | None = None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        for name in (MODEL, OPTIMIZER):
            (folder / name).write_bytes(content)
        sums = {name: hashlib.sha256(content).hexdigest() for name in (MODEL, OPTIMIZER)}
        (folder / STATE).write_text(json.dumps({"format": "zsr-checkpoint-1", "sha256": sums, "score": score}))

    return write


def overwrite(bucket: str, path: str, content: bytes) -> None:
    from pyarrow.fs import FileSystem

    filesystem, root = FileSystem.from_uri(f"s3://{bucket}")
    with filesystem.open_output_stream(f"{root}/{path}") as file:
        file.write(content)


def test_the_last_ones_and_the_best_are_kept_and_a_damaged_one_is_passed_over(bucket: str, tmp_path: Path) -> None:
    from zsr.launch.remote_shelf import RemoteShelf

    shelf = RemoteShelf(f"s3://{bucket}/run/checkpoints", tmp_path / "a", keep=2)
    assert shelf.newest_sound() is None
    for step, score in [(1, 0.1), (2, 0.9), (3, None), (4, 0.5), (5, 0.5)]:
        shelf.put(step, writes(f"weights {step}".encode(), score))
    assert shelf.names() == [name_of(2), name_of(4), name_of(5)]

    elsewhere = RemoteShelf(f"s3://{bucket}/run/checkpoints", tmp_path / "b", keep=2)
    found = elsewhere.newest_sound()
    assert found is not None and found.name == name_of(5)
    assert (found / MODEL).read_bytes() == b"weights 5"
    overwrite(bucket, f"run/checkpoints/{name_of(5)}/{OPTIMIZER}", b"weights 4")
    found = elsewhere.newest_sound()
    assert found is not None and found.name == name_of(4)
    with pytest.raises(ValueError, match="torn"):
        elsewhere.fetch(name_of(5))

    shelf.put(5, writes(b"weights 5, again", 0.5))
    found = elsewhere.newest_sound()
    assert found is not None and (found / MODEL).read_bytes() == b"weights 5, again"


def test_a_storage_that_is_away_for_a_while_is_waited_for(
    bucket: str, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zsr.launch.remote_shelf import RemoteShelf

    def faults(number: int) -> Fault | None:
        return Fault(0, "503") if number < 6 else Fault(0, "reset") if number < 12 else None

    with FlakyProxy(port, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.port}")
        shelf = RemoteShelf(f"s3://{bucket}/run", tmp_path, keep=1)
        shelf.put(7, writes(b"weights 7"))
        assert proxy.num_connections > 12
        found = shelf.newest_sound()
    assert found is not None and (found / MODEL).read_bytes() == b"weights 7"


def test_patience_ends() -> None:
    from zsr.launch.remote_shelf import patiently

    asked = []

    def never() -> None:
        asked.append(1)
        raise OSError("away")

    with pytest.raises(OSError, match="away"):
        patiently(never, patience_s=2.0)
    assert len(asked) == 3  # at 0, 0.5 and 1.5 s; the next would come after the end
