"""Pictures of one run for its page: accuracy and loss over steps. Drawn with matplotlib if that is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Curve = Sequence[tuple[int, float]]


def plot_run(curves: Mapping[str, Curve], path: Path, title: str) -> bool:
    """Draw accuracy (clean, robust) and loss over steps into ``path``; return whether there was anything to draw."""
    accuracy = {key: curves[key] for key in ("val/clean_acc", "val/robust_acc") if curves.get(key)}
    loss = {key: curves[key] for key in sorted(curves) if key == "train/loss" or key.startswith("train/term/")}
    if not accuracy and not loss:
        return False
    figure, (left, right) = new_figure(columns=2)
    for key, points in accuracy.items():
        left.plot(*zip(*points, strict=True), marker="o", label=key)
    for key, points in loss.items():
        right.plot(*zip(*points, strict=True), label=key, linewidth=2 if key == "train/loss" else 1)
    left.set(xlabel="step", ylabel="accuracy", ylim=(0, 1), title=title)
    right.set(xlabel="step", ylabel="loss", title="loss and its terms")
    save(figure, path)
    return True


def new_figure(columns: int = 1) -> tuple[Any, Any]:
    """A figure with ``columns`` axes, made without the global state that a thread must not touch.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * columns, 4), layout="constrained")
    return figure, figure.subplots(1, columns)


def save(figure: Any, path: Path) -> None:
    """Write ``figure`` with a grid, and a legend where something is labelled and the figure has none of its own."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1] and not figure.legends:
            axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
