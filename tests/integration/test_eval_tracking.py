"""Cards on MLflow runs: one of their own, and that of the training run that made the model; MLflow keeps a local file."""

from __future__ import annotations

from pathlib import Path

import pytest

from zsr.attacks.checks import LEVELS
from zsr.cli.main import main
from zsr.eval.card import find_cards
from zsr.tracking.mlflow import connect
from zsr.tracking.spool import history

pytestmark = [pytest.mark.xdist_group("mlflow")]


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def test_cards_go_to_a_run_of_their_own_once(
    tiny_model_name: str, small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts beside a database
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(uri)
    client.search_experiments()  # makes the database, which takes longer than a tracker waits on a busy machine
    order = [
        "eval",
        "--model",
        tiny_model_name,
        "--data",
        small_shards,
        "--eps",
        "1/255",
        "--steps",
        1,
        "--num-samples",
        8,
    ]
    order += ["--no-probes", "--out", tmp_path / "cards", "--mlflow-run", "table one", "--tracking-uri", uri]
    assert call(*order) == 0
    assert call(*order) == 0  # finds its card, and the run
    (card,) = find_cards([tmp_path / "cards"])
    experiment = client.get_experiment_by_name("zsr")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name.startswith("table one ") and run.info.status == "FINISHED"
    robust = [name for name in run.data.metrics if name.endswith(f"/pgd-1-255-{card.column[:6]}")]
    assert card.robust is not None and run.data.metrics[robust[0]] == card.robust.value
    (clean,) = (name for name in run.data.metrics if "/clean-" in name)
    assert run.data.metrics[clean] == card.clean.value
    levels = {finding.id: LEVELS.index(finding.level) for finding in card.checks}
    assert levels == {
        name.split("-check-")[1]: value
        for name, value in run.data.metrics.items()
        if name.startswith(f"{robust[0]}-check-")
    }
    assert len(client.get_metric_history(run.info.run_id, robust[0])) == 1
    (artifact,) = client.list_artifacts(run.info.run_id, "cards")
    assert artifact.path == f"cards/pgd-1-255-{card.id}.card.json"
    assert call(*["table two" if word == "table one" else word for word in order]) == 0  # the same card, another run
    other = next(
        found for found in client.search_runs([experiment.experiment_id]) if found.info.run_id != run.info.run_id
    )
    assert other.data.metrics == run.data.metrics


def test_cards_go_to_the_run_that_trained_the_model(tiny_model_name: str, small_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [f"model.name={tiny_model_name}", f"data.train={small_shards}", f"data.val={small_shards}"]
    settings += ["train.batch_size=10", "train.max_steps=1", "eval.num_samples=5", "eval.attack.steps=1"]
    assert call("train", "--local", "--output", run, *settings) == 0
    order = ["eval", "--model", run, "--data", small_shards, "--num-samples", 8, "--attack", "none"]
    assert call(*order, "--out", tmp_path / "cards", "--log") == 0
    (card,) = find_cards([tmp_path / "cards"])
    (name,) = (name for name in history(run) if name.startswith("eval/") and "-check-" not in name)
    assert [value for _, value in history(run)[name]] == [card.clean.value]
    assert (run / "artifacts" / "cards" / f"clean-{card.id}.card.json").is_file()
