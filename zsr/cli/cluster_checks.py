"""What zsr doctor --cluster makes of a cluster: every node against the others, and against what a run asks for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from zsr.cli.checks import Finding, http_status
from zsr.config import RunConfig

if TYPE_CHECKING:
    from zsr.launch.probe import ClusterReport, NodeReport

SKEW_WARN_S, SKEW_FAIL_S = 2.0, 300.0  # object stores refuse requests whose clock is a quarter of an hour off
MIN_SHM = 1e9


def cluster_findings(config: RunConfig, ray_address: str, num_trials: int | None) -> Iterator[Finding]:
    """One finding a line; asks the cluster once.

    Args:
        config: of the run, or of a sweep's trial.
        ray_address: the dashboard.
        num_trials: of the sweep, if it is one.
    """
    from zsr.launch.probe import probe_cluster

    yield token(ray_address)
    try:
        report = probe_cluster(config)
    except ConnectionError as error:
        yield Finding(
            "cluster", "fail", str(error).splitlines()[0], "set RAY_ADDRESS where the head can be reached, or run this as a "
            "job: ray job submit --working-dir . -- zsr doctor --cluster",
        )  # fmt: skip
        return
    answered = [node for node in report.nodes if not node.error]
    for node in report.nodes:
        if node.error:
            fix = (
                "install zsr on every node, with constraints.txt" if "zsr" in node.error else "see that node's Ray logs"
            )
            yield Finding("node", "fail", f"{node.name}: {node.error}", fix)
    yield Finding("nodes", "ok", report.capacity.describe())
    yield demand(config, report, num_trials)
    yield from versions(report, answered)
    yield storage(config, report, answered)
    yield from data(config, answered)
    yield tracking(config, answered)
    yield clocks(answered)
    yield from shared_memory(answered)


def token(ray_address: str) -> Finding:
    """Whether the dashboard asks who is there."""
    status = http_status(f"{ray_address}/api/version", {})
    if status in (401, 403):
        return Finding("cluster auth", "ok", f"{ray_address} asks for a token")
    if status == 200:
        fix = "start every node with RAY_AUTH_MODE=token and a token (docs/security.md)"
        return Finding("cluster auth", "warn", f"{ray_address} lets in whoever reaches it, and a job is code", fix)
    fix = "set --ray-address or RAY_API_SERVER_ADDRESS to the dashboard"
    return Finding("cluster auth", "warn", f"nothing answers at {ray_address}, so nobody can say", fix)


def demand(config: RunConfig, report: ClusterReport, num_trials: int | None) -> Finding:
    """What a trial asks for, against what there is and may be."""
    from zsr.launch.capacity import LIMITS_VARIABLE, Demand

    asked, capacity = Demand.of(config.launch), report.capacity
    now, grown = capacity.trials_now(asked), capacity.trials_grown(asked)
    what = "a run" if num_trials is None else f"each of {num_trials} trials"
    says = f"{what} needs {asked}: {now} fit now" + (f", {grown} when the cluster has grown" if capacity.types else "")
    if grown < 1:
        fix = "lower launch.workers, launch.cpus_per_worker or launch.gpus_per_worker"
        more = "" if capacity.types else f", or name the autoscaler's limits in {LIMITS_VARIABLE}"
        return Finding("demand", "fail", says, fix + more)
    if now < 1:
        return Finding("demand", "warn", says, "trials will wait for nodes; that is fine if the autoscaler gets them")
    return Finding("demand", "ok", says)


def versions(report: ClusterReport, nodes: Iterable[NodeReport]) -> Iterator[Finding]:
    """Ray and Python must be equal everywhere; the others should be."""
    ours = report.driver.versions
    differs = False
    for node in nodes:
        other = {name: node.versions.get(name, "missing") for name in ours if node.versions.get(name) != ours[name]}
        if other:
            differs = True
            listed = ", ".join(f"{name} {version} (here {ours[name]})" for name, version in other.items())
            worst = bool({"ray", "zsr", "torch"} & set(other))
            fix = "one image, or one environment made with constraints.txt, on all nodes"
            yield Finding("versions", "fail" if worst else "warn", f"{node.name}: {listed}", fix)
    if not differs:
        yield Finding(
            "versions", "ok", ", ".join(f"{name} {version}" for name, version in ours.items()) + " everywhere"
        )


def storage(config: RunConfig, report: ClusterReport, nodes: list[NodeReport]) -> Finding:
    """Every node must write, read and list, and see what the driver wrote."""
    where = config.launch.storage
    broken = [f"{node.name}: {node.storage}" for node in nodes if node.storage]
    if broken:
        fix = "mend the permissions or AWS_* of those nodes, or choose another launch.storage"
        return Finding("storage", "fail", f"{where}: {'; '.join(broken)}", fix)
    apart = [node.name for node in nodes if not node.sees_driver]
    if apart or len(report.written) < len(nodes) + 2:  # the driver's two files and one of each node
        fix = "launch.storage must be an s3:// prefix, or a folder that all nodes mount"
        return Finding("storage", "fail", f"{where} is not one place: {', '.join(apart) or 'files are missing'}", fix)
    return Finding("storage", "ok", f"{where}: written, read and listed by {len(nodes)} nodes and here")


def data(config: RunConfig, nodes: list[NodeReport]) -> Iterator[Finding]:
    """Whether workers find the training set, how fast they decode it, and whether they all get shards."""
    broken = [f"{node.name}: {node.data}" for node in nodes if node.data]
    if broken:
        fix = "copy the set to the same folder of every node, or put it into s3://"
        yield Finding("data", "fail", f"data.train={config.data.train}: {'; '.join(broken)}", fix)
        return
    if not nodes:
        return
    rates = sorted(node.images_per_s for node in nodes)
    processes = max(config.data.num_workers, 1) * config.launch.workers
    says = (
        f"{rates[0]:.0f} to {rates[-1]:.0f} images/s a core; {processes} decode, so about {processes * rates[0]:.0f}/s"
    )
    if rates[0] < rates[len(rates) // 2] / 2:
        slow = ", ".join(node.name for node in nodes if node.images_per_s < rates[len(rates) // 2] / 2)
        yield Finding(
            "decode", "warn", f"{says}; slow: {slow}", "all ranks wait for the slowest: busy, or another machine?"
        )
    else:
        yield Finding("decode", "ok", says)


def tracking(config: RunConfig, nodes: list[NodeReport]) -> Finding:
    """Whether every node reaches the tracking server, with its log-in."""
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    asked = [node for node in nodes if node.tracking is not None]
    if not asked:
        return Finding("tracking", "ok", f"no server to ask; tracking.name={config.tracking.name}")
    refused = [node.name for node in asked if node.tracking == 401]
    if refused:
        fix = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment of every node"
        return Finding("tracking", "fail", f"{uri} asks for a log-in that {', '.join(refused)} lacks", fix)
    wrong = [f"{node.name}: {node.tracking}" for node in asked if node.tracking != 200]
    if wrong:
        fix = "403: start the server with --allowed-hosts; else mend the address or the firewall. Runs go on without it"
        return Finding("tracking", "warn", f"{uri}: {'; '.join(wrong)}", fix)
    return Finding("tracking", "ok", f"{uri} answers {len(asked)} nodes")


def clocks(nodes: list[NodeReport]) -> Finding:
    """Clocks against the driver's, less what the measurement may be wrong by."""
    off = {node.name: max(abs(node.clock_s) - node.clock_error_s, 0.0) for node in nodes}
    worst = max(off.values(), default=0.0)
    says = f"at most {worst:.1f} s apart"
    if worst > SKEW_WARN_S:
        who = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in off.items() if seconds > SKEW_WARN_S)
        state = "fail" if worst > SKEW_FAIL_S else "warn"
        return Finding("clocks", state, f"{says}: {who}", "turn on time synchronisation (chrony, systemd-timesyncd)")  # type: ignore[arg-type]
    return Finding("clocks", "ok", says)


