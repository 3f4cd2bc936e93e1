"""A small Ray cluster of a test module's own, on loopback, and a training loop that learns nothing but behaves like one."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from zsr.config import RunConfig
from zsr.engine.protocols import Session, Tracker
from zsr.launch.services import held, stop_family

# One token for all clusters of this process: Ray reads it once. Left to itself it would write one into the home folder.
_TOKEN_FOLDER = tempfile.TemporaryDirectory(prefix="zr", dir="/tmp")
_TOKEN = Path(_TOKEN_FOLDER.name) / "token"
_TOKEN.write_text(secrets.token_hex(32))


def cluster_environment(folder: Path) -> dict[str, str]:
    """Variables for Ray processes that share nothing with other clusters of this machine."""
    return {
        "RAY_AUTH_TOKEN_PATH": str(_TOKEN),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "200",
        "RAY_worker_niceness": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in [*values, "RAY_ADDRESS"]}
    os.environ.update(values)
    os.environ.pop("RAY_ADDRESS", None)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def local_cluster(num_cpus: int = 4) -> Iterator[None]:
    """A cluster that lives as long as the block; its folder has a short name, since socket paths are bounded."""
    import ray

    with tempfile.TemporaryDirectory(prefix="zr", dir="/tmp") as folder, environment(cluster_environment(Path(folder))):
        ray.init(
            address="local", num_cpus=num_cpus, include_dashboard=True, object_store_memory=100 * 2**20,
            log_to_driver=False,
        )  # fmt: skip
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def head_process(num_cpus: int = 4) -> Iterator[dict[str, str]]:
    """A cluster in processes of its own, which outlives the drivers that a test kills; gives their environment."""
    with tempfile.TemporaryDirectory(prefix="zr", dir="/tmp", ignore_cleanup_errors=True) as folder:
        port, dashboard, client = free_ports(3)
        values = {**os.environ, **cluster_environment(Path(folder)), "RAY_AUTH_MODE": "token"}
        command = ["start", "--head", "--disable-usage-stats", f"--num-cpus={num_cpus}"]
        command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        command += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--temp-dir={folder}/r"]
        command += ["--object-store-memory=100000000", "--dashboard-agent-listen-port=0"]
        head = _started_head(Path(folder, "head.log"), command, values)
        try:
            yield {**values, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            _stop(head)


def _started_head(log: Path, command: list[str], values: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a head, and again where its raylet gave up waiting for the others, as happens on a busy machine."""
    ray = Path(sys.executable).with_name("ray")
    for last in (False, True):
        with log.open("w") as output:
            head = subprocess.Popen(
                held([str(ray), *command]), env=values, stdout=output, stderr=output, start_new_session=True
            )
        try:
            _wait_for(lambda: "Ray runtime started" in log.read_text(), 120)
            break
        except TimeoutError as error:
            _stop(head)
            if last:
                raise TimeoutError(f"no Ray head in two attempts; the second said:\n{log.read_text()}") from error
    return head


def _stop(head: subprocess.Popen[bytes]) -> None:
    stop_family(head.pid, patience_s=5)
    head.wait(10)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _wait_for(ready: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ready after {seconds} s")
        time.sleep(0.2)


def counting_loop(config: RunConfig, session: Session, tracker: Tracker) -> SimpleNamespace:
    """Counts steps, reports every other one, and writes down who did what into the folder that ``data.cache_dir`` names.

    ``optim.lr`` plays the metric. At step 5 a file called ``hang`` makes rank 0 wait, so that a test can kill it;
    with a text in it, only runs whose id ends so.
    """
    diary = Path(config.data.cache_dir or ".")
    found = session.resume_from()
    first = json.loads((found / "state.json").read_text())["step"] if found else 0
    if session.rank == 0:
        with (diary / "starts.jsonl").open("a") as file:
            file.write(json.dumps({"run": tracker.run_id, "first": first, "pid": os.getpid()}) + "\n")
    metrics: dict[str, Any] = {}
    for step in range(first + 1, config.train.max_steps + 1):
        time.sleep(0.1)
        metrics = {
            "step": step, "epoch": step / 2, "val/clean_acc": 0.5, "val/robust_acc": config.optim.lr * step,
            "val/check/zero-gradients": 3.0 if config.optim.lr > 0.05 else 0.0,
        }  # fmt: skip
        if step % 2 == 0:
            tracker.log_metrics(metrics, step)
            session.report(metrics, partial(write_step, step) if session.rank == 0 else None)
        while step == 5 and session.rank == 0 and hangs(diary, tracker.run_id):
            time.sleep(0.1)
    session.close()
    return SimpleNamespace(metrics=metrics)


def write_step(step: int, folder: Path) -> None:
    """A checkpoint of nothing but a number, sound by the rules of a real one."""
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"format": "zsr-checkpoint-1", "sha256": {}, "step": step}))


def hangs(diary: Path, run_id: str) -> bool:
    try:
        return run_id.endswith((diary / "hang").read_text())
    except FileNotFoundError:
        return False


def starts(diary: Path) -> list[dict[str, Any]]:
    """Who started where, in order."""
    path = diary / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
