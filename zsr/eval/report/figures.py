"""The plots of accuracy: clean against robust with its Pareto front, accuracy over epsilon, bars for each set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zsr.eval.report.grid import NORMS, Block, Cell, Column, Row, Sheet, group, mean_cell
from zsr.eval.report.style import Look, Looks, Plot, finish, frame, handle, legend, panels, set_title, some


def tradeoff(sheet: Sheet, blocks: Sequence[Block], looks: Looks, name: str) -> Plot | None:
    """Clean against robust accuracy, a panel for each budget, averaged over the sets; of the rows that have all of them."""
    found = [(block, points) for block in blocks if (points := _points(sheet, block))]
    if not found:
        return None
    figure, axes_list = panels(len(found), 4.2 if len(found) > 1 else 6.4, 3.6)
    said = []
    for axes, (block, points) in zip(axes_list, found):
        attack = block.attack
        assert attack is not None
        front = pareto(points)
        for row, (clean, robust) in points.items():
            _point(axes, clean, robust, looks[row])
        along = sorted((100 * points[row][0].value, 100 * points[row][1].value) for row in front)
        axes.plot(*zip(*along), color="#8c8c8c", linewidth=1, zorder=0)
        axes.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %", ylim=(0, None))
        sets = block.columns[0].label if len(block.columns) == 1 else f"mean of {len(block.columns)} sets"
        frame(axes, f"{attack.eps_text}, {sets}", "both")
        numbers = [
            f"{one.label} {_say(points[one.key][0])} clean and {_say(points[one.key][1])} robust"
            for one in sheet.rows
            if one.key in front
        ]
        said.append(f"At {attack.eps_text} ({sets}) the Pareto front has {some(numbers) or 'no row'}")
    title = f"Clean against robust accuracy, Pareto front as a line: {_without_budget(found[0][0])}"
    set_title(figure, title)
    shown = [row for row in sheet.rows if any(row.key in points for _, points in found)]
    legend(figure, [handle(row, looks[row.key]) for row in shown])
    return finish(figure, name, title, f"{title}. {'. '.join(said)}.")


def _points(sheet: Sheet, block: Block) -> dict[str, tuple[Cell, Cell]]:
    pairs = {row.key: _clean_and_robust(sheet, block, row) for row in sheet.rows}
    return {row: pair for row, pair in pairs.items() if pair}


def _point(axes: Any, clean: Cell, robust: Cell, look: Look) -> None:
    x, y = 100 * clean.value, 100 * robust.value
    axes.errorbar(x, y, xerr=_error(clean), yerr=_error(robust), color=look.color, alpha=0.35, linewidth=1)
    marker = "x" if robust.failed else look.marker
    axes.plot(x, y, color=look.color, markerfacecolor=look.fill, marker=marker, markersize=8)


def _without_budget(block: Block) -> str:
    return block.label.replace(f" {block.attack.eps_text}", "", 1) if block.attack else block.label


def pareto(points: Mapping[str, tuple[Cell, Cell]]) -> set[str]:
    """Keys of the points that no other equals or beats in both numbers while beating one; none that a check failed."""
    fair = {key: (clean.value, robust.value) for key, (clean, robust) in points.items() if not robust.failed}
    return {
        key
        for key, mine in fair.items()
        if not any(other[0] >= mine[0] and other[1] >= mine[1] and other != mine for other in fair.values())
    }


def over_epsilon(sheet: Sheet, blocks: Sequence[Block], looks: Looks, name: str) -> Plot | None:
    """Accuracy over the budgets of one attack, a panel for each set, with bands for the intervals."""
    by_set = group([column for block in blocks for column in block.columns], lambda column: column.clean_key)
    by_set = {key: columns for key, columns in by_set.items() if key in sheet.clean}
    budget = {column.key: block.attack.eps for block in blocks if block.attack for column in block.columns}
    attack = blocks[0].attack
    if attack is None or len(blocks) < 2 or not by_set:
        return None
    several = len(by_set) > 1
    figure, axes_list = panels(len(by_set) + several, 3.3 if several else 6.4, 2.7 if several else 4.0)
    drawn: dict[str, Row] = {}
    for row in sheet.rows:
        curves = []
        for columns, key in zip(by_set.values(), by_set):
            clean = sheet.clean[key].cells.get(row.key)
            attacked = {budget[column.key]: column.cells[row.key] for column in columns if row.key in column.cells}
            curves.append(({0.0: clean} if clean and attacked else {}) | dict(sorted(attacked.items())))
        if several:
            shared = set.intersection(*(set(curve) for curve in curves))
            curves.append({eps: mean_cell([curve[eps] for curve in curves]) for eps in sorted(shared)})
        for axes, curve in zip(axes_list, curves):
            if curve:
                drawn[row.key] = row
                _curve(axes, curve, looks[row.key])
    texts = {block.attack.eps: block.attack.eps_text for block in blocks if block.attack}
    names = [sheet.clean[key].label for key in by_set] + ["mean of all sets"] * several
    for axes, label in zip(axes_list, names):
        frame(axes, label)
        axes.set(xlabel=f"epsilon ({NORMS[attack.norm]})", ylabel="accuracy, %", ylim=(0, None))
        axes.set_xticks([0.0, *texts], ["clean", *texts.values()])
    title = f"Accuracy over epsilon: {_without_budget(blocks[0])}"
    set_title(figure, title)
    legend(figure, [handle(row, looks[row.key]) for row in drawn.values()])
    alt = f"{title}. One line for each of {len(drawn)} rows, from clean to {texts[max(texts)]}, on {some(names)}."
    return finish(figure, name, title, alt)


def set_bars(sheet: Sheet, block: Block, looks: Looks, name: str) -> Plot | None:
    """Robust accuracy of each row as a bar in front of its clean accuracy, a panel for each set."""
    shown = [column for column in block.columns if column.cells]
    rows = [row for row in sheet.rows if any(row.key in column.cells for column in shown)]
    if not rows:
        return None
    figure, axes_list = panels(len(shown), 3.6 if len(shown) > 1 else 6.4, 0.22 * len(rows) + 0.9)
    for axes, column in zip(axes_list, shown):
        _bars(axes, rows, column, sheet.clean.get(column.clean_key), looks)
    title = f"Accuracy by set: {block.label}"
    set_title(figure, title)
    from matplotlib.patches import Patch

    legend(figure, [Patch(color="#8c8c8c", label="robust, with 95 % interval"),
                    Patch(color="#8c8c8c", alpha=0.25, label="clean")])  # fmt: skip
    leaders = [f"{column.label}: highest {_leader(rows, column)}" for column in shown]
    return finish(figure, name, title, f"{title}. Bars for {len(rows)} rows. {some(leaders)}.")


def _bars(axes: Any, rows: Sequence[Row], column: Column, clean: Column | None, looks: Looks) -> None:
    for place, row in enumerate(rows):
        color, cell = looks[row.key].color, column.cells.get(row.key)
        before = clean.cells.get(row.key) if clean else None
        if cell is None:
            axes.text(0.5, place, "not measured", va="center", fontsize=7, alpha=0.7)
            continue
        if before:
            axes.barh(place, 100 * before.value, color=color, alpha=0.25, height=0.75)
        hatch = "///" if looks[row.key].hollow else None
        axes.barh(place, 100 * cell.value, height=0.75, color=looks[row.key].fill, edgecolor=color, hatch=hatch)
        axes.errorbar(100 * cell.value, place, xerr=_error(cell), color="#8c8c8c", linewidth=1, capsize=2)
        if cell.failed:
            axes.text(100 * cell.high + 1, place, "check failed", va="center", fontsize=7, color="#d55e00")
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set(xlabel="accuracy, %", xlim=(0, None), ylim=(len(rows) - 0.4, -0.6))
    frame(axes, column.label, "x")


def _curve(axes: Any, curve: Mapping[float, Cell], look: Look) -> None:
    eps, cells = list(curve), list(curve.values())
    axes.fill_between(eps, [100 * cell.low for cell in cells], [100 * cell.high for cell in cells],
                      color=look.color, alpha=0.12, linewidth=0)  # fmt: skip
    axes.plot(eps, [100 * cell.value for cell in cells], color=look.color, linestyle=look.line, linewidth=1.6,
              marker=look.marker, markersize=4, markerfacecolor=look.fill)  # fmt: skip
    for x, cell in curve.items():
        if cell.failed:
            axes.plot(x, 100 * cell.value, color=look.color, marker="x", markersize=10)


def _clean_and_robust(sheet: Sheet, block: Block, row: Row) -> tuple[Cell, Cell] | None:
    cleans = [
        sheet.clean[column.clean_key].cells.get(row.key) for column in block.columns if column.clean_key in sheet.clean
    ]
    robusts = [column.cells.get(row.key) for column in block.columns]
    both = [cell for cell in cleans if cell], [cell for cell in robusts if cell]
    if not len(both[0]) == len(both[1]) == len(robusts):
        return None
    return mean_cell(both[0]), mean_cell(both[1])


def _error(cell: Cell) -> list[list[float]]:
    return [[100 * (cell.value - cell.low)], [100 * (cell.high - cell.value)]]


def _leader(rows: Sequence[Row], column: Column) -> str:
    fair = [
        (column.cells[row.key].value, row)
        for row in rows
        if row.key in column.cells and not column.cells[row.key].failed
    ]
    return f"{max(fair, key=lambda one: one[0])[1].label}" if fair else "none that passed its checks"


def _say(cell: Cell) -> str:
    return f"{100 * cell.value:.1f} %"
