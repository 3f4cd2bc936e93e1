"""The search and the tracker on a real PostgreSQL server that asks for a password, which nothing keeps."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from postgres_server import Postgres, postgres_server

from zsr.config import ConfigError, TrackingConfig, load_config
from zsr.launch.search import SweepSearch
from zsr.launch.store import Store
from zsr.launch.study import close_study, open_study_storage
from zsr.launch.sweep import BOTH
from zsr.launch.trials import TrialBook
from zsr.tracking import make_tracker
from zsr.tracking.mlflow import connect

pytestmark = [pytest.mark.network, pytest.mark.xdist_group("postgres")]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with postgres_server() as server:
        yield server


@pytest.fixture
def _password(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", postgres.password)


def space(trial: Any, base: Any) -> dict[str, Any]:
    return {"optim.lr": base.optim.lr * trial.suggest_float("factor", 0.1, 1.0)}


def files_with(word: str, folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]


@pytest.mark.usefixtures("_password")
def test_a_search_in_the_database_goes_on_in_another_process_s_state(postgres: Postgres, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    book, base = TrialBook(store), load_config("demo", [f"launch.search={postgres.url}"])
    assert base.launch.search is not None
    search = SweepSearch(space, base, BOTH, open_study_storage(store, base.launch.search), "one", 0, book)
    points = [search.suggest(name) for name in "abc"]
    search.on_trial_complete("a", {"val/clean_acc": 0.5, "val/robust_acc": 0.25})
    search.save(str(tmp_path / "state"))

    storage = open_study_storage(store, base.launch.search)
    later = SweepSearch(space, base, BOTH, storage, "one", 0, book)
    later.restore(str(tmp_path / "state"))
    assert later.suggest("c") == points[2]
    later.on_trial_complete("c", {"val/clean_acc": 0.25, "val/robust_acc": 0.5})
    fresh = later.suggest("d")
    assert isinstance(fresh, dict) and fresh["number"] == 3
    study = close_study(storage, "one")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "FAIL"]
    assert [trial.values for trial in study.trials if trial.values] == [[0.5, 0.25], [0.25, 0.5]]
    # Two sweeps share a database without mixing: a study is the sweep's own.
    other = SweepSearch(space, base, BOTH, open_study_storage(store, base.launch.search), "two", 0, book)
    assert isinstance(first := other.suggest("e"), dict) and first["number"] == 0
    assert files_with(postgres.password, tmp_path) == [], "the saved state holds the address, never the password"


def test_without_the_password_the_database_refuses_in_a_sentence(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "wrong-" + postgres.password)
    with pytest.raises(ConfigError, match=r"PGPASSWORD or ~/\.pgpass") as refusal:
        open_study_storage(Store(str(tmp_path)), postgres.url)
    assert "authentication failed" in str(refusal.value)
    assert postgres.password not in str(refusal.value)


@pytest.mark.slow  # MLflow makes its tables one migration at a time: a minute
@pytest.mark.usefixtures("_password")
def test_the_tracker_on_a_server_that_keeps_its_runs_in_postgresql(postgres: Postgres, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    # As the manifests in cluster/ and docker/ start it: the address without a password, which is in the environment.
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # A database of its own: MLflow and Optuna both keep their version in a table called alembic_version.
    command += [
        "--backend-store-uri",
        postgres.create("mlflow"),
        "--artifacts-destination",
        str(tmp_path / "artifacts"),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = (tmp_path / "server.log").open("wb")
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=2).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()[
                    -2000:
                ]
                time.sleep(0.5)
        for step in (1, 2):  # the second opening finds the first one's run
            tracker = make_tracker(
                TrackingConfig(name="mlflow", uri=uri, experiment="pg"),
                run_name="run",
                key={"run": "1"},
                folder=tmp_path / "run",
            )
            tracker.log_params({"method": "tima"})
            tracker.log_metrics({"cost/usd": float(step)}, step)
            (tmp_path / "note.txt").write_text("kept")
            tracker.log_artifact(tmp_path / "note.txt")
            tracker.finish("FINISHED")
        client = connect(uri)
        experiment = client.get_experiment_by_name("pg")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        assert [run.info.status for run in runs] == ["FINISHED"]
        history = client.get_metric_history(runs[0].info.run_id, "cost/usd")
        assert sorted((point.step, point.value) for point in history) == [(1, 1.0), (2, 2.0)]
        assert [artifact.path for artifact in client.list_artifacts(runs[0].info.run_id)] == ["note.txt"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    assert files_with(postgres.password, tmp_path) == [], "neither log nor spool nor artifacts hold the password"
