"""Checkpoints: written beside training, whole or not there, the last few and the best kept, damage passed over."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsr.engine.background import Background
from zsr.engine.checkpoint import MODEL, OPTIMIZER, STATE, Snapshot
from zsr.engine.loop import Trainer, train
from zsr.engine.session import LocalSession
from zsr.engine.shelf import Shelf, name_of, score_in, surplus

MakeConfig = Callable[..., Any]


class Recorder:
    run_id = "test"

    def __init__(self) -> None:
        self.accuracy: dict[int, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if "val/robust_acc" in metrics:
            self.accuracy[step] = metrics["val/robust_acc"]


def test_a_snapshot_is_the_moment_at_which_it_was_taken(tmp_path: Path, make_config: MakeConfig) -> None:
    """Written late, after more steps have changed everything, it holds the bytes that it holds when written at once."""
    config = make_config("objective.name=tima", "optim.name=adamw", "train.max_steps=2")
    trainer = Trainer(config, LocalSession(tmp_path), None)
    trainer.run()
    snapshot = Snapshot(trainer.model, trainer.optimizer, trainer.state, config)
    snapshot.write(tmp_path / "at-once")
    trainer.total_steps = 4
    trainer.run()
    snapshot.write(tmp_path / "late")
    Snapshot(trainer.model, trainer.optimizer, trainer.state, config).write(tmp_path / "later-moment")
    for name in (MODEL, OPTIMIZER, STATE):
        assert (tmp_path / "late" / name).read_bytes() == (tmp_path / "at-once" / name).read_bytes(), name
        assert (tmp_path / "later-moment" / name).read_bytes() != (tmp_path / "at-once" / name).read_bytes(), name


def test_one_thing_at_a_time_and_its_error_is_raised_where_it_is_waited_for() -> None:
    background, gate, running = Background(), threading.Event(), []

    def work(number: int) -> None:
        running.append(number)
        assert len(running) == 1
        if number == 0:
            assert gate.wait(10)
        running.remove(number)
        if number == 1:
            raise OSError("no space left")

    background.submit(lambda: work(0))  # returns while it runs
    assert not gate.is_set()
    threading.Timer(0.2, gate.set).start()
    background.submit(lambda: work(1))
    assert gate.is_set()
    with pytest.raises(OSError, match="no space left"):
        background.submit(lambda: work(2))
    background.wait()
    assert running == []


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, make_config: MakeConfig) -> None:
    """A disk that takes longer than all steps together: steps are done meanwhile, the next checkpoint waits."""
    at_write: list[int] = []
    config = make_config("objective.name=clean", "train.checkpoint_every=3", "train.max_steps=6")

    class SlowDisk(LocalSession):
        def report(self, metrics: dict[str, float], checkpoint: Any) -> None:
            def slowly(folder: Path) -> None:
                deadline = time.monotonic() + 60
                while trainer.state.step == metrics["step"] < 6 and time.monotonic() < deadline:
                    time.sleep(0.01)
                at_write.append(trainer.state.step)
                checkpoint(folder)

            super().report(metrics, slowly)

    trainer = Trainer(config, SlowDisk(tmp_path), None)
    trainer.run()
    assert at_write[0] > 3
    assert [path.name for path in LocalSession(tmp_path).saved()] == [name_of(3), name_of(6)]
    assert json.loads((tmp_path / "checkpoints" / name_of(3) / STATE).read_text())["step"] == 3


def test_a_disk_that_refuses_ends_the_run_with_its_words(tmp_path: Path, make_config: MakeConfig) -> None:
    class Refusing(LocalSession):
        def report(self, metrics: dict[str, float], checkpoint: Any) -> None:
            def refuse(folder: Path) -> None:
                raise OSError(28, "No space left on device")

            super().report(metrics, refuse)

    with pytest.raises(OSError, match="No space left"):
        train(make_config("objective.name=clean", "train.max_steps=2"), Refusing(tmp_path), None)
    assert LocalSession(tmp_path).saved() == []


@given(st.dictionaries(st.integers(0, 40).map(name_of), st.none() | st.integers(0, 3).map(float)), st.integers(1, 4))
def test_the_last_few_and_the_best_stay(scores: dict[str, float | None], keep: int) -> None:
    gone = set(surplus(scores, keep))
    stay = [name for name in sorted(scores) if name not in gone]
    assert stay[-keep:] == sorted(scores)[-keep:]
    assert len(stay) <= keep + 1
    measured = [score for score in scores.values() if score is not None]
    if measured:
        assert max(measured) in [scores[name] for name in stay]
    # What has gone once never has to come back: dropping it changes nothing for what is decided later.
    assert surplus({name: scores[name] for name in stay}, keep) == []


def test_a_run_keeps_its_last_and_its_best_checkpoint(tmp_path: Path, make_config: MakeConfig) -> None:
    settings = ["train.eval_every=1", "train.max_steps=8", "optim.lr=0.3", "attack.eps=1/255", "eval.attack.eps=1/255"]
    recorder = Recorder()
    train(make_config("objective.name=clean", *settings), LocalSession(tmp_path, keep=1), recorder)  # type: ignore[arg-type]
    best = max(recorder.accuracy, key=lambda step: (recorder.accuracy[step], -step))
    assert len(set(recorder.accuracy.values())) > 1
    assert best < 8, "the last is the best: choose settings under which they differ"
    assert [path.name for path in LocalSession(tmp_path).saved()] == [name_of(best), name_of(8)]
    assert score_in((tmp_path / "checkpoints" / name_of(best) / STATE).read_text()) == recorder.accuracy[best]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("file", "damage"), [(MODEL, cut), (MODEL, flip), (OPTIMIZER, cut), (OPTIMIZER, flip), (STATE, cut)]
)
def test_a_damaged_checkpoint_is_passed_over_and_replaced(
    tmp_path: Path,
    make_config: MakeConfig,
    caplog: pytest.LogCaptureFixture,
    file: str,
    damage: Callable[[bytes], bytes],
) -> None:
    config = make_config("objective.name=clean", "train.checkpoint_every=3", "train.max_steps=6")
    train(config, LocalSession(tmp_path), None)
    first, last = LocalSession(tmp_path).saved()
    whole = (last / MODEL).read_bytes()
    (last / file).write_bytes(damage((last / file).read_bytes()))
    assert LocalSession(tmp_path).resume_from() == first
    assert "state=torn" in caplog.text
    train(config, LocalSession(tmp_path), None)
    assert (last / MODEL).read_bytes() == whole


def test_an_unfinished_write_is_no_checkpoint(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, keep=2)

    def die(folder: Path) -> None:
        folder.mkdir()
        (folder / STATE).write_text("{}")
        raise OSError("power cut")

    with pytest.raises(OSError, match="power cut"):
        shelf.put(3, die)
    assert shelf.saved() == []
    assert shelf.newest_sound() is None
