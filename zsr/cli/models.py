"""Which model a command line means: a checkpoint folder, a run's folder, or any name that zsr can load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zsr.config.schema import Precision
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


def load_named(name: str, pretrained: str | None, precision: Precision, device: str) -> tuple[RobustCLIP, str | None]:
    """Load a checkpoint folder, an exported folder or a model name; return it with its training template, if known.

    Raises:
        ValueError: nothing of that name can be loaded.
    """
    from zsr.config import ModelConfig
    from zsr.engine.checkpoint import load_trained
    from zsr.models import load_model

    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "open_clip_config.json").is_file():
        model, config = load_trained(find_checkpoint(folder), device)
        model.image.precision = precision
        return model, config.data.template
    if folder.is_dir():
        name = f"local-dir:{folder}"
    model = load_model(ModelConfig(name=name, pretrained=pretrained), precision, device)
    model.eval()
    return model, None
