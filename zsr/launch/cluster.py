"""The link to a Ray cluster: attach or start one, quietly, and know what it can hold."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Capacity:
    """CPUs and GPUs of the cluster as it is now."""

    cpus: float
    gpus: float

    def trials(self, cpus_per_trial: float, gpus_per_trial: float) -> int:
        """How many trials fit at once."""
        fit = int(self.cpus // cpus_per_trial)
        return min(fit, int(self.gpus // gpus_per_trial)) if gpus_per_trial else fit


def quiet_environment() -> None:
    """Set what keeps Ray's libraries from talking over zsr's own lines; what the user has set stays."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=r"(ray|optuna)\..*")
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def attach(worker_output: bool = True) -> Capacity:
    """Join the cluster of ``RAY_ADDRESS``, or one that runs here, or start one.

    Args:
        worker_output: show what worker processes print.

    Raises:
        RuntimeError: the cluster has no dashboard. Ray frees the places of stopped trials by asking it; without it a
            sweep would fill the cluster with dead trials and wait for ever.
    """
    quiet_environment()
    import ray

    context = ray.init(
        include_dashboard=None if os.environ.get("RAY_ADDRESS") else True,
        ignore_reinit_error=True,
        log_to_driver=worker_output,
        logging_level=logging.ERROR,
    )
    if not context.dashboard_url:
        raise RuntimeError(
            "the Ray cluster has no dashboard, without which stopped trials keep their places: install ray[default] "
            "on the head and start it with --include-dashboard=true"
        )
    found = ray.cluster_resources()
    return Capacity(found.get("CPU", 0.0), found.get("GPU", 0.0))
