"""A run whose nodes leave and join: it goes on with what there is, and every sample is seen once an epoch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import elastic_driver
import pytest
import torch
from metadata_service import Metadata
from safetensors.torch import load_file

pytest.importorskip("ray")
from zsr.config import RunConfig, to_yaml
from zsr.engine.loop import train
from zsr.engine.optim import learning_rate
from zsr.engine.session import LocalSession
from zsr.launch.chaos_bed import Bed

# About two minutes on an idle machine; a busy one may take many times that.
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.xdist_group("ray"), pytest.mark.timeout(1800)]
MakeConfig = Callable[..., Any]


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with Bed(2, s3=False, mlflow=False) as bed:
        yield bed


class Driver:
    """A driver in a process of its own, and what its run has written."""

    def __init__(self, bed: Bed, folder: Path, config: RunConfig, holds: list[list[int]], step_s: float) -> None:
        self.folder, self._bed = folder, bed
        (folder / "holds.json").write_text(json.dumps({"holds": holds, "step_s": step_s}))
        (folder / "config.yaml").write_text(to_yaml(config))
        command = [sys.executable, elastic_driver.__file__, str(folder / "config.yaml")]
        with (folder / "driver.log").open("wb") as log:
            self.process = subprocess.Popen(command, env=bed.environment, cwd=folder, stdout=log, stderr=log)

    def wait_for(self, what: str, ready: Callable[[], bool], seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert self.process.poll() in (None, 0), self.log
            assert time.monotonic() < deadline, f"{what} did not come: {self.log}"
            time.sleep(0.2)

    def wait_for_hold(self, step: int, world: int) -> None:
        names = [self.folder / f"holding-{step}-{world}-{rank}" for rank in range(world)]
        self.wait_for(f"step {step} with {world} workers", lambda: all(name.exists() for name in names))

    def finish(self) -> None:
        assert self.process.wait(600) == 0, self.log

    @property
    def log(self) -> str:
        return (self.folder / "driver.log").read_text()[-6000:]

    @property
    def newest(self) -> Path:
        return sorted((self.folder / "runs/run/checkpoints").iterdir())[-1]


@pytest.fixture
def start(bed: Bed, tmp_path: Path, make_config: MakeConfig) -> Iterator[Callable[..., Driver]]:
    started = []

    def begin(*settings: str, holds: list[list[int]] = [], step_s: float = 0.0) -> Driver:  # noqa: B006
        config = make_config(
            *settings, f"launch.storage={tmp_path}/runs", f"data.cache_dir={tmp_path}/cache", "launch.workers=2",
            "launch.min_workers=1", "launch.resize_every_s=3", "tracking.name=jsonl",
        )  # fmt: skip
        started.append(Driver(bed, tmp_path, config, holds, step_s))
        return started[-1]

    yield begin
    for driver in started:
        driver.process.kill()
        driver.process.wait()


def test_nodes_leave_and_join_and_every_sample_is_seen_once(
    bed: Bed, start: Callable[..., Driver], make_config: MakeConfig, tmp_path: Path
) -> None:
    # 50 samples in epochs of 5 steps. A checkpoint every other step, so that a step is lost and done again both times.
    settings = ["objective.name=tecoa", "train.batch_size=10", "train.epochs=3", "train.checkpoint_every=2"]
    settings += ["optim.momentum=0", "optim.lr=0.05", "optim.warmup_steps=4", "train.log_every=1"]
    driver = start(*settings, holds=[[5, 2], [9, 1]])
    driver.wait_for_hold(5, 2)
    bed.kill("node-2")
    driver.wait_for_hold(9, 1)
    bed.start("node-2")
    driver.finish()

    tries = elastic_driver.attempts(tmp_path)
    assert [attempt["world"] for attempt in tries] == [2, 1, 2]
    # Where they start: checkpoints that were whole by then, the last but one at worst.
    assert tries[1]["start"] in (2, 4) and tries[2]["start"] in (6, 8)
    steps = elastic_driver.kept(tries)
    assert sorted(steps) == list(range(1, 16))
    config = make_config(*settings)
    for step, done in steps.items():
        assert len(done["keys"]) == 10
        assert done["lr"] == {learning_rate(config.optim, step - 1, 15)}
    for epoch in range(3):
        seen = [key for step in range(5 * epoch + 1, 5 * epoch + 6) for key in steps[step]["keys"]]
        assert len(seen) == len(set(seen)) == 50

    # One process that nothing happened to ends at the same place, up to the order in which gradients are added.
    train(config, LocalSession(tmp_path / "alone"), None)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (driver.newest, newest(tmp_path / "alone")))
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs]).norm()
    moved = torch.cat([(theirs[name] - start_weights(config)[name]).flatten() for name in theirs]).norm()
    assert apart < 0.05 * moved


def test_a_notice_drains_the_node_and_training_goes_on_from_a_checkpoint_made_for_it(
    bed: Bed, start: Callable[..., Driver], tmp_path: Path
) -> None:
    """No failure is allowed and no checkpoint is due: only the notice can have caused the one that is resumed from."""
    bed.start("node-2")
    settings = ["objective.name=clean", "train.batch_size=10", "train.epochs=60", "train.max_steps=300"]
    driver = start(*settings, "train.log_every=2", "launch.max_failures=0", step_s=0.3)
    with Metadata() as cloud:
        sidecar = subprocess.Popen(
            [sys.executable, "-m", "zsr.launch.notice", "--cloud", "aws", "--endpoint", cloud.address, "--poll", "0.3",
             "--address", bed.ray_address, "--node-name", "node-2"],
            env=bed.environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            driver.wait_for("ten steps", lambda: steps_done(tmp_path) >= 10)
            assert not list((tmp_path / "runs/run/checkpoints").glob("step-*"))
            assert sidecar.poll() is None
            cloud.take_away_in(60)
            output, _ = sidecar.communicate(timeout=120)
            assert sidecar.returncode == 0, output
            assert "drained=" in output
            driver.wait_for(
                "the checkpoint", lambda: bool(list((tmp_path / "runs/run/checkpoints").glob("step-*"))), 60
            )
        finally:
            sidecar.kill()
            sidecar.wait()
    # Ray ends the group at the deadline, a little before the machine goes, and starts again on what is left.
    driver.wait_for("the start without the node", lambda: len(elastic_driver.attempts(tmp_path)) > 1)
    bed.kill("node-2")
    driver.finish()
    first, *later = elastic_driver.attempts(tmp_path)
    assert first["start"] == 0 and [attempt["world"] for attempt in later] == [1]
    assert all(attempt["start"] > 10 and attempt["start"] % 2 == 0 for attempt in later)
    assert json.loads((driver.newest / "state.json").read_text())["step"] == 300


def steps_done(folder: Path) -> int:
    return max((max(attempt["steps"], default=0) for attempt in elastic_driver.attempts(folder)), default=0)


def newest(folder: Path) -> Path:
    return LocalSession(folder).saved()[-1]


def start_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    from zsr.models import load_model

    return {name: value.clone() for name, value in load_model(config.model).trained_state().items()}
