"""The whole system on one machine: ``python -m zsr.launch.demo up | down | status``.

``up`` starts a Ray head and an MLflow server on loopback unless they run already, then submits the TIMA sweep exactly as
one would to a real cluster, with ``ray job submit``. Everything is kept under ``.zsr`` of the current directory, which
should be the root of a checkout. ``down`` stops those two services and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from zsr.launch.services import Service, Services, held, pick_port
from zsr.launch.store import HOME_VARIABLE, scratch
from zsr.tracking.environment import COMMIT_VARIABLE, source_commit

SWEEP = ("sweeps/tima_sweep.py", "--preset", "demo")
START_S = 20
START_LIMIT_S = 180
# Four trials need no pool of processes, no client server and little shared memory.
RAY_CPUS = 4
OBJECT_STORE_BYTES = 150_000_000

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PREFIX = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+\s+[A-Z]+ \S+\.py:\d+ -- ")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code, for ``up`` that of the sweep."""
    parser = argparse.ArgumentParser(prog="python -m zsr.launch.demo", description="The system on one machine.")
    parser.add_argument("verb", choices=["up", "down", "status"])
    parser.add_argument("arguments", nargs="*", help="more arguments for the sweep (after --)")
    asked = parser.parse_args(argv)
    demo = Demo(Path.cwd())
    if asked.verb == "down":
        return demo.down()
    if asked.verb == "status":
        return demo.status()
    try:
        return demo.up(asked.arguments)
    except (OSError, TimeoutError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: stopped watching; the services stay up, `make down` stops them")
        return 130


class Demo:
    """Services and sweep of one checkout.

    Args:
        root: the checkout.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / ".zsr"
        self.services = Services(self.home / "demo.json")
        self.token = self.home / "ray-token"

    def up(self, arguments: Sequence[str]) -> int:
        """Start what is missing and run the sweep."""
        if not (self.root / SWEEP[0]).exists():
            raise ValueError(f"there is no {SWEEP[0]} here; run it in the root of a checkout")
        try:
            ray, mlflow = self._start_missing(usual_ports=True)
        except ChildProcessError:
            # Most likely somebody took a port between our look and the start.
            say("a service did not start; once more, on other ports")
            ray, mlflow = self._start_missing(usual_ports=False)
        say(f"Ray dashboard {ray.address}   MLflow {mlflow.address}")
        say("submitting the sweep: ray job submit --working-dir . -- python " + " ".join([*SWEEP, *arguments]))
        code = self._submit(ray, mlflow, arguments)
        say(f"MLflow stays up at {mlflow.address}; `make down` stops it and Ray")
        return code

    def down(self) -> int:
        """Stop what ``up`` started."""
        for name in ("ray", "mlflow"):
            say(f"{name}: {'stopped' if self.services.stop(name) else 'was not running'}")
        return 0

    def status(self) -> int:
        """Say what is running; 0 if all is."""
        found = {name: self.services.get(name) for name in ("ray", "mlflow")}
        for name, service in found.items():
            say(f"{name}: {'not running' if service is None else f'{service.address} (pid {service.pid})'}")
        return 0 if all(found.values()) else 1

    def _start_missing(self, usual_ports: bool) -> tuple[Service, Service]:
        ray, mlflow = self.services.get("ray"), self.services.get("mlflow")
        missing = [name for name, service in (("Ray", ray), ("MLflow", mlflow)) if service is None]
        if missing:
            say(f"starting {' and '.join(missing)} on this machine (about {START_S} s)")
        ray = ray or self._start_ray(usual_ports)  # both start at once; then both are waited for
        mlflow = mlflow or self._start_mlflow(usual_ports)
        self._wait_until_up({"Ray": ray, "MLflow": mlflow})
        return ray, mlflow

    def _start_ray(self, usual_ports: bool) -> Service:
        self.home.mkdir(exist_ok=True)
        if not self.token.exists():
            self.token.touch(mode=0o600)
            self.token.write_text(secrets.token_hex(32))
        gcs, dashboard, client = (pick_port(port if usual_ports else 0) for port in (6379, 8265, 10001))
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
        command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        command += ["--dashboard-agent-listen-port=0", f"--num-cpus={RAY_CPUS}"]
        # Under the system's temporary folder and short, since Ray's socket paths are bounded.
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={scratch(f'ray {self.root}')}"]
        return self.services.start(
            "ray",
            held(command),
            address=f"http://127.0.0.1:{dashboard}",
            log=self.home / "ray.log",
            environment=self._environment(),
            folder=self.home,
        )

    def _start_mlflow(self, usual_ports: bool) -> Service:
        self.home.mkdir(exist_ok=True)
        port = pick_port(5000 if usual_ports else 0)
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.home / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.home / "mlflow-artifacts")]
        # Its background jobs are for features that are not used here: eight more processes of a quarter gigabyte each.
        environment = {**self._environment(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        return self.services.start(
            "mlflow",
            command,
            address=f"http://127.0.0.1:{port}",
            log=self.home / "mlflow.log",
            environment=environment,
            folder=self.home,
        )

    def _environment(self) -> dict[str, str]:
        """Variables for the services and the submission; ``python`` in a job is then this interpreter."""
        scripts = str(Path(sys.executable).parent)
        return {
            **{key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")},
            "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(START_LIMIT_S),
            # Ray gives its workers low priority; here they are what the machine is for.
            "RAY_worker_niceness": "0",
            "RAY_DISABLE_IMPORT_WARNING": "1",
        }

    def _wait_until_up(self, services: Mapping[str, Service]) -> None:
        paths = {"Ray": "/api/version", "MLflow": "/health"}
        began = said = time.monotonic()
        waiting = dict(services)
        while waiting:
            for name, service in list(waiting.items()):
                if answers(service.address + paths[name], self.token.read_text() if name == "Ray" else None):
                    del waiting[name]
                elif not service.alive or time.monotonic() - began > START_LIMIT_S:
                    tail = Path(service.log).read_text(errors="replace")[-1500:]
                    problem = TimeoutError if service.alive else ChildProcessError
                    raise problem(f"{name} did not start; the end of {service.log}:\n{tail}")
            if waiting and time.monotonic() - said > 5:
                said = time.monotonic()
                say(f"waiting for {' and '.join(waiting)} ({said - began:.0f} s)")
            time.sleep(0.3)

    def _submit(self, ray: Service, mlflow: Service, arguments: Sequence[str]) -> int:
        variables = {
            # The job runs in a copy of this folder; what it makes belongs here.
            HOME_VARIABLE: str(self.root),
            "MLFLOW_TRACKING_URI": mlflow.address,
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            # Both cores are busy while workers start; Ray's minute may not do.
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
            # One machine is not taken away with notice; one process less for each trial to start.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            "PYTHONUNBUFFERED": "1",
        }
        commit = source_commit()
        if commit:
            variables[COMMIT_VARIABLE] = commit
        command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", ray.address]
        command += ["--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": variables}), "--"]
        command += ["python", *SWEEP, *arguments]
        process = subprocess.Popen(
            command, cwd=self.root, env=self._environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if not is_noise(line):
                print(line, end="", flush=True)
        return process.wait()


def answers(url: str, token: str | None = None) -> bool:
    """Whether a server answers at all."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def is_noise(line: str) -> bool:
    """Lines of the submission command itself that say nothing to who runs the demo."""
    text = _COLOUR.sub("", line).strip()
    text, from_ray = _PREFIX.subn("", text)
    if text.startswith("(raylet)"):
        return True  # advice on process counts; what goes wrong is also said by the sweep
    chatter = (
        "Directory '", "Job submission server", "Next steps", "Query the ", "Request the job", "Tailing logs",
        "Uploading package", "WebSocket closed", "ray job ", "Ignoring upload", "Creating a file package", "Runtime env is",
    )  # fmt: skip
    return (bool(from_ray) and (text.startswith(chatter) or set(text) <= {"-"})) or not text


def say(line: str) -> None:
    print(f"==> {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
