"""``write_report``: result cards as tables, plots and one page that a person opens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zsr.eval.report.build import Report, build_report

FORMATS = ("html", "md", "csv", "latex")

__all__ = ["FORMATS", "Report", "write_report"]


def write_report(
    places: Sequence[Path],
    out: Path,
    *,
    formats: Sequence[str] = FORMATS,
    title: str = "zsr: accuracy under attack",
    baseline: str | None = None,
    command: str = "zsr report",
) -> tuple[Report, list[Path]]:
    """Read every card in files and folders, and write what they say.

    Writes ``report.html``, ``report.md``, ``report.csv`` and ``report.tex`` into ``out``, and for the first two the plots
    under ``plots/``. A report of the same cards is the same to the byte.

    Args:
        formats: of :data:`FORMATS`.
        baseline: label of the row that others are compared with.
        command: as the reader can repeat it.

    Returns:
        What the report says, and the files written, pages first.

    Raises:
        ValueError: a format is unknown; there is no card; a file is broken; no row is labelled ``baseline``.
    """
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"--format {name}: is not known; choose from {', '.join(FORMATS)}")
    pictures = "html" in formats or "md" in formats
    report = build_report(places, out, title=title, baseline=baseline, command=command, pictures=pictures)
    pages: dict[str, str] = {}
    drawn: list[Path] = []
    if "html" in formats:
        from zsr.eval.report.page import to_html

        pages["report.html"] = to_html(report)
    if "md" in formats:
        from zsr.eval.report.markdown import to_markdown

        pages["report.md"] = to_markdown(report, _addresses(report))
    if "csv" in formats:
        from zsr.eval.report.flat import to_csv

        pages["report.csv"] = to_csv(report.cards, report.rows_by_card)
    if "latex" in formats:
        from zsr.eval.report.flat import to_latex

        pages["report.tex"] = to_latex(report.sheets)
    out.mkdir(parents=True, exist_ok=True)
    if pictures:
        drawn = _save_pictures(report, out / "plots")
    for name, text in pages.items():
        (out / name).write_text(text, encoding="utf-8")
    return report, [out / name for name in pages] + drawn


def _addresses(report: Report) -> dict[str, str]:
    """Of each plot by name, and of each card's examples by card id, relative to the page."""
    return {plot.name: f"plots/{plot.name}.png" for plot in report.all_plots} | {
        one.card.id: f"plots/examples-{one.card.id}.png" for one in report.examples
    }


def _save_pictures(report: Report, folder: Path) -> list[Path]:
    from zsr.eval.report.examples import strip
    from zsr.eval.report.style import save_plots

    written = save_plots(report.all_plots, folder)
    for one in report.examples:
        path = folder / f"examples-{one.card.id}.png"
        path.write_bytes(strip(one))
        written.append(path)
    return written
