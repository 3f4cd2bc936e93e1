"""Which model a command line means: a checkpoint folder, a run's folder, or any name that zsr can load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zsr.models.clip import RobustCLIP

_STATE_FILE = "state.json"


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint in ``folder``: the folder itself, or the latest of a run's.

    Raises:
        ValueError: there is none.
    """
    if (folder / _STATE_FILE).is_file():
        return folder
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    # Names carry the step with leading zeros, so the last by name within a run is the latest.
    found = sorted(path.parent for path in folder.glob("*/state.json")) or sorted(
        path.parent for path in folder.glob("checkpoints/*/state.json")
    )
    if not found:
        raise ValueError(
            f"{folder}: holds no checkpoint; a checkpoint folder has a {_STATE_FILE}, a run's has checkpoints/"
        )
    return found[-1]


def load_named(name: str, pretrained: str | None = None, device: str = "cpu") -> tuple[RobustCLIP, str | None]:
    """Load a checkpoint folder, an exported folder or a model name; return it with its training template, if known.

    Raises:
        ValueError: nothing of that name can be loaded.
    """
    from zsr.config import ModelConfig
    from zsr.engine.checkpoint import load_trained
    from zsr.models.clip import load_model

    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "open_clip_config.json").is_file():
            return load_model(ModelConfig(name=f"local-dir:{folder}"), device), None
        model, config = load_trained(find_checkpoint(folder))
        return model.to(device), config.data.template
    return load_model(ModelConfig(name=name, pretrained=pretrained), device), None
