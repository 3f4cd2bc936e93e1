"""Which sample is seen when: a pure function of the shard sizes, the seed and the epoch.

The order of an epoch is global. Ranks take contiguous slices of each global batch, so a run that goes on with another
number of ranks or loader processes sees exactly the samples it would have seen, and resuming is arithmetic on
``Position``: nothing is read again to find the place.

Why windows: shuffling all samples freely would make every batch touch nearly every shard, which is fine on a local disk
and ruinous over a network. So shards are shuffled, and samples are mixed inside windows of a few consecutive shards: at
any time only one window (two at its edge) is being read, and each shard is fetched once per node and epoch. All nodes
read the same window at the same time; that is the price of an order that does not know how many nodes there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

Last = Literal["drop", "complete"]

_WINDOW_BITS = 24  # up to 16 million windows; the other 40 bits of a sort key are random


@dataclass(frozen=True, order=True)
class Position:
    """A place in the endless stream of batches: the next step to do. All that a resume needs."""

    epoch: int = 0
    step: int = 0

    def after(self, num_batches: int, num_steps: int) -> Position:
        """The position ``num_batches`` further on, in epochs of ``num_steps``."""
        return Position.at(self.batches_before(num_steps) + num_batches, num_steps)

    def batches_before(self, num_steps: int) -> int:
        """How many batches lie before this position, counted from the run's start."""
        return self.epoch * num_steps + self.step

    @staticmethod
    def at(batch: int, num_steps: int) -> Position:
        """The position before batch number ``batch`` (from 0) of the whole run."""
        return Position(*divmod(batch, num_steps))


BEGIN = Position()


def count_steps(num_samples: int, global_batch: int, last: Last = "drop") -> int:
    """Global batches in an epoch.

    Raises:
        ValueError: a size is below one, or dropping the last batch would leave none.
    """
    if num_samples < 1 or global_batch < 1:
        raise ValueError(f"an epoch needs samples and a batch, not {num_samples} samples in batches of {global_batch}")
    if last == "complete":
        return -(-num_samples // global_batch)
    if last != "drop":
        raise ValueError(f'data.last_batch={last!r} is not known; use "drop" or "complete"')
    if global_batch > num_samples:
        raise ValueError(
            f"train.batch_size={global_batch} is larger than the set ({num_samples} samples), so dropping the last "
            f'batch leaves none; lower it to {num_samples} or set data.last_batch="complete"'
        )
    return num_samples // global_batch


class EpochPlan:
    """The batches of one epoch.

    Args:
        shard_sizes: samples in each shard; sample ids count through them in this order.
        seed: of the run.
        epoch: from 0; each has its own order.
        global_batch: samples in a step, over all ranks.
        last: ``"drop"`` leaves the last ``num_samples % global_batch`` samples of this epoch's order out (other ones
            each epoch, the order being new); ``"complete"`` adds one step for them, filled with the epoch's first
            samples.
        window: shards whose samples are mixed.

    Raises:
        ValueError: sizes that give no batch (see ``count_steps``), or a window below one.
    """

    def __init__(
        self, shard_sizes: Sequence[int], seed: int, epoch: int, global_batch: int, last: Last = "drop", window: int = 8
    ) -> None:
        if window < 1:
            raise ValueError(f"data.shuffle_window={window} must be at least 1 shard")
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.num_steps = count_steps(self.num_samples, global_batch, last)
        self.seed, self.epoch, self.global_batch, self.last, self.window = seed, epoch, global_batch, last, window

    @cached_property
    def order(self) -> np.ndarray:
        """int64 [num_samples]: every sample id once, in the order of this epoch."""
        bits, shard_order = self._start()
        sizes = self.shard_sizes[shard_order]
        first_ids = (np.cumsum(self.shard_sizes) - self.shard_sizes)[shard_order]
        starts = np.cumsum(sizes) - sizes
        ids = np.arange(self.num_samples, dtype=np.int64) + np.repeat(first_ids - starts, sizes)
        # One sort does all windows: the window number is the high part of the key, random bits the low part.
        window_of_shard = np.arange(len(sizes), dtype=np.uint64) // np.uint64(self.window)
        keys = bits.random_raw(self.num_samples) >> np.uint64(_WINDOW_BITS)
        keys |= np.repeat(window_of_shard, sizes) << np.uint64(64 - _WINDOW_BITS)
        return ids[np.argsort(keys, kind="stable")]

    @cached_property
    def windows(self) -> list[np.ndarray]:
        """The shards of each window, in the order in which the epoch visits them."""
        _, shard_order = self._start()
        return np.split(shard_order, np.arange(self.window, len(shard_order), self.window))

    def window_at(self, step: int) -> int:
        """The window in which a step ends; it may have begun in an earlier one."""
        last = min((step + 1) * self.global_batch, self.num_samples) - 1
        return int(np.searchsorted(self._window_ends, last, side="right"))

    def step_ids(self, step: int) -> np.ndarray:
        """int64 [global_batch]: the samples of one step."""
        return self._slice(step, 0, self.global_batch)

    def rank_ids(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """int64 [about global_batch / world_size]: one rank's contiguous part of a step.

        Raises:
            ValueError: there is no such rank, or there are more ranks than samples.
        """
        first, length = share_of(self.global_batch, rank, world_size)
        return self._slice(step, first, length)

    @cached_property
    def _window_ends(self) -> np.ndarray:
        return np.cumsum([self.shard_sizes[shards].sum() for shards in self.windows])

    def _start(self) -> tuple[np.random.Philox, np.ndarray]:
        """The epoch's random bits, and its order of shards, which takes the first of them."""
        # numpy promises that a bit generator's raw stream never changes; it does not promise that for
        # Generator.permutation. Sorting raw bits keeps a checkpoint's order valid under any numpy.
        bits = np.random.Philox(key=np.array([self.seed, self.epoch], dtype=np.uint64))
        return bits, np.argsort(bits.random_raw(len(self.shard_sizes)), kind="stable")

    def _slice(self, step: int, start: int, length: int) -> np.ndarray:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of an epoch of {self.num_steps} steps")
        first = step * self.global_batch + start
        # Past the end (the completed last batch only) the epoch starts over.
        return self.order[np.arange(first, first + length) % self.num_samples]


def share_of(global_batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """Where a rank's part of a global batch begins, and how long it is; parts differ by one sample at most.

    Raises:
        ValueError: there is no such rank, or there are more ranks than samples.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} does not exist among world_size={world_size} ranks")
    if global_batch < world_size:
        raise ValueError(
            f"train.batch_size={global_batch} has not even one sample for each of {world_size} workers; "
            f"make it a multiple of {world_size}"
        )
    first = rank * global_batch // world_size
    return first, (rank + 1) * global_batch // world_size - first
