"""Several Ray nodes on this machine, for development: a head without CPUs and worker raylets that can be lost one by one.

    python cluster/local.py up --nodes 2 --cpus 2     # prints what to export
    python cluster/local.py env                       # prints it again: eval "$(python cluster/local.py env)"
    python cluster/local.py kill node-1               # a node is lost, without notice
    python cluster/local.py down

Ports are free ones, every node has its own temporary folder, Ray asks for a token. Only what ``up`` started is ever
stopped, by process id: ``ray stop`` would end every Ray of this user on the machine.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from zsr.launch.demo import answers, say
from zsr.launch.services import Service, Services, held, pick_port
from zsr.launch.store import HOME_VARIABLE, scratch

START_LIMIT_S = 180
OBJECT_STORE_BYTES = 150_000_000
LOOPBACK = "127.0.0.1"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    parser = argparse.ArgumentParser(prog="python cluster/local.py", description="Several Ray nodes on this machine.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="start what is missing")
    up.add_argument("--nodes", type=int, default=2, help="worker nodes (default: %(default)s)")
    up.add_argument("--cpus", type=int, default=2, help="CPUs that each says it has (default: %(default)s)")
    verbs.add_parser("env", help="print the variables that clients need")
    verbs.add_parser("status", help="say what is running")
    verbs.add_parser("kill", help="stop one node at once, as if its machine were lost").add_argument("node")
    verbs.add_parser("down", help="stop what `up` started")
    asked = parser.parse_args(argv)
    nodes = LocalNodes(Path.cwd())
    try:
        if asked.verb == "up":
            return nodes.up(asked.nodes, asked.cpus)
        if asked.verb == "kill":
            return nodes.kill(asked.node)
        return {"env": nodes.env, "status": nodes.status, "down": nodes.down}[asked.verb]()
    except (OSError, ValueError) as error:
        print(f"local: {error}", file=sys.stderr)  # noqa: T201
        return 2


class LocalNodes:
    """The nodes of one checkout.

    Args:
        root: the checkout; state, logs and token lie under its ``.zsr/local``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / ".zsr" / "local"
        self.services = Services(self.home / "nodes.json")
        self.token = self.home / "ray-token"

    def up(self, nodes: int, cpus: int) -> int:
        """Start a head and worker nodes unless they run."""
        if nodes < 1 or cpus < 1:
            raise ValueError(f"--nodes={nodes} --cpus={cpus}: both should be at least 1")
        self.home.mkdir(parents=True, exist_ok=True)
        if not self.token.exists():
            self.token.touch(mode=0o600)
            self.token.write_text(secrets.token_hex(32))
        head = self.services.get("head") or self._start_head()
        for number in range(1, nodes + 1):
            if self.services.get(f"node-{number}") is None:
                self._start_node(f"node-{number}", head, cpus)
        say(f"Ray dashboard {head.address}; {nodes} nodes of {cpus} CPUs join it within seconds")
        return self.env()

    def env(self) -> int:
        """Print what a client of the cluster must have in its environment."""
        head = self._head()
        for name, value in self.variables(head).items():
            print(f"export {name}={shlex.quote(value)}")  # noqa: T201
        return 0

    def status(self) -> int:
        """Say what runs; 0 if the head does."""
        for name in self._names():
            service = self.services.get(name)
            say(f"{name}: {'not running' if service is None else f'pid {service.pid}, log {service.log}'}")
        return 0 if self.services.get("head") else 1

    def kill(self, node: str) -> int:
        """Stop a node without notice."""
        if not self.services.stop(node, patience_s=0):
            raise ValueError(f"{node!r} does not run; running: {', '.join(self._running()) or 'nothing'}")
        say(f"{node}: lost; `up` brings it back")
        return 0

    def down(self) -> int:
        """Stop all nodes, the head last."""
        for name in sorted(self._names(), reverse=True):  # node-... before head
            say(f"{name}: {'stopped' if self.services.stop(name) else 'was not running'}")
        return 0

    def variables(self, head: Service) -> dict[str, str]:
        """Addresses and authentication, for drivers and for ``ray job submit``; clients send no token unless told to."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_ADDRESS": head.details["gcs"],
            "RAY_API_SERVER_ADDRESS": head.address,
            HOME_VARIABLE: str(self.root),
        }

    def _start_head(self) -> Service:
        gcs, dashboard, client = (pick_port(0) for _ in range(3))
        command = start_command("head", scratch(f"local head {self.root}"), cpus=0)
        command += ["--head", f"--port={gcs}", f"--ray-client-server-port={client}"]
        # With the dashboard: without it the places of stopped trials are never freed.
        command += ["--include-dashboard=true", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}"]
        details = {"gcs": f"{LOOPBACK}:{gcs}"}
        head = self._start("head", command, f"http://{LOOPBACK}:{dashboard}", details)
        began = time.monotonic()
        while not answers(head.address + "/api/version", self.token.read_text()):
            if not head.alive or time.monotonic() - began > START_LIMIT_S:
                self.services.stop("head")
                raise OSError(f"the head did not start; the end of {head.log}:\n{Path(head.log).read_text()[-1500:]}")
            time.sleep(0.5)
        return head

    def _start_node(self, name: str, head: Service, cpus: int) -> Service:
        command = start_command(name, scratch(f"local {name} {self.root}"), cpus)
        command.append(f"--address={head.details['gcs']}")
        return self._start(name, command, head.address, {})

    def _start(self, name: str, command: list[str], address: str, details: Mapping[str, str]) -> Service:
        # A process that stays stands for the node's daemons; they are its family, and end with it.
        return self.services.start(
            name,
            held(command),
            address=address,
            log=self.home / f"{name}.log",
            environment=environment(self.token),
            folder=self.home,
            details=details,
        )

    def _head(self) -> Service:
        head = self.services.get("head")
        if head is None:
            raise ValueError("no local cluster runs here; start one with python cluster/local.py up")
        return head

    def _names(self) -> list[str]:
        return ["head", *sorted(path.stem for path in self.home.glob("node-*.log"))]

    def _running(self) -> list[str]:
        return [name for name in self._names() if self.services.get(name)]


def start_command(name: str, temporary: Path, cpus: int) -> list[str]:
    """``ray start`` for one of several nodes of a machine: nothing that two of them would both want is left to defaults."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--disable-usage-stats"]
    command += [f"--node-ip-address={LOOPBACK}", f"--temp-dir={temporary}", f"--num-cpus={cpus}", "--num-gpus=0"]
    # 0 is "any free port": raylets that share the usual range hand out the same numbers to their workers.
    command += ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--node-name={name}"]
    return command


def environment(token: Path) -> dict[str, str]:
    """This process's environment, without the address of any other cluster, and with the token."""
    return {
        **{key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(START_LIMIT_S),
        # A machine that holds all nodes is slow to say that one is well; Ray's own limits are for machines of their own.
        "RAY_health_check_failure_threshold": "10",
    }


if __name__ == "__main__":
    sys.exit(main())
