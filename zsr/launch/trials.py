"""The trial book: one JSON file a trial, written by the sweep's own process alone. Results are read from here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from zsr.launch.space import Point
from zsr.launch.store import Store

TrialState = Literal["pending", "running", "finished", "pruned", "failed", "diverged"]
ENDED: tuple[TrialState, ...] = ("finished", "pruned", "failed", "diverged")
PLACE = "place"
"""In the first report of a trial's workers: the id of Ray's placement group in which they are."""


@dataclass
class TrialRecord:
    """One trial as the book knows it.

    Attributes:
        number: in the study, from 0.
        trial_id: Ray Tune's name for it; also that of its Train run.
        point: settings that the space chose.
        state: where it is.
        metrics: of the last report.
        history: of every report.
        checkpoint: address of the newest checkpoint.
        seconds: its workers held their places, start-up included, over all attempts; waiting for a place is not among them.
        flags: reasons not to believe it.
        error: what stopped it.
        attempts: how often it was started.
    """

    number: int
    trial_id: str
    point: Point
    state: TrialState = "pending"
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    checkpoint: str | None = None
    seconds: float = 0.0
    flags: list[str] = field(default_factory=list)
    error: str | None = None
    attempts: int = 0

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class TrialBook:
    """All trials of one sweep.

    Args:
        store: the sweep's folder; trials lie in its ``trials``.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def create(self, number: int, trial_id: str, point: Point) -> TrialRecord:
        """Begin the page of a new trial; an existing page stays."""
        return self.read(number) or self.write(TrialRecord(number, trial_id, dict(point)))

    def read(self, number: int) -> TrialRecord | None:
        found = self._store.read_json("trials", f"{number:04d}.json")
        return None if found is None else TrialRecord(**found)

    def write(self, record: TrialRecord) -> TrialRecord:
        self._store.write_json(asdict(record), "trials", f"{record.number:04d}.json")
        return record

    def all(self) -> list[TrialRecord]:
        """Every trial, by number."""
        names = [name for name in self._store.names("trials") if name.endswith(".json")]
        found = [self.read(int(name.removesuffix(".json"))) for name in names]
        return [record for record in found if record is not None]


class Tenure:
    """How long trials have held their places: what is paid for, while waiting for a place costs nothing.

    Only the workers can tell which place is theirs, once they run; but then their start-up is behind them. So all places are
    watched from their beginning.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}
        self._places: dict[str, set[str]] = {}
        self._counted: dict[str, float] = {}

    def look(self, held: Iterable[str], now: float) -> None:
        """These places, and no others, are held at this moment (seconds of any clock that does not go back)."""
        for place in held:
            first, _ = self._seen.get(place, (now, now))
            self._seen[place] = first, now

    def settle(self, trial_id: str, place: str) -> None:
        """A trial's workers run in this place; after a failure it is another one."""
        self._places.setdefault(trial_id, set()).add(place)

    def lap(self, trial_id: str) -> float:
        """Seconds that the trial has held its places since this was last asked, as far as was looked."""
        spans = (self._seen[place] for place in self._places.get(trial_id, ()) if place in self._seen)
        total = sum(last - first for first, last in spans)
        before = self._counted.get(trial_id, 0.0)
        self._counted[trial_id] = total
        return total - before


def plain_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a report that are the loop's own, without what Tune adds."""
    own = ("train/", "val/", "perf/", "data/", "cost/")
    return {
        key: float(value)
        for key, value in result.items()
        if isinstance(value, (int, float)) and (key.startswith(own) or key in ("step", "epoch"))
    }
