"""How a report's plots look: one colour a model throughout, other lines and markers for defences, ink of the page's colour."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from zsr.eval.report.grid import Row

# Okabe and Ito's colours, told apart with any colour vision, but for yellow and black: a page is light or dark.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")
_MARKERS = "osD^vPX*<>hp"
_LINES = ("-", "--", ":", "-.")
_INK = "#2b2b2c"  # no colour of the above, so that it can be found again in an SVG
_SETTINGS = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "zsr",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}


@dataclass(frozen=True)
class Look:
    """How one row is drawn."""

    color: str
    marker: str
    line: str
    hollow: bool

    @property
    def fill(self) -> str:
        return "none" if self.hollow else self.color


@dataclass(frozen=True)
class Plot:
    """A drawn plot."""

    name: str
    """Of its files."""
    title: str
    alt: str
    """What it shows, for those who do not see it."""
    svg: str
    """Its ink is ``currentColor``; no id in it is another plot's."""
    png: bytes
    width: int
    """In CSS pixels."""
    detail: bool = False
    """Not for a first look."""


Looks = Mapping[str, Look]
"""By row."""


def looks(rows: Sequence[Row]) -> dict[str, Look]:
    """By row: the colour (and past seven models the marker) is the model's, the line its defence's."""
    models = list(dict.fromkeys(row.model for row in rows))
    made: dict[str, Look] = {}
    for row in rows:
        place = models.index(row.model)
        variant = sum(other.model == row.model and other.key in made for other in rows)
        marker = _MARKERS[place // len(_COLORS) % len(_MARKERS)]
        made[row.key] = Look(
            _COLORS[place % len(_COLORS)], marker, _LINES[variant % len(_LINES)], row.defense is not None
        )
    return made


def panels(count: int, width: float, height: float, across: int = 4) -> tuple[Any, list[Any]]:
    """A figure of ``count`` axes in rows of ``across``, each of that size in inches.

    The figure is no part of pyplot's global state, so that a report can be made in any thread.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_SETTINGS):
        across = min(across, count)
        down = -(-count // across)
        figure = Figure(figsize=(width * across, height * down + 0.3), layout="constrained")
        axes = list(figure.subplots(down, across, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def frame(axes: Any, title: str = "", grid: str = "y") -> None:
    """A title on the left and a faint grid."""
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axes.grid(axis=grid, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def legend(figure: Any, handles: Sequence[Any]) -> None:
    """Below the panels, in as many columns as fit."""
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    fit = int(figure.get_figwidth() / (0.075 * longest + 0.55))
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=max(1, min(fit, len(handles))),
        fontsize=8,
        frameon=False,
    )


def handle(row: Row, look: Look) -> Any:
    """A row's entry in a legend."""
    from matplotlib.lines import Line2D

    style: dict[str, Any] = {"linestyle": look.line, "marker": look.marker, "markerfacecolor": look.fill}
    return Line2D([], [], color=look.color, label=row.label, **style)


def set_title(figure: Any, title: str) -> None:
    """Above all panels, wrapped to the figure's width."""
    figure.suptitle(fill(title, int(figure.get_figwidth() * 13)), fontsize=10, x=0.01, ha="left")


def some(items: Sequence[str], most: int = 8) -> str:
    """A list in words that stays short."""
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


def finish(figure: Any, name: str, title: str, alt: str, detail: bool = False) -> Plot:
    """Render a figure as SVG and PNG."""
    import matplotlib as mpl

    vector, pixels = io.BytesIO(), io.BytesIO()
    with mpl.rc_context(_SETTINGS):
        figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        figure.savefig(pixels, format="png", dpi=130, facecolor="white")
    text = vector.getvalue().decode()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return Plot(name, title, alt, text, pixels.getvalue(), round(figure.get_figwidth() * 96), detail)


def save_plots(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """Write each plot as SVG and PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for plot in plots:
        for path, content in (
            (folder / f"{plot.name}.svg", plot.svg.replace("currentColor", _INK).encode()),
            (folder / f"{plot.name}.png", plot.png),
        ):
            path.write_bytes(content)
            written.append(path)
    return written
