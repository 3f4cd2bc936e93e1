"""Random numbers that belong to a sample, not to a batch.

An attack's random start must not depend on which other samples share the batch, on the batch size or on the number of
ranks: then a resumed, re-sharded or re-batched run attacks every sample the same way. So each sample has its own seed, a
hash of the run's seed, what the noise is for, and the sample's key, and its own generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def sample_seeds(keys: Sequence[str], *purpose: object) -> list[int]:
    """One 63-bit seed per sample, from its key and everything in ``purpose`` (run seed, epoch, restart, ...)."""
    salt = "/".join(map(str, purpose)).encode()
    return [
        int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, key=hashlib.sha256(salt).digest()).digest()) >> 1
        for key in keys
    ]


def derived_seeds(seeds: Sequence[int], *purpose: object) -> list[int]:
    """One 63-bit seed per sample, from the sample's seed and what it is for: an attack, a restart, a target."""
    return sample_seeds([str(seed) for seed in seeds], *purpose)


def fill_uniform(like_BCHW: Tensor, seeds: Sequence[int]) -> Tensor:
    """Uniform noise in [-1, 1) of the shape, device and dtype of ``like_BCHW``, row i from ``seeds[i]``."""
    noise = _empty(like_BCHW)
    generator = torch.Generator(device=like_BCHW.device)
    for row, seed in zip(noise, seeds, strict=True):
        row.uniform_(-1, 1, generator=generator.manual_seed(seed))
    return noise


def fill_normal(like_BCHW: Tensor, seeds: Sequence[int]) -> Tensor:
    """Standard normal noise, otherwise as :func:`fill_uniform`."""
    noise = _empty(like_BCHW)
    generator = torch.Generator(device=like_BCHW.device)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return noise


def _empty(like_BCHW: Tensor) -> Tensor:
    # Contiguous, since the stream fills memory in its own order: channels-last images get the same noise.
    return torch.empty_like(like_BCHW, memory_format=torch.contiguous_format)
