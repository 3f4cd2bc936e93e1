"""Passes of image encoders, counted while they happen.

A unit of cost is one pass of the image encoder over the batch (zsr/objectives/base.py): forward is one, backward to the
input one, backward to the weights one more. Forward passes are seen by module hooks, backward passes by hooks on what a
forward pass gave; that a backward pass also fills weights is known from whether they asked for gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Passes:
    """Passes so far, in units of one pass over a whole batch.

    Attributes:
        forward: forward passes.
        to_input: backward passes through activations.
        to_weights: backward passes that also gave gradients of weights.
    """

    forward: float = 0.0
    to_input: float = 0.0
    to_weights: float = 0.0

    @property
    def units(self) -> float:
        return self.forward + self.to_input + self.to_weights


@contextmanager
def count_passes(batch_size: int, *encoders: nn.Module) -> Iterator[Passes]:
    """Count the passes of these encoders; a pass over half a batch is half a unit.

    Args:
        batch_size: images in a whole batch.
        encoders: called with images ``[B, C, H, W]`` first; they give a tensor, a tuple or a dataclass of tensors.
    """
    passes = Passes()

    def after_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        share = len(args[0]) / batch_size
        passes.forward += share
        asks_weights = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
        seen = False

        def on_gradient(_: Tensor) -> None:
            nonlocal seen
            if not seen:  # several outputs of one pass are one backward pass
                seen = True
                passes.to_input += share
                passes.to_weights += share * asks_weights

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(on_gradient)

    handles = [encoder.register_forward_hook(after_forward) for encoder in encoders]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> list[Tensor]:
    parts = list(vars(output).values()) if is_dataclass(output) else output
    return [part for part in ([parts] if isinstance(parts, Tensor) else parts) if isinstance(part, Tensor)]
