"""RaySession: what links one Ray Train worker to the training loop."""

from __future__ import annotations

import shutil
from pathlib import Path

import ray.train

from zsr.launch.store import scratch


class RaySession:
    """The loop's session inside a Ray Train worker (zsr/engine/protocols.py says what it promises).

    Args:
        run_name: of the Train run; the scratch folder belongs to it.

    Attributes:
        last: the metrics of the last report.
    """

    def __init__(self, run_name: str) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.local_rank: int = context.get_local_rank()
        # Ranks of one node share the machine's scratch folder, and after a failure the node may hold other ranks.
        self.folder: Path = scratch(run_name) / f"rank-{self.rank}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.last: dict[str, float] = {}

    def resume_from(self) -> Path | None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        if checkpoint.filesystem.type_name == "local":
            return Path(checkpoint.path)
        return Path(checkpoint.to_directory(str(self.folder / "resume")))

    def report(self, metrics: dict[str, float], checkpoint: Path | None) -> None:
        self.last = {**self.last, **metrics}
        if checkpoint is None:
            ray.train.report(metrics)
            return
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(str(checkpoint)),
            delete_local_checkpoint_after_upload=True,
        )

    def preempted(self) -> bool:
        # An alpha function of Ray 2.60 that older and newer versions may lack; a run without it still resumes from its
        # last regular checkpoint.
        ask = getattr(ray.train, "get_preemption_info", None)
        return ask is not None and ask() is not None
