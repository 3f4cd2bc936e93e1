"""The plots of accuracy: clean against robust with its Pareto front, accuracy over epsilon, bars for each set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zsr.eval.report.grid import NORMS, Block, Cell, Column, Row, Sheet, group, mean_cell
from zsr.eval.report.style import Look, Looks, Plot, finish, frame, handle, legend, panels, set_title, some


def tradeoff(sheet: Sheet, blocks: Sequence[Block], looks: Looks, name: str) -> Plot | None:
    """Clean against robust accuracy, a panel for each budget, averaged over the sets; of the rows that have all of them."""
    found = [(block, points) for block in blocks if (points := _points(sheet, block))]
    if not found or max(len(points) for _, points in found) < 2:
        return None
    figure, axes_list = panels(len(found), 3.7 if len(found) > 1 else 6.4, 3.6)
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
    by_set = _by_set(sheet, blocks)
    budgets = [block.attack.eps for block in blocks if block.attack]
    attack = blocks[0].attack
    if attack is None or len(blocks) < 2 or not by_set:
        return None
    several = len(by_set) > 1
    figure, axes_list = panels(len(by_set) + several, 3.3 if several else 6.4, 2.7 if several else 4.0)
    drawn: dict[str, Row] = {}
    for row in sheet.rows:
        curves = []
        for key, columns in by_set.items():
            clean = sheet.clean[key].cells.get(row.key)
            attacked = {budgets[place]: column.cells[row.key] for place, column in columns if row.key in column.cells}
            curves.append(({0.0: clean} if clean and attacked else {}) | attacked)
        if several:
            shared = set.intersection(*(set(curve) for curve in curves))
            curves.append({eps: mean_cell([curve[eps] for curve in curves]) for eps in sorted(shared)})
        for axes, curve in zip(axes_list, curves):
            if curve:
                drawn[row.key] = row
                _curve(axes, curve, looks[row.key])
    texts = {block.attack.eps: block.attack.eps_text for block in blocks if block.attack}
    names = [sheet.clean[key].label for key in by_set] + [f"mean of {len(by_set)} sets, where all are known"] * several
    for axes, label in zip(axes_list, names):
        frame(axes, label)
        axes.set(xlabel=f"epsilon ({NORMS[attack.norm]})", ylabel="accuracy, %", ylim=(0, None))
        axes.set_xticks([0.0, *texts], ["clean", *texts.values()], rotation=60 if len(texts) > 3 else 0)
    title = f"Accuracy over epsilon: {_without_budget(blocks[0])}"
    set_title(figure, title)
    legend(figure, [handle(row, looks[row.key]) for row in drawn.values()])
    alt = f"{title}. One line for each of {len(drawn)} rows, from clean to {texts[max(texts)]}, on {some(names)}."
    return finish(figure, name, title, alt)


def set_bars(sheet: Sheet, blocks: Sequence[Block], looks: Looks, name: str) -> Plot | None:
    """Each row's accuracy as bars, a panel for each set: one bar in front of the other, clean first, then larger budgets."""
    by_set = _by_set(sheet, blocks)
    present = {row for columns in by_set.values() for _, column in columns for row in column.cells}
    rows = [row for row in sheet.rows if row.key in present]
    if not rows:
        return None
    figure, axes_list = panels(len(by_set), 3.3 if len(by_set) > 1 else 6.4, 0.24 * len(rows) + 0.9)
    shades = [(place + 2) / (len(blocks) + 1) for place in range(len(blocks))]
    for axes, (key, columns) in zip(axes_list, by_set.items()):
        _bars(axes, rows, sheet.clean[key], [(shades[place], column) for place, column in columns], looks)
    title = f"Accuracy by set: {_without_budget(blocks[0])}"
    set_title(figure, title)
    from matplotlib.patches import Patch

    texts = [block.attack.eps_text for block in blocks if block.attack]
    legend(
        figure,
        [Patch(color="#8c8c8c", alpha=shade, label=text) for shade, text in zip([0.2, *shades], ["clean", *texts])],
    )
    leaders = [f"{sheet.clean[key].label}: {_leader(rows, columns[-1][1])}" for key, columns in by_set.items()]
    alt = (
        f"{title}. Bars for {len(rows)} rows, clean and at {', '.join(texts)}. Highest at the largest: {some(leaders)}."
    )
    return finish(figure, name, title, alt)


def _by_set(sheet: Sheet, blocks: Sequence[Block]) -> dict[str, list[tuple[int, Column]]]:
    """By a set's clean column: its columns in these blocks, with the block's place."""
    found = [(place, column) for place, block in enumerate(blocks) for column in block.columns]
    by_set = group(found, lambda one: one[1].clean_key)
    return {key: by_set[key] for key in sheet.clean if key in by_set}


def _bars(
    axes: Any, rows: Sequence[Row], clean: Column, attacked: Sequence[tuple[float, Column]], looks: Looks
) -> None:
    for place, row in enumerate(rows):
        bars = [(shade, cell) for shade, column in [(0.2, clean), *attacked] if (cell := column.cells.get(row.key))]
        if len(bars) < 2:
            axes.text(0.5, place, "not measured", va="center", fontsize=7, alpha=0.7)
            continue
        ends = [*(100 * cell.value for _, cell in bars[1:]), 0.0]
        for (shade, cell), end in zip(bars, ends):  # a bar stops where the next begins: shades must not add up
            axes.barh(place, 100 * cell.value - end, left=end, height=0.75, color=looks[row.key].color, alpha=shade)
        for _, cell in bars:
            error = {"color": "#6b6b6b", "linewidth": 0.8, "capsize": 1.5, "alpha": 0.8}
            axes.errorbar(100 * cell.value, place, xerr=_error(cell), marker="x" if cell.failed else "", **error)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set(xlabel="accuracy, %", xlim=(0, None), ylim=(len(rows) - 0.4, -0.6))
    frame(axes, clean.label, "x")


def _curve(axes: Any, curve: Mapping[float, Cell], look: Look) -> None:
    eps, cells = list(curve), list(curve.values())
    axes.fill_between(eps, [100 * cell.low for cell in cells], [100 * cell.high for cell in cells],
                      color=look.color, alpha=0.12, linewidth=0)  # fmt: skip
    axes.plot(eps, [100 * cell.value for cell in cells], color=look.color, linestyle=look.line, linewidth=1.6, clip_on=False,
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
