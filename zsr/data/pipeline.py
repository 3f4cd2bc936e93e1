"""Batches of uint8 pixels from a set of shards, in an order that the plan fixes and nothing else changes.

One request is one batch of one rank. With ``num_workers > 0`` whole batches are decoded in processes and handed over in
request order, so the stream is the same with any number of workers; each holds up to two batches in memory.

    for position, batch in train_batches(shards, seed=0, global_batch=128, ..., start=checkpoint.position):
        ...  # `position` is what the next checkpoint stores
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from zsr.data.decode import decode, read_label
from zsr.data.plan import BEGIN, EpochPlan, Last, Position, count_steps, share_of
from zsr.data.prefetch import Prefetch
from zsr.data.shards import ShardSet
from zsr.data.storage import cache_limit
from zsr.data.workers import fill_ahead

log = logging.getLogger(__name__)

Tag = TypeVar("Tag")
Item = TypeVar("Item")

# The seed of the fixed order from which `num_samples` of a set are taken: not the run's seed, so that all runs are
# evaluated on the same images.
_SUBSET_SEED = 0

_NO_LABEL = -1  # of every sample of a set without classes


@dataclass
class Batch:
    """Images (uint8 [B, 3, H, W], pixel values 0..255), labels (int64 [B], -1 in a set without labels), sample keys (B)."""

    image: Tensor
    label: Tensor
    key: list[str]

    def __len__(self) -> int:
        return len(self.key)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return Batch(
            self.image.to(device, non_blocking=non_blocking), self.label.to(device, non_blocking=non_blocking), self.key
        )


def num_steps_per_epoch(shards: ShardSet, global_batch: int, last: Last = "drop") -> int:
    """Steps in an epoch, the same on every rank.

    Raises:
        ValueError: the batch is larger than the set and the last batch is dropped.
    """
    return count_steps(len(shards), global_batch, last)


def train_batches(
    shards: ShardSet,
    *,
    seed: int,
    global_batch: int,
    last: Last = "drop",
    window: int = 8,
    image_size: int,
    rank: int = 0,
    world_size: int = 1,
    start: Position = BEGIN,
    num_workers: int = 0,
) -> Iterator[tuple[Position, Batch]]:
    """This rank's batches from ``start`` on, without end.

    Args:
        shards: the set; stays usable by the caller.
        seed: of the run; with the epoch it fixes the order.
        global_batch: samples in a step over all ranks; this rank's batches hold its share, the same at every step.
        last: what becomes of an epoch's tail; see ``EpochPlan``.
        window: shards whose samples are mixed.
        image_size: side of the images, in pixels.
        rank, world_size: this process among those that share the global batch.
        start: the first step to do: the position that came with the last batch done, or the beginning.
        num_workers: decoding processes; 0 decodes in this one.

    Yields:
        The position *after* the batch (what a checkpoint stores), and the batch.

    Raises:
        ValueError: the batch does not suit the set or the world size (at the call), or a sample cannot be decoded; the
            sentence names set, shard and key.
        OSError: a shard cannot be fetched.
        RuntimeError: a worker died, or gives no answer.
    """
    _, batch_size = share_of(global_batch, rank, world_size)
    prefetch = Prefetch(shards)
    want = prefetch.want if shards.storage.is_remote else None

    def plan_of(epoch: int) -> EpochPlan:
        return EpochPlan(shards.index.shard_sizes, seed, epoch, global_batch, last, window)

    if shards.storage.is_remote:
        _check_cache(shards, window)
    requests = _TrainRequests(plan_of, rank, world_size, start, want)
    shards.keep_open(2 * window)
    return _within(prefetch, _read_ahead(shards, requests, batch_size, image_size, num_workers))


def eval_batches(
    shards: ShardSet,
    *,
    image_size: int,
    batch_size: int,
    num_samples: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Every sample once, in a fixed order; rank r takes samples r, r + world_size, ... (shares differ by one).

    Args:
        shards: the set.
        image_size: side of the images, in pixels.
        batch_size: samples in one of this rank's batches; its last one may be smaller.
        num_samples: take only so many, the same ones on every rank and in every run; 0 takes all.
        rank, world_size: this process among those that share the work.
        num_workers: decoding processes; 0 decodes in this one.

    Raises:
        ValueError, OSError, RuntimeError: as in ``train_batches``.
    """
    if batch_size < 1:
        raise ValueError(f"eval.batch_size={batch_size} must be at least 1")
    share_of(world_size, rank, world_size)  # there is such a rank
    ids = subset_ids(len(shards), num_samples)[rank::world_size]
    requests = [(None, ids[i : i + batch_size]) for i in range(0, len(ids), batch_size)]
    return _untagged(_read_ahead(shards, requests, batch_size, image_size, num_workers))


