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
import time
from collections.abc import Callable, Mapping, Sequence
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
            family = {pid: started_at(pid) for pid in descendants(service.pid)}
            _signal_group(service.pid, signal.SIGTERM)
            _wait(lambda: started_at(service.pid) != service.started, patience_s)
            _signal_group(service.pid, signal.SIGKILL)
            # Ray's workers leave the group; they are known as children of ours from before.
            for pid, started in family.items():
                if started and started_at(pid) == started:
                    _signal(pid, signal.SIGKILL)
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


def descendants(pid: int) -> list[int]:
    """All children of a process, their children, and so on."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in listed.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found, open_ = [], [pid]
    while open_:
        below = children.get(open_.pop(), [])
        found += below
        open_ += below
    return found


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


def _wait(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.2)


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return
