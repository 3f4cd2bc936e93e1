"""``zsr config``, above all ``validate``: ten kinds of broken files, ten sentences, no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from zsr.cli.main import main

# Kind of mistake: (file, what its one sentence must say).
BROKEN = {
    "not-yaml": ("train: [1, 2\n", "is not valid YAML"),
    "not-a-mapping": ("- train\n- eval\n", "should hold settings by name"),
    "key-twice": ("seed: 1\nseed: 2\n", "'seed' is given twice"),
    "unknown-key": ("train: {bacth_size: 64}\n", "train.bacth_size=64: there is no such setting; did you mean"),
    "wrong-type": ("train: {epochs: many}\n", "train.epochs='many': should be a whole number"),
    "out-of-range": ("objective: {name: tima, weight_mhe: -1}\n", "objective.weight_mhe=-1: should be at least 0"),
    "not-a-choice": ("train: {precision: fp16}\n", "train.precision='fp16': should be 'fp32' or 'bf16'"),
    "unknown-plugin": ("objective: tiam\n", "'tiam': is not a known objective; did you mean 'tima'?"),
    "grey-levels": ("attack: {name: pgd, eps: 4}\n", "attack.eps=4 is more than the whole pixel range"),
    "across-groups": ("launch: {workers: 3}\ntrain: {batch_size: 64}\n", "train.batch_size=64 cannot be shared"),
}


def test_ten_kinds_of_broken_files_give_ten_sentences(tmp_path: Path) -> None:
    files = []
    for kind, (content, _) in BROKEN.items():
        files.append(tmp_path / f"{kind}.yaml")
        files[-1].write_text(content)
    done = subprocess.run(
        [sys.executable, "-m", "zsr.cli.main", "config", "validate", *map(str, files)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == len(BROKEN) == 10
    for line, file, (_, sentence) in zip(lines, files, BROKEN.values(), strict=True):
        assert str(file) in line
        assert sentence in line
    assert "Traceback" not in done.stderr


def call(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert not stopped.value.code


def test_show_prints_yaml_that_loads_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("config", "show", "demo", "seed=7")
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["seed"] == 7
    file = tmp_path / "copy.yaml"
    file.write_text(text)
    call("config", "validate", str(file), "demo")
    said = capsys.readouterr().out.splitlines()
    digest = text.splitlines()[-1].removeprefix("# digest: ")
    assert said[0].endswith(f"valid, digest {digest}")
    assert said[1].startswith("demo: valid")


def test_show_takes_overrides_alone(capsys: pytest.CaptureFixture[str]) -> None:
    call("config", "show", "attack.eps=2/255")
    assert yaml.safe_load(capsys.readouterr().out)["attack"]["eps"] == pytest.approx(2 / 255)


def test_show_takes_the_preset_as_an_option_too(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--preset", "demo", "seed=7"], ["demo", "seed=7"], ["seed=7", "-p", "demo"]):
        call("config", "show", *arguments)
        settings = yaml.safe_load(capsys.readouterr().out)
        assert (settings["name"], settings["seed"]) == ("demo", 7)


def test_diff_names_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    call("config", "diff", "tecoa-vit-b32-imagenet", "tecoa-vit-b32-tinyimagenet")
    lines = capsys.readouterr().out.splitlines()
    assert "train.batch_size: 256 -> 128" in lines
    assert not [line for line in lines if line.startswith("optim.")]


def test_schema_is_json_and_knows_the_plugins(capsys: pytest.CaptureFixture[str]) -> None:
    call("config", "schema")
    text = capsys.readouterr().out
    assert json.loads(text)["title"] == "RunConfig"
    assert "weight_mhe" in text


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    call("config", "presets")
    assert "tima-vit-b32-tinyimagenet" in capsys.readouterr().out
