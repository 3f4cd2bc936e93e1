"""Fixtures that several tests share. Nothing here reaches beyond this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Time limits on single examples say more about how busy the machine is than about the code.
settings.register_profile("zsr", deadline=None)
settings.load_profile("zsr")

sys.path.insert(0, str(Path(__file__).parent))  # tests import their helpers by name: shard_factory, tiny_clip


@pytest.fixture(scope="session")
def tiny_model_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a random CLIP of 32-pixel images, a few thousand weights."""
    from tiny_clip import write_tiny_clip

    return write_tiny_clip(tmp_path_factory.mktemp("tiny-clip"))


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 50 images of 32 pixels in 5 classes, in shards of 12."""
    from shard_factory import make_shards

    return make_shards(
        tmp_path_factory.mktemp("shards") / "small", num_samples=50, num_classes=5, shard_size=12, image_size=32
    )


@pytest.fixture
def make_config(tiny_model_name: str, small_shards: Path) -> Callable[..., Any]:
    """``make_config("optim.lr=0.1", ...)``: a run of the tiny model on the small shards, two epochs of 6 steps."""
    from zsr.config import load_config

    def make(*overrides: str) -> Any:
        return load_config(
            "default",
            [
                f"model.name={tiny_model_name}",
                f"data.train={small_shards}",
                f"data.val={small_shards}",
                "train.batch_size=8",
                "train.epochs=2",
                "train.log_every=3",
                "train.num_threads=1",
                "optim.lr=0.01",
                "attack.eps=4/255",
                "attack.step_size=2/255",
                "eval.attack.steps=2",
                "eval.num_samples=20",
                *overrides,
            ],
        )

    return make
