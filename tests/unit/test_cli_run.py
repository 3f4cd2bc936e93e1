"""``zsr train --local``, ``eval`` and ``export`` one after another, on the tiny model."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from zsr.cli.defended import guard
from zsr.cli.main import main
from zsr.cli.models import find_checkpoint, load_named
from zsr.cli.train import free_name
from zsr.config import ModelConfig
from zsr.defenses.ttc import TTCConfig
from zsr.eval.card import ResultCard, find_cards
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
    run, exported = tmp_path / "run", tmp_path / "exported"
    assert call("train", "--local", "--output", run, *settings) == 0
    said = capsys.readouterr().out
    assert "val/robust_acc" in said
    assert "step-00000005" in said

    assert call("train", "--local", "--no-resume", "--output", run, *settings) == 2
    assert "holds a run already" in capsys.readouterr().err

    options = ["--data", small_shards, "--eps", "1/255,4/255", "--steps", 1, "--num-samples", 10]
    assert call("eval", "--model", run, *options, "--out", tmp_path / "cards") == 0
    table = capsys.readouterr().out
    assert "linf 1/255" in table
    assert "linf 4/255" in table
    cards = find_cards([tmp_path / "cards"])
    assert sorted(card.attack.eps_text for card in cards if card.attack) == ["1/255", "4/255"]
    for card in cards:
        assert card.attack is not None and card.attack.settings["steps"] == 1
        assert card.clean.total == 10
        assert (card.model.label, card.model.objective) == ("run", "tima")

    assert call("export", run, "--out", exported) == 0
    assert (exported / "open_clip_config.json").is_file()
    assert call("export", run, "--out", exported) == 2
    assert "is not empty" in capsys.readouterr().err

    # The exported folder is a model like any other, and is as accurate as the checkpoint.
    assert call("eval", "--model", exported, *options, "--out", tmp_path / "again") == 0
    again = find_cards([tmp_path / "again"])
    assert {card.clean.count for card in again} == {card.clean.count for card in cards}
    assert {card.column for card in again} == {card.column for card in cards}
    assert {card.model.weights_digest for card in again} == {card.model.weights_digest for card in cards}


def test_a_defence_is_gated_by_the_model_that_the_checkpoint_came_from(
    settings: list[str], tiny_model_name: str, small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, exported = tmp_path / "run", tmp_path / "exported"
    assert call("train", "--local", "--output", run, *settings) == 0
    assert call("export", run, "--out", exported) == 0

    said = ""

    def defended(*model: object) -> ResultCard:
        nonlocal said
        options = ["--data", small_shards, "--attack", "none", "--num-samples", 10, "--defense", "ttc"]
        folder = tmp_path / "cards" / str(len(list((tmp_path / "cards").glob("*"))))
        assert call("eval", "--model", *model, *options, "--out", folder) == 0
        said = capsys.readouterr().out
        (card,) = (card for card in find_cards([folder]) if card.defense is not None)
        return card

    base = defended(tiny_model_name)
    own = "the model's own image tower"
    assert base.defense is not None and (base.defense.gate, base.defense.cost_units) == (own, 6)
    tower = re.search(r"victim: .*, image tower ([0-9a-f]{12})", said)
    assert tower is not None

    tuned = defended(run)
    gate = f"{tiny_model_name}, image tower {tower[1]}"
    assert f"gate: {gate}" in said
    assert tuned.defense is not None and (tuned.defense.gate, tuned.defense.cost_units) == (gate, 8)
    assert tuned.model.weights_digest != base.model.weights_digest

    # An exported folder does not know what it came from: it gates itself, unless told.
    alone = defended(exported)
    assert alone.defense is not None and (alone.defense.gate, alone.defense.cost_units) == (own, 6)
    assert "name the model it came from with --gate-model" in said
    told = defended(exported, "--gate-model", tiny_model_name)
    assert told.defense == tuned.defense
    assert told.model.weights_digest == tuned.model.weights_digest


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
