"""A report as one HTML file that needs nothing else: no network, no files beside it."""

from __future__ import annotations

from base64 import b64encode
from importlib.resources import files

from zsr.attacks.checks import CHECKS
from zsr.eval.report.build import Report
from zsr.eval.report.examples import Pixels, png
from zsr.eval.report.style import Plot
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

_SVG_LIMIT = 500_000
"""Characters above which a plot goes into the page as pixels: browsers slow down over thousands of shapes."""


def to_html(report: Report) -> str:
    """The page. Everything from cards is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("zsr.eval.report").joinpath("web")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "percent": percent, "interval": interval, "spread": spread, "points": points, "duration": duration,
        "amount": amount, "inline": lambda plot: Markup(_inline(plot)), "png": _data,
    }  # fmt: skip
    template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        style=Markup(folder.joinpath("page.css").read_text(encoding="utf-8")),
        script=Markup(folder.joinpath("page.js").read_text(encoding="utf-8")),
        summary=summary(report.cards),
        versions=versions(report.cards),
        reading=READING,
        oblivious=OBLIVIOUS,
        cost_note=COST,
        checks=CHECKS,
        legend=legend_lines(report.sheets),
        protocols=[protocol_lines(sheet) for sheet in report.sheets],
        sets=_sets(report),
        sample_total=sum(len(one.samples) for one in report.examples),
    )


def _sets(report: Report) -> list[object]:
    by_digest = {(c.dataset.key, c.dataset.split, c.dataset.subset_digest): c.dataset for c in report.cards}
    return list(by_digest.values())


def _inline(plot: Plot) -> str:
    """The plot as an element: drawn text stays text, in the page's own colours."""
    if len(plot.svg) > _SVG_LIMIT:
        picture = b64encode(plot.png).decode()
        return f'<img class="pixels" style="--width:{plot.width}px" alt="" src="data:image/png;base64,{picture}">'
    return plot.svg.replace("<svg", f'<svg aria-hidden="true" focusable="false" style="--width:{plot.width}px"', 1)


def _data(image_HWC: Pixels) -> str:
    return "data:image/png;base64," + b64encode(png(image_HWC)).decode()
