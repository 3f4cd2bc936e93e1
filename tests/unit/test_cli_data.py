"""``zsr data``: a folder of images becomes a set, is checked and looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsr.cli.main import main


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def test_convert_verify_info_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0)
    for place in range(12):
        folder = tmp_path / "images" / ("cat", "red_car")[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{place}.png")
    target = tmp_path / "set"

    assert call("data", "convert", tmp_path / "images", target, "--samples-per-shard", 5, "--image-size", 32) == 0
    assert "zsr data verify" in capsys.readouterr().out
    assert call("data", "verify", target) == 0

    assert call("data", "info", target) == 0
    said = capsys.readouterr().out
    assert "2, with 6 to 6 images each" in said
    assert "This is a photo of a {}." in said

    assert call("data", "sample", target, "--out", tmp_path / "sample.png") == 0
    assert Image.open(tmp_path / "sample.png").width > 100

    shard = next(target.glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert call("data", "verify", target) == 1
    assert shard.name in capsys.readouterr().err


def test_a_folder_that_is_not_one_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("data", "convert", tmp_path / "nowhere", tmp_path / "set") == 2
    assert "there is no folder" in capsys.readouterr().err