def shared_memory(nodes: list[NodeReport]) -> Iterator[Finding]:
    """Ray's object store and data workers' batches live there; too little, and both crawl on disk or die."""
    small = [node for node in nodes if node.shm_bytes < max(MIN_SHM, node.store_bytes)]
    for node in small:
        says = (
            f"{node.name}: /dev/shm has {node.shm_bytes / 1e9:.1f} GB, the object store {node.store_bytes / 1e9:.1f} GB"
        )
        yield Finding(
            "shm", "warn", says, "docker run --shm-size, an emptyDir of medium Memory, or a smaller object store"
        )
    if nodes and not small:
        least = min(node.shm_bytes for node in nodes) / 1e9
        yield Finding("shm", "ok", f"at least {least:.1f} GB, and the object store fits")


def sweep_demand(file: str, overrides: list[str]) -> tuple[RunConfig, int]:
    """Settings of a sweep's trials and how many there are, without running it.

    Raises:
        ValueError: there is no such file, or it holds no sweep; ConfigError for a setting that is wrong.
    """
    import runpy

    from zsr.cli.sweep import find_sweep
    from zsr.launch.sweep import Sweep, make_plan, parse_arguments

    path: Path = find_sweep(file)
    found = [value for value in runpy.run_path(str(path), run_name="doctor").values() if isinstance(value, Sweep)]
    if not found:
        raise ValueError(f"--sweep={file}: {path} has no Sweep at its top level")
    plan = make_plan(found[0], parse_arguments(found[0], overrides))
    return plan.config, plan.num_trials
