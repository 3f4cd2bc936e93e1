"""What a report says: who may share a column, several cards in one cell, averages, marks."""

from __future__ import annotations

import math
import statistics

import pytest
from card_factory import make_card

from zsr.attacks.checks import Finding
from zsr.eval.card import Cost, ResultCard
from zsr.eval.report.effort import cost_lines
from zsr.eval.report.figures import pareto
from zsr.eval.report.grid import Cell, Sheet, make_rows, make_sheets
from zsr.eval.report.marks import mark_sheet


def sheets_of(*cards: ResultCard, baseline: str | None = None) -> list[Sheet]:
    rows, row_of = make_rows(cards)
    sheets = make_sheets(cards, rows, row_of)
    for sheet in sheets:
        mark_sheet(sheet, baseline)
    return sheets


def cell(sheet: Sheet, row: str, column: str, block: int = 1) -> Cell | None:
    key = next(one.key for one in sheet.rows if one.label == row)
    return next(leaf for leaf in sheet.blocks[block].leaves if leaf.label == column).cells.get(key)


def test_protocols_have_sheets_of_their_own() -> None:
    mixed = [
        make_card("a"),
        make_card("a", protocol={"resolution": "native"}),
        make_card("a", protocol={"suite": "tga16"}),
    ]
    sheets = sheets_of(*mixed)
    assert len(sheets) == len({sheet.title for sheet in sheets}) == 3
    assert [len(sheet.cards) for sheet in sheets] == [1, 1, 1]


@pytest.mark.parametrize(
    "other",
    [
        {"data": {"subset_digest": "others"}},
        {"data": {"templates_digest": "others"}},
        {"attack": {"settings": {"steps": 10}}},
        {"attack": {"knowledge": "oblivious"}},
        {"eps": 2},
    ],
)
def test_what_differs_never_shares_a_column(other: dict[str, object]) -> None:
    cards = [make_card("a"), make_card("b"), make_card("b", **other)]  # type: ignore[arg-type]
    (sheet,) = sheets_of(*cards)
    columns = [column for block in sheet.blocks[1:] for column in block.columns]
    assert sorted(len(column.cells) for column in columns) == [1, 2]
    heads = [(block.label, column.label) for block in sheet.blocks[1:] for column in block.columns]
    assert len(set(heads)) == 2, "a reader could not tell the columns apart"


def test_seeds_become_mean_and_spread_and_no_card_is_lost() -> None:
    (sheet,) = sheets_of(*(make_card("a", robust=number, seed=seed) for seed, number in enumerate((30, 40, 44))))
    found = cell(sheet, "a", "pets")
    assert found is not None and (found.num_cards, found.seeds) == (3, (0, 1, 2))
    assert math.isclose(found.value, 0.38) and math.isclose(found.spread or 0, statistics.stdev([0.30, 0.40, 0.44]))
    single = make_card("a", robust=30).robust, make_card("a", robust=44).robust
    assert single[0] and single[1] and (found.low, found.high) == (single[0].low, single[1].high)


def test_clean_accuracy_is_one_measurement_whatever_the_attacks() -> None:
    (sheet,) = sheets_of(make_card("a", eps=1), make_card("a", eps=4), make_card("a", robust=None))
    (column,) = sheet.blocks[0].columns
    (found,) = column.cells.values()
    assert (found.value, found.num_cards, found.spread) == (0.8, 1, None)


def test_rows_tell_weights_and_defences_apart_but_not_a_defences_seed() -> None:
    cards = [make_card("a", weights="x1"), make_card("a", weights="y2"), make_card("a", weights="x1", defense="ttc"),
             make_card("a", weights="x1", defense="ttc", seed=1)]  # fmt: skip
    rows, row_of = make_rows(cards)
    assert [row.label for row in rows] == ["a (x1)", "a (x1) + ttc", "a (y2)"]
    assert row_of[cards[2].id] == row_of[cards[3].id]


def test_an_average_needs_all_of_its_sets() -> None:
    chance = {"chance_level": True}
    cards = [make_card("a", name, number) for name, number in (("pets", 30), ("cars", 50))]
    cards += [make_card("a", "pcam", 70, data=chance), make_card("b", "pets", 20), make_card("b", "cars", 10)]
    (sheet,) = sheets_of(*cards)
    everything, without = "mean of 3", "mean of 2, without chance level"
    found = cell(sheet, "a", everything)
    assert found and math.isclose(found.value, 0.5)
    assert cell(sheet, "b", everything) is None
    assert [cell(sheet, row, without).value for row in "ab"] == pytest.approx([0.4, 0.15])  # type: ignore[union-attr]
    assert any(note.startswith("b: no average") and "pcam" in note for note in sheet.notes)


