"""One piece of work at a time, beside training: what checkpoints are written by."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs what it is given in a thread, one after the other; what goes wrong there is raised here, at the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def submit(self, work: Callable[[], object]) -> None:
        """Wait for the work before, then start this."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as problem:
                self._problem = problem

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is under way; raise what the last work raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem
