"""What trials cost: hours and money from a table, a budget that stops new trials, and what it costs while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from zsr.config import ConfigError, load_config
from zsr.launch.cost import Budget, Rate, cost_meter, load_prices, priced
from zsr.launch.store import Store
from zsr.launch.sweep import ROBUST, Sweep, main
from zsr.launch.trials import TrialBook, TrialRecord

GPUS = ("launch.workers=4", "launch.cpus_per_worker=8", "launch.gpus_per_worker=1")


def launch(*overrides: str) -> Any:
    return load_config("default", list(overrides)).launch


def test_hours_and_money_of_a_trial() -> None:
    rate = Rate.of(launch(*GPUS, "launch.gpu_hour_price=0.5"))
    # Half an hour of four GPUs: two GPU-hours, a dollar.
    assert rate.metrics(1800) == {"cost/gpu_hours": 2.0, "cost/usd": 1.0}
    cpus = Rate.of(launch("launch.workers=2", "launch.cpus_per_worker=3"))
    assert cpus.metrics(3600) == {"cost/cpu_hours": 6.0}, "no price, no money"


def test_the_price_comes_from_the_table_and_a_file_laid_over_it(tmp_path: Path) -> None:
    table = load_prices(None)["aws/g6.12xlarge/spot"]
    assert Rate.of(launch(*GPUS, "launch.machine=aws/g6.12xlarge/spot")).usd == table["usd"] / table["gpus"]
    assert Rate.of(launch(*GPUS, "launch.machine=aws/g6.12xlarge/spot", "launch.gpu_hour_price=9")).usd == 9

    mine = tmp_path / "prices.yaml"
    mine.write_text(yaml.safe_dump({"rack-1": {"usd": 2.0, "gpus": 8, "cpus": 64}}))
    on_rack = ("launch.machine=rack-1", f"launch.prices={mine}")
    assert Rate.of(launch(*GPUS, *on_rack)).usd == 0.25
    assert Rate.of(launch(*on_rack)).usd == 2 / 64, "a run without GPUs pays for CPUs"
    assert priced(load_config("default", list(on_rack))).launch.gpu_hour_price == 2 / 64, "workers need no file"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("launch.machine=aws/g6.12xlarge/spott",), "aws/g6.12xlarge/spot"),
        ((*GPUS, "launch.machine=aws/m6i.2xlarge/on-demand"), "has no GPUs"),
        (("launch.machine=x", "launch.prices=/nothing.yaml"), "/nothing.yaml"),
    ],
)
def test_mistakes_about_prices_are_sentences(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Rate.of(launch(*overrides))


def test_an_entry_without_its_numbers_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("rack: {usd: 1.0, gpus: -1, cpus: 4}")
    with pytest.raises(ConfigError, match=r"rack should have usd, gpus and cpus"):
        load_prices(str(tmp_path / "p.yaml"))


def trial(number: int, state: Any, seconds: float) -> TrialRecord:
    return TrialRecord(number, f"t{number}", {}, state=state, seconds=seconds)


@pytest.mark.parametrize(
    ("trials", "trial_s", "starts"),
    [
        ([], 3600.0, True),
        ([], 11000.0, False),  # one alone is more than three dollars
        ([], None, True),  # nothing known: only what was spent counts
        ([trial(0, "finished", 3600), trial(1, "finished", 3600)], None, True),  # 2 spent, 1 for another
        ([trial(0, "finished", 3600), trial(1, "running", 0)], None, True),  # 1 spent, 1 to come, 1 for another
        ([trial(0, "finished", 3600), trial(1, "running", 0), trial(2, "running", 600)], None, False),
        ([trial(0, "finished", 3600), trial(1, "pruned", 600), trial(2, "running", 0)], None, False),
        ([trial(0, "running", 10800)], None, False),  # all is spent, though no trial has ended
    ],
)
def test_a_new_trial_starts_only_if_the_budget_holds_it_and_those_that_run(
    trials: list[TrialRecord], trial_s: float | None, starts: bool
) -> None:
    budget = Budget(3.0, Rate("gpu", 1, 1.0), trial_s)  # a dollar an hour
    refusal = budget.refusal(trials)
    assert (refusal is None) == starts
    if refusal:
        assert "--max-cost=3" in refusal


class Ledger:
    """A tracker that remembers metrics by step."""

    run_id = "sweep"

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.seen.append((step, dict(metrics)))


def test_the_meter_records_while_trials_run_and_once_more_at_the_end(tmp_path: Path) -> None:
    book, ledger = TrialBook(Store(str(tmp_path))), Ledger()
    rate = Rate("gpu", 2, 3.0)
    with cost_meter(ledger, book, rate, every_s=0.02):  # type: ignore[arg-type]
        book.write(trial(0, "running", 600))
        deadline = time.monotonic() + 20
        while not any(step == 600 for step, _ in ledger.seen):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        book.write(trial(0, "finished", 900))
    assert ledger.seen[-1] == (900, {"cost/gpu_hours": 0.5, "cost/usd": 1.5})
    steps = [step for step, _ in ledger.seen]
    assert steps == sorted(steps)


def test_a_run_counts_its_money_while_it_trains(make_config: Callable[..., Any], tmp_path: Path) -> None:
    from zsr.engine.loop import train
    from zsr.engine.session import LocalSession

    ledger = Ledger()
    config = make_config("launch.gpu_hour_price=3", "launch.cpus_per_worker=2", "train.max_steps=3")
    train(config, LocalSession(tmp_path), ledger)  # type: ignore[arg-type]
    paid = [(metrics["cost/usd"], metrics["cost/worker_hours"]) for _, metrics in ledger.seen if "cost/usd" in metrics]
    assert paid
    # Two CPUs at three dollars an hour each.
    assert all(usd == pytest.approx(6 * hours) and usd > 0 for usd, hours in paid)


def space(trial: Any, base: Any) -> dict[str, Any]:
    return {"optim.lr": base.optim.lr * trial.suggest_float("factor", 0.1, 1.0)}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--max-cost", "5"), 2, "nobody says what an hour costs"),
        (("--max-cost", "5", "launch.gpu_hour_price=1"), 0, "plan trials="),
        (("launch.machine=nowhere",), 2, "not in the table of prices"),
    ],
)
def test_the_command_says_what_a_budget_needs(
    arguments: tuple[str, ...],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(Sweep(name="dummy", preset="demo", space=space), ["--dry-run", *arguments]) == code
    captured = capsys.readouterr()
    assert said in (captured.out + captured.err).replace("\n", " ")


def test_the_search_ends_with_a_sentence_when_the_budget_is_used_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.tune.search import Searcher

    from zsr.launch.drive import open_study_storage
    from zsr.launch.search import SweepSearch

    store = Store(str(tmp_path))
    book = TrialBook(store)
    budget = Budget(2.5, Rate("cpu", 1, 1.0), None)
    search = SweepSearch(space, load_config("demo"), [ROBUST], open_study_storage(store), "id", 0, book, budget=budget)
    for number in (0, 1):
        assert isinstance(search.suggest(f"t{number}"), dict)
        record = book.read(number)
        assert record is not None
        record.state, record.seconds = "finished", 3600
        book.write(record)
    # Two dollars spent on two trials; a third would make three.
    assert search.suggest("t2") == Searcher.FINISHED
    assert "--max-cost=2.5: 2.00 spent" in capsys.readouterr().out
    assert len(book.all()) == 2
