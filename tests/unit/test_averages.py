"""Averages over sets: one definition, which the printed table and the report both follow."""

from __future__ import annotations

import re

import pytest
from card_factory import make_card

from zsr.attacks.checks import Finding
from zsr.cli.eval_table import show_cards
from zsr.data.suite import load_suite
from zsr.eval.averages import averages_of
from zsr.eval.card import ResultCard
from zsr.eval.report.grid import make_rows, make_sheets
from zsr.eval.report.marks import mark_sheet

Means = dict[tuple[str, str, str], str]
"""A mean as printed, by row, label of the average, and column."""


def card(
    model: str, key: str, robust: int | None, eps: int = 4, trained_on: str | None = None, **rest: object
) -> ResultCard:
    suite = rest.pop("suite", None)
    data = {"chance_level": key in ("pcam", "eurosat")}
    made = make_card(model, key, robust, eps=eps, protocol={"suite": suite}, data=data, **rest)  # type: ignore[arg-type]
    return made.model_copy(update={"model": made.model.model_copy(update={"trained_on": trained_on})})


def printed(cards: list[ResultCard], suite: str | None, capsys: pytest.CaptureFixture[str]) -> Means:
    capsys.readouterr()
    show_cards(cards, None if suite is None else load_suite(suite))
    found: Means = {}
    model, header = "", [""]
    for line in capsys.readouterr().out.splitlines():
        if ": accuracy in %" in line:
            model = line.split(":")[0]
        cells = [cell.strip() for cell in re.split("[┃│]", line)][1:-1]
        if cells[:1] == ["set"]:
            header = cells
        if cells and cells[0].startswith("mean of"):
            named = dict(zip(header, cells, strict=True))
            shield = named.get("defence", "none")
            row = model if shield == "none" else f"{model} + {shield}"
            for column in header[header.index("chance") + 1 :]:
                if named[column]:
                    found[row, cells[0], column.removeprefix("linf ")] = named[column]
    return found


def reported(cards: list[ResultCard]) -> Means:
    rows, row_of = make_rows(cards)
    (sheet,) = make_sheets(cards, rows, row_of)
    mark_sheet(sheet, None)
    labels = {row.key: row.label for row in sheet.rows}
    return {
        (labels[row], average.label, column_name(block.label)): f"{100 * cell.value:.1f}" + " !" * bool(cell.failed)
        for block in sheet.blocks
        for average in block.averages
        for row, cell in average.cells.items()
    }


def column_name(block: str) -> str:
    if block == "clean":
        return block
    return block.split("L-inf ")[1].replace(", attack does not know the defence", " oblivious")


def test_the_table_and_the_report_give_the_same_averages(capsys: pytest.CaptureFixture[str]) -> None:
    imagenet = "s3://bucket/imagenet/train"
    numbers = {"cifar10": 30, "pcam": 90, "imagenet": 60, "dtd": 21}
    for suite in (None, "tga16", "fare13"):
        cards = [
            card(model, key, number + eps, eps, imagenet if model == "tuned" else None, suite=suite)
            for model in ("tuned", "plain")
            for key, number in numbers.items()
            for eps in (1, 4)
        ]
        # The second budget lacks a set, and so does the first model's defence; the second model's has all of them.
        cards = [
            one for one in cards if not (one.dataset.key == "pcam" and one.attack and one.attack.eps_text == "4/255")
        ]
        blind = {"attack": {"knowledge": "oblivious"}, "defense": "ttc", "suite": suite}
        cards += [card("tuned", key, 50, 1, imagenet, **blind) for key in ("cifar10", "pcam", "imagenet")]
        cards += [card("plain", key, 70, 1, **blind) for key in numbers]
        table = printed(cards, suite, capsys)
        assert table == reported(cards)
        assert {(row, column) for row, label, column in table if ", " not in label} == {
            ("tuned", "clean"), ("tuned", "1/255"), ("plain", "clean"), ("plain", "1/255"),
            ("plain + ttc", "clean"), ("plain + ttc", "1/255 oblivious"),
        }  # fmt: skip
        if suite is None:
            assert table["plain", "mean of 4", "1/255"] == "51.2"  # (31 + 91 + 61 + 22) / 4 = 51.25, printed to even
            assert table["plain", "mean of 3, without chance level", "1/255"] == "38.0"  # (31 + 61 + 22) / 3
            assert table["plain", "mean of 3, without training set", "1/255"] == "48.0"  # (31 + 91 + 22) / 3
            assert table["plain", "mean of 2, without both", "1/255"] == "26.5"
            # The second budget has all the sets of an average that leaves out the one it lacks.
            assert table["plain", "mean of 3, without chance level", "4/255"] == "41.0"
            assert ("plain", "mean of 3, without training set", "4/255") not in table
        if suite == "tga16":  # 16 sets, one of them the model's training set and one the paper's
            labels = [
                "mean of 4 of 16",
                "mean of 3 of 14, without chance level",
                "mean of 3 of 14, without training set",
            ]
            assert {*labels, "mean of 2 of 12, without both"} == {label for _, label, _ in table}
        if suite == "fare13":  # which has no imagenet
            assert table["tuned", "mean of 3 of 13", "1/255"] == "48.0"
            assert {label for _, label, _ in table} == {"mean of 3 of 13", "mean of 2 of 11, without chance level"}


def test_a_failed_check_marks_the_average_in_both(capsys: pytest.CaptureFixture[str]) -> None:
    failed = Finding(id="zero-gradients", level="fail", sentence="all")
    cards = [card("a", "pets", 20), card("a", "cars", 40, checks=[failed])]
    assert printed(cards, None, capsys)["a", "mean of 2", "4/255"] == "30.0 !"
    assert printed(cards, None, capsys) == reported(cards)


def test_a_protocols_own_averages_are_taken() -> None:
    suite = load_suite("shipped")
    cards = [card("a", one.key, 50, suite="shipped") for one in suite.datasets if one.key != "fashion_mnist"]
    found = {average.label: average.over for average in averages_of(cards, suite)}
    assert list(found) == ["mean of 7 of 8", "mean of 3, embedded", "mean of 2 of 3, not emoji"]
    assert found["mean of 3, embedded"] == ("emoji_test_style", "emoji_test_concepts", "emoji_test_both")
    assert averages_of(cards[:1], suite) == []


@pytest.mark.parametrize(
    ("address", "out"),
    [
        (None, ["tiny_imagenet"]),  # the protocol's
        ("/data/coco/train", ["tiny_imagenet"]),
        ("s3://bucket/imagenet/train", ["imagenet"]),
        ("/data/imagenet_like/train", ["tiny_imagenet"]),
        ("cifar10", ["cifar10"]),
    ],
)
def test_a_models_training_set_is_read_from_its_address(address: str | None, out: list[str]) -> None:
    suite = load_suite("tga16")
    cards = [card("a", one.key, 50, trained_on=address, suite="tga16") for one in suite.datasets]
    found = {average.name: average.over for average in averages_of(cards, suite)}
    assert [key for key in found["all"] if key not in found["without_training_set"]] == out