def subset_ids(total: int, num_samples: int) -> np.ndarray:
    """int64 [min(num_samples, total)] ids of the fixed subset, ascending so that each shard is visited once."""
    if num_samples <= 0 or num_samples >= total:
        return np.arange(total, dtype=np.int64)
    # A plan of one window is a permutation of everything; its head is the subset, and grows with num_samples.
    return np.sort(EpochPlan([total], _SUBSET_SEED, 0, total, window=1).order[:num_samples])


class _TrainRequests:
    """Endless (position after, sample ids) of one rank; ``want`` hears of the shards of each window before it begins."""

    def __init__(
        self,
        plan_of: Callable[[int], EpochPlan],
        rank: int,
        world_size: int,
        start: Position,
        want: Callable[[np.ndarray], None] | None,
    ) -> None:
        self.plan_of, self.rank, self.world_size, self.want = plan_of, rank, world_size, want
        num_steps = plan_of(0).num_steps
        self.start = start.after(0, num_steps)  # the end of one epoch is the beginning of the next

    def __iter__(self) -> Iterator[tuple[Position, np.ndarray]]:
        position = self.start
        if self.want is not None:
            plan = self.plan_of(position.epoch)
            self.want(plan.windows[plan.window_at(position.step)])
        while True:
            plan, window = self.plan_of(position.epoch), -1
            for step in range(position.step, plan.num_steps):
                if self.want is not None and plan.window_at(step) != window:
                    window = plan.window_at(step)
                    following = plan.windows[window + 1 :] or self.plan_of(position.epoch + 1).windows
                    self.want(following[0])
                position = position.after(1, plan.num_steps)
                yield position, plan.rank_ids(step, self.rank, self.world_size)


def read_batch(shards: ShardSet, ids: np.ndarray, image_size: int) -> Batch:
    """The samples with these ids, in this order.

    Raises:
        ValueError: a sample cannot be decoded, or its label is no class of the set.
        OSError: a shard cannot be fetched.
    """
    image = np.empty((len(ids), 3, image_size, image_size), dtype=np.uint8)
    label = np.empty(len(ids), dtype=np.int64)
    keys = _fill(shards, ids, image, label)
    return Batch(torch.from_numpy(image), torch.from_numpy(label), keys)


def _fill(shards: ShardSet, ids: np.ndarray, image: np.ndarray, label: np.ndarray) -> list[str]:
    keys = []
    for place, sample in enumerate(ids.tolist()):
        raw = shards.read(sample)
        try:
            label[place] = read_label(raw.parts) if shards.has_labels else _NO_LABEL
            image[place] = decode(raw.parts, image.shape[-1])
            if shards.has_labels and not 0 <= label[place] < len(shards.classes):
                raise ValueError(f"the label {label[place]} is none of the set's {len(shards.classes)} classes")
        except ValueError as fault:
            file = shards.index.shards[shards.locate(sample)[0]].file
            raise ValueError(f"sample {raw.key!r} in shard {file} of {shards.address}: {fault}") from None
        keys.append(raw.key)
    return keys


def _read_ahead(
    shards: ShardSet, requests: Iterable[tuple[Tag, np.ndarray]], batch_size: int, image_size: int, num_workers: int
) -> Generator[tuple[Tag, Batch], None, None]:
    if not num_workers:
        for tag, ids in requests:
            yield tag, read_batch(shards, ids, image_size)
        return
    stream = fill_ahead(
        partial(_fill, shards),
        requests,
        num_workers=num_workers,
        batch_size=batch_size,
        image_size=image_size,
        prepare=shards.reopen,
    )
    with closing(stream):  # ends the workers now rather than when the garbage collector comes by
        for tag, image, label, keys in stream:
            yield tag, Batch(image, label, keys)


def _check_cache(shards: ShardSet, window: int) -> None:
    """Say so if the cache cannot hold the window that is read and the one that is being brought."""
    largest = sorted((shard.bytes for shard in shards.index.shards), reverse=True)
    needed, limit = sum(largest[: 2 * window]), cache_limit()
    if 0 < limit < needed:
        log.warning(
            "event=cache_small set=%s ZSR_CACHE_GB=%g needed_gb=%.3g effect=shards_are_fetched_again",
            shards.address, limit / 1e9, needed / 1e9,
        )  # fmt: skip


def _within(prefetch: Prefetch, stream: Iterator[Item]) -> Iterator[Item]:
    with prefetch:
        yield from stream


def _untagged(stream: Generator[tuple[Tag, Batch], None, None]) -> Iterator[Batch]:
    with closing(stream):
        for _, batch in stream:
            yield batch
