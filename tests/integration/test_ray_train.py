"""One run on Ray Train: it goes through, and survives a worker that is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray_support
from ray_support import counting_loop, local_cluster, starts

from zsr.config import RunConfig, load_config

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(ray_support)
    with local_cluster():
        yield
    ray.cloudpickle.unregister_pickle_by_value(ray_support)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    settings = ["train.max_steps=8", "launch.workers=2", f"launch.storage={tmp_path}/runs", "optim.lr=0.01"]
    return load_config("demo", [*settings, f"data.cache_dir={tmp_path}"])


def test_a_killed_worker_is_survived_from_the_last_checkpoint(config: RunConfig, tmp_path: Path) -> None:
    from zsr.launch.train import run_ray
    from zsr.tracking.spool import history

    (tmp_path / "hang").touch()

    def kill_at_step_five() -> None:
        while not (tmp_path / "runs/victim").exists() or not starts(tmp_path):
            time.sleep(0.1)
        snapshot = tmp_path / "runs/victim/checkpoint_manager_snapshot.json"
        while not snapshot.exists():
            time.sleep(0.1)
        time.sleep(2.0)  # past step 4's report
        (tmp_path / "hang").unlink()
        os.kill(starts(tmp_path)[0]["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill_at_step_five)
    killer.start()
    result = run_ray(config, "victim", loop=counting_loop)
    killer.join()

    first, second = starts(tmp_path)
    assert first["first"] == 0
    assert second["first"] == 4
    assert second["pid"] != first["pid"]
    assert result.return_value.metrics["step"] == 8
    # The record is one, whole and without repetition, although steps were run twice.
    curve = history(tmp_path / "runs/victim/tracking")["val/robust_acc"]
    assert [step for step, _ in curve] == [2, 4, 6, 8]


def test_a_finished_run_does_not_train_again(config: RunConfig, tmp_path: Path) -> None:
    from zsr.launch.train import run_ray

    for _ in range(2):
        result = run_ray(config, "twice", loop=counting_loop)
    assert [start["first"] for start in starts(tmp_path)] == [0, 8]
    assert result.checkpoint is not None
