"""All that a report says, before any format: sheets, plots, costs, findings, example images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zsr.attacks.checks import LEVELS, Finding
from zsr.eval.card import ResultCard, find_cards
from zsr.eval.report.effort import CostLine, cost_lines, cost_plot, survivors
from zsr.eval.report.examples import Examples, find_examples, pick_examples
from zsr.eval.report.figures import over_epsilon, set_bars, tradeoff
from zsr.eval.report.grid import Row, Sheet, group, make_rows, make_sheets, set_label
from zsr.eval.report.marks import mark_sheet
from zsr.eval.report.style import Looks, Plot, looks


@dataclass(frozen=True)
class Place:
    """Where a check found something."""

    row: str
    where: str
    finding: Finding


@dataclass
class Report:
    """The contents of a report."""

    title: str
    command: str
    cards: list[ResultCard]
    rows: list[Row]
    row_of: dict[str, str]
    """Row by card id."""
    sheets: list[Sheet]
    cost: list[CostLine]
    docs: str | None
    """Link to docs/attacks.md, if the report lies where one leads to it."""
    findings: dict[str, list[Place]] = field(default_factory=dict)
    """By check id, gravest first; what found nothing is not here."""
    plots: list[list[Plot]] = field(default_factory=list)
    """By sheet."""
    cost_plot: Plot | None = None
    examples: list[Examples] = field(default_factory=list)
    examples_left_out: int = 0

    @property
    def all_plots(self) -> list[Plot]:
        return [plot for plots in self.plots for plot in plots] + ([self.cost_plot] if self.cost_plot else [])

    @property
    def rows_by_card(self) -> dict[str, Row]:
        by_key = {row.key: row for row in self.rows}
        return {card: by_key[row] for card, row in self.row_of.items()}


def build_report(
    places: Sequence[Path], out: Path, *, title: str, baseline: str | None, command: str, pictures: bool
) -> Report:
    """Read cards and examples and work out what to say of them.

    Raises:
        ValueError: there is no card, a file is broken, or no row is labelled ``baseline``.
    """
    cards = find_cards(places)
    if not cards:
        raise ValueError(
            f"{', '.join(map(str, places))}: no result card (*.card.json) in there; `zsr eval` writes them"
        )
    rows, row_of = make_rows(cards)
    if baseline is not None:
        base = next((row for row in rows if row.label == baseline), None)
        if base is None:
            known = ", ".join(row.label for row in rows)
            raise ValueError(f"--baseline {baseline}: there is no such row, only {known}")
        rows.sort(key=lambda row: (row.model != base.model, row.model == base.model and row.key != base.key))
    sheets = make_sheets(cards, rows, row_of)
    for sheet in sheets:
        mark_sheet(sheet, baseline)
    report = Report(title, command, cards, rows, row_of, sheets, cost_lines(cards, rows, row_of), _docs_link(out))
    report.findings = _findings(report)
    if pictures:
        look = looks(rows)
        report.plots = [list(_plots(sheet, look, row_of, f"s{number}")) for number, sheet in enumerate(sheets, 1)]
        report.cost_plot = cost_plot(report.cost, look)
        report.examples, report.examples_left_out = pick_examples(cards, find_examples(places), rows, row_of)
    return report


def _plots(sheet: Sheet, look: Looks, row_of: dict[str, str], prefix: str) -> Iterator[Plot]:
    attacked = sheet.blocks[1:]
    families = list(group(attacked, lambda block: block.family).values())
    drawn = [over_epsilon(sheet, found, look, f"{prefix}-epsilon-{n}") for n, found in enumerate(families, 1)]
    drawn += [tradeoff(sheet, found, look, f"{prefix}-tradeoff-{n}") for n, found in enumerate(families, 1)]
    drawn += [set_bars(sheet, found, look, f"{prefix}-sets-{n}") for n, found in enumerate(families, 1)]
    for number, block in enumerate(attacked, 1):
        drawn.append(survivors(sheet, block, look, row_of, f"{prefix}-survivors-{number}"))
    yield from (plot for plot in drawn if plot is not None)


def _findings(report: Report) -> dict[str, list[Place]]:
    rows = report.rows_by_card
    found = [
        Place(rows[card.id].label, _where(card), finding)
        for card in report.cards
        for finding in card.checks
        if finding.level != "ok"
    ]
    found.sort(key=lambda place: -LEVELS.index(place.finding.level))
    return group(found, lambda place: place.finding.id)


def _where(card: ResultCard) -> str:
    attack = f", {card.attack.title} {card.attack.eps_text}, {card.attack.knowledge}" if card.attack else ", clean"
    return set_label(card.dataset) + attack


def _docs_link(out: Path) -> str | None:
    """The way from the report to the page that explains the checks, in a report inside a checkout."""
    folder = out.resolve()
    for up, parent in enumerate([folder, *folder.parents]):
        for page in ("attacks.md", "docs/attacks.md"):
            if (parent / page).is_file() and (page != "attacks.md" or parent.name == "docs"):
                return "../" * up + page
    return None
