"""Checkpoints: everything that makes a resumed run the run that would have happened.

A folder with ``model.safetensors`` (what fine-tuning can change), ``optimizer.pt`` (optimizer state and torch's random
stream) and ``state.json`` (step, position in the data, config, environment, checksums). ``state.json`` is written
last, so a folder without it, or whose files do not match its checksums, is a torn checkpoint and is refused.

Training waits for a :class:`Snapshot` only, a copy in memory; whoever carries the run writes it while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import zsr
from zsr.config import RunConfig, validate
from zsr.config.schema import Precision
from zsr.data.plan import Position
from zsr.models import RobustCLIP, load_model

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"
_FORMAT = "zsr-checkpoint-1"


@dataclass
class TrainState:
    """What the loop itself has to remember.

    Attributes:
        step: optimizer steps done.
        position: in the data, after the last batch done.
        elapsed_s: seconds of training so far, over all attempts.
        worker_s: the same, times the workers of the time.
        metrics: the last quick evaluation.
        score: how good these very weights are, higher is better; None if nobody has measured them.
        run_id: of the tracker's record.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    elapsed_s: float = 0.0
    worker_s: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    score: float | None = None
    run_id: str = ""


class Snapshot:
    """A run at one moment, copied into main memory: what happens to model and optimizer afterwards does not change it."""

    def __init__(
        self, model: RobustCLIP, optimizer: torch.optim.Optimizer, state: TrainState, config: RunConfig
    ) -> None:
        self._weights = {name: _copied(value.contiguous()) for name, value in model.trained_state().items()}
        self._optimizer = {"optimizer": _copied(optimizer.state_dict()), "torch_rng": torch.get_rng_state()}
        self._content = {
            "format": _FORMAT,
            **asdict(state),
            "config": config.model_dump(mode="json"),
            "config_digest": config.digest(),
            "environment": environment(),
        }

    def write(self, folder: Path) -> None:
        """Write the checkpoint into ``folder``, which must be new or empty. Any thread may do it.

        Raises:
            OSError: the disk is full or gone.
        """
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._weights, folder / MODEL)
        torch.save(self._optimizer, folder / OPTIMIZER)
        content = {**self._content, "sha256": {name: _sha256(folder / name) for name in (MODEL, OPTIMIZER)}}
        unfinished = folder / f".{STATE}.part"
        unfinished.write_text(json.dumps(content, indent=1))
        unfinished.replace(folder / STATE)


def read_state(folder: Path) -> dict[str, Any]:
    """The content of ``state.json``, after checking that the other files are the ones it was written with.

    Raises:
        ValueError: not a checkpoint, or a torn one.
    """
    file = folder / STATE
    if not file.is_file():
        raise ValueError(
            f"{folder} is not a checkpoint: it has no {STATE}; give the folder of one, such as .../checkpoints/step-00000100"
        )
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        damaged = [name for name, sha256 in content["sha256"].items() if _sha256(folder / name) != sha256]
    except (json.JSONDecodeError, KeyError, OSError) as error:
        raise ValueError(f"{folder} is a torn checkpoint ({error}); use an earlier one") from error
    if content.get("format") != _FORMAT:
        raise ValueError(f"{folder} has format {content.get('format')!r}; this version reads {_FORMAT}")
    if damaged:
        raise ValueError(
            f"{folder} is a torn checkpoint: {', '.join(damaged)} changed since it was written; use an earlier one"
        )
    return content


def load_checkpoint(folder: Path, model: RobustCLIP, optimizer: torch.optim.Optimizer, config: RunConfig) -> TrainState:
    """Put a run back where it was.

    Raises:
        ValueError: torn, or written by a run with other settings.
    """
    content = read_state(folder)
    if content["config_digest"] != config.digest():
        raise ValueError(
            f"{folder} was written with other settings ({_first_difference(content['config'], config)}); "
            "start a new run in another folder, or restore that setting"
        )
    model.load_trained_state(load_file(folder / MODEL))
    saved = torch.load(folder / OPTIMIZER, weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["torch_rng"])
    return TrainState(
        step=content["step"],
        position=Position(**content["position"]),
        elapsed_s=content["elapsed_s"],
        worker_s=content.get("worker_s", content["elapsed_s"]),
        metrics=content["metrics"],
        score=content.get("score"),
        run_id=content["run_id"],
    )


def load_trained(
    folder: Path, device: str | torch.device = "cpu", precision: Precision = "fp32"
) -> tuple[RobustCLIP, RunConfig]:
    """The model of a checkpoint, ready to evaluate or export, and the settings it was trained with.

    Args:
        precision: of its passes from now on; that of its training says nothing about how it should be measured.

    Raises:
        ValueError: not a checkpoint, a torn one, or its base model cannot be loaded.
    """
    content = read_state(folder)
    config = validate(content["config"])
    model = load_model(config.model, precision, device)
    model.load_trained_state(load_file(folder / MODEL, device=str(device)))
    model.eval()
    return model, config


def environment() -> dict[str, str]:
    """Versions that a result may depend on."""
    found = {"zsr": zsr.__version__, "python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _copied(value: Any) -> Any:
    """A copy in main memory of tensors in any nest of dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list) else value


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _first_difference(old: dict[str, Any], config: RunConfig) -> str:
    def walk(a: Any, b: Any, path: str) -> str | None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted(a.keys() | b.keys()):
                found = walk(a.get(key), b.get(key), f"{path}.{key}" if path else key)
                if found:
                    return found
            return None
        return None if a == b else f"{path} was {a}, is {b}"

    left_out = {"name", "tracking", "launch"}
    new = config.model_dump(mode="json", exclude=left_out)
    return walk({k: v for k, v in old.items() if k not in left_out}, new, "") or "by an older version"
