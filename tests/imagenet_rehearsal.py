"""The way of ImageNet from its tar to a training run, with made-up images: converted between kills, read over a bad network.

Run at size by ``make imagenet-rehearsal``, and small by the default tests.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import signal
import tarfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from s3_server import FaultyGateway, use_server

from zsr.cli.main import main
from zsr.data import s3
from zsr.data.pipeline import num_steps_per_epoch, train_batches
from zsr.data.shards import ShardSet

BUCKET = "rehearsal"
GLOBAL_BATCH = 64


@dataclass
class Figures:
    """What was measured, to be printed: name and value."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, value: str) -> None:
        self.lines.append((name, value))
        print(f"{name:58s} {value}", flush=True)


def write_train_tar(path: Path, num_classes: int, num_images: int, side: int = 64) -> None:
    """ILSVRC2012_img_train.tar in small: a tar of a tar a class, of JPEGs in coarse random colours."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as outer:
        for label in range(num_classes):
            wnid, buffer = f"n{10_000_000 + 7 * label}", io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as inner:
                for number in range(label, num_images, num_classes):
                    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
                    image = io.BytesIO()
                    coarse.resize((side + number % 13, side), Image.Resampling.BILINEAR).save(image, "JPEG", quality=90)
                    add(inner, f"{wnid}_{number}.JPEG", image.getvalue())
            add(outer, f"{wnid}.tar", buffer.getvalue())


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def convert_apart(
    source: Path, target: str | Path, log: Path, workers: int, samples_per_shard: int, kill_at: int = 0
) -> tuple[float, int]:
    """``zsr data convert`` in a process of its own, killed once ``kill_at`` shards lie in the target folder.

    Returns:
        Seconds, and the largest RSS of one of its processes, in bytes.
    """
    options = ["--samples-per-shard", str(samples_per_shard), "--workers", str(workers), "--name", "rehearsal"]
    began, pid = time.monotonic(), os.fork()
    if pid == 0:  # a fork, since a new interpreter would spend most of a small rehearsal importing torch
        try:
            with log.open("ab", buffering=0) as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            main(["data", "convert", str(source), str(target), *options])
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
        finally:
            os._exit(70)
    ended = (0, 0)
    while kill_at and len(list(Path(target).glob("*.tar"))) < kill_at and not ended[0]:
        time.sleep(0.002)
        ended = os.waitpid(pid, os.WNOHANG)
    if kill_at:
        assert not ended[0], "finished before it could be killed:\n" + log.read_text()
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if kill_at else 0), log.read_text()
    return time.monotonic() - began, usage.ru_maxrss * 1024


def convert_between_kills(
    source: Path, folder: Path, samples_per_shard: int, num_shards: int, figures: Figures
) -> Path:
    """Convert straight, and again with two kills and changing numbers of workers; returns the set, after comparing them."""
    log = folder / "convert.log"
    seconds, memory = convert_apart(source, folder / "straight", log, 2, samples_per_shard)
    figures.add("conversion, 2 workers, uninterrupted", f"{seconds:.1f} s, peak RSS {memory / 1e6:.0f} MB a process")
    rng = random.Random(1)
    for number, share in enumerate((rng.uniform(0.1, 0.4), rng.uniform(0.5, 0.8))):
        kill_at = max(1, round(share * num_shards))
        convert_apart(source, folder / "killed", log, (2, 1)[number], samples_per_shard, kill_at)
        found = len(list((folder / "killed").glob("*.tar")))
        figures.add(f"SIGKILL {number + 1}", f"with {found} of {num_shards} shards there")
        assert found < num_shards and not (folder / "killed" / "index.json").exists()
    convert_apart(source, folder / "killed", log, 3, samples_per_shard)
    straight, killed = ({p.name: p.read_bytes() for p in (folder / name).iterdir()} for name in ("straight", "killed"))
    assert killed == straight
    assert len(straight) == num_shards + 3
    figures.add("killed twice against uninterrupted", f"all {len(straight)} files are the same, byte for byte")
    return folder / "straight"


def convert_to_s3(source: Path, folder: Path, samples_per_shard: int, gateway: FaultyGateway, figures: Figures) -> str:
    """Convert straight into the bucket, through the gateway."""
    address = f"s3://{BUCKET}/train"
    seconds, _ = convert_apart(source, address, folder / "s3.log", 2, samples_per_shard)
    figures.add("conversion to s3:// through the bad gateway", f"{seconds:.1f} s, spoilt: {dict(gateway.faults)}")
    return address


def _read_epochs(address: str, cache: Path, rank: int, world: int, workers: int, epochs: int, out: Connection) -> None:
    shards = ShardSet(address, cache)
    steps = num_steps_per_epoch(shards, GLOBAL_BATCH, "drop")
    stream = train_batches(
        shards,
        seed=5,
        global_batch=GLOBAL_BATCH,
        image_size=32,
        rank=rank,
        world_size=world,
        num_workers=workers,
        window=8,
    )
    out.send([[key for _ in range(steps) for key in next(stream)[1].key] for _ in range(epochs)])
    stream.close()  # type: ignore[attr-defined]


def read_on_two_ranks(address: str, folder: Path, num_images: int, gateway: FaultyGateway, figures: Figures) -> None:
    """Two epochs on two ranks of one node, with two loader processes each: every sample once an epoch, each shard once."""
    fork = multiprocessing.get_context("fork")
    ranks = []
    gateway.begun.clear()
    before, began = gateway.faults.copy(), time.monotonic()
    for rank in range(2):
        mine, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=_read_epochs, args=(address, folder / "node", rank, 2, 2, 2, theirs))
        process.start()
        ranks.append((process, mine))
    seen = []
    for process, mine in ranks:
        while not mine.poll(1):
            assert process.is_alive(), "a rank ended before its epochs did"
        seen.append(mine.recv())
        process.join()
    for epoch in range(2):
        counts = Counter(key for rank in seen for key in rank[epoch])
        assert len(counts) == num_images and set(counts.values()) == {1}
    assert seen[0][0] != seen[0][1]
    seconds = time.monotonic() - began
    figures.add("two epochs, 2 ranks x 2 loader processes, from s3://", f"{2 * num_images / seconds:.0f} images/s")
    figures.add("  every sample seen", f"once an epoch, {num_images} of {num_images}")
    tars = Counter({path: count for path, count in gateway.begun.items() if path.endswith(".tar")})
    # A request that met an error before its first byte, or whose answer broke off before a chunk was whole, begins again.
    again = sum(tars.values()) - len(tars)
    spoilt = gateway.faults - before
    assert again <= spoilt.total()
    figures.add("  downloads begun", f"{sum(tars.values())} of {len(tars)} shards; spoilt: {dict(spoilt)}")
    assert spoilt.total() > 0


def train_from_s3(
    address: str, model_name: str, folder: Path, num_images: int, patch: pytest.MonkeyPatch, figures: Figures
) -> None:
    """``zsr train --local`` of a tiny model for two epochs; which samples it trained on is recorded as they come by."""
    from zsr.engine import loop

    seen: list[str] = []

    def recorded(*args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        for position, batch in train_batches(*args, **kwargs):  # type: ignore[arg-type]
            seen.extend(batch.key)
            yield position, batch

    patch.setattr(loop, "train_batches", recorded)
    patch.setenv("ZSR_CACHE", str(folder / "train-cache"))
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(io.StringIO()):
        main(
            ["train", "--local", "--output", str(folder / "run"), f"data.train={address}", f"data.val={address}"]
            + [f"model.name={model_name}", f"train.batch_size={GLOBAL_BATCH}", "train.epochs=2", "data.num_workers=2"]
            + ["objective=tecoa", "attack.eps=2/255", "attack.steps=1", "eval.num_samples=64", "eval.attack.steps=1"]
            + ["data.last_batch=drop", "train.num_threads=1"]
        )
    assert not ended.value.code
    steps = num_images // GLOBAL_BATCH
    done = seen[: 2 * steps * GLOBAL_BATCH]  # the loader is one step ahead at the end
    for epoch in range(2):
        counts = Counter(done[epoch * num_images : (epoch + 1) * num_images])
        assert len(counts) == num_images and set(counts.values()) == {1}
    figures.add(
        "zsr train --local, 2 epochs, from s3://", f"{time.monotonic() - began:.1f} s, every sample once an epoch"
    )


def rehearse(
    folder: Path,
    server: int,
    model_name: str,
    patch: pytest.MonkeyPatch,
    *,
    num_classes: int,
    num_images: int,
    samples_per_shard: int,
) -> Figures:
    """All of it; ``num_images`` is a multiple of the batch, so that an epoch is every sample."""
    assert num_images % GLOBAL_BATCH == 0
    figures = Figures()
    source = folder / "ILSVRC2012_img_train.tar"
    write_train_tar(source, num_classes, num_images)
    figures.add("made", f"{num_images} images of {num_classes} classes, {source.stat().st_size / 1e6:.0f} MB")
    num_shards = -(-num_images // samples_per_shard)
    convert_between_kills(source, folder, samples_per_shard, num_shards, figures)
    patch.setattr(s3, "FIRST_WAIT_S", 0.02)
    use_server(patch, server)
    s3.make_client().create_bucket(Bucket=BUCKET)
    with FaultyGateway(server) as gateway:
        use_server(patch, gateway.port)
        address = convert_to_s3(source, folder, samples_per_shard, gateway, figures)
        here = ShardSet(folder / "straight").index
        assert ShardSet(address, folder / "compare").index == here
        read_on_two_ranks(address, folder, num_images, gateway, figures)
        train_from_s3(address, model_name, folder, num_images, patch, figures)
        total = gateway.requests.total()
        figures.add(
            "requests in all", f"{total}, spoilt {gateway.faults.total()} ({gateway.faults.total() / total:.1%})"
        )
    return figures
