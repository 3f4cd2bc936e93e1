"""A report as Markdown: the tables, with plots and example images as files beside the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from zsr.attacks.checks import CHECKS
from zsr.eval.report.build import Report
from zsr.eval.report.grid import Block, Column, Row, Sheet
from zsr.eval.report.words import (
    COST,
    OBLIVIOUS,
    READING,
    amount,
    duration,
    interval,
    legend_lines,
    percent,
    points,
    protocol_lines,
    spread,
    summary,
    versions,
)

_ACROSS = 8
"""Columns of numbers that a table may have before it goes on below."""


def to_markdown(report: Report, pictures: Mapping[str, str]) -> str:
    """The page.

    Args:
        pictures: address, relative to the page, of each plot by its name and of the examples by their card's id.
    """
    lines = [f"# {_text(report.title)}", "", summary(report.cards), "", *_table(["", ""], _origin(report))]
    lines += ["", "## How to read this", "", *_paragraphs(READING)]
    for number, sheet in enumerate(report.sheets):
        lines += _sheet(sheet, report.docs)
        for plot in report.plots[number] if report.plots else []:
            lines += [f"![{_alt(plot.alt)}]({pictures[plot.name]})", ""]
    lines += _checks(report)
    lines += ["## Sets", "", *_sets(report), "", "## Cost", "", *_cost(report), "", COST, ""]
    if report.cost_plot:
        lines += [f"![{_alt(report.cost_plot.alt)}]({pictures[report.cost_plot.name]})", ""]
    return "\n".join([*lines, *_examples(report, pictures)])


def _origin(report: Report) -> list[list[str]]:
    pairs = [("cards", str(len(report.cards))), ("command", f"`{report.command}`"), *versions(report.cards)]
    return [[name, _text(value) if name != "command" else value] for name, value in pairs]


def _sheet(sheet: Sheet, docs: str | None) -> list[str]:
    lines = [f"## {_text(sheet.title)}", "", *_table(["", ""], [[a, _text(b)] for a, b in protocol_lines(sheet)]), ""]
    for block in sheet.blocks:
        lines += [f"### {_text(block.label)}", ""]
        for start in range(0, len(block.leaves), _ACROSS):
            lines += [*_block(block, block.leaves[start : start + _ACROSS], sheet.rows, docs), ""]
    return lines + [f"- {_text(line)}" for line in (*legend_lines([sheet]), *sheet.notes)] + [""]


def _block(block: Block, leaves: Sequence[Column], rows: Sequence[Row], docs: str | None) -> list[str]:
    own = [row for row in rows if any(row.key in leaf.cells or row.key in leaf.missing for leaf in leaves)]
    body = [[_text(row.label), *(_cell(leaf, row, block.oblivious, docs) for leaf in leaves)] for row in own]
    return _table(["model", *(_text(leaf.label) for leaf in leaves)], body)


def _cell(leaf: Column, row: Row, oblivious: bool, docs: str | None) -> str:
    cell = leaf.cells.get(row.key)
    if cell is None:
        return "-"
    number = percent(cell.value)
    number = f"**{number}**" if cell.best else f"~~{number}~~" if cell.failed else number
    flags = [f"[{name}]({docs or ''}#{name})" for name in cell.failed] + [f"{name}?" for name in cell.warned]
    parts = [number, interval(cell), spread(cell), points(cell.delta), "o" if oblivious else "", *flags]
    return " ".join(part for part in parts if part)


def _checks(report: Report) -> Iterator[str]:
    yield from ("## Checks", "")
    if not report.findings:
        yield from ("No check found anything.", "")
    for name, places in report.findings.items():
        target = f"[docs/attacks.md]({report.docs}#{name})" if report.docs else f"docs/attacks.md#{name}"
        yield from (f'### <a id="{name}"></a>{name}', "", f"{CHECKS.get(name, '')} More in {target}.", "")
        yield from _table(
            ["level", "model", "where", "what"],
            [[one.finding.level, _text(one.row), _text(one.where), _text(one.finding.sentence)] for one in places],
        )
        yield ""


def _sets(report: Report) -> list[str]:
    found = {(card.dataset.key, card.dataset.split, card.dataset.subset_digest): card.dataset for card in report.cards}
    header = ["set", "split", "title", "images", "classes", "prompts", "chance %", "pixels", ""]
    return _table(header, [
        [_text(data.key), data.split, _text(data.title), f"{data.samples} of {data.of}", str(data.classes),
         str(len(data.templates)), percent(data.chance), str(data.pixels), "chance-level" * data.chance_level]
        for data in found.values()
    ])  # fmt: skip


def _cost(report: Report) -> list[str]:
    header = ["model", "cards", "images", "time", "images/s", "encoder passes", "device"]
    return _table(header, [
        [_text(line.row.label), str(line.cards), str(line.samples), duration(line.seconds),
         " to ".join(dict.fromkeys(f"{speed:.3g}" for speed in line.images_per_s)), amount(line.encoder_passes), line.devices]
        for line in report.cost
    ])  # fmt: skip


def _examples(report: Report, pictures: Mapping[str, str]) -> Iterator[str]:
    if report.examples:
        yield from ("## Example images", "", "A line an image: clean, perturbation (amplified), attacked.", "")
    for one in report.examples:
        attack = one.card.attack
        assert attack is not None
        said = "; ".join(
            f"{sample.truth}: clean {_verdict(sample.clean_says, sample.clean_right)}, attacked "
            f"{_verdict(sample.attacked_says, sample.attacked_right)}"
            for sample in one.samples
        )
        blind = f" ({OBLIVIOUS})" if attack.knowledge == "oblivious" else ""
        what = _text(f"{one.set_label}, {attack.title} {attack.eps_text}{blind}, perturbation x{one.factor}. {said}.")
        yield f"**{_text(one.row.label)}** on {what}"
        yield from ("", f"![{_alt(said)}]({pictures[one.card.id]})", "")


def _verdict(says: str, right: bool) -> str:
    return "right" if right else f"wrong ({says})"


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    line = ["---", *["---" if header[1:] == [""] else "---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, line, *body)]


def _paragraphs(texts: Sequence[str]) -> list[str]:
    return [line for text in texts for line in (text, "")]


def _text(text: str) -> str:
    """Text from a card, without the signs that Markdown would take for its own."""
    for sign in "\\`*_[]<>|~":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")


def _alt(text: str) -> str:
    return _text(text).replace("\\_", "_")
