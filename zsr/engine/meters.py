"""Averages that stay on the device until somebody reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zsr.engine.distributed import sum_over_ranks


class Meters:
    """Sums of named scalars since the last read. Adding never waits for the device; reading does, once for all."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0.0

    def add(self, values: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Add one step's scalars, the same names each step; ``weight`` is their number of samples where ranks differ."""
        for name, value in values.items():
            value = value.detach().double() * weight
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += weight

    def read(self) -> dict[str, float]:
        """Means over the steps and ranks since the last read, and start anew. Every rank must call it."""
        if not self._count:
            return {}
        names = sorted(self._sums)
        packed = torch.stack([self._sums[name] for name in names] + [self._sums[names[0]].new_tensor(self._count)])
        *sums, count = sum_over_ranks(packed).tolist()
        self._sums, self._count = {}, 0.0
        return {name: total / count for name, total in zip(names, sums, strict=True)}
