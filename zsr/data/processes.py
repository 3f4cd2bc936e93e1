"""A few processes that work through a list of numbers, and never outlive the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

_POLL_S = 0.5

_task: Callable[[int], object]  # of a worker process


def work_through(
    task: Callable[[int], Result], numbers: Sequence[int], num_workers: int, poll: Callable[[], None]
) -> Iterator[Result]:
    """``task(number)`` of every number, in the order in which they finish.

    Args:
        task: runs in forked processes, or in this one if there is one worker only; it need not be picklable, its result
            must be, and be short: some kilobytes.
        poll: called often, to show how far the work is.

    Raises:
        RuntimeError: a process was killed.
        Exception: what ``task`` raised; no further number is begun then.
    """
    if num_workers == 1:
        for number in numbers:
            yield task(number)
            poll()
        return
    pool = ProcessPoolExecutor(
        min(num_workers, len(numbers) or 1),
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(task, os.getpid()),
    )
    try:
        waiting: set[Future[Any]] = {pool.submit(_run, number) for number in numbers}
        while waiting:
            finished, waiting = wait(waiting, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
            poll()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process was killed; most often that means that memory ran out: lower --workers. "
            "The same command goes on where this one stopped"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(task: Callable[[int], object], parent: int) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    torch.set_num_threads(1)  # torch's thread pool did not come along
    # A process that waits for work would not notice that its parent was killed: the others hold the same pipe.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _run(number: int) -> object:
    return _task(number)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(1)
