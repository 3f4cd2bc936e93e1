"""What the machine can do, and what a pass asks of it: the two numbers behind a share of the matrix-product rate.

Shapes: N tokens of a batch, E width.
"""

from __future__ import annotations

import time
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zsr.models import RobustCLIP
from zsr.models.fast_linear import linear


def tower_macs(plain: RobustCLIP) -> float:
    """Multiply-accumulates of one image's forward pass, for a model loaded with ``fast_layers`` off.

    A backward pass to the input, and one to the weights, ask for as many again.
    """
    size = plain.image_size
    image = torch.rand(1, 3, size, size, device=plain.image.mean.device)
    # Fused attention and the inference-only path hide their products from the counter.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        plain.train().encode_image(image)
    return counter.get_total_flops() / 2


def matmul_rate(plain: RobustCLIP, batch_size: int, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Multiply-accumulates per second of the four products of a transformer block, by the better of torch's libraries.

    On CUDA a product large enough to fill the device is taken instead, so that the share is a model FLOPs utilisation
    against what the device reaches, not against its data sheet.
    """
    device = plain.image.mean.device
    if device.type == "cuda":
        return _rate([(8192, 8192, 8192)], dtype, device, seconds)
    width, tokens = _width_and_tokens(plain)
    rows = batch_size * tokens
    shapes = [(rows, width, out) for out in (3 * width, width, 4 * width)] + [(rows, 4 * width, width)]
    return _rate(shapes, dtype, device, seconds)


def _rate(shapes: list[tuple[int, int, int]], dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    operands = [
        (torch.rand(n, k, dtype=dtype, device=device), torch.rand(m, k, dtype=dtype, device=device))
        for n, k, m in shapes
    ]
    macs, best = sum(n * k * m for n, k, m in shapes), 0.0
    with torch.no_grad():
        for product in (F.linear, linear):
            rounds, began = 0, 0.0
            while rounds < 2 or time.perf_counter() - began < seconds:
                if rounds == 1:  # the first round warms up
                    synchronize(device)
                    began = time.perf_counter()
                for x, weight in operands:
                    product(x, weight)
                rounds += 1
            synchronize(device)
            best = max(best, (rounds - 1) * macs / (time.perf_counter() - began))
    return best


def _width_and_tokens(plain: RobustCLIP) -> tuple[int, int]:
    visual = cast(Any, plain.image.visual)
    if not plain.image.is_vit:
        return 1024, 64  # no block to copy: a middling product
    return int(visual.class_embedding.shape[0]), int(visual.positional_embedding.shape[0])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
