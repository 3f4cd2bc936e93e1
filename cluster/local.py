"""Several Ray nodes on this machine, for development: a head without CPUs and worker raylets that can be lost one by one.

    python cluster/local.py up --nodes 2 --cpus 2     # prints what to export
    python cluster/local.py env                       # prints it again: eval "$(python cluster/local.py env)"
    python cluster/local.py kill node-1               # a node is lost, without notice
    python cluster/local.py down
    python cluster/local.py up --nodes 0 --grow 3     # instead: nodes come when work asks for them, and go when idle

Ports are free ones, every node has its own temporary folder, Ray asks for a token. Only what ``up`` started is ever
stopped, by process id: ``ray stop`` would end every Ray of this user on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zsr.launch.capacity import LIMITS_VARIABLE
from zsr.launch.demo import answers, say
from zsr.launch.services import Service, Services, held, pick_port
from zsr.launch.store import HOME_VARIABLE, scratch

START_LIMIT_S = 180
START_ATTEMPTS = 3
STARTED = "Ray runtime started"
OBJECT_STORE_BYTES = 150_000_000
LOOPBACK = "127.0.0.1"
IDLE_S = 20.0
# What Ray's provider of made-up nodes calls the head (ray.autoscaler._private.fake_multi_node.node_provider).
FAKE_HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
FAKE_HEAD_TYPE = "ray.head.default"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    parser = argparse.ArgumentParser(prog="python cluster/local.py", description="Several Ray nodes on this machine.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="start what is missing")
    up.add_argument("--nodes", type=int, default=2, help="worker nodes (default: %(default)s)")
    up.add_argument("--cpus", type=int, default=2, help="CPUs that each says it has (default: %(default)s)")
    up.add_argument("--grow", type=int, default=0, help="nodes that Ray's autoscaler may add when work asks for them")
    up.add_argument("--idle", type=float, default=IDLE_S, help="seconds after which it removes an idle one")
    verbs.add_parser("env", help="print the variables that clients need")
    verbs.add_parser("status", help="say what is running")
    verbs.add_parser("kill", help="stop one node at once, as if its machine were lost").add_argument("node")
    verbs.add_parser("down", help="stop what `up` started")
    asked = parser.parse_args(argv)
    nodes = LocalNodes(Path.cwd())
    try:
        if asked.verb == "up":
            return nodes.up(asked.nodes, asked.cpus, asked.grow, asked.idle)
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

    def up(self, nodes: int, cpus: int, grow: int = 0, idle_s: float = IDLE_S) -> int:
        """Start a head and worker nodes unless they run."""
        if nodes + grow < 1 or min(nodes, grow) < 0 or cpus < 1:
            raise ValueError(f"--nodes={nodes} --grow={grow} --cpus={cpus}: a cluster has at least one node of one CPU")
        self.home.mkdir(parents=True, exist_ok=True)
        if not self.token.exists():
            self.token.touch(mode=0o600)
            self.token.write_text(secrets.token_hex(32))
        head = self.services.get("head") or self._start_head(autoscaling(grow, cpus, idle_s) if grow else None)
        for number in range(1, nodes + 1):
            if self.services.get(f"node-{number}") is None:
                self._start_node(f"node-{number}", head, cpus)
        more = f", up to {grow} more when work asks for them" if grow else ""
        say(f"Ray dashboard {head.address}; {nodes} nodes of {cpus} CPUs join it within seconds{more}")
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
        limits = {LIMITS_VARIABLE: head.details["limits"]} if "limits" in head.details else {}
        return {
            **limits,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_ADDRESS": head.details["gcs"],
            "RAY_API_SERVER_ADDRESS": head.address,
            HOME_VARIABLE: str(self.root),
        }

    def _start_head(self, autoscaler: dict[str, Any] | None = None) -> Service:
        gcs, dashboard, client = (pick_port(0) for _ in range(3))
        folder = scratch(f"local head {self.root}")
        command = start_command("head", folder, cpus=0)
        details, more = {"gcs": f"{LOOPBACK}:{gcs}"}, {}
        if autoscaler:
            autoscaler["provider"]["gcs_address"] = f"{LOOPBACK}:{gcs}"
            path = self.home / "autoscaler.json"
            path.write_text(json.dumps(autoscaler, indent=1))
            command.append(f"--autoscaling-config={path}")
            more = {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
            more |= {"RAY_CLOUD_INSTANCE_ID": FAKE_HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD}
            more |= {"RAY_TMPDIR": str(folder), LIMITS_VARIABLE: str(path)}
            details["limits"] = str(path)
        command += ["--head", f"--port={gcs}", f"--ray-client-server-port={client}"]
        # With the dashboard: without it the places of stopped trials are never freed.
        command += ["--include-dashboard=true", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}"]
        for attempt in range(START_ATTEMPTS):
            head = self._start("head", command, f"http://{LOOPBACK}:{dashboard}", details, more)
            if self._is_up(head):
                return head
            self.services.stop("head")
            say(f"the head did not start, attempt {attempt + 1} of {START_ATTEMPTS}")
        raise OSError(f"the head did not start; the end of {head.log}:\n{Path(head.log).read_text()[-1500:]}")

    def _is_up(self, head: Service) -> bool:
        """Wait until the dashboard answers and `ray start` says that it is done: it gives a raylet 30 s, then ends the head."""
        began = time.monotonic()
        while not (
            STARTED in Path(head.log).read_text() and answers(head.address + "/api/version", self.token.read_text())
        ):
            if not head.alive or time.monotonic() - began > START_LIMIT_S:
                return False
            time.sleep(0.5)
        return True

    def _start_node(self, name: str, head: Service, cpus: int) -> Service:
        command = start_command(name, scratch(f"local {name} {self.root}"), cpus)
        command.append(f"--address={head.details['gcs']}")
        return self._start(name, command, head.address, {}, {})

    def _start(
        self, name: str, command: list[str], address: str, details: Mapping[str, str], variables: Mapping[str, str]
    ) -> Service:
        # A process that stays stands for the node's daemons; they are its family, and end with it.
        return self.services.start(
            name,
            held(command),
            address=address,
            log=self.home / f"{name}.log",
            environment={**environment(self.token), **variables},
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


def autoscaling(most: int, cpus: int, idle_s: float) -> dict[str, Any]:
    """What Ray's autoscaler is told: up to ``most`` worker nodes, which are raylets that its provider starts here.

    Ray's own ``AutoscalingCluster`` cannot be used: it stops every Ray of the machine first, and reads a file that the
    wheel lacks.
    """
    worker = {"CPU": cpus, "object_store_memory": OBJECT_STORE_BYTES}
    types = {
        FAKE_HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": most},
    }
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "launch_multiple": True,
        "disable_node_updaters": True,  # there is nobody to log in to
        "head_node_id": FAKE_HEAD,
    }
    unused: dict[str, Any] = {name: {} for name in ("auth", "docker", "file_mounts")}
    unused |= {
        name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands")
    }
    unused |= {f"{who}setup_commands": [] for who in ("", "head_", "worker_")}
    unused |= {f"{who}_start_ray_commands": [] for who in ("head", "worker")}
    return {
        "cluster_name": "local", "max_workers": most, "upscaling_speed": 1.0, "idle_timeout_minutes": idle_s / 60,
        "provider": provider, "available_node_types": types, "head_node_type": FAKE_HEAD_TYPE,
        "file_mounts_sync_continuously": False, **unused,
    }  # fmt: skip


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
