"""Two ways of doing one thing, in turns, in wall time and in processor time of this process.

On a machine that others use too, wall time says how busy they were; ratios of processor time are the better guide there. On
a GPU it is the other way round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from zsr.bench.compare import Progress, Spread
from zsr.bench.rate import synchronize

Result = TypeVar("Result")


@dataclass(frozen=True)
class Spent:
    """Seconds of one piece of work."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Sides:
    """Ours and theirs, in seconds over all rounds.

    Attributes:
        cpu_ratio, wall_ratio: theirs over ours, of the sums.
        cpu_rounds, wall_rounds: the same round by round.
    """

    ours: Spent
    theirs: Spent
    cpu_ratio: float
    wall_ratio: float
    cpu_rounds: Spread
    wall_rounds: Spread

    @classmethod
    def of(cls, ours: Sequence[Spent], theirs: Sequence[Spent]) -> Sides:
        mine, other = total(ours), total(theirs)
        return cls(
            mine,
            other,
            other.cpu_s / mine.cpu_s,
            other.wall_s / mine.wall_s,
            Spread.of([b.cpu_s / a.cpu_s for a, b in zip(ours, theirs, strict=True)]),
            Spread.of([b.wall_s / a.wall_s for a, b in zip(ours, theirs, strict=True)]),
        )

    def ratio(self, device: str) -> float:
        """The one that counts there."""
        return self.wall_ratio if device.startswith("cuda") else self.cpu_ratio


def total(spent: Sequence[Spent]) -> Spent:
    """The sum."""
    return Spent(sum(one.wall_s for one in spent), sum(one.cpu_s for one in spent))


def timed(work: Callable[[], Result], device: str) -> tuple[Result, Spent]:
    """Do some work, and say what it took."""
    synchronize(torch.device(device))
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    synchronize(torch.device(device))
    return result, Spent(time.perf_counter() - wall, time.process_time() - cpu)


def in_turns(
    works: Sequence[Callable[[int], Result]], rounds: int, device: str, what: str, progress: Progress | None = None
) -> tuple[list[list[Result]], list[list[Spent]]]:
    """Do each piece of work once a round, in an order that is turned round at every other one.

    Returns:
        What each gave and what it took, ``[works][rounds]``.
    """
    results: list[list[Result]] = [[] for _ in works]
    spent: list[list[Spent]] = [[] for _ in works]
    for number in range(rounds):
        if progress is not None and not number:
            progress(what, 0, rounds)
        places = range(len(works))
        for place in places if number % 2 == 0 else reversed(places):
            result, took = timed(lambda: works[place](number), device)  # noqa: B023 - called at once
            results[place].append(result)
            spent[place].append(took)
        if progress is not None:
            progress(what, number + 1, rounds)
    return results, spent
