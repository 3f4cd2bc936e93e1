"""What zsr bench ray makes of its notes, and the taking of turns."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from zsr.bench.compare import Spread
from zsr.bench.ray_share import summarise
from zsr.bench.turns import Turns


def block(number: int, wall: float, cpu: float = 1.0, averaging: float = 0.0) -> dict[str, float]:
    return {"round": number, "wall": wall, "cpu": cpu, "averaging": averaging}


def test_rounds_are_compared_with_themselves_and_the_first_does_not_count() -> None:
    # A machine that is twice as slow in the last round, where all three are.
    found = summarise(
        {
            "bare": [block(0, 9.0), block(1, 1.0, 0.5), block(2, 1.0, 0.5), block(3, 2.0, 0.5)],
            "ray-1": [block(0, 1.0), block(1, 1.01, 0.51), block(2, 1.01, 0.51), block(3, 2.02, 0.51)],
            "ray-2": [block(0, 1.0)] + [block(n, w, 0.6, w / 10) for n, w in ((1, 1.2625), (2, 1.2625), (3, 2.525))],
        },
        Spread.of([0.9]),
    )
    assert found.share.median == pytest.approx(0.01)
    assert found.cpu_share.median == pytest.approx(0.02)
    # Two workers do twice the images in 1.25 times the time.
    assert found.scaling.median == pytest.approx(0.8)
    assert found.averaging.median == pytest.approx(0.1)
    assert found.slower.median == pytest.approx(0.9 * 1.25 - 1)
    assert found.share_reached and not found.scaling_reached


def test_turns_go_round_and_back(tmp_path: Path) -> None:
    turns = Turns(str(tmp_path), ("a", "b", "c"), (1, 2, 1), rounds=4, block=1)
    taken: list[str] = []

    def take(name: str, rank: int) -> None:
        turns.ready(name, rank)
        for number in range(4):
            turns.wait(name, number)
            if rank == 0:
                taken.append(name)
                turns.done(name, number)
        turns.wait(name, 4)

    threads = [threading.Thread(target=take, args=one) for one in (("a", 0), ("b", 0), ("b", 1), ("c", 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert "".join(taken) == "abccbaabccba"
