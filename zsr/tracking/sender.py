"""A thread that delivers a spool to a server that may be slow, away or restarted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from zsr.tracking.base import log
from zsr.tracking.spool import Record, Spool

_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LONGEST_LAST_PAUSE_S = 0.5, 20.0, 2.0
_BATCH_VALUES = 900  # MLflow takes 1000 metrics in one request


class RejectedError(Exception):
    """The server is there and will never take this record."""


class Remote(Protocol):
    """The other end: takes records of one kind; raises ``RejectedError`` for good, anything else for now."""

    def send(self, records: Sequence[Record]) -> None: ...


class Sender:
    """Delivers one spool in order until drained or stopped.

    Args:
        spool: what to deliver.
        connect: makes the other end; called again after each failure until it succeeds once.
    """

    def __init__(self, spool: Spool, connect: Callable[[], Remote]) -> None:
        self._spool = spool
        self._connect = connect
        self._remote: Remote | None = None
        self._wake = threading.Event()
        self._draining = False
        self._stopped = False
        self._away = False
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Say that there is something to deliver."""
        self._wake.set()

    def finish(self, wait_s: float) -> bool:
        """Deliver what is left, for at most ``wait_s`` seconds; return whether all of it arrived."""
        self._draining = True
        self._wake.set()
        self._thread.join(wait_s)
        arrived = not self._thread.is_alive()
        self._stopped = True
        self._wake.set()
        return arrived

    def _run(self) -> None:
        pause = _FIRST_PAUSE_S
        while not self._stopped:
            self._wake.clear()
            try:
                batch = self._spool.pending()
                if batch:
                    self._remote = self._remote or self._connect()
                    deliver(self._remote, self._spool, batch)
                    self._say_back()
                    pause = _FIRST_PAUSE_S
                elif self._draining:
                    return
                else:
                    self._wake.wait(5.0)
                    if not self._draining:
                        time.sleep(_FIRST_PAUSE_S)  # gather what comes in the next moment into one request
            except Exception as error:
                self._say_away(error)
                self._pause(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _pause(self, seconds: float) -> None:
        """Wait before the next attempt. New records do not shorten it (the server is away), the end of the run does."""
        started = time.monotonic()
        while not self._stopped:
            waited = time.monotonic() - started
            if waited >= (min(seconds, _LONGEST_LAST_PAUSE_S) if self._draining else seconds):
                return
            time.sleep(0.1)

    def _say_away(self, error: Exception) -> None:
        if not self._away:  # once an outage, not at each attempt
            problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            log.warning("tracker state=away spool=%s problem=%r", self._spool.path, problem)
        self._away = True

    def _say_back(self) -> None:
        if self._away:
            log.warning("tracker state=back note=%r", "what was kept on disk has been delivered")
        self._away = False


def deliver(remote: Remote, spool: Spool, batch: Sequence[tuple[Record, int]]) -> None:
    """Send ``batch`` and mark each part that arrived; what the server rejects for good is logged and passed over."""
    while batch:
        together = _metrics_head(batch)
        head = batch[:together]
        try:
            remote.send([record for record, _ in head])
        except RejectedError as error:
            if together > 1:  # find the culprit one by one
                for one in head:
                    deliver(remote, spool, [one])
            else:
                log.warning("tracker rejected=%s problem=%r", head[0][0]["kind"], str(error)[:300])
        spool.mark(head[-1][1])
        batch = batch[together:]


def _metrics_head(batch: Sequence[tuple[Record, int]]) -> int:
    """How many records from the front fit one request: a row of metrics, or one record of another kind."""
    count = values = 0
    for record, _ in batch:
        values += len(record.get("values", ()))
        if record["kind"] != "metrics" or values > _BATCH_VALUES:
            break
        count += 1
    return max(count, 1)
