"""RaySession: what links one Ray Train worker to the training loop."""

from __future__ import annotations

import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.collective import broadcast_from_rank_zero

from zsr.engine.shelf import Shelf, Write, name_of
from zsr.launch.records import keep_records
from zsr.launch.remote_shelf import PATIENCE_S, RemoteShelf, patiently
from zsr.launch.store import Store, scratch

FOLDER = "checkpoints"


class RaySession:
    """The loop's session inside a Ray Train worker (zsr/engine/protocols.py says what it promises).

    Which checkpoints there are is for the run's folder to say, not for Ray's notes, which a killed driver leaves behind
    late or torn; so a checkpoint counts from the moment it is whole.

    Args:
        store: the run's folder or prefix.
        keep: how many of the last checkpoints stay, beside the best.

    Attributes:
        last: the metrics of the last report.
    """

    def __init__(self, store: Store, keep: int) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.local_rank: int = context.get_local_rank()
        # Ranks of one node share the machine's scratch folder, and after a failure the node may hold other ranks.
        self.folder: Path = scratch(store.root) / f"rank-{self.rank}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._store = store
        self.shelf: Shelf | RemoteShelf
        if store.is_local:
            self.shelf = Shelf(store.folder(FOLDER), keep)
        else:
            self.shelf = RemoteShelf(store.at(FOLDER), self.folder, keep)
        self.last: dict[str, float] = {}
        self._leaving = False
        self._written = threading.Event()
        self._written.set()
        self._problem: BaseException | None = None

    def resume_from(self) -> Path | None:
        # Rank 0 decides: every rank must begin at the same step, whatever each would find.
        found = self.shelf.newest_sound() if self.rank == 0 else None
        name = broadcast_from_rank_zero(None if found is None else found.name)
        if name is None:
            return None
        known = ray.train.get_checkpoint()
        if known is None or Path(known.path).name != name:
            # Ray is told, so that a run that has nothing left to do still ends with a checkpoint.
            at = self._ray_checkpoint(name) if self.rank == 0 else None
            ray.train.report({}, checkpoint=at, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
        return found if found is not None else self.shelf.fetch(name)

    def report(self, metrics: dict[str, float], checkpoint: Write | None) -> None:
        self.last = {**self.last, **metrics}
        self.close()
        # A machine about to go does nothing else until its checkpoint is safe.
        mode = CheckpointUploadMode.SYNC if self._leaving else CheckpointUploadMode.ASYNC
        if checkpoint is None:
            ray.train.report(metrics, checkpoint_upload_mode=mode)
            return
        self._written.clear()

        def upload(_: Checkpoint, name: str) -> Checkpoint:
            try:
                patiently(partial(keep_records, self._store))
                self.shelf.put(int(metrics["step"]), checkpoint)
            except BaseException as problem:
                self._problem = problem
                raise
            finally:
                self._written.set()
            return self._ray_checkpoint(Path(name).name)

        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(str(self.folder)),  # Ray wants a folder; `upload` makes its own
            checkpoint_dir_name=f"{FOLDER}/{name_of(int(metrics['step']))}",
            checkpoint_upload_mode=mode,
            checkpoint_upload_fn=upload,
        )

    def close(self) -> None:
        if not self._written.wait(2 * PATIENCE_S):
            raise TimeoutError("the checkpoint before was neither written nor refused; Ray Train has dropped it")
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def preempted(self) -> bool:
        # An alpha function of Ray 2.60 that older and newer versions may lack; a run without it still resumes from its
        # last regular checkpoint.
        ask = getattr(ray.train, "get_preemption_info", None)
        self._leaving = ask is not None and ask() is not None
        return self._leaving

    def _ray_checkpoint(self, name: str) -> Checkpoint:
        storage: Any = ray.train.get_context().get_storage()
        path = storage.build_checkpoint_path_from_name(f"{FOLDER}/{name}")
        return Checkpoint(path=path, filesystem=storage.storage_filesystem)
