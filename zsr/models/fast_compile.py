"""torch.compile for the blocks of an image tower, where the machine can.

Blocks are compiled one by one, not the tower as a whole: equal blocks share one compilation, and prompts, token maps and
the short way through the last block stay plain code around them. What a block stores does not change, and copies of a
tower, a frozen teacher for one, are not compiled.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import nn

log = logging.getLogger("zsr.models")


def compile_blocks(visual: nn.Module) -> int:
    """Compile each block of a ViT, in place; on failure log a warning and change nothing.

    Returns:
        How many blocks are compiled from now on, each when it first runs.
    """
    blocks = list(getattr(cast(Any, getattr(visual, "transformer", None)), "resblocks", []))
    if not blocks:
        log.warning("model.compile=true: %s has no transformer blocks; it runs as it is", type(visual).__name__)
        return 0
    device = next(visual.parameters()).device
    try:
        _try_compiler(device)
    except (
        Exception
    ) as error:  # whatever a missing or broken compiler raises: a faster step is never worth a failed run
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning("model.compile=true: torch.compile does not work here, the model runs as it is: %s", reason)
        return 0
    import torch._dynamo  # seconds to import, so only here

    # What fails later, in one block and for one shape, falls back the same way, with torch's own warning.
    torch._dynamo.config.suppress_errors = True
    for block in blocks:
        block.compile()
    return len(blocks)


def _try_compiler(device: torch.device) -> None:
    """Compile something small, forward and backward; raises what goes wrong."""

    def small(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x * 2 + 1).sum(-1)

    x = torch.ones(4, 8, device=device, requires_grad=True)
    compiled = torch.compile(small)
    compiled(x).sum().backward()
    assert x.grad is not None
