"""Optimizer and learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zsr.config.schema import OptimConfig


def make_optimizer(
    config: OptimConfig, parameters: Sequence[nn.Parameter], text: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters, those of the text side among them at a rate of their own.

    Weight decay touches matrices, not gains and biases.
    """
    of_text = {id(p) for p in text}
    image = [p for p in parameters if id(p) not in of_text]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in image if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in image if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if text:
        groups.append({"params": list(text), "weight_decay": config.weight_decay, "lr_factor": config.text_lr_factor})
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999))


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step ``step`` (from 0): linear warm-up, then cosine to zero or constant. A pure function."""
    warmup = min(config.warmup_steps, total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.decay == "constant":
        return config.lr
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.lr * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate, each group's own factor on top."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)
