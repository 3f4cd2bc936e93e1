"""``zsr doctor``: every line has a state, what is broken has a way out, nothing is changed and nothing hangs."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zsr.cli import checks
from zsr.cli.checks import Finding, Surroundings, guarded
from zsr.cli.main import main
from zsr.cli.uploads import ignored, upload_size
from zsr.config import load_config
from zsr.launch.services import started_at


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.chdir(tmp_path)  # away from the services of a demo that may be running


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        refused = "Authorization" not in self.headers and self.path == "/api/version"
        self.send_response(401 if refused else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


NOBODY = "http://127.0.0.1:9"


def findings(check: Any, *overrides: str, ray: str = NOBODY, folder: Path = Path(".")) -> dict[str, Finding]:
    around = Surroundings(load_config("default", list(overrides)), ray, folder)
    return {finding.what: finding for finding in guarded(check, around)}


def test_ray_cluster_absent_refusing_and_there(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert findings(checks.ray)["ray cluster"].state == "warn"
    assert findings(checks.ray, ray=server)["ray cluster"].state == "fail"
    (tmp_path / "no-token").write_text("secret-word")
    said = findings(checks.ray, ray=server)
    assert said["ray cluster"].state == "ok"
    # The token is found, but Ray's own clients would not send it.
    assert said["ray auth"].state == "warn"
    assert said["ray auth"].fix == "export RAY_AUTH_MODE=token"
    assert "secret-word" not in str(said)


def test_token_mode_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert findings(checks.ray)["ray auth"].state == "fail"


def test_mlflow_unused_absent_and_there(server: str) -> None:
    assert findings(checks.mlflow)["mlflow"].state == "ok"
    assert findings(checks.mlflow, "tracking.name=mlflow")["mlflow"].state == "fail"
    assert findings(checks.mlflow, "tracking.name=mlflow", f"tracking.uri={NOBODY}")["mlflow"].state == "warn"
    assert findings(checks.mlflow, "tracking.name=mlflow", f"tracking.uri={server}")["mlflow"].state == "ok"


def test_s3_unused_absent_and_there(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings(checks.s3)["s3"].state == "ok"
    monkeypatch.setenv("AWS_ENDPOINT_URL", NOBODY)
    assert findings(checks.s3, "data.train=s3://bucket/train")["s3"].state == "fail"
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    assert findings(checks.s3, "data.train=s3://bucket/train")["s3"].state == "ok"


def test_data_missing_too_small_and_fine(small_shards: Path, tmp_path: Path) -> None:
    assert findings(checks.data, f"data.train={tmp_path}")["data.train"].state == "fail"
    said = findings(checks.data, f"data.train={small_shards}", "train.batch_size=64")["data.train"]
    assert said.state == "fail"
    assert "at most 50" in said.fix
    assert findings(checks.data, f"data.train={small_shards}", "train.batch_size=8")["data.train"].state == "ok"


def test_a_check_that_breaks_is_a_finding() -> None:
    def broken(_: Surroundings) -> Iterator[Finding]:
        raise RuntimeError("no such thing")
        yield

    (finding,) = findings(broken).values()
    assert finding.state == "fail"
    assert "no such thing" in finding.says


def test_a_running_demo_is_found_with_its_token(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    home = tmp_path / ".zsr"
    home.mkdir()
    (home / "ray-token").write_text("secret-word")
    service = {"pid": os.getpid(), "started": started_at(os.getpid()), "address": server, "log": "", "details": {}}
    (home / "demo.json").write_text(json.dumps({"ray": service, "mlflow": service}))
    assert checks.demo_address("ray") == server
    said = findings(checks.ray, ray=server)
    assert said["ray cluster"].state == "ok"
    assert said["ray auth"].fix == "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=.zsr/ray-token"
    assert findings(checks.mlflow, "tracking.name=mlflow")["mlflow"].state == "ok"
    (home / "demo.json").write_text(json.dumps({"ray": {**service, "started": "long ago"}}))
    assert checks.demo_address("ray") is None


def test_upload_counts_what_is_not_ignored(tmp_path: Path) -> None:
    (tmp_path / ".rayignore").write_text("# comment\n.venv\n*.log\n/data\nruns/\n!keep.log\n")
    sizes = {"a.py": 10, "x.log": 100, "keep.log": 5, ".venv/lib.so": 1000, "data/big": 1000, "zsr/data/w.bin": 20}
    for name, size in {**sizes, "runs/1": 1000, "deep/.venv/x": 1000}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    total, largest = upload_size(tmp_path)
    ignore_file = (tmp_path / ".rayignore").stat().st_size
    assert total == 10 + 5 + 20 + ignore_file
    assert max(largest, key=lambda entry: entry[1])[0] in ("zsr", ".rayignore")


def test_ignore_patterns_anchor_as_in_git() -> None:
    assert ignored(Path("a/b/.venv"), [".venv"], is_folder=True)
    assert ignored(Path("data"), ["/data"], is_folder=True)
    assert not ignored(Path("zsr/data"), ["/data"], is_folder=True)
    assert not ignored(Path("build"), ["build/"])


def test_the_repository_itself_uploads_little() -> None:
    root = Path(__file__).parents[2]
    size, largest = upload_size(root)
    assert size < 50e6, largest


def test_exit_code_and_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--ray-address", NOBODY, f"data.train={tmp_path}", "--working-dir", str(tmp_path)])
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "fail data.train" in said
    assert "-> set data.train" in said
    assert "ok   torch" in said
