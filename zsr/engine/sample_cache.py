"""What is constant for a sample, kept by its key: rows that the frozen model would otherwise compute in every epoch.

The recipes of this field do not augment, so the frozen model's view of a clean image never changes (METHODS.md 11.4). A
row is computed in the batch that first meets its sample. Rows differ in their last bits with the size of the batch that
computed them, so a resumed run, whose cache starts empty, follows the uninterrupted one closely but not bit for bit;
therefore ``train.cache_frozen`` is off unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class SampleCache:
    """Rows by (name, sample key), one growing table for each name, on the device where the rows were made."""

    def __init__(self) -> None:
        self._tables: dict[str, Tensor] = {}
        self._places: dict[str, dict[str, int]] = {}

    def get(self, name: str, keys: Sequence[str], make: Callable[[Tensor], Tensor]) -> Tensor:
        """The rows ``[B, ...]`` of these samples.

        Args:
            name: of the constant.
            keys: of the samples, B.
            make: called with the places in the batch (int64 ``[M]``) of samples not yet known; gives their rows
                ``[M, ...]``. Not called if all are known.
        """
        places = self._places.setdefault(name, {})
        missing = [i for i, key in enumerate(keys) if key not in places]
        if missing:
            rows = make(torch.tensor(missing)).detach()
            self._reserve(name, len(places) + len(missing), rows)
            # A batch may hold a sample twice (an epoch filled up with its own head): both rows have one place.
            taken = [places.setdefault(keys[i], len(places)) for i in missing]
            self._tables[name][torch.tensor(taken, device=rows.device)] = rows
        table = self._tables[name]
        return table[torch.tensor([places[key] for key in keys], device=table.device)]

    def _reserve(self, name: str, rows: int, like: Tensor) -> None:
        table = self._tables.get(name)
        if table is not None and rows <= len(table):
            return
        larger = like.new_empty(max(1024, 2 * rows), *like.shape[1:])
        if table is not None:
            larger[: len(table)] = table
        self._tables[name] = larger
