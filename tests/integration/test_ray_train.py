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
# Under a minute on an idle machine; a busy one may take many times that.
pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray"), pytest.mark.timeout(900)]


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

    # The name stands for the run: starting it again finds it finished.
    again = run_ray(config, "victim", loop=counting_loop)
    assert [start["first"] for start in starts(tmp_path)] == [0, 4, 8]
    assert again.checkpoint is not None


def test_the_real_loop_trains_on_two_workers_and_its_checkpoint_loads(tmp_path: Path) -> None:
    from zsr.engine.checkpoint import load_trained
    from zsr.launch.train import run_name, run_ray
    from zsr.tracking.spool import history

    small = ["train.max_steps=2", "train.batch_size=8", "train.eval_every=2", "train.log_every=1", "eval.num_samples=8"]
    config = load_config("demo", [*small, "eval.attack.steps=1", f"launch.storage={tmp_path}", "launch.workers=2"])
    result = run_ray(config)

    assert result.return_value.metrics["step"] == 2
    assert 0 <= result.return_value.metrics["val/robust_acc"] <= 1
    assert result.checkpoint is not None
    _, trained = load_trained(Path(result.checkpoint.path))
    assert trained.digest() == config.digest()
    folder = tmp_path / run_name(config) / "tracking"
    assert [step for step, _ in history(folder)["train/loss"]] == [1, 2]
    assert (folder / "artifacts/curves.png").exists()


def test_settings_that_the_data_contradict_are_said_once_and_not_tried_again(tmp_path: Path) -> None:
    from zsr.launch.train import RunEndedError, run_ray

    config = load_config("demo", ["train.batch_size=100000", "data.last_batch=drop", "launch.workers=1"])
    with pytest.raises(RunEndedError, match="batch"):
        run_ray(config, storage=str(tmp_path))
