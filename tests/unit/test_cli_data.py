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


def test_convert_says_what_was_left_out_resumed_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from shard_factory import encode_image, make_image

    rows = ["path,label"]
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(encode_image(make_image(number, 200, 300), "jpg"))
        rows.append(f"{number}.jpg,{number % 2}")
    (tmp_path / "3.jpg").write_bytes(b"<html>not found</html>")
    (tmp_path / "all.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "names.txt").write_text("tench\ngoldfish\n")
    arguments = [tmp_path / "all.csv", tmp_path / "set", "--samples-per-shard", 3, "--image-size", 64, "--quality", 80]
    arguments += ["--class-names", tmp_path / "names.txt", "--workers", 2, "--shuffle", 7]

    assert call("data", "convert", *arguments) == 2
    said = capsys.readouterr().err
    assert "1 of 8 images cannot be used and --max-bad allows 0" in said
    assert "3.jpg: the image cannot be decoded" in said

    assert call("data", "convert", *arguments, "--max-bad", "20%") == 0
    said = capsys.readouterr().out
    assert "7 images of 2 classes in 3 shards" in said and "3 shards were there already" in said
    assert "1 images left out and 0 other files ignored" in said and "rejected.csv names them" in said
    assert "resizing: an image takes" in said

    assert call("data", "convert", *arguments, "--max-bad", "some") == 2
    assert "--max-bad some: is neither" in capsys.readouterr().err
    assert call("data", "verify", tmp_path / "set") == 0
