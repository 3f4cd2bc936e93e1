"""What every node of a cluster says of itself when a small actor on it looks around; ``zsr doctor --cluster`` judges it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zsr.config import RunConfig
from zsr.launch.capacity import Capacity
from zsr.launch.cluster import current_capacity, quiet_environment
from zsr.launch.store import Store

PACKAGES = ("ray", "torch", "open_clip_torch", "zsr")
DECODE_S = 1.0
"""Time that a node decodes images for, with one thread."""


@dataclass(frozen=True)
class NodeReport:
    """One node.

    Attributes:
        name: its address, and what Ray calls it if that says more.
        is_head: whether Ray's head runs there.
        versions: of Python and :data:`PACKAGES`; empty where a package is missing.
        clock_s: how far its clock is ahead of the driver's, in seconds.
        clock_error_s: what that may be wrong by: half of the time that the question took.
        shm_bytes: size of its shared memory.
        store_bytes: Ray's object store, which should fit into that.
        storage: problem with ``launch.storage``, if any.
        sees_driver: whether it saw the file that the driver had written there.
        data: problem with the training set, if any.
        images_per_s: that one thread decodes, from the training set.
        tracking: HTTP status by which the tracking server answers a query, or what went wrong.
        error: why it could not say anything.
    """

    name: str
    is_head: bool
    versions: Mapping[str, str] = field(default_factory=dict)
    clock_s: float = 0.0
    clock_error_s: float = 0.0
    shm_bytes: int = 0
    store_bytes: int = 0
    storage: str = ""
    sees_driver: bool = False
    data: str = ""
    images_per_s: float = 0.0
    tracking: int | str | None = None
    error: str = ""


@dataclass(frozen=True)
class ClusterReport:
    """A cluster.

    Attributes:
        capacity: its nodes and what it may grow to.
        nodes: what each says.
        driver: what the driver's own process says, which the nodes must agree with.
        written: names of the files that nodes wrote to the storage, as the driver lists them.
    """

    capacity: Capacity
    nodes: list[NodeReport]
    driver: NodeReport
    written: list[str]


def probe_cluster(config: RunConfig, patience_s: float = 120.0) -> ClusterReport:
    """Ask every node of the cluster of ``RAY_ADDRESS``, or of the one that runs here; starts no cluster.

    Raises:
        ConnectionError: there is no cluster to join.
    """
    quiet_environment()
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or "auto"
        expect_listener(address)
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    with probe_folder(config) as store:
        actor = ray.remote(num_cpus=0, max_restarts=0)(Probe)
        asked: dict[Any, tuple[dict[str, Any], Any]] = {}
        for node in ray.nodes():
            if node["Alive"]:
                place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                probe = actor.options(scheduling_strategy=place).remote()
                asked[probe.look.remote(config.model_dump(mode="json"), store.root, node["NodeID"])] = (node, probe)
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=patience_s)
        reports = [_report(node, answer, probe, answer in ready) for answer, (node, probe) in asked.items()]
        driver = NodeReport(**Probe().look(config.model_dump(mode="json"), store.root, "driver-again"))
        written = store.names()
    return ClusterReport(current_capacity(), sorted(reports, key=lambda report: not report.is_head), driver, written)


def expect_listener(address: str) -> None:
    """Try the head's port before Ray does, which would try for minutes.

    Raises:
        ConnectionError: nobody listens there.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise ConnectionError(f"RAY_ADDRESS={address}: {error}") from None


@contextlib.contextmanager
def probe_folder(config: RunConfig) -> Iterator[Store]:
    """A folder of ``launch.storage`` with the driver's file in it, and gone afterwards."""
    store = Store(config.launch.storage).child(f"doctor-{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):  # said by the look at it
        store.write_json({}, "driver.json")
    try:
        yield store
    finally:
        with contextlib.suppress(OSError):
            for name in store.names():
                store.remove(name)
            if store.is_local:
                Path(store.root).rmdir()


class Probe:
    """Looks around on the node where it lives. Its answers are plain values: versions of zsr may differ."""

    def look(self, tree: dict[str, Any], storage: str, who: str) -> dict[str, Any]:
        config = RunConfig.model_validate(tree)
        data, images_per_s = decode_rate(config)
        problem, sees_driver = try_storage(Store(storage), who)
        return {
            "name": platform.node(),
            "is_head": False,
            "versions": versions(),
            "shm_bytes": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
            "storage": problem,
            "sees_driver": sees_driver,
            "data": data,
            "images_per_s": images_per_s,
            "tracking": ask_tracking(config),
        }

    def clock(self) -> float:
        return time.time()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def try_storage(store: Store, who: str) -> tuple[str, bool]:
    """Write, read back and list; the problem if there is one, and whether the driver's file is there."""
    try:
        store.write_json({"who": who}, f"{who}.json")
        if store.read_json(f"{who}.json") != {"who": who}:
            return "what was written is not what is read", False
        return "", "driver.json" in store.names()
    except Exception as error:  # pyarrow and the clouds' own
        return f"{type(error).__name__}: {str(error)[:200]}", False


def decode_rate(config: RunConfig) -> tuple[str, float]:
    """Problem with the training set if there is one, and the images a second that one thread decodes."""
    from zsr.data.decode import decode
    from zsr.data.shards import ShardSet

    try:
        shards = ShardSet(config.data.train, config.data.cache_dir)
        first = shards.index.shards[0].samples
        shards.read(0)  # brings the shard here, which is not what is measured
        began, count = time.monotonic(), 0
        while count < len(shards) and time.monotonic() - began < DECODE_S:
            decode(shards.read(count % first).parts, 224)
            count += 1
        return "", count / (time.monotonic() - began)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}", 0.0


def ask_tracking(config: RunConfig) -> int | str | None:
    """How the MLflow server answers from here: an HTTP status, a problem, or ``None`` if there is none to ask."""
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    if config.tracking.name != "mlflow" or not uri.startswith("http"):
        return None
    request = urllib.request.Request(f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1")
    name, password = (os.environ.get(f"MLFLOW_TRACKING_{part}", "") for part in ("USERNAME", "PASSWORD"))
    if name:
        import base64

        request.add_header("Authorization", "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            json.load(answer)
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError) as error:
        return str(error)


def _report(node: Mapping[str, Any], answer: Any, probe: Any, is_ready: bool) -> NodeReport:
    """What came back from one node, with the clock asked for once its actor is warm."""
    import ray

    name = (
        node["NodeName"]
        if node["NodeName"] == node["NodeManagerAddress"]
        else (f"{node['NodeManagerAddress']} {node['NodeName']}")
    )
    common: dict[str, Any] = {"name": name, "is_head": "node:__internal_head__" in node["Resources"]}
    if not is_ready:
        return NodeReport(**common, error="did not answer")
    try:
        said = ray.get(answer)
        rounds = []
        for _ in range(5):
            sent = time.time()
            there = ray.get(probe.clock.remote(), timeout=30)
            back = time.time()
            rounds.append(((back - sent) / 2, there - (sent + back) / 2))
        error_s, clock_s = min(rounds)
        common |= {"clock_s": clock_s, "clock_error_s": error_s}
        return NodeReport(**{**said, **common, "store_bytes": int(node["Resources"].get("object_store_memory", 0))})
    except Exception as error:  # of the node: a missing package, a lost raylet
        return NodeReport(**common, error=str(error).strip().splitlines()[-1][:200])
    finally:
        ray.kill(probe)
