"""A sweep as its users run it: a command that is killed and resumed, that leaves nothing behind, that can be asked first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray_support
from ray_support import head_process, starts

from zsr.config import load_config
from zsr.launch.guard import honest
from zsr.launch.results import judge
from zsr.launch.store import Store
from zsr.launch.sweep import BOTH, ROBUST, Sweep, main
from zsr.launch.trials import TrialBook, TrialRecord

# Under a minute on an idle machine; a busy one may take many times that.
pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray"), pytest.mark.timeout(900)]
PATIENCE_S = 400

SCRIPT = f"""
import sys
sys.path.insert(0, {str(Path(ray_support.__file__).parent)!r})
import ray.cloudpickle, ray_support
from zsr.launch.sweep import Sweep, main
ray.cloudpickle.register_pickle_by_value(ray_support)

def space(trial, base):
    return {{"optim.lr": base.optim.lr * trial.suggest_float("factor", 0.1, 1.0)}}

sys.exit(main(Sweep(
    name="dummy", preset="demo", space=space, num_trials=2, loop=ray_support.counting_loop,
    settings=("train.max_steps=8", "train.eval_every=2", "optim.lr=0.02"),
    first=[{{"factor": 0.9}}, {{"factor": 0.5}}],
)))
"""


MASKED_SCRIPT = """
import sys
from zsr.launch.strong import BRIEF_FINALISTS
from zsr.launch.sweep import Sweep, main

def space(trial, base):
    return {"model.name": "local-dir:FOLDER/" + trial.suggest_categorical("folder", ["sound", "masked"])}

sys.exit(main(Sweep(
    name="dummy", preset="demo", space=space, num_trials=2, finalists=BRIEF_FINALISTS,
    first=[{"folder": "masked"}, {"folder": "sound"}],
    settings=(
        "objective=tecoa", "data.train=SHARDS", "data.val=SHARDS", "train.max_steps=2", "train.eval_every=2",
        "train.batch_size=8", "optim.lr=1e-7", "optim.warmup_steps=0", "eval.attack.eps=32/255",
        "eval.attack.step_size=8/255", "launch.workers=1",
    ),
)))
"""


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    with head_process() as environment:
        yield environment


class Command:
    """The sweep's command line in a folder of its own."""

    def __init__(self, folder: Path, environment: dict[str, str], script: str = SCRIPT) -> None:
        self.folder = folder
        self.environment = {**environment, "ZSR_HOME": str(folder)}
        self.script = folder / "dummy_sweep.py"
        self.script.write_text(script)
        (folder / "diary").mkdir()
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(self.script), f"data.cache_dir={self.folder}/diary", *arguments]
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._started.append(process)
        return process

    def stop(self) -> None:
        """End what still runs, such as after a failed assertion."""
        for process in self._started:
            process.kill()
            process.wait()

    def trials(self) -> dict[int, dict[str, Any]]:
        found = self.folder.glob(".zsr/runs/dummy-*/trials/*.json")
        return {int(path.stem): json.loads(path.read_text()) for path in found}


@pytest.fixture
def command(head: dict[str, str], tmp_path: Path) -> Iterator[Command]:
    command = Command(tmp_path, head)
    yield command
    command.stop()


def test_a_killed_sweep_resumes_and_repeats_no_finished_trial(
    command: Command, head: dict[str, str], tmp_path: Path
) -> None:
    diary = tmp_path / "diary"
    options = ("--workers-per-trial", "1", "--max-concurrent", "1", "--multi-objective")
    # One trial finishes; the next one stops in the middle, held there by the file.
    (diary / "hang").write_text("trial=1")
    driver = command.start(*options)
    deadline = time.monotonic() + PATIENCE_S
    while [trial["state"] for trial in command.trials().values()].count("finished") < 1:
        assert time.monotonic() < deadline, driver.stdout and driver.stdout.read()
        assert driver.poll() is None, driver.stdout and driver.stdout.read()
        time.sleep(0.1)
    while not any(trial["state"] == "running" and trial["history"] for trial in command.trials().values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1.5)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    (diary / "hang").unlink()
    before = command.trials()
    begun = starts(diary)

    resumed = command.start("--resume")
    output, _ = resumed.communicate(timeout=PATIENCE_S)
    assert resumed.returncode == 0, output
    after = command.trials()
    assert sorted(after) == [0, 1], output
    assert {trial["state"] for trial in after.values()} == {"finished"}
    assert len(list(tmp_path.glob(".zsr/runs/dummy-*"))) == 1

    finished = [number for number, trial in before.items() if trial["state"] == "finished"]
    interrupted = [number for number, trial in before.items() if trial["state"] == "running"]
    assert (len(finished), len(interrupted)) == (1, 1)
    again = [start["run"] for start in starts(diary)[len(begun) :]]
    assert not any(run.endswith(f"trial={finished[0]}") for run in again), "a finished trial ran again"
    continued = next(start for start in starts(diary)[len(begun) :] if start["run"].endswith(f"trial={interrupted[0]}"))
    assert continued["first"] == 4, "it goes on from its checkpoint"

    assert "Pareto" in output
    assert "best checkpoint=" in output
    assert leftovers(head) == [], "stopped and finished trials give their places back"


