"""Reports for other programs: a CSV with one line a card, and LaTeX tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from zsr.eval.card import ResultCard, Share
from zsr.eval.report.grid import Cell, Column, Row, Sheet
from zsr.eval.report.words import interval, legend_lines, spread

_ACROSS = 5
"""Columns of numbers that fit on a page beside the models."""
_NAMES = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar"}
_SPECIAL = {sign: rf"\text{name}{{}}" for sign, name in _NAMES.items()} | {sign: f"\\{sign}" for sign in "&%$#_{}"}


def to_csv(cards: Sequence[ResultCard], rows: Mapping[str, Row]) -> str:
    """One line a card with all its numbers; accuracies are shares of 1.

    Args:
        rows: by card id.
    """
    out = io.StringIO()
    lines = [_csv_line(card, rows[card.id]) for card in cards]
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _csv_line(card: ResultCard, row: Row) -> dict[str, object]:
    data, model, attack, defense = card.dataset, card.model, card.attack, card.defense
    return {
        "row": row.label,
        **_numbers("clean", card.clean),
        **_numbers("robust", card.robust),
        "believed": card.believed,
        "failed": " ".join(finding.id for finding in card.checks if finding.level == "fail"),
        "warned": " ".join(finding.id for finding in card.checks if finding.level == "warn"),
        "dataset": data.key,
        "split": data.split,
        "samples": data.samples,
        "of": data.of,
        "classes": data.classes,
        "templates": len(data.templates),
        "chance": data.chance,
        "chance_level": data.chance_level,
        "pixels": data.pixels,
        "attack": attack.title if attack else "",
        "norm": attack.norm if attack else "",
        "eps": attack.eps if attack else "",
        "eps_text": attack.eps_text if attack else "",
        "knowledge": attack.knowledge if attack else "",
        "crafted_on": attack.crafted_on if attack else "",
        "survivors": " ".join(f"{stage}={share.count}/{share.total}" for stage, share in card.survivors.items()),
        "model": model.name,
        "arch": model.arch,
        "weights": model.weights_digest,
        "objective": model.objective or "",
        "trained_on": model.trained_on or "",
        "defense": defense.name if defense else "",
        "defense_settings": " ".join(f"{name}={value}" for name, value in defense.settings.items()) if defense else "",
        "suite": card.protocol.suite or "",
        **card.protocol.model_dump(exclude={"suite"}),
        "seed": card.seed,
        "seconds": card.cost.seconds,
        "images_per_s": card.cost.images_per_s,
        "encoder_passes": card.cost.encoder_passes,
        "device": card.cost.device,
        "workers": card.cost.workers,
        "column": card.column,
        "id": card.id,
        "created": card.created,
        "environment": " ".join(f"{name}={value}" for name, value in card.environment.items()),
    }


def _numbers(name: str, share: Share | None) -> dict[str, object]:
    parts = ("count", "total", "value", "low", "high")
    return {name if part == "value" else f"{name}_{part}": getattr(share, part) if share else "" for part in parts}


def to_latex(sheets: Sequence[Sheet]) -> str:
    """A booktabs table for each protocol; what is wider than a page goes on below, under the same caption."""
    return "\n".join(["% needs \\usepackage{booktabs}", *(_latex_sheet(sheet) for sheet in sheets)])


def _latex_sheet(sheet: Sheet) -> str:
    lines = [
        "",
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{_tex(sheet.title)}: accuracy in \%, with 95\,\% intervals.}}",
    ]
    letters: dict[str, str] = {}
    for block in sheet.blocks:
        for start in range(0, len(block.leaves), _ACROSS):
            leaves = block.leaves[start : start + _ACROSS]
            rows = [
                row for row in sheet.rows if any(row.key in leaf.cells or row.key in leaf.missing for leaf in leaves)
            ]
            lines += [
                rf"\begin{{tabular}}{{l{'r' * len(leaves)}}}",
                r"\toprule",
                rf"& \multicolumn{{{len(leaves)}}}{{c}}{{{_tex(block.label)}}} \\",
                rf"\cmidrule(l){{2-{len(leaves) + 1}}}",
                " & ".join(["", *(_tex(leaf.label) for leaf in leaves)]) + r" \\",
                r"\midrule",
                *(" & ".join([_tex(row.label), *(_latex_cell(leaf, row, letters, block.oblivious) for leaf in leaves)]) + r" \\"
                  for row in rows),
                r"\bottomrule",
                r"\end{tabular}\par\medskip",
            ]  # fmt: skip
    notes = [_tex(line) for line in (*legend_lines([sheet]), *sheet.notes)]
    notes += [
        rf"\textsuperscript{{{letter}}} failed the check {_tex(name)}: not to be believed."
        for name, letter in letters.items()
    ]
    return "\n".join([*lines, r"\raggedright\footnotesize", r"\\ ".join(notes), r"\end{table}"])


def _latex_cell(leaf: Column, row: Row, letters: dict[str, str], oblivious: bool) -> str:
    cell = leaf.cells.get(row.key)
    if cell is None:
        return "--"
    number = f"{100 * cell.value:.1f}"
    number = rf"\textbf{{{number}}}" if cell.best else f"({number})" if cell.failed else number
    marks = [letters.setdefault(name, chr(ord("a") + len(letters))) for name in cell.failed] + ["o"] * oblivious
    mark = rf"\textsuperscript{{{','.join(marks)}}}" if marks else ""
    return f"{number}{mark} {{\\scriptsize {_around(cell)}}}"


def _around(cell: Cell) -> str:
    return _tex(interval(cell)).replace("-", "--") + (
        _tex(f" {spread(cell)}").replace("+-", r"$\pm$") if cell.spread is not None else ""
    )


def _tex(text: str) -> str:
    return "".join(_SPECIAL.get(char, char) for char in text)
