"""What the search knows outlives its machine; addresses with passwords are refused, and no sentence repeats one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zsr.cli.main import main as zsr
from zsr.config import ConfigError, load_config
from zsr.launch.search import SweepSearch
from zsr.launch.store import Store
from zsr.launch.study import Journal, close_study, open_study_storage
from zsr.launch.sweep import ROBUST, Sweep, main
from zsr.launch.trials import TrialBook
from zsr.tracking.mlflow import mlflow_uri

SECRET = "s3cretw0rd"


def space(trial: Any, base: Any) -> dict[str, Any]:
    return {"optim.lr": base.optim.lr * trial.suggest_float("factor", 0.1, 1.0)}


def make_search(store: Store) -> SweepSearch:
    storage = open_study_storage(store)
    return SweepSearch(space, load_config("demo"), [ROBUST], storage, "id", 0, TrialBook(store), journal=Journal(store))


def test_a_new_head_finds_the_search_in_its_saved_state(tmp_path: Path) -> None:
    old, new = Store(str(tmp_path / "old")), Store(str(tmp_path / "new"))
    search = make_search(old)
    points = [search.suggest(name) for name in "abc"]
    search.on_trial_complete("a", {"val/robust_acc": 0.4})
    search.save(str(tmp_path / "state"))
    # The head is lost with its disk: the other one has the saved state and an empty journal.
    Journal(old).path.unlink()
    later = make_search(new)
    later._journal = Journal(old)  # the same place on another machine
    later.restore(str(tmp_path / "state"))
    assert later.suggest("b") == points[1], "a trial that was under way keeps its point"
    later.on_trial_complete("b", {"val/robust_acc": 0.5})
    fresh = later.suggest("d")
    assert isinstance(fresh, dict) and fresh["number"] == 3
    study = close_study(open_study_storage(old), "id")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "FAIL"]
    assert [trial.value for trial in study.trials][:2] == [0.4, 0.5]


def test_a_journal_that_knows_more_is_kept(tmp_path: Path) -> None:
    journal = Journal(Store(str(tmp_path)))
    journal.bring_back(b"one\n")
    journal.bring_back(b"one\ntwo\n")
    journal.bring_back(b"one\n")
    assert journal.read() == b"one\ntwo\n"


@pytest.mark.parametrize(
    "override",
    [
        f"tracking.uri=http://me:{SECRET}@tracker:5000",
        f"tracking.uri=postgresql://me:{SECRET}@db/mlflow",
        f"launch.search=postgresql+psycopg://me:{SECRET}@db/optuna",
        f"launch.search=postgresql://me@db/optuna?password={SECRET}",
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(
    override: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def config_show() -> object:
        with pytest.raises(SystemExit) as ended:
            zsr(["config", "show", override])
        return ended.value.code

    def sweep() -> object:
        return main(Sweep(name="dummy", preset="demo", space=space), ["--dry-run", override])

    for command in (config_show, sweep):
        assert command() == 2
        captured = capsys.readouterr()
        assert SECRET not in captured.out + captured.err
        assert "has a password in it" in captured.err.replace("\n", " ")


def test_a_password_in_the_environments_address_is_refused_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@tracker:5000")
    with pytest.raises(
        ValueError, match=r"MLFLOW_TRACKING_URI=http://me:\*\*\*@tracker:5000: has a password"
    ) as refusal:
        mlflow_uri(None)
    assert SECRET not in str(refusal.value)
    assert main(Sweep(name="dummy", preset="demo", space=space), ["--dry-run"]) == 2
    assert SECRET not in "".join(capsys.readouterr())


def test_addresses_without_one_are_kept() -> None:
    config = load_config("demo", ["tracking.uri=http://tracker:5000", "launch.search=postgresql://me@db:5432/optuna"])
    assert (config.tracking.uri, config.launch.search) == ("http://tracker:5000", "postgresql://me@db:5432/optuna")


def test_a_database_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"launch\.search=postgresql://me@127\.0\.0\.1:1/x: .*PGPASSWORD"):
        open_study_storage(Store(str(tmp_path)), "postgresql://me@127.0.0.1:1/x")
