"""What a sheet says beyond its numbers: averages over sets, the best of a column, distance to a baseline, notes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from zsr.data.suite import Suite, load_suite, suite_names
from zsr.eval.report.grid import Block, Cell, Column, Row, Sheet, group, mean_cell


def mark_sheet(sheet: Sheet, baseline: str | None) -> None:
    """Add averages, marks, differences and notes.

    Args:
        baseline: label of a row; a sheet that has not got it goes without differences.
    """
    suite = load_suite(sheet.protocol.suite) if sheet.protocol.suite in suite_names() else None
    _order_sets(sheet, suite)
    trained_on = _training_sets(sheet, suite)
    base = next((row.key for row in sheet.rows if row.label == baseline), None)
    for block in sheet.blocks:
        block.averages = _averages(block, sheet.rows, trained_on)
        for column in block.leaves:
            _mark_best(list(column.cells.values()))
            if base in column.cells:
                for row, cell in column.cells.items():
                    cell.delta = None if row == base else cell.value - column.cells[base].value
    sheet.notes = _notes(sheet, suite)


def _order_sets(sheet: Sheet, suite: Suite | None) -> None:
    order = {data.key: place for place, data in enumerate(suite.datasets)} if suite else {}
    for block in sheet.blocks:
        block.columns.sort(key=lambda column: order.get(column.dataset.key if column.dataset else "", len(order)))


def _training_sets(sheet: Sheet, suite: Suite | None) -> set[str]:
    """Keys of the sets that a model of the sheet was trained on, so that all rows leave the same ones out."""
    named = {card.model.trained_on or "" for card in sheet.cards} | {(suite and suite.protocol.training_set) or ""}
    parts = {part for name in named for part in [name, *re.split(r"[/:]+", name)] if part}
    return parts & {card.dataset.key for card in sheet.cards}


def _averages(block: Block, rows: Sequence[Row], trained_on: set[str]) -> list[Column]:
    if len(block.columns) < 2 or twice(block):
        return []
    chance = {column.key for column in block.columns if column.dataset and column.dataset.chance_level}
    trained = {column.key for column in block.columns if column.dataset and column.dataset.key in trained_on}
    wanted = {"all": set[str](), "without chance-level": chance, "without training set": trained}
    if chance and trained:
        wanted["without both"] = chance | trained
    averages = []
    for name, out in wanted.items():
        over = [column for column in block.columns if column.key not in out]
        if (name != "all" and not out) or len(over) < 2:
            continue
        average = Column(f"{block.key}-{name}", f"mean of {len(over)}" + f", {name}" * bool(out), None, "", name)
        for row in rows:
            missing = tuple(column.label for column in over if row.key not in column.cells)
            if not missing:
                average.cells[row.key] = mean_cell([column.cells[row.key] for column in over])
            elif len(missing) < len(over):
                average.missing[row.key] = missing
        averages.append(average)
    return averages


def twice(block: Block) -> list[str]:
    """Sets that stand in more than one column of a block, as other samples, classes or prompts."""
    sets = group((column.dataset for column in block.columns if column.dataset), lambda data: data.key + data.split)
    return [found[0].key for found in sets.values() if len(found) > 1]


def _mark_best(cells: Sequence[Cell]) -> None:
    """Mark the best and all whose interval touches its; none where that would be all, which tells nothing."""
    fair = [cell for cell in cells if not cell.failed]
    if len(fair) > 1:
        best = max(fair, key=lambda cell: cell.value)
        near = [cell for cell in fair if cell.high >= best.low]
        for cell in near if len(near) < len(fair) else []:
            cell.best = True


def _notes(sheet: Sheet, suite: Suite | None) -> list[str]:
    notes = []
    labels = {row.key: row.label for row in sheet.rows}
    lacking: dict[tuple[str, str], list[str]] = {}
    for block in sheet.blocks:
        if same := twice(block):
            notes.append(
                f"{block.label}: no average, since {', '.join(same)} stands in several columns (other samples, classes or "
                "prompts), which must not be mixed."
            )
        for average in block.averages[:1]:  # the others leave sets out, so they lack no more than the first
            for row, missing in average.missing.items():
                lacking.setdefault((labels[row], ", ".join(missing)), []).append(block.label)
    for (label, names), blocks in lacking.items():
        notes.append(f"{label}: no average over all sets, since {names} was not measured ({'; '.join(blocks)}).")
    here = {card.dataset.key for card in sheet.cards}
    absent = [data.key for data in suite.datasets if data.key not in here] if suite else []
    if absent:
        notes.append(
            f"{len(absent)} of the {len(suite.datasets if suite else [])} sets of {sheet.title} are not in these cards, nor "
            f"in the averages: {', '.join(absent)}."
        )
    return notes
