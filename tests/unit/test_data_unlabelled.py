"""Images without labels: they can be converted and looked at, and objectives that use no labels train on them."""

from __future__ import annotations

from pathlib import Path

import pytest
from shard_factory import encode_image, make_image

from zsr.cli.main import main
from zsr.data.inspect import info, verify
from zsr.data.pipeline import eval_batches
from zsr.data.shards import ShardSet
from zsr.engine.loop import train
from zsr.engine.session import LocalSession
from zsr.eval import evaluate_sets
from zsr.models import load_model


@pytest.fixture
def unlabelled(tmp_path: Path) -> Path:
    """Twelve images, some at the top and some deeper, as they come from anywhere."""
    for number in range(12):
        folder = tmp_path / "images" / ("" if number % 2 else "more")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encode_image(make_image(number, 30, 40), "png"))
    main_exits("data", "convert", str(tmp_path / "images"), str(tmp_path / "set"), "--no-labels")
    return tmp_path / "set"


def main_exits(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def test_a_set_without_labels_is_sound_and_says_so(unlabelled, tmp_path, capsys):
    assert verify(unlabelled, show_progress=False) == []
    assert info(unlabelled)["classes"] == 0 and info(unlabelled)["samples"] == 12
    main_exits("data", "info", str(unlabelled))
    assert "none: the set has no labels" in capsys.readouterr().out
    main_exits("data", "sample", str(unlabelled), "--out", str(tmp_path / "sheet.png"))
    (batch,) = eval_batches(ShardSet(unlabelled), image_size=16, batch_size=12)
    assert batch.label.tolist() == [-1] * 12 and len(set(batch.key)) == 12


def test_fare_trains_on_it_as_on_the_same_images_with_labels(unlabelled, make_config, tmp_path):
    config = make_config("objective=fare", f"data.train={unlabelled}", "train.max_steps=2", "train.batch_size=6")
    result = train(config, LocalSession(tmp_path / "run"))
    assert result.steps == 2 and 0 <= result.metrics["val/clean_acc"] <= 1


@pytest.mark.parametrize("name", ["tecoa", "tima", "agft"])
def test_an_objective_that_uses_labels_refuses_it(unlabelled, make_config, tmp_path, name):
    config = make_config(f"objective={name}", f"data.train={unlabelled}", "train.batch_size=6")
    with pytest.raises(
        ValueError, match=rf"data.train=.*: has no labels, and objective.name={name} uses classes; choose"
    ):
        train(config, LocalSession(tmp_path / "run"))


def test_accuracy_asks_for_classes(unlabelled, make_config, tmp_path):
    config = make_config("objective=fare", f"data.val={unlabelled}")
    with pytest.raises(ValueError, match=r"data.val=.*: has no labels; accuracy needs a set with classes"):
        train(config, LocalSession(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"has no labels; accuracy needs"):
        evaluate_sets(load_model(config.model), [ShardSet(unlabelled)], {})


def test_a_folder_without_images_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["data", "convert", str(tmp_path), str(tmp_path / "set"), "--no-labels"])
    assert f"{tmp_path} holds no images" in capsys.readouterr().err
