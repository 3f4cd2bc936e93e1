"""How far a long piece of work on data is: a bar with the time left on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

Item = TypeVar("Item")

LOG_EVERY_S = 20.0


class Work:
    """A count that is shown while it grows. A context manager.

    Args:
        what: the work, in a word.
        total: the count at its end.
        show: False shows nothing.
        done: the count to begin with, which took no time.
    """

    def __init__(self, what: str, total: int, show: bool = True, done: int = 0) -> None:
        self.what, self.total, self.show, self.start = what, total, show, done
        self.began = self.said_at = time.monotonic()
        console = Console(stderr=True)
        self._on_terminal = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
            disable=not (show and self._on_terminal),
        )  # fmt: skip
        self._task = self._bar.add_task(what, total=total, completed=done)

    def at(self, done: int) -> None:
        """Show that so much is done."""
        self._bar.update(self._task, completed=done)
        now = time.monotonic()
        if not self.show or self._on_terminal or now - self.said_at < LOG_EVERY_S:
            return
        self.said_at = now
        rate = (done - self.start) / (now - self.began)
        left = f"{(self.total - done) / rate:.0f}" if rate else "unknown"
        log.info("event=%s done=%d total=%d per_s=%.1f eta_s=%s", self.what, done, self.total, rate, left)

    def __enter__(self) -> Work:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def tracked(items: Collection[Item], what: str, show: bool) -> Iterator[Item]:
    """The items, with a bar for how many have been taken."""
    with Work(what, len(items), show) as work:
        for number, item in enumerate(items):
            yield item
            work.at(number + 1)
