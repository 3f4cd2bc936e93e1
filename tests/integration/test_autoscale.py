"""A sweep on a cluster without nodes: they come as trials ask for them, and go when idle."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_sweep import Command

# Three minutes on two busy cores, most of it starts of processes.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parents[2]
MOST, IDLE_S = 2, 10.0

WATCH = """
import time, ray
ray.init(log_to_driver=False, logging_level="ERROR")
while True:
    alive = [n for n in ray.nodes() if n["Alive"] and "node:__internal_head__" not in n["Resources"]]
    print("nodes", len(alive), flush=True)
    time.sleep(0.5)
"""


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head without CPUs that may start ``MOST`` nodes of two; gives what its clients need."""
    spec = importlib.util.spec_from_file_location("local", REPOSITORY / "cluster" / "local.py")
    assert spec is not None and spec.loader is not None
    local = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(local)
    nodes = local.LocalNodes(tmp_path_factory.mktemp("growing"))
    try:
        nodes.up(nodes=0, cpus=2, grow=MOST, idle_s=IDLE_S)
        yield {**os.environ, **nodes.variables(nodes.services.get("head"))}
    finally:
        nodes.down()


@pytest.fixture
def counts(growing: dict[str, str], tmp_path: Path) -> Iterator[Path]:
    """A file with the number of worker nodes, twice a second."""
    path = tmp_path / "counts"
    with path.open("w") as file:
        watch = subprocess.Popen([sys.executable, "-c", WATCH], env=growing, stdout=file, stderr=subprocess.DEVNULL)
        yield path
        watch.kill()
        watch.wait()


def seen(counts: Path) -> list[int]:
    # Ray prints into the same output when a node goes.
    lines = [line.split() for line in counts.read_text().splitlines()]
    return [int(words[1]) for words in lines if len(words) == 2 and words[0] == "nodes"]


def test_nodes_come_as_trials_ask_and_go_when_idle(growing: dict[str, str], counts: Path, tmp_path: Path) -> None:
    command = Command(tmp_path, growing)
    try:
        process = command.start("--workers-per-trial", "2", "--multi-objective", "launch.cpus_per_worker=1")
        output, _ = process.communicate(timeout=600)
    finally:
        command.stop()
    assert process.returncode == 0, output
    assert {number: trial["state"] for number, trial in command.trials().items()} == {0: "finished", 1: "finished"}
    # Two trials of two CPUs: the driver knew that two nodes may come, asked for both, and said why it waited.
    assert "at_once=2" in output
    assert "trials wait for nodes" in output
    during = seen(counts)
    assert during[0] == 0
    assert max(during) == MOST

    deadline = time.monotonic() + IDLE_S + 120
    while seen(counts)[-1] and time.monotonic() < deadline:
        time.sleep(0.5)
    assert seen(counts)[-1] == 0, "idle nodes go"


def test_a_trial_beyond_the_limits_is_refused_and_no_node_is_started(
    growing: dict[str, str], counts: Path, tmp_path: Path
) -> None:
    command = Command(tmp_path, growing)
    process = command.start("--workers-per-trial", "8", "--max-concurrent", "1", "launch.cpus_per_worker=1")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    said = " ".join(output.split())
    assert "8 x (1 CPUs, 0 GPUs), which never fits" in said
    assert f"may grow to {MOST} x worker (2 CPUs, 0 GPUs), {MOST} nodes in all" in said
    assert not command.trials()
    assert max(seen(counts), default=0) == 0
