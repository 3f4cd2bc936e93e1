"""What trials cost: hours and money from a table, a budget that stops new trials, and what it costs while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from zsr.config import ConfigError, load_config
from zsr.launch.cost import Budget, Rate, cost_meter, find_budget, keep_budget, load_prices, priced
from zsr.launch.store import Store
from zsr.launch.sweep import ROBUST, Sweep, main, parse_arguments
from zsr.launch.trials import Tenure, TrialBook, TrialRecord

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


def test_a_resume_is_refused_only_where_it_would_change_nothing() -> None:
    done = [trial(0, "finished", 3600), trial(1, "finished", 3600), trial(2, "failed", 1800)]
    budget = Budget(3.0, Rate("gpu", 1, 1.0), None)  # a dollar an hour: 2.50 spent, another trial makes 3.50
    said = budget.spent_up(done, 5)
    assert said is not None
    assert "the budget is spent, 2.50 on 3 of 5 trials" in said
    enough = float(said.split("--resume --max-cost=")[1].split()[0])
    assert 3.5 <= enough < 3.6
    assert Budget(enough, budget.rate, None).refusal(done) is None, "what the sentence names is enough"
    assert budget.spent_up(done, 3) is None, "no trials are left"
    assert budget.spent_up([*done, trial(3, "running", 60)], 5) is None, "one is to be continued"
    assert Budget(4.0, budget.rate, None).spent_up(done, 5) is None


def test_what_a_first_trial_costs_may_be_unknown_and_the_sentence_still_names_enough() -> None:
    budget = Budget(0.5, Rate("gpu", 1, 1.0), None)
    failed = [trial(0, "failed", 3600)]
    said = budget.spent_up(failed, 2)
    assert said is not None
    enough = float(said.split("--resume --max-cost=")[1].split()[0])
    assert Budget(enough, budget.rate, None).refusal(failed) is None


def test_waiting_for_a_place_is_not_counted_and_starting_up_is() -> None:
    tenure = Tenure()
    for now in range(100):  # the trial waits; others hold places
        tenure.look(["theirs"], now)
    assert tenure.lap("trial") == 0
    for now in range(100, 125):  # its workers start, and cannot speak yet
        tenure.look(["theirs", "ours"], now)
    assert tenure.lap("trial") == 0
    tenure.settle("trial", "ours")
    assert tenure.lap("trial") == 24
    tenure.look(["theirs", "ours"], 130)
    assert tenure.lap("trial") == 6
    assert tenure.lap("trial") == 0, "time is counted once"
    # A machine is lost; the next place is found a while later.
    for now in (140, 200, 300):
        tenure.look(["theirs"], now)
    tenure.look(["ours again"], 310)
    tenure.settle("trial", "ours again")
    tenure.look(["ours again"], 315)
    assert tenure.lap("trial") == 5


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
    keep_budget(Budget(2.5, Rate("cpu", 1, 1.0), None), store)
    search = SweepSearch(space, load_config("demo"), [ROBUST], open_study_storage(store), "id", 0, book, purse=store)
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


def test_a_search_that_ended_for_want_of_money_goes_on_with_more(tmp_path: Path) -> None:
    """As Tune does it: the search's state is saved, a process later it is brought back, and asked whether it has finished."""
    from zsr.launch.drive import open_study_storage
    from zsr.launch.search import ResumableSearch, SweepSearch

    store = Store(str(tmp_path / "sweep"))
    book = TrialBook(store)

    def search() -> ResumableSearch:
        inner = SweepSearch(space, load_config("demo"), [ROBUST], open_study_storage(store), "id", 0, book, purse=store)
        found = ResumableSearch(inner, concurrent=1)
        found._total_samples = 2  # as add_configurations sets it
        return found

    def ask(found: ResumableSearch, trial_id: str) -> Any:
        found._finished = found.searcher.suggest(trial_id) == found.searcher.FINISHED
        return found.is_finished()

    keep_budget(Budget(1.5, Rate("cpu", 1, 1.0), None), store)
    first = search()
    assert not ask(first, "t0")
    record = book.read(0)
    assert record is not None
    record.state, record.seconds = "finished", 3600
    book.write(record)
    first.on_trial_complete("t0", {"val/robust_acc": 0.5})
    assert ask(first, "t1"), "a dollar spent, and another trial is one more"
    (tmp_path / "state").mkdir()
    first.save_to_dir(str(tmp_path / "state"), "session")

    keep_budget(Budget(2.0, Rate("cpu", 1, 1.0), None), store)
    later = search()
    later.restore_from_dir(str(tmp_path / "state"))
    assert not later.is_finished()
    assert not ask(later, "t2")
    assert [record.number for record in book.all()] == [0, 1]


def test_the_budget_that_was_kept_last_counts(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert find_budget(store) is None
    budget = Budget(2.5, Rate("gpu", 4, 0.5), 60.0)
    keep_budget(budget, store)
    assert find_budget(store) == budget
    keep_budget(None, store)
    assert find_budget(store) is None


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            (),
            2,
            "--max-cost=1: the budget is spent, 2.00 on 1 of 32 trials; go on with --resume --max-cost=4.01 or more",
        ),
        (("--max-cost", "0.5"), 2, "--max-cost=0.5: the budget is spent"),
        (("--max-cost", "5"), 0, "dry_run=done"),
    ],
)
def test_a_spent_sweep_is_resumed_with_a_larger_budget_alone(
    arguments: tuple[str, ...],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("ZSR_HOME", str(tmp_path))
    sweep = Sweep(name="dummy", preset="demo", space=space)
    asked = vars(parse_arguments(sweep, ["--max-cost", "1", "launch.gpu_hour_price=1", "launch.workers=1"]))
    store = Store(load_config("demo").launch.storage).child("dummy-20260101-000000")
    page = {"id": "dummy-20260101-000000", "name": "dummy", "asked": asked}
    hours = 2 / load_config("demo").launch.cpus_per_worker
    TrialBook(store).write(trial(0, "finished", 3600 * hours))

    store.write_json({**page, "ended": True}, "sweep.json")
    assert main(sweep, ["--resume", "--dry-run", *arguments]) == code
    captured = capsys.readouterr()
    assert said in (captured.out + captured.err).replace("\n", " ")

    store.write_json({**page, "ended": False}, "sweep.json")
    assert main(sweep, ["--resume", "--dry-run", *arguments]) == 0, "its results were not published yet"
