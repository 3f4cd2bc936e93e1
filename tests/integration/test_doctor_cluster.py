"""zsr doctor --cluster on two real nodes of this machine: what fits, what is shared, who differs, and the exit code."""

from __future__ import annotations

import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two minutes on two busy cores: a head and two nodes start, and each doctor is a driver of its own.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head and two nodes of two CPUs, started by cluster/local.py."""
    spec = importlib.util.spec_from_file_location("local", REPOSITORY / "cluster" / "local.py")
    assert spec is not None and spec.loader is not None
    local = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(local)
    cluster = local.LocalNodes(tmp_path_factory.mktemp("doctor"))
    try:
        cluster.up(nodes=2, cpus=2)
        environment = {**os.environ, **cluster.variables(cluster.services.get("head"))}
        environment.pop("MLFLOW_TRACKING_URI", None)
        count = "import ray; ray.init(log_to_driver=False, logging_level='ERROR'); print('nodes', len(ray.nodes()))"
        deadline = time.monotonic() + 240
        while True:
            done = subprocess.run([sys.executable, "-c", count], env=environment, capture_output=True, text=True)
            if "nodes 3" in done.stdout:
                break
            assert time.monotonic() < deadline, done.stdout + done.stderr
        yield environment
    finally:
        cluster.down()


def doctor(environment: dict[str, str], folder: Path, *arguments: str) -> tuple[int, dict[str, list[str]]]:
    """Exit code, and the lines by what they are about."""
    command = [str(Path(sys.executable).with_name("zsr")), "doctor", "--cluster", f"--working-dir={folder}", *arguments]
    environment = {**environment, "COLUMNS": "400"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400)
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if said := re.match(r"(ok|warn|fail) +(\S.{11}) (.*)", line):
            found.setdefault(said[2].strip(), []).append(f"{said[1]}: {said[3]}")
        elif "->" in line:
            list(found.values())[-1].append(line.strip())
    assert found, done.stdout + done.stderr
    return done.returncode, found


class _Refuses(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_healthy_cluster_and_a_sweep_that_fits(nodes: dict[str, str], tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    code, found = doctor(nodes, tmp_path, "--sweep=tima", "--preset=demo", f"launch.storage={storage}")
    assert code == 0, found
    assert found["cluster auth"][0].startswith("ok") and "asks for a token" in found["cluster auth"][0]
    assert found["nodes"] == ["ok: 3 nodes with 4 CPUs and 0 GPUs"]
    # Four trials of two workers of a CPU: a node each.
    assert found["demand"] == ["ok: each of 4 trials needs 2 x (1 CPUs, 0 GPUs): 2 fit now"]
    assert found["versions"][0].startswith("ok: python ") and "ray 2.60.0" in found["versions"][0]
    assert found["storage"] == [f"ok: {storage}: written, read and listed by 3 nodes and here"]
    assert re.match(r"ok: \d+ to \d+ images/s a core; 2 decode", found["decode"][0])
    assert found["clocks"] == ["ok: at most 0.0 s apart"]
    assert found["tracking"][0].startswith("ok: no server to ask")
    assert "upload" in found
    assert list(storage.iterdir()) == [], "what was written is gone again"


def test_what_is_wrong_is_named_with_its_fix(nodes: dict[str, str], tmp_path: Path) -> None:
    closed = tmp_path / "a-file"
    closed.write_text("not a folder")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code, found = doctor(
            nodes, tmp_path, "--preset=demo", "launch.workers=2", "launch.cpus_per_worker=3", f"launch.storage={closed}",
            f"data.train={tmp_path}/nothing", "tracking.name=mlflow",
            f"tracking.uri=http://127.0.0.1:{server.server_port}",
        )  # fmt: skip
        server.shutdown()
    assert code == 1
    # Four CPUs in all, but no node has three.
    assert found["demand"][0] == "fail: a run needs 2 x (3 CPUs, 0 GPUs): 0 fit now"
    assert "launch.cpus_per_worker" in found["demand"][1]
    assert found["storage"][0].startswith("fail") and "launch.storage" in found["storage"][1]
    assert found["data"][0].startswith("fail") and "nothing" in found["data"][0]
    assert found["tracking"][0].startswith("fail") and "MLFLOW_TRACKING_PASSWORD" in found["tracking"][1]


def test_without_a_cluster_it_starts_none(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_ADDRESS": "127.0.0.1:9", "RAY_TMPDIR": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    code, found = doctor(environment, tmp_path)
    assert code == 1
    assert found["cluster"][0].startswith("fail")
    assert "ray job submit" in found["cluster"][1]
