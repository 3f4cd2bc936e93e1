"""Services: found again while they live, never mistaken for somebody else's process, stopped with their children."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from zsr.launch.demo import is_noise
from zsr.launch.services import Service, Services, family, held, pick_port, started_at

PARENT = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"


def start(folder: Path, command: list[str]) -> tuple[Services, Service]:
    services = Services(folder / "demo.json")
    service = services.start(
        "x", command, address="nowhere", log=folder / "x.log", environment=dict(os.environ), folder=folder
    )
    return services, service


def test_a_service_is_found_again_and_stopped_with_its_children(tmp_path: Path) -> None:
    services, service = start(tmp_path, [sys.executable, "-c", PARENT])
    again = Services(tmp_path / "demo.json").get("x")
    assert again == service
    while len(members := family(service.pid)) < 2:
        time.sleep(0.1)
    assert services.stop("x")
    assert not any(started_at(pid) for pid in members)
    assert services.get("x") is None
    assert not services.stop("x")


def test_an_id_that_belongs_to_somebody_else_now_is_left_alone(tmp_path: Path) -> None:
    services, service = start(tmp_path, [sys.executable, "-c", "import time; time.sleep(60)"])
    state = json.loads((tmp_path / "demo.json").read_text())
    state["x"]["started"] = "Thu Jan  1 00:00:00 1970"
    (tmp_path / "demo.json").write_text(json.dumps(state))
    assert services.get("x") is None
    assert not services.stop("x")
    assert started_at(service.pid) == service.started
    os.kill(service.pid, 9)


def test_daemons_are_stood_for_by_a_process_that_stays(tmp_path: Path) -> None:
    services, service = start(tmp_path, held([sys.executable, "-c", "pass"]))
    time.sleep(0.5)
    assert service.alive
    services.stop("x")
    left = "import subprocess, sys; subprocess.Popen(['sleep', '60']); sys.exit(3)"
    _, failed = start(tmp_path, held([sys.executable, "-c", left]))
    while failed.alive:
        time.sleep(0.05)
    assert not [pid for pid in family(failed.pid) if started_at(pid)], "a failed start leaves nothing behind"


def test_a_taken_port_is_passed_over() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert pick_port(taken.getsockname()[1]) != taken.getsockname()[1]


def test_only_the_submission_s_own_chatter_is_hidden() -> None:
    prefix = "2026-11-22 08:55:29,619\tINFO cli.py:333 -- "
    assert is_noise(prefix + "\x1b[1mray job logs raysubmit_x\x1b[22m")
    assert is_noise("2026-11-22 08:55:29,619\tSUCC cli.py:66 -- \x1b[32m-------\x1b[39m")
    assert not is_noise("trial=1 state=finished")
    assert not is_noise("2026-11-22 08:55:32,672\tERR cli.py:75 -- Job 'x' failed")
    assert not is_noise("ray job submit is what I printed myself")
