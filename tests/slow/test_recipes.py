"""The recipes run: shards come out byte for byte as shipped, and a one-minute training ends in a model that loads."""

from __future__ import annotations

import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import zsr

EMOJI = Path(zsr.__file__).parent / "data" / "embedded" / "emoji"
PACKAGES = Path("~/.cache/zsr/packages").expanduser()


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(
    shutil.which("npm") is None and not list(PACKAGES.glob("*.tgz")), reason="needs npm, or the packages in the cache"
)
def test_the_shards_are_rebuilt_as_they_were_shipped(tmp_path: Path) -> None:
    run("zsr.recipes.emoji_shards", "--out", str(tmp_path), "--packages", str(PACKAGES))
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    shipped = sorted(path.relative_to(EMOJI) for path in EMOJI.rglob("*") if path.is_file())
    assert made == shipped
    different = [str(path) for path in made if not filecmp.cmp(tmp_path / path, EMOJI / path, shallow=False)]
    assert not different


@pytest.mark.slow
def test_a_smoke_run_of_the_pretraining_ends_in_a_model_that_loads(tmp_path: Path) -> None:
    output = run("zsr.recipes.emoji_clip", "--data", str(EMOJI), "--out", str(tmp_path), "--smoke")
    assert "stage=text done" in output and "stage=image done" in output

    from zsr.recipes.emoji_eval import load_model

    model, _, _ = load_model(tmp_path)
    assert 1 < model.logit_scale.exp().item() < 100
    assert not (tmp_path / "unfinished.pt").exists()
