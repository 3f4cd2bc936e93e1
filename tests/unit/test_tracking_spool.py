"""The spool: nothing lost, nothing twice, whatever byte the process died at."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsr.tracking.sender import RejectedError, Sender, deliver
from zsr.tracking.spool import NewSteps, Record, Spool, history


class Server:
    """Stands for the other end: answers, is away, or rejects, as told."""

    def __init__(self) -> None:
        self.got: list[Record] = []
        self.away = False
        self.calls = 0

    def send(self, records: Sequence[Record]) -> None:
        self.calls += 1
        if self.away:
            raise ConnectionError("nobody there")
        if any("bad" in record.get("values", {}) for record in records):
            raise RejectedError("bad name")
        self.got += records

    def steps(self) -> list[int]:
        return [record["step"] for record in self.got if record["kind"] == "metrics"]


def metrics(step: int, key: str = "train/loss") -> Record:
    return {"kind": "metrics", "step": step, "time": 1, "values": {key: 0.5}}


def test_delivers_in_order_and_goes_on_from_the_mark(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path / "spool.jsonl"), Server()
    for step in range(5):
        spool.append(metrics(step))
    deliver(server, spool, spool.pending(limit=3))
    spool.close()

    reopened = Spool(tmp_path / "spool.jsonl")
    assert [record["step"] for record, _ in reopened.pending()] == [3, 4]
    deliver(server, reopened, reopened.pending())
    assert server.steps() == [0, 1, 2, 3, 4]
    assert reopened.num_pending() == 0


@settings(max_examples=50, deadline=None)
@given(cut=st.integers(min_value=0, max_value=200))
def test_a_torn_last_line_costs_that_line_only(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("spool") / "spool.jsonl"
    spool = Spool(path)
    for step in range(4):
        spool.append(metrics(step))
    spool.close()
    content = path.read_bytes()
    path.write_bytes(content[: max(0, len(content) - cut)])

    reopened = Spool(path)
    reopened.append(metrics(99))
    steps = [record["step"] for record in reopened.records()]
    whole = content[: max(0, len(content) - cut)].count(b"\n")
    assert steps == [*range(whole), 99]


def test_a_rejected_record_does_not_hold_up_the_others(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path / "spool.jsonl"), Server()
    for record in (metrics(1), metrics(2, "bad"), metrics(3)):
        spool.append(record)
    deliver(server, spool, spool.pending())
    assert server.steps() == [1, 3]
    assert spool.num_pending() == 0


def test_a_row_of_metrics_is_one_request(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path / "spool.jsonl"), Server()
    for step in range(300):
        spool.append(metrics(step))
    deliver(server, spool, spool.pending())
    assert server.calls == 1


def test_the_sender_waits_out_an_absence_and_never_loses_order(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path / "spool.jsonl"), Server()
    server.away = True
    sender = Sender(spool, lambda: server)
    sender.start()
    for step in range(10):
        spool.append(metrics(step))
        sender.wake()
    threading.Timer(0.8, lambda: setattr(server, "away", False)).start()
    assert sender.finish(wait_s=15)
    assert server.steps() == list(range(10))


def test_finish_is_bounded_while_the_server_is_away(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path / "spool.jsonl"), Server()
    server.away = True
    sender = Sender(spool, lambda: server)
    sender.start()
    spool.append(metrics(1))
    sender.wake()
    assert not sender.finish(wait_s=0.5)
    assert spool.num_pending() == 1


def test_repeated_steps_pass_once() -> None:
    new = NewSteps()
    assert new.fresh({"a": 1.0, "b": 2.0}, step=10) == {"a": 1.0, "b": 2.0}
    assert new.fresh({"a": 1.5, "c": 3.0}, step=10) == {"c": 3.0}
    assert new.fresh({"a": 1.5}, step=5) == {}
    assert new.fresh({"a": 1.5}, step=11) == {"a": 1.5}


def test_history_reads_either_tracker(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "mlflow-spool.jsonl"):
        folder = tmp_path / name.split(".")[0]
        spool = Spool(folder / name)
        spool.append(metrics(1))
        spool.append({"kind": "tags", "time": 1, "values": {"x": "y"}})
        spool.append(metrics(2))
        assert history(folder) == {"train/loss": [(1, 0.5), (2, 0.5)]}