def test_the_training_set_leaves_an_average() -> None:
    cards = [make_card("a", name, number) for name, number in (("imagenet", 90), ("cars", 50), ("pets", 30))]
    trained = cards[0].model.model_copy(update={"trained_on": "s3://bucket/imagenet/train"})
    (sheet,) = sheets_of(*(card.model_copy(update={"model": trained}) for card in cards))
    found = cell(sheet, "a", "mean of 2, without training set")
    assert found and math.isclose(found.value, 0.4)


def test_one_set_in_two_columns_is_not_averaged() -> None:
    cards = [make_card("a", "pets"), make_card("a", "pets", data={"subset_digest": "others"}), make_card("a", "cars")]
    (sheet,) = sheets_of(*cards)
    assert not any(block.averages for block in sheet.blocks)
    assert any("pets stands in several columns" in note for note in sheet.notes)


def test_the_interval_of_an_average_is_narrower_than_its_sets() -> None:
    (sheet,) = sheets_of(make_card("a", "pets", 50), make_card("a", "cars", 50))
    mean, one = cell(sheet, "a", "mean of 2"), cell(sheet, "a", "pets")
    assert mean and one and math.isclose(mean.high - mean.low, (one.high - one.low) / math.sqrt(2))


def test_best_goes_to_all_that_cannot_be_told_from_it_and_to_none_where_that_is_all() -> None:
    def best(*numbers: int) -> list[bool]:
        (sheet,) = sheets_of(
            *(make_card(f"m{n}", robust=number, total=1000, clean=900) for n, number in enumerate(numbers))
        )
        return [cell(sheet, f"m{n}", "pets").best for n in range(len(numbers))]  # type: ignore[union-attr]

    assert best(500, 490, 300) == [True, True, False]
    assert best(500, 490) == [False, False]
    assert best(500, 300) == [True, False]


def test_what_failed_a_check_is_neither_best_nor_on_the_front() -> None:
    failed = Finding(id="zero-gradients", level="fail", sentence="none")
    cards = [
        make_card("masked", robust=700, checks=[failed], total=1000, clean=900),
        make_card("good", robust=500, total=1000, clean=900),
        make_card("bad", robust=300, total=1000, clean=900),
    ]
    (sheet,) = sheets_of(*cards)
    found = {row: cell(sheet, row, "pets") for row in ("masked", "good", "bad")}
    assert [one.best for one in found.values() if one] == [False, True, False]
    assert found["masked"] and found["masked"].failed == ("zero-gradients",)
    clean = cell(sheet, "masked", "pets", block=0)
    assert clean and not clean.failed
    points = {name: (clean, one) for name, one in found.items() if one}
    assert pareto(points) == {"good"}


def test_differences_to_the_baseline() -> None:
    (sheet,) = sheets_of(make_card("a", robust=40), make_card("b", robust=55), baseline="a")
    assert [cell(sheet, row, "pets").delta for row in "ab"] == [None, pytest.approx(0.15)]  # type: ignore[union-attr]


def test_what_cards_repeat_is_counted_once_and_what_rows_share_is_split() -> None:
    def card(seconds: float, passes: int, eps: int, defense: str | None, dataset: str = "pets") -> ResultCard:
        made = make_card("a", dataset, eps=eps, defense=defense)
        clean = {"clean_seconds": 6, "clean_passes": 600} if defense else {"clean_seconds": 1, "clean_passes": 100}
        cost = Cost(
            seconds=seconds, images_per_s=1, encoder_passes=passes, device="cpu", shared_by=2,
            probe_seconds=0 if defense else 4, probe_passes=0 if defense else 40, **clean,
        )  # fmt: skip
        return made.model_copy(update={"cost": cost})

    # Two budgets, each from one run of the attack of 20 s and 2000 passes that gave the card of both rows.
    cards = [card(21, 2100, eps, None) for eps in (1, 4)] + [card(26, 2600, eps, "ttc") for eps in (1, 4)]
    rows, row_of = make_rows(cards)
    bare, behind = cost_lines(cards, rows, row_of)
    assert (bare.seconds, bare.encoder_passes) == (1 + 2 * (10 + 4), 100 + 2 * (1000 + 40))
    assert (behind.seconds, behind.encoder_passes) == (6 + 2 * 10, 600 + 2 * 1000)
    assert bare.seconds + behind.seconds == 1 + 6 + 2 * 20 + 2 * 4  # what was done in fact
    # Another set has clean predictions of its own; a card from before says nothing, and gives all that it has.
    more = [*cards, card(21, 2100, 1, None, "cars"), make_card("a", "cars", eps=4)]
    rows, row_of = make_rows(more)
    assert cost_lines(more, rows, row_of)[0].seconds == bare.seconds + (1 + 10 + 4) + 12.5
