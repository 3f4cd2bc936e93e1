"""Trackers as the loop sees them: they take every call, keep what they should, and never raise."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from zsr.config import ConfigError, RunConfig, TrackingConfig, load_config
from zsr.engine.protocols import Tracker
from zsr.tracking import make_tracker
from zsr.tracking.base import key_text
from zsr.tracking.card import model_card
from zsr.tracking.environment import describe_environment
from zsr.tracking.record import comparison_params, record_end, record_start
from zsr.tracking.spool import history, read_records

KEY = {"sweep": "s", "trial": "1"}


@pytest.fixture
def config() -> RunConfig:
    return load_config("demo")


def make(name: str, folder: Path, **settings: str) -> Tracker:
    return make_tracker(TrackingConfig(name=name, **settings), run_name="run", key=KEY, folder=folder)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["null", "jsonl", "mlflow"])
def test_every_tracker_takes_every_call_quickly_with_nobody_listening(name: str, tmp_path: Path) -> None:
    tracker = make(name, tmp_path, uri="http://127.0.0.1:9")
    assert isinstance(tracker, Tracker)
    started = time.monotonic()
    tracker.log_params({"lr": 0.1})
    for step in range(100):
        tracker.log_metrics({"train/loss": float("nan")}, step)
    tracker.log_artifact(tmp_path / "not-there.txt")
    tracker.set_tags({"a": "b"})
    assert time.monotonic() - started < 1.0, "logging must not wait for a server"


def test_jsonl_continues_and_repeats_no_step(tmp_path: Path) -> None:
    first = make("jsonl", tmp_path)
    for step in (1, 2, 3):
        first.log_metrics({"train/loss": step / 10}, step)
    resumed = make("jsonl", tmp_path)
    for step in (2, 3, 4):
        resumed.log_metrics({"train/loss": 9.0}, step)
    resumed.finish("FINISHED")
    assert history(tmp_path) == {"train/loss": [(1, 0.1), (2, 0.2), (3, 0.3), (4, 9.0)]}
    assert list(read_records(tmp_path / "metrics.jsonl"))[-1]["status"] == "FINISHED"


def test_artifacts_are_copies(tmp_path: Path) -> None:
    tracker = make("jsonl", tmp_path / "run")
    original = tmp_path / "note.txt"
    original.write_text("first")
    tracker.log_artifact(original, "notes")
    original.unlink()
    assert (tmp_path / "run/artifacts/notes/note.txt").read_text() == "first"


def test_a_lost_folder_is_no_reason_to_stop_training(tmp_path: Path) -> None:
    tracker = make("jsonl", tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    tracker.log_metrics({"a": 1.0}, 1)
    tracker.finish("FAILED")


def test_mlflow_without_an_address_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match=r"tracking\.uri is empty"):
        make("mlflow", tmp_path)


def test_a_key_does_not_depend_on_order_and_refuses_quotes() -> None:
    assert key_text({"b": "2", "a": "1"}) == key_text({"a": "1", "b": "2"}) == "a=1/b=2"
    with pytest.raises(ValueError, match="without quotes"):
        key_text({"a": "it's"})


def test_few_params_and_all_settings(tmp_path: Path, config: RunConfig) -> None:
    tracker = make("jsonl", tmp_path)
    record_start(tracker, config, {"optim.lr": 0.1})  # type: ignore[arg-type]
    tracker.log_metrics({"val/clean_acc": 0.5, "val/robust_acc": 0.2, "train/loss": 2.0}, 1)
    record_end(tracker, {"val/clean_acc": 0.5})  # type: ignore[arg-type]
    params = next(r for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "params")["values"]
    assert set(params) == {"method", "architecture", "eps", "optim.lr"}
    assert params["eps"] == "4/255"
    assert load_config(tmp_path / "artifacts/config.yaml") == config
    assert json.loads((tmp_path / "artifacts/environment.json").read_text())["packages"]["numpy"]
    assert (tmp_path / "artifacts/curves.png").stat().st_size > 1000


def test_card_says_numbers_checks_and_settings(config: RunConfig) -> None:
    card = model_card(config, {"val/robust_acc": 0.25}, title="best of s", checks=["zero gradients: 0.1 %"])
    assert "| val/robust_acc | 0.25 |" in card
    assert "zero gradients: 0.1 %" in card
    assert f"steps: {config.attack.steps}" in card


def test_environment_names_the_commit_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSR_COMMIT", "abc")
    assert describe_environment()["commit"] == "abc"


def test_params_do_not_need_an_epsilon(config: RunConfig) -> None:
    assert comparison_params(config, {"attack.schedule": {"name": "linear"}})["attack.schedule"] == '{"name": "linear"}'


def test_an_unknown_tracker_is_a_config_error() -> None:
    with pytest.raises(ConfigError):
        load_config("demo", ["tracking.name=wandb"])
