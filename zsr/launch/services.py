"""Background processes that belong to a checkout: started once, found again, and stopped by whoever started them only.

A process is remembered by its id together with when it was started, so that an id that the system has given to somebody
else since is never mistaken for ours.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Service:
    """One running service.

    Attributes:
        pid: of its first process, which leads a process group of its own.
        started: when that process started, in the system's words.
        address: where to reach it.
        log: its output.
        details: whatever else its users need.
    """

    pid: int
    started: str
    address: str
    log: str
    details: Mapping[str, str]

    @property
    def alive(self) -> bool:
        return bool(self.started) and started_at(self.pid) == self.started


class Services:
    """The services of one checkout, remembered in a file.

    Args:
        state: the file.
    """

    def __init__(self, state: Path) -> None:
        self._state = state

    def get(self, name: str) -> Service | None:
        """The service, if it is remembered and its process is the one that was started."""
        found = self._read().get(name)
        service = None if found is None else Service(**found)
        return service if service is not None and service.alive else None

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        address: str,
        log: Path,
        environment: Mapping[str, str],
        folder: Path,
        details: Mapping[str, str] | None = None,
    ) -> Service:
        """Start a service in a process group of its own and remember it at once."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                list(command), cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        service = Service(process.pid, started_at(process.pid), address, str(log), dict(details or {}))
        self._write({**self._read(), name: asdict(service)})
        return service

    def stop(self, name: str, patience_s: float = 6.0) -> bool:
        """Stop a service with everything that it started; return whether there was one."""
        service = self.get(name)
        if service is not None:
            stop_family(service.pid, patience_s)
        remaining = {key: value for key, value in self._read().items() if key != name}
        self._write(remaining)
        return service is not None

    def _read(self) -> dict[str, dict]:  # type: ignore[type-arg]
        try:
            return dict(json.loads(self._state.read_text()))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def _write(self, content: Mapping[str, object]) -> None:
        self._state.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._state.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1))
        temporary.replace(self._state)


def started_at(pid: int) -> str:
    """When a process started, as ``ps`` says it; empty for none and for one that has ended and waits to be collected."""
    asked = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True)
    state, _, started = asked.stdout.strip().partition(" ")
    return "" if state.startswith("Z") else started.strip()


def stop_family(leader: int, patience_s: float) -> None:
    """Stop a process group and all descendants of its members: politely, then not."""
    members = {pid: started_at(pid) for pid in family(leader)}
    _signal(-leader, signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while members and time.monotonic() < deadline:
        time.sleep(0.2)
        members = {pid: started for pid, started in members.items() if started and started_at(pid) == started}
    for pid in members:
        _signal(pid, signal.SIGKILL)


def family(leader: int) -> list[int]:
    """The members of a process group and everything that they started; Ray's workers leave the group, for one."""
    command = ["ps", "-e", "-o", "pid=,ppid=,pgid="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    open_ = []
    for line in listed.splitlines():
        pid, parent, group = map(int, line.split())
        children.setdefault(parent, []).append(pid)
        if group == leader:
            open_.append(pid)
    found: set[int] = set()
    while open_:
        pid = open_.pop()
        if pid not in found:
            found.add(pid)
            open_ += children.get(pid, [])
    return sorted(found)


def held(command: Sequence[str]) -> list[str]:
    """A command whose work is done by daemons that it leaves behind, with a process that stays to stand for them.

    ``ray start --block`` would stay too, but it ends the whole head when any helper process ends, even the Ray client
    server that nobody uses here; on a busy machine that one gives up early. If the command fails, what it has started
    goes with it.
    """
    stay = "os.killpg(0, signal.SIGKILL) if subprocess.call(sys.argv[1:]) else signal.pause()"
    return [sys.executable, "-c", f"import os, signal, subprocess, sys; {stay}", *command]


def pick_port(preferred: int) -> int:
    """``preferred`` if nobody uses it, else a port that is free now."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found: int = probe.getsockname()[1]
            return found
    raise OSError("no free port on the loopback address")


def _signal(pid: int, number: signal.Signals) -> None:
    """Signal a process, or the group of a negative id, if it is still there."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return
