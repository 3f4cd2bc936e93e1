"""Records on disk first: an append-only file of what was logged, with a mark for how much of it was delivered.

One line is one record: ``{"kind": "metrics", "step": 40, "time": 1760000000000, "values": {...}}``. The mark is a byte
offset in a file beside it, replaced atomically after each delivery. A process may die at any byte: a torn last line is
cut off when the file is opened again, and a delivery whose mark was lost is repeated with the same content (same time
stamp), which a server can recognise.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Spool:
    """An append-only record file that one process writes and any process may deliver.

    Args:
        path: the file; its folder is made. The mark lies beside it with the suffix ``.delivered``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mark_path = path.with_suffix(".delivered")
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._cut_torn_line()
        self._file = path.open("ab")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record; it is in the operating system's hands when this returns."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()

    def pending(self, limit: int = 500) -> list[tuple[Record, int]]:
        """Up to ``limit`` undelivered records in order, each with the offset to mark once it is delivered."""
        found: list[tuple[Record, int]] = []
        offset = self.delivered()
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                # A line still being written has no newline yet; it is read the next time.
                if len(found) == limit or not line.endswith(b"\n"):
                    break
                offset += len(line)
                found.append((json.loads(line), offset))
        return found

    def delivered(self) -> int:
        """Offset up to which records were delivered."""
        try:
            offset = int(self._mark_path.read_text())
        except (FileNotFoundError, ValueError):
            return 0
        return offset if offset <= self.path.stat().st_size else 0

    def mark(self, offset: int) -> None:
        """Note that everything before ``offset`` was delivered."""
        temporary = self._mark_path.with_suffix(f".{os.getpid()}")
        temporary.write_text(str(offset))
        temporary.replace(self._mark_path)

    def num_pending(self) -> int:
        """How many records still wait."""
        return len(self.pending(limit=1_000_000))

    def records(self) -> Iterator[Record]:
        """Every record so far, delivered or not."""
        yield from read_records(self.path)

    def close(self) -> None:
        """Close the file; records keep."""
        with self._lock:
            self._file.close()

    def _cut_torn_line(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)


class NewSteps:
    """Lets each metric through once per step, also when a resumed run repeats steps it had already logged.

    A run that resumes from a checkpoint repeats the steps after it. Repeated steps give the same values (a resume is
    exact) or, at another world size, values that differ by rounding; the first stays, so no metric is ever there twice.
    """

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def seen(self, key: str, step: int) -> None:
        """Note that ``key`` was logged up to ``step``."""
        self._last[key] = max(step, self._last.get(key, step))

    def learn(self, records: Iterator[Record]) -> None:
        """Note everything that ``records`` hold."""
        for record in records:
            if record["kind"] == "metrics":
                for key in record["values"]:
                    self.seen(key, record["step"])

    def fresh(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        """The part of ``values`` not logged before; it counts as logged from now on."""
        fresh = {key: float(value) for key, value in values.items() if step > self._last.get(key, -1)}
        for key in fresh:
            self._last[key] = step
        return fresh


def read_records(path: Path) -> Iterator[Record]:
    """The whole lines of a record file; nothing when there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def history(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric of the run in ``folder`` as (step, value) pairs in the order logged, whichever tracker wrote it."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for name in ("metrics.jsonl", "mlflow-spool.jsonl"):
        for record in read_records(folder / name):
            if record["kind"] == "metrics":
                for key, value in record["values"].items():
                    curves.setdefault(key, []).append((record["step"], value))
        if curves:
            break
    return curves
