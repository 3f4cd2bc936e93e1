"""The tracker against a real MLflow server that is killed and comes back: everything arrives, each metric once."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from zsr.config import TrackingConfig
from zsr.tracking import RunTracker, make_tracker
from zsr.tracking.mlflow import connect, run_pages

pytestmark = [pytest.mark.network, pytest.mark.xdist_group("mlflow")]
PARENT = {"sweep": "s1"}


class Server:
    """An MLflow server in its own process group, so that killing it kills its child too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.3)
        raise TimeoutError((self.folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


def make(server: Server, folder: Path, trial: str | None, experiment: str) -> RunTracker:
    config = TrackingConfig(name="mlflow", uri=server.uri, experiment=experiment)
    key = PARENT if trial is None else {**PARENT, "trial": trial}
    name = "sweep" if trial is None else f"trial-{trial}"
    return make_tracker(config, run_name=name, key=key, parent=None if trial is None else PARENT, folder=folder)


def points(server: Server, experiment: str, trial: str) -> dict[str, list[tuple[int, float]]]:
    client = connect(server.uri)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id], f"tags.`zsr.trial` = '{trial}'")
    assert len(runs) == 1, "a run is found again, never made twice"
    history = {key: client.get_metric_history(runs[0].info.run_id, key) for key in runs[0].data.metrics}
    return {key: sorted((point.step, point.value) for point in values) for key, values in history.items()}


def test_a_server_killed_in_the_middle_costs_nothing(server: Server, tmp_path: Path) -> None:
    parent = make(server, tmp_path / "parent", None, "outage")
    tracker = make(server, tmp_path / "run", "1", "outage")
    for step in range(60):
        if step == 20:
            time.sleep(3)  # let the first part arrive
            server.kill()
        if step == 40:
            server.start()
        started = time.monotonic()
        tracker.log_metrics({"train/loss": 1 / (step + 1), "val/clean_acc": step / 60}, step)
        assert time.monotonic() - started < 0.5, "logging must not wait for the server"
        time.sleep(0.02)
    tracker.finish("FINISHED")
    parent.finish("FINISHED")

    found = points(server, "outage", "1")
    assert found["train/loss"] == [(step, 1 / (step + 1)) for step in range(60)]
    assert [step for step, _ in found["val/clean_acc"]] == list(range(60))


def test_what_a_dead_process_left_is_sent_at_the_next_start_and_repeated_steps_are_not(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parent = make(server, tmp_path / "parent", None, "restart")
    first = make(server, tmp_path / "run", "2", "restart")
    for step in range(10):
        first.log_metrics({"train/loss": 1.0}, step)
    time.sleep(2)
    server.kill()
    for step in range(10, 20):
        first.log_metrics({"train/loss": 1.0}, step)
    first._finish_wait_s = 1.0  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        first.finish("FAILED")
    assert "undelivered" in caplog.text
    assert str(tmp_path) in caplog.text
    server.start()

    # The same run resumes from a checkpoint at step 15 and repeats what it had logged after that.
    second = make(server, tmp_path / "run", "2", "restart")
    for step in range(15, 25):
        second.log_metrics({"train/loss": 2.0}, step)
    second.finish("FINISHED")
    parent.finish("FINISHED")
    assert points(server, "restart", "2")["train/loss"] == [(s, 1.0 if s < 20 else 2.0) for s in range(25)]

    # On another machine the spool is not there; what the server knows decides.
    third = make(server, tmp_path / "elsewhere", "2", "restart")
    for step in range(20, 30):
        third.log_metrics({"train/loss": 3.0}, step)
    third.finish("FINISHED")
    steps = [step for step, _ in points(server, "restart", "2")["train/loss"]]
    assert steps == list(range(30))


def test_runs_lie_under_their_sweep_with_model_and_status(server: Server, tmp_path: Path) -> None:
    child = make(server, tmp_path / "run", "3", "registry")  # before its parent
    parent = make(server, tmp_path / "parent", None, "registry")
    child.log_params({"method": "tima"})
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights.safetensors").write_bytes(b"0")
    child.register_model("zsr-test", tmp_path / "model", "# card")
    time.sleep(3)
    child.spool.close()  # a trial that was stopped says nothing more
    for _ in range(2):  # its sweep says it instead
        make(server, tmp_path / "run", "3", "registry").finish("KILLED")
    parent.finish("FINISHED")

    client = connect(server.uri)
    found = client.get_experiment_by_name("registry")
    runs = {run.info.run_name: run for run in client.search_runs([found.experiment_id])}
    assert runs["trial-3"].data.tags["mlflow.parentRunId"] == runs["sweep"].info.run_id
    assert runs["trial-3"].info.status == "KILLED"
    assert runs["trial-3"].data.params == {"method": "tima"}
    version = client.get_model_version_by_alias("zsr-test", "best")
    assert (version.version, version.description) == ("1", "# card")
    files = [file.path for file in client.list_artifacts(runs["trial-3"].info.run_id, "model")]
    assert files == ["model/weights.safetensors"]
    pages = run_pages(server.uri, "registry", PARENT)
    assert pages is not None
    assert runs["trial-3"].info.run_id in pages[1]
