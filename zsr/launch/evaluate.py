"""The batches of an evaluation over Ray workers: they classify and attack, the driver alone keeps ledgers and writes cards.

A worker holds one model and set at a time and fetches them from Ray's object store when a batch needs others. One that dies is
started again, and its batch is done again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import ray

import zsr  # noqa: F401  first on a worker too: makes torchvision importable beside CPU torch
from zsr.eval.scene import Answer, Request, Scene
from zsr.launch.cluster import attach

_TRIES = 3


class RayCrew:
    """Workers of a Ray cluster, joined or started; use it in a ``with`` block.

    Args:
        workers: how many.
        on_gpu: whether each takes a GPU; else one CPU.

    Raises:
        ValueError: the cluster cannot hold so many.
    """

    def __init__(self, workers: int, on_gpu: bool) -> None:
        self._started = not ray.is_initialized()
        attach(worker_output=False)
        has, what = ray.cluster_resources().get("GPU" if on_gpu else "CPU", 0.0), "GPUs" if on_gpu else "CPUs"
        if workers > has:
            raise ValueError(f"--workers {workers}: the cluster has {has:g} {what}, and each worker takes one")
        options = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
        make = ray.remote(**options, max_restarts=-1, max_task_retries=_TRIES)(_Worker)
        self._workers = [make.remote() for _ in range(workers)]
        self._scene: tuple[Scene, Any] | None = None

    def run(self, scene: Scene, requests: Iterable[Request]) -> Iterator[Answer]:
        """The answers as they come."""
        if self._scene is None or self._scene[0] is not scene:
            self._scene = (scene, ray.put(scene))
        # In a list: Ray would fetch a bare reference again for each call.
        place = [self._scene[1]]
        waiting, idle = iter(requests), list(self._workers)
        busy: dict[Any, Any] = {}
        while True:
            while idle and (request := next(waiting, None)) is not None:
                worker = idle.pop()
                busy[worker.do.remote(place, request)] = worker
            if not busy:
                return
            (done, *_), _ = ray.wait(list(busy))
            idle.append(busy.pop(done))
            answer: Answer = ray.get(done)
            yield answer

    def __enter__(self) -> RayCrew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            ray.kill(worker)
        if self._started:
            ray.shutdown()


class _Worker:
    """What runs on a worker."""

    def __init__(self) -> None:
        self._place: Any = None
        self._scene: Scene | None = None

    def do(self, place: list[Any], request: Request) -> Answer:
        if self._scene is None or place[0] != self._place:
            self._scene = None  # make room before the next model comes
            self._place, self._scene = place[0], ray.get(place[0])
        assert self._scene is not None
        return self._scene.do(request)
