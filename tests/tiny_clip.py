"""A CLIP of a few thousand weights in open_clip's local-dir layout, for tests that need a model and not its accuracy."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import zsr  # noqa: F401  first: makes torchvision importable beside CPU torch
from zsr.config import ModelConfig
from zsr.models import RobustCLIP, load_model

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def write_tiny_clip(folder: Path, seed: int = 0) -> str:
    """Write the model with seeded random weights; return the name that loads it."""
    import open_clip

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(**ARCHITECTURE)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": ARCHITECTURE, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def tiny_clip(folder: Path, seed: int = 0) -> RobustCLIP:
    return load_model(ModelConfig(name=write_tiny_clip(folder, seed)))