def test_a_stopped_job_closes_its_record_and_says_how_to_go_on(
    command: Command, head: dict[str, str], tmp_path: Path
) -> None:
    """``ray job stop`` sends SIGTERM, for which Ray has a handler of its own."""
    (tmp_path / "diary" / "hang").write_text("trial=0")
    driver = command.start("--workers-per-trial", "1", "--max-concurrent", "1")
    deadline = time.monotonic() + PATIENCE_S
    while not any(trial["state"] == "running" and trial["history"] for trial in command.trials().values()):
        assert time.monotonic() < deadline and driver.poll() is None, driver.stdout and driver.stdout.read()
        time.sleep(0.1)
    driver.send_signal(signal.SIGTERM)
    output, _ = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 130, output
    assert "stopped=yes note='go on with --resume'" in output
    assert "SIGTERM received" not in output and "Traceback" not in output
    assert leftovers(head) == []


def test_a_sweep_does_not_choose_a_model_whose_gradients_vanish(
    head: dict[str, str], small_shards: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from tiny_clip import write_tiny_clip

    for name in ("sound", "masked"):
        write_tiny_clip(tmp_path / name)
    weights = load_file(tmp_path / "masked" / "open_clip_model.safetensors")
    # Cross-entropy is flat to the last bit wherever the model is right; its predictions are those of the sound one.
    weights["logit_scale"] = torch.tensor(1e7).log()
    save_file(weights, tmp_path / "masked" / "open_clip_model.safetensors")
    script = MASKED_SCRIPT.replace("FOLDER", str(tmp_path)).replace("SHARDS", str(small_shards))
    sweep = Command(tmp_path, head, script)
    try:
        process = sweep.start("--max-concurrent", "1", "--multi-objective")
        output, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        sweep.stop()
    assert process.returncode == 0, output
    masked, sound = sweep.trials()[0], sweep.trials()[1]
    assert masked["metrics"]["val/clean_acc"] == sound["metrics"]["val/clean_acc"], output
    assert masked["metrics"]["val/robust_acc"] > sound["metrics"]["val/robust_acc"], "or there is nothing to resist"
    assert masked["flags"] == ["zero-gradients"]
    assert sound["flags"] == []
    assert "val/strong_acc" in sound["metrics"]
    assert "best trial=1 " in output


def test_a_dry_run_touches_nothing_and_needs_no_cluster(tmp_path: Path) -> None:
    command = Command(tmp_path, {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"})
    before = sorted(tmp_path.rglob("*"))
    process = command.start("--dry-run", "launch.gpu_hour_price=2")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "trials=2" in output
    assert sorted(tmp_path.rglob("*")) == before


def space(trial: Any, base: Any) -> dict[str, Any]:
    return {"optim.lr": base.optim.lr * trial.suggest_float("factor", 0.1, 1.0)}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--workers-per-trial", "3"), "make it a multiple of 3"),
        (("optim.lrr=1",), "optim.lrr"),
        (("optim.name=sgdd",), "sgd"),
        (("--resume",), "there is no sweep called"),
        (("--preset", "demoo"), "demo"),
    ],
)
def test_mistakes_are_sentences(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("ZSR_HOME", str(tmp_path))
    assert main(Sweep(name="dummy", preset="demo", space=space), ["--dry-run", *arguments]) == 2
    assert expected in capsys.readouterr().err.replace("\n", " ")


def test_a_point_that_does_not_fit_is_named_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(trial: Any, base: Any) -> dict[str, Any]:
        return {"attack.eps": trial.suggest_float("eps", 0.5, 20.0)}

    assert main(Sweep(name="dummy", preset="demo", space=wrong), []) == 2
    message = capsys.readouterr().err
    assert "drawn from the search space" in message
    assert "attack.eps=" in message


def trial(number: int, clean: float, robust: float, **more: Any) -> TrialRecord:
    metrics = {"val/clean_acc": clean, "val/robust_acc": robust}
    return TrialRecord(number, f"t{number}", {}, state=more.pop("state", "finished"), metrics=metrics, **more)


def test_the_front_and_the_best_leave_out_what_cannot_be_believed() -> None:
    trials = [
        trial(0, 0.9, 0.1),
        trial(1, 0.8, 0.3),
        trial(2, 0.7, 0.2),  # beaten by 1
        trial(3, 0.9, 0.9, flags=["zero-gradients"]),
        trial(4, 0.9, 0.8, state="pruned"),
        trial(5, float("nan"), 0.9),
    ]
    results = judge(trials, BOTH)
    assert [t.number for t in results.front] == [1, 0]
    assert results.best is not None
    assert results.best.number == 1
    assert judge(trials[3:], BOTH).best is None


@pytest.mark.parametrize(
    ("measured", "seen"),
    [
        ({"val/robust_acc": 0.4, "val/check/zero-gradients": 2.0}, 0.4),
        ({"val/robust_acc": 0.4, "val/check/zero-gradients": 3.0}, 0.0),
        ({"val/robust_acc": float("nan"), "val/check/zero-gradients": 0.0}, 0.0),
        ({}, 0.0),
    ],
)
def test_the_search_sees_the_worst_for_what_is_not_honest(measured: dict[str, float], seen: float) -> None:
    assert honest(measured, [ROBUST]) == {"val/robust_acc": seen}


@pytest.mark.parametrize("metrics", [[ROBUST], list(BOTH)])
def test_the_search_numbers_trials_and_goes_on_from_its_saved_state(
    metrics: list[tuple[str, str]], tmp_path: Path
) -> None:
    from zsr.launch.drive import close_study, open_study_storage
    from zsr.launch.search import SweepSearch

    store = Store(str(tmp_path))
    book, storage = TrialBook(store), open_study_storage(store)
    base = load_config("demo", ["optim.lr=0.02"])
    search = SweepSearch(space, base, metrics, storage, "id", 0, book, first=[{"factor": 0.5}])
    first, second = search.suggest("a"), search.suggest("b")
    assert first == {"number": 0, "point": {"optim.lr": 0.01}}
    assert second is not None
    assert [record.trial_id for record in book.all()] == ["a", "b"]

    search.on_trial_result("a", {"step": 2, "training_iteration": 1})  # a checkpoint without an evaluation
    search.on_trial_complete("a", {name: 0.4 for name, _ in metrics})
    search.save(str(tmp_path / "state"))
    other = SweepSearch(space, base, metrics, open_study_storage(store), "id", 0, book)
    other.restore(str(tmp_path / "state"))
    assert other.suggest("b") == second, "a trial that was under way keeps its point"
    third = other.suggest("c")
    assert third is not None
    assert third["number"] == 2

    study = close_study(storage, "id")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "FAIL"]


def test_asha_counts_steps_and_lets_full_trials_end_by_themselves() -> None:
    from ray.tune.schedulers import FIFOScheduler

    from zsr.launch.search import make_scheduler

    asha = make_scheduler([ROBUST], steps=80, grace=0.25, reduction_factor=3)
    assert (asha._time_attr, asha._max_t) == ("step", 81)
    assert type(make_scheduler(BOTH, 80, 0.25, 3)) is FIFOScheduler


def leftovers(head: dict[str, str]) -> list[str]:
    """Placement groups that still hold something, as another process sees them."""
    code = (
        "import ray, json; ray.init(log_to_driver=False, logging_level='ERROR');"
        "print(json.dumps([g['state'] for g in ray.util.placement_group_table().values() if g['state'] != 'REMOVED']))"
    )
    found: list[str] = ["unknown"]
    for _ in range(3):  # the cleaner works a few seconds behind
        done = subprocess.run(
            [sys.executable, "-c", code], env=head, capture_output=True, text=True, timeout=60, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        if not found:
            break
        time.sleep(3)
    return found
