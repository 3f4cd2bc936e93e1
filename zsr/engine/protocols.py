"""What the training loop needs from its surroundings: a session that carries it and a tracker that records it.

The loop knows nothing of Ray or MLflow. ``zsr train --local`` hands it a ``LocalSession``, ``zsr/launch`` one that speaks
to Ray Train; a test may hand it a few lines of its own. This module imports neither torch nor anything heavier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


@runtime_checkable
class Session(Protocol):
    """One rank's link to whatever started it.

    Attributes:
        rank: this process among all, 0 to ``world_size - 1``. Ranks may be dealt anew after a failure.
        world_size: number of processes that train together.
        local_rank: this process among those of its machine; picks the GPU.
        folder: scratch folder of this run on this machine. It may be gone after a restart.
    """

    rank: int
    world_size: int
    local_rank: int
    folder: Path

    def resume_from(self) -> Path | None:
        """Folder of the checkpoint to continue from, the same content on every rank; ``None`` for a fresh start."""
        ...

    def report(self, metrics: dict[str, float], checkpoint: Callable[[Path], None] | None) -> None:
        """Hand over metrics, ``step`` among them, and from rank 0 alone a checkpoint, as what writes it into a folder.

        It is written in another thread while training goes on, one at a time: a report waits for the checkpoint before,
        and raises what went wrong there. A barrier: every rank must call it equally often. It may take seconds, so call
        it at evaluations and checkpoints, never at each step.
        """
        ...

    def close(self) -> None:
        """Wait until the last checkpoint is where it belongs; raises what went wrong on the way."""
        ...

    def preempted(self) -> bool:
        """Whether this machine is about to be taken away, so that a checkpoint is due now.

        May be a barrier: every rank asks at the same steps, and every rank gets the same answer.
        """
        ...


@runtime_checkable
class Tracker(Protocol):
    """Where rank 0 records a run. No method raises, and none makes training wait for a network.

    Attributes:
        run_id: what a checkpoint stores to find this record again; stable over restarts of the same run.
    """

    run_id: str

    def log_params(self, params: Mapping[str, str | int | float]) -> None:
        """Record settings that are worth a column when runs are compared: few, and constant over a run."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at an optimizer step. A step already recorded before a restart is not recorded twice."""
        ...

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Keep a file, or a folder with all it holds, under ``folder`` of the run."""
        ...

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Label the run; a tag set twice has the later value."""
        ...

    def finish(self, status: RunStatus) -> None:
        """End the record; waits a bounded time for what is still on its way."""
        ...
