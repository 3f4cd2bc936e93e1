"""What a sheet says beyond its numbers: averages over sets, the best of a column, distance to a baseline, notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zsr.data.suite import Suite, load_suite, suite_names
from zsr.eval.averages import Average, averages_of
from zsr.eval.report.grid import Block, Cell, Column, Sheet, group, mean_cell, set_label


def mark_sheet(sheet: Sheet, baseline: str | None) -> None:
    """Add averages, marks, differences and notes.

    Args:
        baseline: label of a row; a sheet that has not got it goes without differences.
    """
    suite = load_suite(sheet.protocol.suite) if sheet.protocol.suite in suite_names() else None
    _order_sets(sheet, suite)
    averages = averages_of(sheet.cards, suite)
    lacking: dict[str, Mapping[str, tuple[str, ...]]] = {}
    base = next((row.key for row in sheet.rows if row.label == baseline), None)
    for block in sheet.blocks:
        means = _average_columns(block, sheet, averages)
        block.averages = [column for column in means if column.cells]
        lacking[block.label] = means[0].missing if means else {}  # the others leave sets out, so they lack no more
        for column in block.leaves:
            _mark_best(list(column.cells.values()))
            if base in column.cells:
                for row, cell in column.cells.items():
                    cell.delta = None if row == base else cell.value - column.cells[base].value
    sheet.notes = _notes(sheet, suite, lacking)


def _order_sets(sheet: Sheet, suite: Suite | None) -> None:
    order = {data.key: place for place, data in enumerate(suite.datasets)} if suite else {}
    for block in sheet.blocks:
        block.columns.sort(key=lambda column: order.get(column.dataset.key if column.dataset else "", len(order)))


def _average_columns(block: Block, sheet: Sheet, averages: Sequence[Average]) -> list[Column]:
    if len(block.columns) < 2 or twice(block):
        return []
    labels = {card.dataset.key: set_label(card.dataset) for card in reversed(sheet.cards)}
    columns = []
    for average in averages:
        column = Column(f"{block.key}-{average.name}", average.label, None, "", average.name)
        for row in sheet.rows:
            here = {
                one.dataset.key: one.cells[row.key] for one in block.columns if one.dataset and row.key in one.cells
            }
            found, missing = average.take(here), average.missing(here)
            if found is not None:
                column.cells[row.key] = mean_cell(found)
            elif len(missing) < len(average.over):
                column.missing[row.key] = tuple(labels[key] for key in missing)
        columns.append(column)
    return columns


def twice(block: Block) -> list[str]:
    """Sets that stand in more than one column of a block, as another split, other samples, classes or prompts."""
    sets = group((column.dataset for column in block.columns if column.dataset), lambda data: data.key)
    return [found[0].key for found in sets.values() if len(found) > 1]


def _mark_best(cells: Sequence[Cell]) -> None:
    """Mark the best and all whose interval touches its; none where that would be all, which tells nothing."""
    fair = [cell for cell in cells if not cell.failed]
    if len(fair) > 1:
        best = max(fair, key=lambda cell: cell.value)
        near = [cell for cell in fair if cell.high >= best.low]
        for cell in near if len(near) < len(fair) else []:
            cell.best = True


def _notes(sheet: Sheet, suite: Suite | None, lacking: Mapping[str, Mapping[str, tuple[str, ...]]]) -> list[str]:
    """What has to be said of the averages.

    Args:
        lacking: by block and row, the sets for want of which there is none.
    """
    notes = []
    labels = {row.key: row.label for row in sheet.rows}
    unknown: dict[tuple[str, str], list[str]] = {}
    for block in sheet.blocks:
        if same := twice(block):
            notes.append(
                f"{block.label}: no average, since {', '.join(same)} stands in several columns (another split, other "
                "samples, classes or prompts), which must not be mixed."
            )
        for row, missing in lacking[block.label].items():
            unknown.setdefault((labels[row], ", ".join(missing)), []).append(block.label)
    for (label, names), blocks in unknown.items():
        notes.append(f"{label}: no average over all sets, since {names} was not measured ({'; '.join(blocks)}).")
    here = {card.dataset.key for card in sheet.cards}
    absent = [data.key for data in suite.datasets if data.key not in here] if suite else []
    if absent:
        notes.append(
            f"{len(absent)} of the {len(suite.datasets if suite else [])} sets of {sheet.title} are not in these cards, nor "
            f"in the averages: {', '.join(absent)}."
        )
    return notes
