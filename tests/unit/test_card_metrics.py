"""Cards on a run: every number arrives, under a name of its own, once. The records on disk say what a server would get."""

from __future__ import annotations

from pathlib import Path

import pytest
from card_factory import make_card, store

from zsr.attacks.checks import Finding
from zsr.cli.eval_tracking import card_metrics, record_cards, spool_folder
from zsr.config.schema import TrackingConfig
from zsr.eval.card import ResultCard
from zsr.tracking import make_tracker
from zsr.tracking.spool import history


def record(run: Path, results: Path, *cards: ResultCard) -> dict[str, list[float]]:
    """The values of each metric after these cards were recorded on a run."""
    store(list(cards), results)
    paths = [(next(results.rglob(f"{card.id}.card.json")), card) for card in cards]
    record_cards(make_tracker(TrackingConfig(name="jsonl"), run_name="r", key={"run": "r"}, folder=run), paths)
    return {name: [value for _, value in curve] for name, curve in history(run).items()}


@pytest.mark.parametrize(
    "other",
    [
        {"attack": {"settings": {"steps": 10}}},
        {"attack": {"norm": "l2"}},
        {"attack": {"knowledge": "oblivious"}},
        {"data": {"subset_digest": "others"}},
        {"protocol": {"precision": "bf16"}},
        {"seed": 1},
        {"defense": "ttc"},
    ],
)
def test_numbers_that_may_not_share_a_column_share_no_metric(other: dict[str, object]) -> None:
    one, two = make_card(robust=40), make_card(robust=30, **other)  # type: ignore[arg-type]
    robust = [{name for name, value in card_metrics(card).items() if "/autoattack-" in name} for card in (one, two)]
    assert len(robust[0]) == 3 and not robust[0] & robust[1]  # the number, and one after each stage


def test_no_card_is_dropped_for_its_second_or_its_age(tmp_path: Path) -> None:
    moments = ("2026-01-01T00:00:05Z", "2026-01-01T00:00:05Z", "2026-01-01T00:00:01Z")
    cards = [
        make_card(robust=number, weights=f"w{number}", created=created)
        for number, created in zip((40, 30, 20), moments, strict=True)
    ]
    (key,) = {
        name for card in cards for name in card_metrics(card) if card.column[:6] in name and "-after-" not in name
    }
    assert record(tmp_path / "run", tmp_path, *cards[:2])[key] == [0.4, 0.3]
    assert record(tmp_path / "run", tmp_path, cards[2])[key] == [0.4, 0.3, 0.2]  # older, and comes later
    again = record(tmp_path / "run", tmp_path, *cards)
    assert again[key] == [0.4, 0.3, 0.2]
    assert all(values == [0.8] for name, values in again.items() if "/clean-" in name)


def test_survivors_and_levels_of_checks_are_recorded(tmp_path: Path) -> None:
    found = [Finding(id="black-box", level="fail", sentence="s"), Finding(id="tie", level="ok", sentence="s")]
    card = make_card(robust=40, checks=found)
    curves = record(tmp_path / "run", tmp_path, card)
    assert {name.rsplit("-check-")[1]: values for name, values in curves.items() if "-check-" in name} == {
        "black-box": [3.0],
        "tie": [0.0],
    }
    assert {name.rsplit("-after-")[1]: values for name, values in curves.items() if "-after-" in name} == {
        "apgd-ce": [0.45],
        "square": [0.4],
    }


def test_what_one_run_was_sent_does_not_count_for_another(tmp_path: Path) -> None:
    servers = ("sqlite:///one.db", "sqlite:///two.db")
    assert len({spool_folder(name, "model", "abc", uri, tmp_path) for name in ("A", "B") for uri in servers}) == 4
