"""Processes that prepare batches ahead of time; if one dies or stalls, that is an error and never a hang.

A worker can be killed at any instruction: the kernel does so when memory runs out. So nothing here waits for what only a
live worker can give. Processes share no lock; each worker has two pipes of its own, and is asked in turn, which also keeps
the order. Messages are short: pixels lie in memory that was shared before the fork, in two slots a worker.

Two ready-made pools were tried. torch's DataLoader hangs if a worker dies while it holds a semaphore of the pool, and
raises whatever its socket says if one dies while handing over memory. concurrent.futures hangs if a worker dies in the
middle of an answer: six of ten kills did that with batches in the pipe. Time per batch of 256x3x224x224 bytes, two workers on
two cores, when little else ran and when much did: 128 to 310 ms with slots, 110 to 430 ms with torch's shared memory in
concurrent.futures, 355 to 1290 ms through its pipe. Of that the consumer pays 25, 12 and 85 ms of CPU time: a slot is copied
out. In return slots need no room in /dev/shm, and vanish with the last process.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import multiprocessing
import os
import pickle
import signal
import struct
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import cycle, islice
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Tag = TypeVar("Tag")

Fill = Callable[[np.ndarray, np.ndarray, np.ndarray], list[str]]
"""Given sample ids (int64 [n]), writes images (uint8 [n, 3, H, W]) and labels (int64 [n]); returns keys (n)."""

# Longer than the storage layer's own retries, which give up first and say why. This one ends an unforeseen hang.
WORKER_TIMEOUT_S = 1800.0

SLOTS = 2  # batches that a worker may have in hand: one is being decoded while another waits to be taken

_POLL_S = 1.0  # how soon a death is noticed that no pipe tells of
_END_S = 5.0  # what a killed process may take to be gone; only one stuck in the kernel needs longer
_REQUEST = struct.Struct("qq")  # slot, number of samples
_LENGTH = struct.Struct("q")  # bytes of the pickled answer that follows

# Forked workers see the index without a copy and start in milliseconds. They touch neither the accelerator nor, keeping
# to one thread, torch's thread pool: the two things that do not survive a fork.
_FORK = multiprocessing.get_context("fork")


class WorkerLost(RuntimeError):
    """A data worker died or stalled; the message says how and what to do."""


def fill_ahead(
    fill: Fill,
    requests: Iterable[tuple[Tag, np.ndarray]],
    *,
    num_workers: int,
    batch_size: int,
    image_size: int,
    prepare: Callable[[], None] = lambda: None,
) -> Generator[tuple[Tag, Tensor, Tensor, list[str]], None, None]:
    """Have ``fill`` called in ``num_workers`` processes, and hand over what it made in the order of the requests.

    Requests are drawn in this process, at most ``SLOTS * num_workers`` ahead of the batch that is handed over. Closing
    the iterator ends the workers at once. They also end within seconds of this process, however it ends.

    Args:
        fill: runs in the workers.
        requests: (tag, sample ids int64 [n <= batch_size]); the tag comes back with the batch.
        num_workers: at least 1.
        batch_size, image_size: room for a batch of [batch_size, 3, image_size, image_size].
        prepare: called first in each worker, to mend what does not survive a fork.

    Yields:
        The tag, images (uint8 [n, 3, H, W]) and labels (int64 [n]), pinned where there is a GPU, and keys (n).

    Raises:
        WorkerLost: a worker died, or gave no answer for ``WORKER_TIMEOUT_S``.
        Exception: what ``fill`` raised, when its batch is due.
    """
    workers: list[_Worker] = []
    asked: deque[tuple[Tag, _Worker]] = deque()
    try:
        # All of them before the first request is drawn: drawing may start threads, and a fork is best done before that.
        for number in range(num_workers):
            workers.append(_Worker(f"{number} of {num_workers}", fill, prepare, batch_size, image_size))
        turns = zip(requests, cycle(workers))

        def ask(count: int) -> None:
            for (tag, ids), worker in islice(turns, count):
                worker.ask(ids)
                asked.append((tag, worker))

        ask(SLOTS * num_workers)
        while asked:
            tag, worker = asked.popleft()
            batch = worker.answer()
            ask(1)  # the same worker, whose slot is free now: it works on while the caller has the batch
            yield tag, *batch
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()


class _Worker:
    """One process, its slots and its pipes. Made and asked in the parent; ``_serve`` is what runs in the process."""

    def __init__(self, name: str, fill: Fill, prepare: Callable[[], None], batch_size: int, image_size: int) -> None:
        self.name, self._fill, self._prepare = name, fill, prepare
        self._ids = _shared((SLOTS, batch_size), np.dtype(np.int64))
        self._image = _shared((SLOTS, batch_size, 3, image_size, image_size), np.dtype(np.uint8))
        self._label = _shared((SLOTS, batch_size), np.dtype(np.int64))
        self._num_asked = self._num_answered = 0
        self._received = bytearray()
        self._parent = os.getpid()
        their_requests, self._requests = _FORK.Pipe(duplex=False)
        self._answers, their_answers = _FORK.Pipe(duplex=False)
        self._process = _FORK.Process(target=self._serve, args=(their_requests, their_answers), daemon=True)
        self._process.start()
        their_requests.close()
        their_answers.close()
        os.set_blocking(self._answers.fileno(), False)

    def ask(self, ids: np.ndarray) -> None:
        slot = self._num_asked % SLOTS
        self._num_asked += 1
        self._ids[slot, : len(ids)] = ids
        with contextlib.suppress(BrokenPipeError):  # it is dead: said when this answer is due, after those it gave
            self._requests.send_bytes(_REQUEST.pack(slot, len(ids)))

    def answer(self) -> tuple[Tensor, Tensor, list[str]]:
        """The batch asked for longest ago, in memory of its own: the slot is free again."""
        slot = self._num_answered % SLOTS
        self._num_answered += 1
        keys = self._receive()
        if isinstance(keys, Exception):
            raise keys
        return _copy(self._image[slot, : len(keys)]), _copy(self._label[slot, : len(keys)]), keys

    def kill(self) -> None:
        # Not in a process forked later, which has a copy of this object. And not SIGTERM: a stopped process, or one that
        # has not yet replaced the trainer's handlers, would live on.
        if os.getpid() == self._parent:
            self._process.kill()

    def join(self) -> None:
        if os.getpid() == self._parent:
            self._process.join(_END_S)
        self._requests.close()
        self._answers.close()

    def _receive(self) -> Any:
        give_up_at = time.monotonic() + WORKER_TIMEOUT_S
        while True:
            # First whether it lives, then what it wrote: an answer given before the end counts. The end of the pipe alone
            # would not do, since a process forked by someone else in a bad moment may keep it open.
            gone = not self._process.is_alive()
            gone |= self._read()
            if len(self._received) >= _LENGTH.size:
                end = _LENGTH.size + _LENGTH.unpack_from(self._received)[0]
                if len(self._received) >= end:
                    message = pickle.loads(self._received[_LENGTH.size : end])
                    del self._received[:end]
                    return message
            if gone:
                raise WorkerLost(self._describe_end())
            left = give_up_at - time.monotonic()
            if left <= 0:
                raise WorkerLost(
                    f"data worker {self.name} (pid {self._process.pid}) has given no batch for {WORKER_TIMEOUT_S:g} s: "
                    "it is stopped, or the storage behind the shards hangs; data.num_workers=0 shows where"
                )
            wait([self._answers], min(left, _POLL_S))

    def _read(self) -> bool:
        """Take what is in the pipe, without waiting for the rest; true at its end."""
        try:
            while chunk := os.read(self._answers.fileno(), 1 << 16):
                self._received += chunk
        except BlockingIOError:
            return False
        return True

    def _describe_end(self) -> str:
        self._process.join(_END_S)
        code = self._process.exitcode
        who = f"data worker {self.name} (pid {self._process.pid})"
        if code is not None and code >= 0:
            return f"{who} ended with exit code {code}; its own error stands in the output of this process"
        how = "is gone" if code is None else f"was killed by signal {-code} ({signal.strsignal(-code)})"
        return (
            f"{who} {how}; most often that means that memory ran out: lower data.num_workers, "
            "or give the run more memory"
        )

    def _serve(self, requests: Connection, answers: Connection) -> None:
        # The trainer's handlers (preemption, Ctrl-C) came along with the fork: a worker that swallowed SIGTERM could not
        # be ended from outside, and one that answered Ctrl-C would print a traceback of its own.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # A closed pipe does not tell that the parent is gone: workers forked later hold a copy of its other end.
        threading.Thread(target=_end_with, args=(self._parent,), daemon=True).start()
        self._requests.close()
        self._answers.close()
        torch.set_num_threads(1)  # resizing is torch's, and its thread pool did not come along
        self._prepare()
        with open(answers.fileno(), "wb", closefd=False) as output:
            while True:
                try:
                    slot, count = _REQUEST.unpack(requests.recv_bytes())
                except EOFError:
                    return
                body = pickle.dumps(self._answer(slot, count))
                output.write(_LENGTH.pack(len(body)) + body)
                output.flush()

    def _answer(self, slot: int, count: int) -> list[str] | Exception:
        try:
            return self._fill(self._ids[slot, :count], self._image[slot, :count], self._label[slot, :count])
        except (ValueError, OSError) as fault:
            return fault  # a sentence that says all; the traceback would hide it
        except Exception as fault:
            fault.add_note(f"in data worker {self.name}:\n{traceback.format_exc()}")
            return fault


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(1)


def _shared(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros that processes forked later share; pages take memory when they are first written."""
    return np.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def _copy(array: np.ndarray) -> Tensor:
    source = torch.from_numpy(array)
    return torch.empty_like(source, pin_memory=torch.cuda.is_available()).copy_(source)
