"""Bring the shards of the next window here while this one is being trained on, so that a window's edge is no stop."""

from __future__ import annotations

import logging
import queue
import threading

import numpy as np

from zsr.data.shards import ShardSet

log = logging.getLogger(__name__)

NUM_THREADS = 4  # downloads at a time; processes of one machine that want the same shard wait for one of them


class Prefetch:
    """Fetches shards in the background, in the order asked for. A context manager: leaving it ends the threads.

    Threads start with the first wish, which comes after the loader has forked its processes; they are daemons and end
    when their current download does.
    """

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self._wishes: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()

    def want(self, numbers: np.ndarray) -> None:
        """Shards (int64 [n]) that will be needed soon."""
        for number in numbers.tolist():
            self._wishes.put(number)
        while len(self._threads) < NUM_THREADS:
            self._threads.append(threading.Thread(target=self._work, name="zsr-prefetch", daemon=True))
            self._threads[-1].start()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for _thread in self._threads:
            self._wishes.put(None)

    def _work(self) -> None:
        while (number := self._wishes.get()) is not None and not self._closed.is_set():
            try:
                self.shards.fetch(number)
            except Exception as fault:
                # Whoever reads the shard meets the same fault and reports it where it can be handled.
                log.warning("event=prefetch_failed shard=%d error=%s", number, type(fault).__name__)
