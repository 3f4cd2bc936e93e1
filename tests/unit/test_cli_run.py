"""``zsr train --local``, ``eval`` and ``export`` one after another, on the tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from zsr.cli.defended import guard
from zsr.cli.main import main
from zsr.cli.models import find_checkpoint, load_named
from zsr.cli.train import free_name
from zsr.config import ModelConfig
from zsr.defenses.ttc import TTCConfig
from zsr.models import load_model


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


@pytest.fixture
def settings(tiny_model_name: str, small_shards: Path) -> list[str]:
    return [
        f"model.name={tiny_model_name}",
        f"data.train={small_shards}",
        f"data.val={small_shards}",
        "train.batch_size=10",
        "train.epochs=1",
        "eval.num_samples=10",
        "eval.attack.steps=1",
    ]


def test_dry_run_touches_nothing(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("train", "--local", "--dry-run", *settings) == 0
    said = capsys.readouterr().out
    assert "5 of batch 10 (5 an epoch)" in said
    assert "50 in 5 classes, 5 shards" in said
    assert list(tmp_path.iterdir()) == []


def test_train_evaluate_export(
    settings: list[str], small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, results, exported = tmp_path / "run", tmp_path / "results.json", tmp_path / "exported"
    assert call("train", "--local", "--output", run, *settings) == 0
    said = capsys.readouterr().out
    assert "val/robust_acc" in said
    assert "step-00000005" in said

    assert call("train", "--local", "--no-resume", "--output", run, *settings) == 2
    assert "holds a run already" in capsys.readouterr().err

    options = ["--data", small_shards, "--eps", "1/255,4/255", "--steps", 1, "--num-samples", 10]
    assert call("eval", "--model", run, *options, "--json", results) == 0
    table = capsys.readouterr().out
    assert "linf 1/255" in table
    assert "linf 4/255" in table
    content = json.loads(results.read_text())
    assert list(content["results"][0]["robust"]) == ["1/255", "4/255"]
    assert content["protocol"]["attacks"]["4/255"]["steps"] == 1
    assert content["results"][0]["clean"]["num_samples"] == 10

    assert call("export", run, "--out", exported) == 0
    assert (exported / "open_clip_config.json").is_file()
    assert call("export", run, "--out", exported) == 2
    assert "is not empty" in capsys.readouterr().err

    # The exported folder is a model like any other, and is as accurate as the checkpoint.
    assert call("eval", "--model", exported, *options, "--json", tmp_path / "again.json") == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["results"][0]["clean"] == content["results"][0]["clean"]


def test_a_defence_is_gated_by_the_model_that_the_checkpoint_came_from(
    settings: list[str], tiny_model_name: str, small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, exported = tmp_path / "run", tmp_path / "exported"
    assert call("train", "--local", "--output", run, *settings) == 0
    assert call("export", run, "--out", exported) == 0

    def defense_of(*model: object) -> dict[str, Any]:
        capsys.readouterr()
        options = ["--data", small_shards, "--eps", "4/255", "--steps", 1, "--num-samples", 10, "--defense", "ttc"]
        assert call("eval", "--model", *model, *options, "--json", tmp_path / "results.json") == 0
        return json.loads((tmp_path / "results.json").read_text())["protocol"]["defense"]

    base = defense_of(tiny_model_name)
    assert base["victim"] == base["gate"]
    assert base["cost_units"] == 6

    tuned = defense_of(run)
    assert f"gate: {tiny_model_name}, image tower {base['victim']['image_sha256']}\n" in capsys.readouterr().out
    assert tuned["gate"] == base["gate"]
    assert tuned["victim"]["image_sha256"] != base["victim"]["image_sha256"]
    assert tuned["cost_units"] == 8

    # An exported folder does not know what it came from: it gates itself, unless told.
    assert defense_of(exported)["cost_units"] == 6
    assert "name the model it came from with --gate-model" in capsys.readouterr().out
    told = defense_of(exported, "--gate-model", tiny_model_name)
    assert told["gate"] == base["gate"]
    assert told["victim"]["image_sha256"] == tuned["victim"]["image_sha256"]
    assert told["cost_units"] == 8


def test_the_gate_of_a_defence_is_without_what_a_run_adds_to_its_model(
    settings: list[str], tiny_model_name: str, tmp_path: Path
) -> None:
    added = ["model.attention_cap=0.1", "model.adapt=token_prompt"]
    assert call("train", "--local", "--output", tmp_path / "run", *settings, *added) == 0
    clip, _ = load_named(str(tmp_path / "run"), None, "fp32", "cpu")
    guarded = guard(
        clip, str(tmp_path / "run"), TTCConfig(), None, pretrained=None, precision="fp32", device="cpu", seed=0
    )  # fmt: skip
    plain = load_model(ModelConfig(name=tiny_model_name)).eval()
    image_BCHW = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_BD = plain.encode_image(image_BCHW).raw_BD
        assert torch.equal(guarded.defended.frozen(image_BCHW).raw_BD, expected_BD)
        assert not torch.allclose(clip.encode_image(image_BCHW).raw_BD, expected_BD)


def test_a_runs_folder_means_its_latest_checkpoint(tmp_path: Path) -> None:
    for step in (5, 10):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
    assert find_checkpoint(tmp_path).name == "step-00000010"
    assert find_checkpoint(folder) == folder
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find_checkpoint(tmp_path / "empty")


def test_a_runs_name_means_the_newest_run_of_that_name(tmp_path: Path) -> None:
    for age, digest in enumerate(("aa", "cc", "bb")):
        folder = tmp_path / f"demo-{digest}" / "checkpoints" / "step-00000001"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
        os.utime(folder / "state.json", (age, age))
    assert find_checkpoint(tmp_path / "demo").parts[-3] == "demo-bb"
    with pytest.raises(ValueError, match="no run of that name"):
        find_checkpoint(tmp_path / "other")


def test_a_fresh_run_gets_a_free_name() -> None:
    assert free_name("run", []) == "run"
    assert free_name("run", ["run", "run-2", "other"]) == "run-3"
