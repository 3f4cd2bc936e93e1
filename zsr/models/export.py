"""Write a fine-tuned model as a folder that ``open_clip.create_model_and_transforms("local-dir:...")`` loads."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from zsr.models.clip import RobustCLIP, projection_owner
from zsr.models.robust_attention import RobustAttention


def export_open_clip(model: RobustCLIP, folder: Path) -> Path:
    """Write ``open_clip_config.json`` and ``open_clip_model.safetensors``.

    Raises:
        ValueError: the model has what open_clip cannot carry: a prompt, attention of another kind, expanded class
            embeddings, or a tuned text map where the text tower has no projection to put it into.
    """
    _check_carried(model)
    state = {name: value.detach().cpu() for name, value in model.open_clip.state_dict().items()}
    _put_projection(model, state)
    config = {"model_cfg": model.architecture, "preprocess_cfg": _json_ready(model.preprocess)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    # Contiguous clones: safetensors refuses tensors that share memory.
    save_file(
        {name: value.contiguous().clone() for name, value in state.items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def _check_carried(model: RobustCLIP) -> None:
    if model.anchor_mean is not None:
        raise ValueError(
            "model.expand_text: open_clip cannot carry the expansion of class embeddings, so there is no such export; keep the "
            "checkpoint, which zsr eval reads, or train without the expansion (objective laat: objective.expand=false)"
        )
    if model.image.prompt is not None:
        raise ValueError(
            f"model.adapt={model.image.prompt.adapt}: open_clip's models cannot carry a prompt, so there is no such export; "
            "keep the checkpoint, which zsr eval reads, or train with model.adapt=weights"
        )
    if any(isinstance(module, RobustAttention) for module in model.image.modules()):
        raise ValueError(
            "model.attention_cap, model.attention_drop: open_clip has plain attention only, so there is no such export; "
            "keep the checkpoint, which zsr eval reads, or train with both at 0"
        )


def _put_projection(model: RobustCLIP, state: dict[str, Tensor]) -> None:
    tuned = model.text_projection.detach().cpu()
    owner = projection_owner(model.open_clip)
    prefix = "" if owner is model.open_clip else "text."
    projection = owner.text_projection
    if isinstance(projection, nn.Parameter):
        state[f"{prefix}text_projection"] = tuned
    elif isinstance(projection, nn.Linear):
        # zsr's map comes after the tower's own linear layer: fold it in.
        state[f"{prefix}text_projection.weight"] = tuned.T @ state[f"{prefix}text_projection.weight"]
        if projection.bias is not None:
            state[f"{prefix}text_projection.bias"] = state[f"{prefix}text_projection.bias"] @ tuned
    elif not bool((tuned == tuned.new_ones(tuned.shape[0]).diag()).all()):
        raise ValueError(
            f"{model.arch} has no text projection that could hold the tuned one; train with text tuning off"
        )


def _json_ready(preprocess: dict[str, object]) -> dict[str, object]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in preprocess.items()}
