"""The link to a Ray cluster: attach or start one, quietly, and know what it can hold."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from pathlib import Path

import yaml

from zsr.config import ConfigError
from zsr.launch.capacity import LIMITS_VARIABLE, Capacity, Node, NodeType, read_limits

LAUNCHED_HEAD_FILE = "~/ray_bootstrap_config.yaml"
"""Where ``ray up`` lays the autoscaler's configuration on a head."""

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray 2.60 asks for this choice with a warning at every start; a worker without GPUs keeps what it inherited.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # No result.json, CSV and TensorBoard file for each trial: zsr keeps its own records.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A report without every objective (a checkpoint between evaluations) is not a mistake.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def quiet_environment() -> None:
    """Set what keeps Ray's libraries from talking over zsr's own lines; what the user has set stays."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=r"(ray|optuna)\..*")
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def attach(worker_output: bool = True) -> Capacity:
    """Join the cluster of ``RAY_ADDRESS``, or one that runs here, or start one.

    A handler of SIGTERM that is set before stays.

    Args:
        worker_output: show what worker processes print.

    Raises:
        RuntimeError: the cluster has no dashboard. Ray frees the places of stopped trials by asking it; without it a
            sweep would fill the cluster with dead trials and wait for ever.
    """
    quiet_environment()
    # For a cluster that is started here: Ray would give its workers the lowest priority, below its own helpers on the same
    # cores, which was 5 % of a step (zsr bench ray).
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM)
    context = ray.init(
        include_dashboard=None if os.environ.get("RAY_ADDRESS") else True,
        ignore_reinit_error=True,
        log_to_driver=worker_output,
        logging_level=logging.ERROR,
    )
    if callable(on_sigterm) and signal.getsignal(signal.SIGTERM) is not on_sigterm:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own prints a stack and leaves at once
    if not context.dashboard_url:
        raise RuntimeError(
            "the Ray cluster has no dashboard, without which stopped trials keep their places: install ray[default] "
            "on the head and start it with --include-dashboard=true"
        )
    return current_capacity()


def current_capacity() -> Capacity:
    """The nodes of the joined cluster, and what its autoscaler may add as far as that is known here.

    Ray's autoscaler tells nobody its limits. They are read where it reads them: in the file that ``ray up`` lays into the
    head's home, where a job's driver runs too, or in what ``ZSR_NODE_TYPES`` names.

    Raises:
        ConfigError: ``ZSR_NODE_TYPES`` cannot be read.
    """
    import ray

    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            nodes.append(Node(has.get("CPU", 0.0), has.get("GPU", 0.0), "node:__internal_head__" in has))
    return Capacity(tuple(nodes), *find_limits())


def find_limits() -> tuple[tuple[NodeType, ...], int | None]:
    """The autoscaler's limits: node types and the bound on all; none if nobody says them.

    Raises:
        ConfigError: ``ZSR_NODE_TYPES`` is neither a readable file nor a mapping of node types.
    """
    said = os.environ.get(LIMITS_VARIABLE, "")
    if said.lstrip().startswith("{"):
        return read_limits({"available_node_types": yaml.safe_load(said)})
    path = Path(said or LAUNCHED_HEAD_FILE).expanduser()
    if not said and not path.exists():
        return (), None
    try:
        return read_limits(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{LIMITS_VARIABLE}={said}: {error}; name the autoscaler's configuration file") from None
