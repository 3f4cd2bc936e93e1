"""``zsr bench data``: our preparation of images against open_clip's."""

from __future__ import annotations

import json

import numpy as np
import pytest
from shard_factory import make_shards

from zsr.bench import data
from zsr.cli.main import main
from zsr.data.decode import decode_whole


@pytest.fixture(scope="module")
def images() -> list[dict[str, bytes]]:
    return data.take_images(None, 4)


def test_the_whole_pipeline_reaches_its_bar_with_nearly_the_same_pixels(images):
    rows, pixels = data.measure(images, repeats=5)
    ratio = {row.stage: row.ratio.median for row in rows}
    assert ratio[data.WHOLE] >= data.BAR  # 2.6 to 2.9 when measured
    assert ratio[data.WITH_FLOATS] >= data.BAR
    assert pixels.in_bounds
    for row in rows:
        assert row.ratio.median == pytest.approx(row.images_per_s.median / row.their_images_per_s.median, rel=0.5)


def test_pixels_out_of_bounds_are_noticed(images, monkeypatch):
    real = data.decode
    monkeypatch.setattr(data, "decode", lambda parts, size: np.roll(real(parts, size), 1, axis=2))
    assert not data.measure(images, repeats=1)[1].in_bounds


def test_made_up_images_are_like_photographs(images):
    """Power falls with the square of the frequency, neighbours resemble each other, and so do colours."""
    pixels = decode_whole(images[0]).astype(float)
    assert pixels.shape == (375, 500, 3)
    assert 60_000 < len(images[0]["jpg"]) < 200_000
    grey = pixels.mean(axis=2)[:, :375]
    power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.fftfreq(375)[None])
    low, high = (power[(frequency > f) & (frequency < 1.2 * f)].mean() for f in (0.02, 0.2))
    assert np.log(low / high) / np.log(10) == pytest.approx(2, abs=0.4)
    assert np.corrcoef(pixels[..., 0].ravel(), pixels[..., 2].ravel())[0, 1] > 0.6


def test_cores_are_rounded_up():
    assert [data.cores_for(rate, 500) for rate in (1, 500, 501, 5000)] == [1, 1, 2, 10]


def test_the_command_takes_images_of_a_set(tmp_path, capsys):
    folder = make_shards(tmp_path / "set", num_samples=6, image_size=(60, 80), extension="jpg")
    arguments = ["--images", str(folder), "--count", "3", "--repeats", "1", "--json", "--gpu-rate", "1,9e9"]
    with pytest.raises(SystemExit) as ended:
        main(["bench", "data", *arguments])
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    assert [row["stage"] for row in found["rows"]][:2] == ["decode", "crop and resize"]
    assert found["cores"]["1"] == 1 and found["cores"]["9e+09"] > 10_000


def test_a_rate_that_is_no_number(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "data", "--gpu-rate", "fast"])
    assert ended.value.code == 2
    assert "--gpu-rate fast: should be numbers" in capsys.readouterr().err
