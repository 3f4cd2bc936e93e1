"""Which model a command line means: a checkpoint folder, a run's folder, or any name that zsr can load."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from zsr.config import RunConfig
    from zsr.config.schema import Precision
    from zsr.models.clip import RobustCLIP

_STATE_FILE = "state.json"


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint in ``folder``: the folder itself, a run's latest, or that of the newest run of this name.

    Runs are called ``name-digest``, so that ``.zsr/runs/demo`` finds ``.zsr/runs/demo-1f2e3d4c5b6a7988``.

    Raises:
        ValueError: there is none.
    """
    if folder.is_dir():
        found = _checkpoints(folder)
        if not found:
            raise ValueError(f"{folder}: holds no checkpoint; a checkpoint has a {_STATE_FILE}, a run has checkpoints/")
        return found[-1]
    runs = [found[-1] for run in folder.parent.glob(f"{glob.escape(folder.name)}-*") if (found := _checkpoints(run))]
    if not runs:
        raise ValueError(f"{folder}: there is no such folder, and no run of that name")
    return max(runs, key=lambda checkpoint: (checkpoint / _STATE_FILE).stat().st_mtime)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; names carry the step, or the time, in digits of equal number."""
    if (folder / _STATE_FILE).is_file():
        return [folder]
    found = [path.parent for pattern in ("*", "checkpoints/*") for path in folder.glob(f"{pattern}/{_STATE_FILE}")]
    return sorted(found, key=lambda path: path.name)


def read_device(device: str | None) -> str:
    """The device of an option's value: cuda where there is one, else cpu, without one.

    Raises:
        ValueError: torch has no such device here.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # torch has one for each way to be wrong
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise ValueError(f"--device {device}: torch has no such device here; it has {', '.join(there)}") from None
    return device


def takes_pretrained(name: str) -> bool:
    """Whether a model is an architecture's name, which open_clip has weights for; folders and schemes bring their own."""
    folder = Path(name).expanduser()
    return ":" not in name and not folder.is_dir() and len(folder.parts) == 1


def load_named(name: str, pretrained: str | None, precision: Precision, device: str) -> tuple[RobustCLIP, str | None]:
    """Load a checkpoint folder, an exported folder or a model name; return it with its training template, if known.

    Raises:
        ValueError: nothing of that name can be loaded.
    """
    from zsr.config import ModelConfig
    from zsr.engine.checkpoint import load_trained
    from zsr.models import load_model

    folder = Path(name).expanduser()
    if (folder / "open_clip_config.json").is_file():
        name = f"local-dir:{folder}"
    elif folder.is_dir() or (":" not in name and len(folder.parts) > 1):  # a path, not "ViT-B-32" or "zsr:emoji-vit"
        checkpoint = find_checkpoint(folder)
        typer.echo(f"model={checkpoint}", err=True)
        model, config = load_trained(checkpoint, device, precision)
        if model.image.columns is not None:
            typer.echo(
                f"note: model.attention_drop={model.image.columns.share:g} makes this model random; robust accuracy from "
                "one draw a step is too high (an attack would average over draws, EOT)",
                err=True,
            )
        return model, config.data.template
    model = load_model(ModelConfig(name=name, pretrained=pretrained), precision, device)
    model.eval()
    return model, None


def trained_config(name: str, clip: RobustCLIP) -> RunConfig | None:
    """Settings of the run that a loaded checkpoint came from; None for a model that is no checkpoint."""
    from zsr.config import validate
    from zsr.engine.checkpoint import read_state

    folder = Path(name).expanduser()
    if clip.arch in (name, f"local-dir:{folder}"):  # loaded by its own name: a model, or an exported folder
        return None
    return validate(read_state(find_checkpoint(folder))["config"])


def label_of(name: str) -> str:
    """A short name for tables: a folder's own, a model's without its scheme."""
    parts = [part for part in Path(name.partition(":")[2] or name).parts if part != "/"]
    if len(parts) > 2 and parts[-2] == "checkpoints":
        return parts[-3]
    return parts[-1] if parts else name
